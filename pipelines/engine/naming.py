"""Names of a run and the run's models, and descriptions for MLflow.

Names follow the recipe or the user's images.
"""

import hashlib
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence

from components.configuration.usage import UsageError, usage_errors
from components.data.ingest import INSTALLED, PACKAGED
from components.data.sources.folder import LICENSE as UNSPECIFIED
from components.data.sources.parquet import SUFFIX
from components.data.sources.webdataset import TARS, split_glob
from components.evaluation.metrics import METRICS, PUBLISHED, DistanceRow, distance_name
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.connection import shown
from components.runtime.storage.store import absolute
from components.runtime.tracking.names import REGISTRY, environment
from pipelines.engine.code_seen import made_by
from pipelines.engine.session import set_environment
from pipelines.planning.cost_table import heading, markdown
from pipelines.recipes.catalog import DEMO, DRAWINGS, RECIPES
from pipelines.recipes.shapes import Recipe
from pipelines.workflow import Workflow

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
LONGEST = 5000  # characters of a description that MLflow takes
COMMIT = re.compile(r"[0-9a-f]{40}")
PAGES = {  # that a license asks to be named
    "openmoji": "from [openmoji.org](https://openmoji.org)",
    "photographs": "named with their authors in `components/data/sources/photographs.csv`",
}
COMMON = {  # folders that say nothing of what is in them, where one above them does
    *("data", "dataset", "datasets", "files", "image", "images", "shard", "shards", "tar", "tars", "train", "training"),
}


def cascade_name(recipe: Recipe, given: str | None) -> str:
    """The name of a run's models: `given`, or after the recipe, or after other images than the recipe's.
    The models are registered as `image-cascade-NAME`, so that one's own images never move the champion of others'. Two
    recipes on the same images stay apart: `class_guided_on_photos`, and `photos` for the cascade's. Raises UsageError
    for a name that MLflow's registry or a folder can't have."""
    name, packaged = recipe.name, RECIPES.get(recipe.name)
    if given is not None:
        name = given
    elif packaged is not None and recipe.images.source != packaged().images.source:
        images = source_name(recipe.images.source)
        own = f"{images}_images" if images in RECIPES else images  # a folder named as a recipe
        name = own if recipe.name in (DEMO, DRAWINGS) else f"{recipe.name}_on_{images}"
    if not NAME.fullmatch(name):
        raise UsageError(f"name {name!r} can't be that of a model: letters, digits, - and _, at most 100; set --name")
    return name


def source_name(source: str) -> str:
    """The last telling part of a source's address, in letters, digits and underscores.
    s3://bucket/imagenet/train/*.tar -> imagenet; cats.tar -> cats; ~/Müller -> Muller; ~/写真 -> images_9c3250."""
    parts = split_glob(absolute(source))[0].rpartition("://")[2].split("/")
    suffixes = (*TARS, SUFFIX)
    bare = [next((part.removesuffix(end) for end in suffixes if part.endswith(end)), part) for part in parts]
    named = [name for part in bare if (name := _plain(part))]
    telling = [name for name in named if name.lower() not in COMMON]
    return (telling or named or ["images"])[-1]


def data_identity(source: str) -> str:
    """The address of a set in a canonical form, equal for the same set after additions."""
    if source in (*PACKAGED, *INSTALLED):
        return source
    return split_glob(absolute(source))[0]


def _plain(part: str) -> str:
    """A name in ASCII: letters without accents, with a digest where letters are lost."""
    composed = unicodedata.normalize("NFC", part)
    bases = ["".join(c for c in unicodedata.normalize("NFKD", letter) if c.isascii()) for letter in composed]
    lost = any(letter.isalnum() and not base for letter, base in zip(composed, bases, strict=True))
    plain = re.sub(r"\W+", "_", "".join(bases), flags=re.ASCII).strip("_")[:60]
    return f"{plain or 'images'}_{hashlib.sha256(composed.encode()).hexdigest()[:6]}" if lost else plain


def resolve_starts(workflow: Workflow, tracking: str | None) -> list[str]:
    """Puts folders in storage in the place of starts' registered names; returns a line for each name.
    From here on an alias may move: keys and stages know the folder alone. Raises UsageError, in one line, for a version
    that is not registered, or lies in storage no longer."""
    found: dict[str, tuple[str, Artifact]] = {}
    for stage in workflow.stages:
        start = getattr(stage.config, "init_from", None)
        if start is None or not start.uri.startswith(REGISTRY):
            continue
        from components.runtime.tracking.registry import stored_model  # MLflow takes seconds to import

        set_environment(environment())
        with usage_errors(f"{stage.name}.init_from: "):
            found[start.uri] = found.get(start.uri) or stored_model(start.uri, tracking_uri=tracking)
        start = start.model_copy(update={"uri": found[start.uri][1].root})
        stage.config = stage.config.model_copy(update={"init_from": start})
    return [f"{given} is {version} in {shown(artifact.root)}" for given, (version, artifact) in found.items()]


def model_card(
    artifacts: Mapping[str, Artifact], *, recipe: str, run: str, report: str, command: Sequence[str], commit: str
) -> tuple[str, str]:
    """Descriptions in Markdown: of all versions of the models, and of this run's versions.
    `artifacts`: stage -> what it made, now or before. `report`: its URL. `command`: as typed, without places."""
    about, again = f"Recipe `{recipe}`.", f"    {shlex.join(command)}"
    if "images" in artifacts:
        facts = artifacts["images"].metadata
        license_ = "unknown, the source states none" if facts["license"] == UNSPECIFIED else facts["license"]
        images = f"{facts['train_samples']:,} images of `{facts['source']}`"
        images += f", {PAGES[facts['source']]}" if facts["source"] in PAGES else ""
        about += f" Trained on {images}; their license: {license_}."
        if pairs := facts.get("held_out_pairs"):
            about += f" None of them shows a {' or a '.join(pairs)}: pairs to ask for that it has never seen."
    if COMMIT.fullmatch(commit):
        again = f"    git checkout {commit}\n{again}"
    again = f"Run `{run}`, report `{report}`; its `recipe.yaml` has every number. To make it again:\n\n{again}"
    makers: dict[str, list[str]] = {}  # code version -> models
    for stage, artifact in artifacts.items():
        if artifact.kind == "model":
            makers.setdefault(made_by(artifact.provenance) or "code that is not known", []).append(stage)
    code = "\n".join(f"- {', '.join(stages)}: made by {maker}" for maker, stages in makers.items())
    details = "\n\n".join(part for part in (again, code, _figures(artifacts)) if part)
    return about, details[: LONGEST - len(about) - 2]


def _figures(artifacts: Mapping[str, Artifact]) -> str:
    facts = artifacts["evaluation"].metadata if "evaluation" in artifacts else {}
    if not facts.get("distances"):
        return ""
    rows = [DistanceRow(**row) for row in facts["distances"]]
    shown = {name: metric for name, metric in METRICS.items() if any(row.figure(name) is not None for row in rows)}
    network, unlicensed = facts["feature_network"], "Nobody states the license of that network's pretrained weights; "
    lines = [
        f"Fréchet distances `{distance_name(network)}` to the training images, smaller is nearer. "
        f"{'' if network in PUBLISHED else unlicensed}no model here holds them.",
        "",
        *heading(["images", "N", *(metric.title for metric in shown.values())], words=1),
    ]
    for row in rows:
        cells = [row.name, f"{row.samples:,}"]
        for name, metric in shown.items():
            figures = [figure for figure in (row.figure(name), row.error(name)) if figure is not None]
            cells.append(" ± ".join(f"{figure:.{metric.digits}f}" for figure in figures))
        lines.append(markdown(cells))
    return "\n".join(lines)
