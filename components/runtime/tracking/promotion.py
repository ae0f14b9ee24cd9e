"""Decides on the images of a registered name, and on the name's champion version.

A version is compared by figures that were measured as the champion's were: Fréchet distances of what the generators of
a run made, or of its autoencoder's reconstructions. One decision holds for all models of a run. It is written into the
run before an alias moves, so that doing it twice changes nothing.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from mlflow.tracking import MlflowClient

from components.configuration.config import Config
from components.runtime.events import Promote
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.connection import shown
from components.runtime.tracking import names
from components.runtime.tracking.registry import create_name, in_one_line
from components.runtime.tracking.runs import is_new

KEPT = 8  # measurements of a version, each in its own way
RECONSTRUCTIONS = "reconstructions of "  # a set: count where nothing else is made
VERSION = re.compile(rf"(?:{names.REGISTRY})?([^/@:]+)[/@]([0-9]+)")


class MadeFigure(Config):
    """A distance of images of a single size."""

    distance: float
    error: float | None  # its standard error over images; None: too few of them
    samples: int
    side: str  # 64²


class Figures(Config):
    """The distances of an evaluation, with the method of measurement. Only equal methods can be compared."""

    images: str  # key of the stage that made the set
    network: str
    precision: str
    references: int  # training images at most
    seed: int
    made: dict[str, MadeFigure]  # what made them: diffusion branch, token branch, …

    def way(self) -> dict[str, Any]:
        """The method of measurement in words for comparison."""
        return {
            "set of images": self.images,
            "feature network": self.network,
            "precision": self.precision,
            "number of training images": self.references,
            "seed": self.seed,
            **{f"number or size of images ({name})": (each.samples, each.side) for name, each in self.made.items()},
        }


Verdict = tuple[bool, str]  # whether a version becomes champion, and the reason, a part of a sentence


class Promotion(NamedTuple):
    """The decision about the models of a run; about the composed cascade where a run has a cascade."""

    model: str  # registered name
    version: str
    promoted: bool
    reason: str

    def lines(self) -> list[str]:
        if self.promoted:
            return [f"model: {names.REGISTRY}{self.model}@{names.CHAMPION} (version {self.version}: {self.reason})"]
        by_hand = f"to make it the champion: cascade promote {self.model}@{self.version}"
        return [f"model: {names.REGISTRY}{self.model}/{self.version}", f"not the champion: {self.reason}; {by_hand}"]


def figures_of(evaluation: Artifact) -> Figures | None:
    """Distances of each generator's finished images; None for an artifact without distances."""
    rows = [row for row in evaluation.metadata.get("distances", ()) if row["purpose"] == "model"]
    made = {}
    for row in rows:  # a generator's stages are in their order
        name, error, samples = row["name"], row.get("standard_error"), row["samples"]
        what, _, side = (name, "", "") if name.startswith(RECONSTRUCTIONS) else name.rpartition(", ")
        made[what.partition(":")[0]] = MadeFigure(distance=row["distance"], error=error, samples=samples, side=side)
    if len(made) > 1:
        made = {what: figure for what, figure in made.items() if not what.startswith(RECONSTRUCTIONS)}
    if not made:
        return None
    config = evaluation.provenance.get("config", {})
    return Figures(
        images=evaluation.inputs.get("images", ""),
        network=evaluation.metadata["feature_network"],
        precision=config.get("precision", ""),
        references=config.get("reference_samples", 0),
        seed=config.get("seed", 0),
        made=made,
    )


def compared(new: Figures | None, champion: Figures | None) -> Verdict:
    """Decides if a version may follow the champion: no figure worse by more than the difference's error."""
    if new is None or champion is None:
        why = "the run measured no distance of it" if new is None else "no distance of that was measured"
        return False, f"it can't be compared with the champion: {why}"
    if missing := champion.made.keys() - new.made.keys():
        return False, f"it makes no {' and no '.join(sorted(missing))}, which the champion does"
    ours, theirs = new.way(), champion.way()
    if differing := [name for name, value in theirs.items() if ours[name] != value]:
        return False, f"the champion was measured by another {' and another '.join(differing)}"
    if few := [name for name in champion.made if None in (new.made[name].error, champion.made[name].error)]:
        return False, f"it can't be compared with the champion: too few images for an error ({few[0]})"
    lines, worse = [], False
    for name, old in champion.made.items():
        error = math.hypot(new.made[name].error or 0, old.error or 0)
        worse |= not new.made[name].distance - old.distance <= error
        lines.append(f"{name} {new.made[name].distance:.4g}, the champion's {old.distance:.4g} ± {error:.2g}")
    return not worse, f"distance: {'; '.join(lines)}"


def promote_run(client: MlflowClient, run_id: str, *, models: str, how: Promote, ended: int) -> Promotion | None:
    """Decide on the models of a run finished at `ended` (ms), if any, and move the aliases."""
    tags = client.get_run(run_id).data.tags
    versions = {tag.removeprefix(names.MODEL_TAG): tags[tag] for tag in sorted(tags) if tag.startswith(names.MODEL_TAG)}
    if not versions:
        return None
    decision = json.loads(tags.get(names.DECISION, "{}"))
    if decision.get("ended") != ended or decision["models"].keys() != versions.keys():  # one was refused at first
        figures = _listed(tags.get(names.FIGURES))
        decision = _decide(client, versions, models=models, how=how, figures=figures) | {"ended": ended}
        client.set_tag(run_id, names.DECISION, json.dumps(decision))
    for name, (before, promoted, reason) in {} if decision.get("done") else decision["models"].items():
        if promoted and champion_of(client, name) == before != versions[name]:
            make_champion(client, name, versions[name], reason=reason)
        elif not promoted:
            client.set_model_version_tag(name, versions[name], names.REASON, reason)
    client.set_tag(run_id, names.DECISION, json.dumps(decision | {"done": True}))
    main = decision["main"]
    _, promoted, reason = decision["models"][main]
    return Promotion(main, versions[main], promoted, reason)


def _decide(
    client: MlflowClient, versions: dict[str, str], *, models: str, how: Promote, figures: list[Figures]
) -> dict[str, Any]:
    """Name -> the champion until now, if the run's version follows, and the reason."""
    main = names.registered_name(models) if names.registered_name(models) in versions else min(versions)
    follows = len(versions) == 1 or main == names.registered_name(models)  # else it is unknown whose figures they are
    measured = figures[-1] if figures and follows else None
    if measured is not None:  # beside figures of the same version from other methods
        earlier = _listed(client.get_model_version(main, versions[main]).tags.get(names.FIGURES))
        kept = [*(each for each in earlier if each.way() != measured.way()), measured][-KEPT:]
        text = json.dumps([each.model_dump() for each in kept])
        client.set_model_version_tag(main, versions[main], names.FIGURES, text)
    champions = {name: champion_of(client, name) for name in versions}
    verdict = _verdict(client, main, versions[main], champions[main], measured, how)
    decided = {}
    for name, version in versions.items():
        own = verdict
        if name != main and (champions[name] in (None, version) or not follows):
            own = _verdict(client, name, version, champions[name], None, how)
        elif name != main:
            own = verdict[0], f"as {main}/{versions[main]}: {verdict[1]}"
        decided[name] = (champions[name], *own)
    return {"main": main, "models": decided}


def _verdict(
    client: MlflowClient, name: str, version: str, champion: str | None, measured: Figures | None, how: Promote
) -> Verdict:
    if champion == version:
        return True, "it is the champion already"
    if how != "better" or champion is None:
        return how != "never", "the first of its name" if how == "better" else f"--promote {how}"
    measurements = _listed(client.get_model_version(name, champion).tags.get(names.FIGURES))
    alike = [each for each in measurements if measured is not None and each.way() == measured.way()]
    return compared(measured, (alike or measurements or [None])[-1])


def _listed(text: str | None) -> list[Figures]:
    return [Figures(**each) for each in json.loads(text or "[]")]


def champion_of(client: MlflowClient, name: str) -> str | None:
    """The number of the champion now; None if there is none."""
    version = client.get_registered_model(name).aliases.get(names.CHAMPION)
    return None if version is None else str(version)


def make_champion(client: MlflowClient, name: str, version: str, *, reason: str, back: bool = False) -> None:
    """Move the alias, and remember the former version unless the alias goes `back`."""
    before = champion_of(client, name)
    if before not in (None, version) and not back:
        client.set_model_version_tag(name, version, names.BEFORE, before)
    client.set_model_version_tag(name, version, names.REASON, reason)
    client.set_registered_model_alias(name, names.CHAMPION, version)


def promote_by_hand(model: str, *, tracking_uri: str, back: bool = False) -> tuple[str, str, str | None]:
    """Make NAME@VERSION or models:/NAME/VERSION the champion, or with `back` the champion before.
    Returns (name, version, the champion until now). Raises ValueError as `registry.named_version`."""
    with in_one_line(f"can't promote {model} at {shown(tracking_uri)}"):
        client = MlflowClient(tracking_uri)
        if back:
            name = model.removeprefix(names.REGISTRY).removesuffix(f"@{names.CHAMPION}")
            before = champion_of(client, name)
            version = None if before is None else client.get_model_version(name, before).tags.get(names.BEFORE)
            if version is None:
                raise ValueError(f"{name} had no champion before this one: write NAME@VERSION")
        elif parts := VERSION.fullmatch(model):
            name, version = parts.groups()
        else:
            raise ValueError(f"{model} names no version: write NAME@VERSION or models:/NAME/VERSION")
        client.get_model_version(name, version)
        before = champion_of(client, name)
        make_champion(client, name, version, reason=f"by hand: back from {before}" if back else "by hand", back=back)
    return name, version, before


def clash(name: str, data: str, theirs: str) -> str:
    """The message about two image sets of a single name, in one line."""
    own = name.removeprefix("image-cascade-")
    return f"{name} holds models of {theirs}, not of {data}: choose a name with --name (--name {own} takes it over)"


def find_clash(models: str, stages: Collection[str], data: str, *, tracking_uri: str) -> str | None:
    """The `clash` of the first of a run's names with other images; None without a clash.
    Raises any exception of MLflow while MLflow is away."""
    if is_new(tracking_uri):
        return None
    own, client = names.registered_name(models), MlflowClient(tracking_uri)
    ours = {own, *(names.registered_name(models, stage=stage) for stage in stages)}
    for model in client.search_registered_models(f"name LIKE '{own}%'", max_results=1000, order_by=["name"]):
        theirs = model.tags.get(names.DATA)
        if model.name in ours and theirs and theirs != data:
            return clash(model.name, data, theirs)
    return None


def take(client: MlflowClient, name: str, tags: Mapping[str, str]) -> str | None:
    """Note the images of a registered name, from the tags of a run that registers a model.
    Returns the `clash` if the name stands for other images and the user has not chosen it."""
    if (data := tags.get(names.DATA)) is None:
        return None
    existing = client.search_registered_models(f"name = '{name}'")
    theirs = existing[0].tags.get(names.DATA, "") if existing else None  # empty: nothing is known of its images
    if theirs and theirs != data and names.CHOSEN not in tags:
        return clash(name, data, theirs)
    if theirs is None:
        create_name(client, name, tags={names.DATA: data})
    elif theirs != data:
        client.set_registered_model_tag(name, names.DATA, data)
    return None
