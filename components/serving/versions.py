"""Versions of a served model: a new version loads and warms up while the old version serves."""

import logging
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from components.runtime.tracking.names import REGISTRY, shown_source
from components.runtime.tracking.registry import Named, find_named, is_model_folder, local_model, model_artifact
from components.sampling.cascade import Cascade, cascade_in, quick
from components.sampling.device import best_device
from components.sampling.generator import Generator
from components.serving.messages import COSTLY, Card, GeneratorCard
from components.serving.settings import ServedModel

LOG = logging.getLogger("cascade.serving")
MAKES_NONE = "makes no image: serve a composed cascade, or a model that makes images by itself"
WARM_SECONDS = 5.0  # of one generator: a generator of one value after another would take minutes
DIGITS = 12  # of the key of a model that is in no registry


@dataclass(eq=False)
class Version:
    """A model at work."""

    model: ServedModel
    named: Named
    cascade: Cascade

    @cached_property
    def card(self) -> Card:
        """The model's card."""
        generators = tuple(generator_card(maker) for maker in self.cascade.makers.values())
        source = shown_source(self.model.source)
        return Card(self.model.name, source, self.named.version, self.named.created, generators)


class Versions:
    """The current version, and the watch over an alias; what is no alias never changes.
    `tracking`: MLflow's address; None: sources are folders. Raises ValueError, in one line, if there is no such model
    or it makes no image."""

    def __init__(self, model: ServedModel, *, tracking: str | None, poll_seconds: float) -> None:
        self.model, self._tracking, self._poll_seconds = model, tracking, poll_seconds
        self.current = self._load(find_version(model.source, tracking))
        self._refused = ""  # a version that could not be loaded
        self._end = threading.Event()
        if model.source.startswith(REGISTRY) and "@" in model.source:
            threading.Thread(target=self._watch, name="versions", daemon=True).start()

    @property
    def card(self) -> Card:
        """The current version's card, with the number of a refused version of the alias."""
        return self.current.card._replace(refused=self._refused)

    def close(self) -> None:
        """Ends the watch."""
        self._end.set()

    def _watch(self) -> None:
        is_away = False
        while not self._end.wait(self._poll_seconds):
            try:
                named = find_version(self.model.source, self._tracking)
                is_away = False
            except ValueError as error:
                if not is_away:
                    LOG.warning("%s: %s; version %s goes on", self.model.name, error, self.current.named.version)
                is_away = True
                continue
            if named.version == self.current.named.version:
                self._refused = ""  # the alias has moved back
            elif named.version != self._refused:
                self._change(named)

    def _change(self, named: Named) -> None:
        """Loads a version for later jobs; a version that can't be loaded is tried a single time."""
        started, name, before = time.monotonic(), self.model.name, self.current.named.version
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
            raise ValueError(f"{shown_source(self.model.source)} {MAKES_NONE}")
        warm(cascade)
        return Version(self.model, named, cascade)


def find_version(source: str, tracking: str | None) -> Named:
    """Returns the current version of a source.
    Raises ValueError, in one line, if there is no such model, or the one on this disk makes no image."""
    if source.startswith(REGISTRY):
        return find_named(source, tracking_uri=tracking)
    if is_model_folder(source):
        if cascade_in(Path(source), weights=False) is None:
            raise ValueError(f"{shown_source(source)} {MAKES_NONE}")
        newest = int(max(path.stat().st_mtime for path in Path(source).iterdir()))
        return Named(shown_source(source), f"{newest}", newest)
    return Named(shown_source(source), model_artifact(source).key[:DIGITS], int(time.time()))


class EndedError(Exception):
    """Ends a sampling between two steps: nobody wants the batch any more, or the generator is warm."""


def warm(cascade: Cascade) -> None:
    """Makes a small image of each generator, to allocate memory and choose kernels early."""
    for maker in cascade.makers.values():
        started = time.monotonic()

        def between(started: float = started) -> None:
            if time.monotonic() - started > WARM_SECONDS:
                raise EndedError

        try:
            cascade.sample_stages([quick(cascade, maker.example())], between=between)
        except EndedError:
            continue


def generator_card(maker: Generator) -> GeneratorCard:
    """Returns the description of a generator for requests."""
    (height, width), first = maker.size, maker.first
    sampling, seen = first.sampling.model_dump(), maker.condition_images
    objective: dict[str, Any] = first.settings.get("objective", {})
    # Steps of training of its first model, or the tokens that a masked prior has to choose.
    most_steps = objective.get("num_train_timesteps") or first.network.get("num_tokens")
    return GeneratorCard(
        name=maker.name,
        title=maker.title,
        options=maker.options,
        classes=tuple(maker.classes),
        reads_prompts=first.reads_words,
        prompts=tuple(first.settings.get("prompts", ())),
        shows_steps=maker.shows_steps,
        width=width,
        height=height,
        steps=sampling.get("num_inference_steps"),
        most_steps=most_steps if "num_inference_steps" in sampling else None,
        sampling={model.name: model.sampling.model_dump(mode="json", exclude=COSTLY) for model in maker.models},
        tasks=maker.tasks,
        condition_side=None if seen is None else seen.resolution,
    )
