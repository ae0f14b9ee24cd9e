"""The report as a self-contained HTML page, drawn from any part of a run.

No script and no request to anywhere: it opens from a disk, an artifact store or an attachment alike.
"""

import base64
import io
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from pydantic import Field

from components.configuration.config import Config
from components.evaluation.grids import readable
from components.evaluation.measures import MEASURES, measures_of
from components.evaluation.metrics import METRICS, USUAL, DistanceRow, distance_name
from components.evaluation.plots import curve_svg
from components.sampling.cascade import GENERATORS
from components.sampling.image_files import encode_png

State = Literal["done", "cached", "failed", "running", "queued", "waiting", "skipped"]
SIDE_METRICS = {"learning_rate", "grad_norm", "checkpoint_copy_seconds", *MEASURES}  # folded away
CURVES_IN_A_ROW = 3
HELD = "checkpoint_hold_seconds"
BEFORE = "before_"  # starts the names of images of the run before
HIDDEN_METRICS = {"samples_seen"}  # the step in another unit
IMAGES = {  # name -> (section of the page, caption, what a screen reader says)
    "real_images": ("samples", "Real images, held out from training", "Held-out images, by class or with captions"),
    "cascade_side_by_side": ("cascade", "From small to large", "The image that each stage made, a row for each stage"),
    "forward_noising": (
        "noising",
        "Held-out images on their way to noise",
        "A row for each image: itself, then what is left of it after more and more noising steps",
    ),
    "predicted_x_0": (
        "noising",
        "The x_0 predicted at each step",
        "For each image what is left of it after some steps, above the clean image that the model sees in that",
    ),
    "originals_and_reconstructions": (
        "tokenizer",
        "Held-out images, never trained on, and their reconstructions",
        "Rows of originals, each above the row of their reconstructions",
    ),
    "trained_and_reconstructions": (
        "tokenizer",
        "Training images, as none are held out, and their reconstructions",
        "Rows of training images, each above the row of their reconstructions",
    ),
    "by_stage_steps": (
        "others",
        "Images by the steps of each stage of a cascade, the other stages with their own",
        "Rows of images, a row for each stage and number of steps",
    ),
    "code_patches": (
        "tokenizer",
        "Held-out patches that have one code, in a row for each of a few codes",
        "Rows of patches of one code each, with what is around them",
    ),
    "index_grids": (
        "tokenizer",
        "Their index grids: near codes have near colors",
        "Originals, under each the grid of its codes in colors and what is decoded of it",
    ),
}
ARRANGED = {  # by which condition -> (in words, how the rows are arranged)
    "by_class": ("by class", "a row for each class"),
    "by_prompt": ("by prompt", "a row for each prompt"),
    "by_condition": ("by condition image", "a row for each condition image, which stands first"),
    "unconditional": ("unconditional", "without any condition"),
    "nearest": ("nearest to training images", "the nearest of all to a training image, above that image"),
}
BOX_WIDTH, BOX_HEIGHT = 140, 50  # pixels of the graph; also in the template
COLUMN, ROW, MARGIN = 156, 88, 8  # distance of neighboring boxes, and of the edge


class StageRow(Config):
    """State, times, inputs and figures of a stage of the run."""

    name: str
    key: str
    state: State
    seconds: float | None = None  # now, or in the run that made the result; None: unknown
    started: float | None = None  # seconds since 1970
    inputs: tuple[str, ...] = ()  # names of stages
    uri: str = ""  # of its artifact's folder
    note: str = ""  # reason of a failed or skipped stage
    summary: dict[str, float] = Field({})  # figures in the stage's artifact
    code: str = ""  # commit and versions of the code


class DataFacts(Config):
    """Facts about the training data: source, counts, and quarantined images."""

    source: str
    license: str
    samples: int
    train_samples: int
    resolution: int | None
    classes: tuple[str, ...]
    held_out_pairs: tuple[str, ...] = ()  # of scenes: colors with shapes that no training image shows
    quarantined: tuple[str, ...] = ()  # a line for each image left out: name and reason


class Table(Config):
    """Figures in rows; a missing figure is a dash."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


class Study(Config):
    """Plots and tables of a study, measured and drawn by a stage."""

    stage: str
    plots: dict[str, str] = Field({})  # title -> SVG
    tables: dict[str, Table] = Field({})  # title -> figures


class ReportData(Config):
    """All data of the page; whatever is empty is left out."""

    run: str
    recipe: str
    recipe_yaml: str
    stages: tuple[StageRow, ...]
    finished: float | None = None  # seconds since 1970
    seconds: float | None = None  # of the whole run, from the command to here
    facts: dict[str, str] = Field({})  # whatever else names the run: commit, machine, storage, tracking
    # stage -> (step, {metric: value})
    curves: dict[str, tuple[tuple[int, dict[str, float]], ...]] = Field({})
    images: dict[str, bytes] = Field({})  # name -> PNG; the names of `gallery.py`
    words: dict[str, tuple[str, ...]] = Field({})  # image -> conditions of rows or columns
    feature_network: str | None = None
    distances: tuple[DistanceRow, ...] = ()
    # codebook_size, codebook_usage, codebook_perplexity, dead_codes, images
    codebook: dict[str, float] = Field({})
    nearest: dict[str, dict[str, float]] = Field({})  # images made -> median, held_out_median, share_nearer
    earlier_run: str = ""  # the run of the same recipe before this one, if any
    studies: tuple[Study, ...] = ()
    data: DataFacts | None = None
    warnings: tuple[str, ...] = ()
    traces: tuple[str, ...] = ()  # URLs of what torch.profiler recorded


class Figure(NamedTuple):
    """An image of the page with a caption and a text for screen readers."""

    name: str
    caption: str
    alt: str
    source: str  # data URI
    width: int
    height: int
    words: Sequence[str] = ()  # conditions of rows or columns


def render_report(data: ReportData) -> str:
    """The page as HTML, rendered from the template of the report."""
    measured = {name for name in METRICS if any(row.figure(name) is not None for row in data.distances)}
    page = page_environment().get_template("report.html.j2")
    return page.render(
        data=data,
        groups=image_groups(data),
        graph=graph(data.stages),
        bars=bars(data.stages),
        curves={stage: stage_curves(stage, points) for stage, points in data.curves.items() if points},
        distances=sorted(data.distances, key=lambda row: row.distance),
        metrics={name: metric for name, metric in METRICS.items() if name in measured.union(USUAL) - {"distance"}},
        distance_name=distance_name(data.feature_network or ""),
        longest=max((row.distance for row in data.distances), default=1.0) or 1.0,
        tiles=tiles(data),
        speed=speed_table(data),
        studies=[(study, {title: Markup(svg) for title, svg in study.plots.items()}) for study in data.studies],
    )


def page_environment(module: str = __name__) -> Environment:
    """Jinja environment with templates beside `module`, shared templates, and number filters."""
    packages = dict.fromkeys(name.rpartition(".")[0] for name in (module, __name__))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "number": number, "moment": moment}
    environment.filters |= {"readable": readable, "detail": stage_detail}
    return environment


def image_groups(data: ReportData) -> dict[str, list[Figure]]:
    """Figures of all images by section of the page; strips from the smallest stage to the largest."""
    generated = [f"{generator}_{name}" for name in ARRANGED for generator in GENERATORS]  # side by side
    strips = [name for name in data.images if name.startswith("strip_")]
    strips.sort(key=lambda name: (int("".join(filter(str.isdigit, name)) or 0), name))
    sections = ("samples", "strips", "cascade", "noising", "tokenizer", "others")
    groups = {section: list[Figure]() for section in sections}
    for name in dict.fromkeys([*generated, *IMAGES, *strips, *data.images]):
        if name in data.images:
            section, caption, alt = described_image(name)
            shown = figure(name, data.images[name], caption, alt, data.words.get(name, ()))
            groups[section].append(shown)
    return groups


def described_image(name: str) -> tuple[str, str, str]:
    """Section of an image on the page, its caption, and the text for a screen reader."""
    if name.startswith(BEFORE):
        section, caption, alt = described_image(name.removeprefix(BEFORE))
        return section, f"{caption}: the run before", f"The run before: {alt}"
    if name.startswith("strip_"):
        stage = readable(name.removeprefix("strip_"))
        alt = f"Denoising by {stage}: noisy images above the clean ones that it predicts"
        return "strips", f"Denoising, {stage}", alt
    generator, _, condition = name.partition("_")
    if generator in GENERATORS and condition in ARRANGED:
        words, arranged = ARRANGED[condition]
        title = f"{GENERATORS[generator].title}, {words}"
        return "samples", title, f"Images of the {generator} generator, {arranged}"
    return IMAGES.get(name, ("others", readable(name).capitalize(), readable(name)))


def figure(name: str, png: bytes, caption: str, alt: str, words: Sequence[str] = ()) -> Figure:
    """A figure of an image, as data URI."""
    with Image.open(io.BytesIO(png)) as image:
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        return Figure(name, caption, alt, source, *image.size, words)


def shrunk(png: bytes, *, width: int) -> bytes:
    """The image, at most `width` pixels wide; a narrower image is unchanged."""
    with Image.open(io.BytesIO(png)) as image:
        if image.width <= width:
            return png
        height = round(image.height * width / image.width)
        return encode_png(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), optimize=True)


def graph(stages: Sequence[StageRow]) -> dict[str, Any]:
    """Size of the workflow's graph, boxes (upper left corners by stage) and lines (SVG paths), in pixels.
    Stages are listed after all inputs; lines implied by longer paths are left out."""
    parents = direct_parents({row.name: row.inputs for row in stages})
    places = place(parents)
    left = min((x for x, _ in places.values()), default=0)
    boxes = {name: (MARGIN + (x - left) * COLUMN, MARGIN + y * ROW) for name, (x, y) in places.items()}
    lines = []
    for above, name in ((above, name) for name, every in parents.items() for above in every):
        start, end = boxes[above][0] + BOX_WIDTH / 2, boxes[name][0] + BOX_WIDTH / 2
        top, bottom = boxes[above][1] + BOX_HEIGHT, boxes[name][1]
        turn = max(top, bottom - ROW + BOX_HEIGHT)
        middle = (turn + bottom) / 2
        curve = f"C{start:g} {middle:g} {end:g} {middle:g} {end:g} {bottom:g}"
        lines.append(f"M{start:g} {top:g}V{turn:g}{curve}")
    width = max((x for x, _ in boxes.values()), default=0) + BOX_WIDTH + MARGIN
    height = max((y for _, y in boxes.values()), default=0) + BOX_HEIGHT + MARGIN
    return {"width": width, "height": height, "boxes": boxes, "lines": lines}


def direct_parents(inputs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Inputs of each stage that no other input already implies (transitive reduction)."""
    above, direct = dict[str, set[str]](), dict[str, list[str]]()
    for name, parents in inputs.items():
        known = [parent for parent in dict.fromkeys(parents) if parent in above]
        reached = set().union(*(above[parent] for parent in known))
        direct[name] = [parent for parent in known if parent not in reached]
        above[name] = reached | set(known)
    return direct


def place(parents: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, int]]:
    """(column, row) of each stage: a row below the lowest parent; children spread below a common parent.
    A stage takes the middle of the places below its parents, or the nearest to the right with enough room."""
    children = {name: [child for child, above in parents.items() if name in above] for name in parents}
    places: dict[str, tuple[float, int]] = {}
    for name, above in parents.items():
        row = 1 + max((places[parent][1] for parent in above), default=-1)
        below = [places[p][0] + children[p].index(name) - (len(children[p]) - 1) / 2 for p in above]
        column = sum(below) / max(1, len(above))
        while any(abs(column - other) < 1 for other, level in places.values() if level == row):
            column += 0.5
        places[name] = (column, row)
    return places


def stage_detail(row: StageRow) -> str:
    """Second line of a stage's box."""
    if row.seconds is None or row.state not in ("done", "cached"):
        return row.state
    return duration(row.seconds) if row.state == "done" else f"cached ({duration(row.seconds)})"


def bars(stages: Sequence[StageRow]) -> dict[str, tuple[float, float]]:
    """Start and width in percent of the run, of each stage with work in it; cached stages are left out."""
    spans = {
        row.name: (row.started, row.seconds)
        for row in stages
        if row.state != "cached" and row.started is not None and row.seconds is not None
    }
    if not spans:
        return {}
    first = min(start for start, _ in spans.values())
    whole = max(start + seconds for start, seconds in spans.values()) - first or 1.0
    return {
        name: (round(100 * (start - first) / whole, 2), round(max(0.6, 100 * seconds / whole), 2))
        for name, (start, seconds) in spans.items()
    }


def stage_curves(stage: str, points: Sequence[tuple[int, dict[str, float]]]) -> dict[str, list[dict[str, Any]]]:
    """Curves of a stage, losses first: `main`, at least a row, and `side`, folded away on the page."""
    drawn: dict[str, list[dict[str, Any]]] = {"main": [], "side": []}
    names = list(dict.fromkeys(name for _, values in points for name in values))
    names.sort(key=lambda name: (name != "loss", "loss" not in name and "bits" not in name))
    for metric in names:
        if metric not in HIDDEN_METRICS:
            line = tuple((step, values[metric]) for step, values in points if metric in values)
            svg = Markup(curve_svg(line, metric, salt=f"curve-{stage}-{metric.replace('/', '-')}"))
            constant = len({value for _, value in line}) == 1 < len(points)  # a switch that is off rather than a curve
            entry = {"metric": metric, "svg": svg, "last": line[-1][1]}
            drawn["side" if metric in SIDE_METRICS or constant else "main"].append(entry)
    missing = max(0, CURVES_IN_A_ROW - len(drawn["main"]))
    return {"main": drawn["main"] + drawn["side"][:missing], "side": drawn["side"][missing:]}


def tiles(data: ReportData) -> list[tuple[str, str]]:
    """The few figures at the top of the page, each with a label."""
    found = [] if data.seconds is None else [(duration(data.seconds), "for everything")]
    found += [] if data.data is None else [(f"{data.data.train_samples:,}", "images to train on")]
    made = [row for row in data.distances if row.purpose == "model" and "branch" in row.name]
    found += [(number(row.distance), f"distance, {row.name}") for row in made]
    if "codebook_usage" in data.codebook:
        found.append((f"{100 * data.codebook['codebook_usage']:.0f} %", "of the codebook in use"))
    return found


def speed_table(data: ReportData) -> Table | None:
    """A row for each training, and a column for each reported speed measure; None without measures."""
    rows = {stage: measures_of([values for _, values in points]) for stage, points in data.curves.items()}
    for row in data.stages:
        if rows.get(row.name) and HELD in row.summary:  # the last checkpoint came after the last log
            rows[row.name][HELD] = max(row.summary[HELD], rows[row.name].get(HELD, 0.0))
    told = {stage: measures for stage, measures in rows.items() if measures}
    shown = {name: measure for name, measure in MEASURES.items() if any(name in found for found in told.values())}
    lines = [
        (readable(stage), *(m.text(found[name]) if name in found else None for name, m in shown.items()))
        for stage, found in told.items()
    ]
    return Table(columns=("training", *(m.title for m in shown.values())), rows=tuple(lines)) if lines else None


def duration(seconds: float | None) -> str:
    """`7.3 s`, `4 min 05 s`, `2 h 03 min`; a dash if there is none."""
    if seconds is None:
        return "–"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | str | None) -> str:
    """About three significant digits: `12`, `0.0123`, `1.23e-05`, `24,700`; words are unchanged."""
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    if abs(value) >= 999.5 or (value == int(value) and abs(value) >= 1):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def moment(seconds: float | None) -> str:
    """A time since 1970 as date and time in UTC."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
