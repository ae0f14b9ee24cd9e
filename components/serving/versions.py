"""Which version of a model answers: what its source names now, loaded and warmed while the one before serves."""

import logging
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from components.runtime.tracking.model_source import is_model_folder, local_model, model_artifact, registry_of
from components.runtime.tracking.names import REGISTRY, shown_source
from components.runtime.tracking.registry import Named, find_named
from components.sampling.answers import cascade_in
from components.sampling.cascade import Cascade, quick
from components.sampling.device import best_device
from components.sampling.image_files import encode_png
from components.sampling.request_forms import settings_of, with_settings
from components.sampling.requests import Request
from components.serving.cards import card_of
from components.serving.messages import Card
from components.serving.settings import ServedModel

LOG = logging.getLogger("cascade.serving")
WARM_SECONDS = 5.0  # of one generator: what makes images value by value would take minutes
DIGITS = 12  # of the key of a model that is in no registry


@dataclass(eq=False)
class Version:
    """A model at work."""

    model: ServedModel
    named: Named
    cascade: Cascade

    @property
    def number(self) -> str:
        return self.named.version

    @cached_property
    def card(self) -> Card:
        """What it can do."""
        said = shown_source(self.model.source)
        name, created = self.model.name, self.named.created
        return card_of(self.cascade, name=name, source=said, version=self.number, created=created)

    def png(self, image: np.ndarray, request: Request) -> bytes:
        """A finished image, uint8 (H, W, 3), as a file that says how it was made."""
        return with_settings(encode_png(image), settings_of(request, model=self.named.name, version=self.number))


class Versions:
    """The version that answers now, and the watch over what an alias names.

    Args:
        tracking: MLflow's address; None: sources are folders.
        poll_seconds: between looks at an alias; what is no alias never changes.

    Raises ValueError, in one line, if there is no such model or it makes no image.
    """

    def __init__(self, model: ServedModel, *, tracking: str | None, poll_seconds: float) -> None:
        self.model, self._tracking, self._poll_seconds = model, tracking, poll_seconds
        self.current = self._load(find_version(model.source, tracking))
        self._refused = ""  # a version that could not be loaded
        self._end = threading.Event()
        if is_alias(model.source):
            threading.Thread(target=self._watch, name="versions", daemon=True).start()

    @property
    def card(self) -> Card:
        """The card of the version that answers, with the version of the alias that was refused."""
        return self.current.card._replace(refused=self._refused)

    def close(self) -> None:
        """Watch no more."""
        self._end.set()

    def _watch(self) -> None:
        away = False
        while not self._end.wait(self._poll_seconds):
            try:
                named = find_version(self.model.source, self._tracking)
                away = False
            except ValueError as error:
                if not away:
                    LOG.warning("%s: %s; version %s goes on", self.model.name, error, self.current.number)
                away = True
                continue
            if named.version not in (self.current.number, self._refused):
                self._change(named)

    def _change(self, named: Named) -> None:
        """The new version answers jobs that come from now on, unless it can't be loaded: then none does, until the
        alias names another."""
        started, name, before = time.monotonic(), self.model.name, self.current.number
        try:
            self.current = self._load(named)
        except Exception as error:  # whatever is wrong with it, the old one serves
            self._refused = named.version
            LOG.warning("%s: version %s can't be loaded (%s); %s goes on", name, named.version, error, before)
            return
        self._refused = ""
        seconds = time.monotonic() - started
        LOG.warning("%s: version %s answers after %s, loaded in %.1f s", name, named.version, before, seconds)

    def _load(self, named: Named) -> Version:
        source = named.uri if self.model.source.startswith(REGISTRY) else self.model.source
        with local_model(source, tracking_uri=self._tracking) as folder:
            cascade = cascade_in(folder, device=best_device())
        if cascade is None:
            raise makes_none(self.model.source)
        warm(cascade)
        return Version(self.model, named, cascade)


def find_version(source: str, tracking: str | None) -> Named:
    """What a source names now. Raises ValueError, in one line, if there is no such model, or the one on this disk makes
    no image; of what is elsewhere that is known when it is loaded."""
    if source.startswith(REGISTRY):
        return find_named(source, tracking_uri=registry_of(source, tracking))
    if is_model_folder(source):
        if cascade_in(Path(source), weights=False) is None:
            raise makes_none(source)
        newest = max(path.stat().st_mtime for path in Path(source).iterdir())
        return Named(shown_source(source), f"{int(newest)}", int(newest))
    return Named(shown_source(source), model_artifact(source).key[:DIGITS], int(time.time()))


def makes_none(source: str) -> ValueError:
    return ValueError(
        f"{shown_source(source)} makes no image: serve a composed cascade, or a model that makes images by itself"
    )


def is_alias(source: str) -> bool:
    return source.startswith(REGISTRY) and "@" in source


def warm(cascade: Cascade) -> None:
    """One small image of each generator: the first request finds memory taken and kernels chosen."""
    for maker in cascade.makers.values():
        started = time.monotonic()

        def between(started: float = started) -> None:
            if time.monotonic() - started > WARM_SECONDS:
                raise _EnoughError

        try:
            cascade.sample_stages([quick(cascade, maker.example())], between=between)
        except _EnoughError:
            continue


class _EnoughError(Exception):
    """The generator is warm."""
