"""`cascade evaluate`: the field's figures of images, or of a model's samples, against a reference."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from components.configuration.usage import UsageError, check_figures, usage_errors, validated
from pipelines.command.options import Model, Tracking, share_cores

SEED = 2020  # torch-fidelity's own, so that both draw the same parts of a set


def evaluate(
    images: Annotated[
        str | None, typer.Option(help="A folder, archives, a tar, a zip, an npz (arr_0); of --model a new folder.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Likewise; also ADM's npz with mu and sigma; else held-out images of --model.")
    ] = None,
    model: Model = None,
    count: Annotated[int, typer.Option(help="Samples of --model.", min=2)] = 1000,
    captions: Annotated[Path | None, typer.Option(help="A text file with the images' captions, one a line.")] = None,
    clip_weights: Annotated[
        str | None,
        typer.Option(help="URI of the folder of a CLIPModel or an open_clip model, for the score of captions."),
    ] = None,
    network: Annotated[
        str, typer.Option(help="inception (as TensorFlow 1 resizes), inception_clean, dinov2, or efficientnet_lite0.")
    ] = "inception",
    feature_weights: Annotated[
        str | None, typer.Option(help="URI of the network's weights: they are never fetched by themselves.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the parts of a set that KID and IS are means over.", min=0)] = SEED,
    figures: Annotated[Path | None, typer.Option("--json", help="A file that gets the figures.")] = None,
    tracking: Tracking = None,
) -> None:
    """Measure images against a reference: FID, KID, Inception score, precision and recall, CLIP score.

    A model is sampled: by the captions, else by classes and captions of the images held out of its training set, in
    their proportions, or of classes in turn where there is another reference. Samples stay where --images names a
    folder. Images are taken as they are. Features are kept beside --images, so that measuring that was stopped goes on
    where it was. The names of figures have protocol and N: `fid_inception_50k`, `fid_clean_50k`, `fd_dinov2_50k`.

    **Examples**

    - `cascade evaluate --model models:/image-cascade-scenes@champion --feature-weights inception.pth`
    - `cascade evaluate --images samples --reference photos --feature-weights inception.pth`
    - `cascade evaluate --images made.npz --reference VIRTUAL_imagenet256_labeled.npz --feature-weights inception.pth`
    - `cascade evaluate --images s3://bucket/tars --reference photos.zip --network inception_clean --feature-weights …`
    - `cascade evaluate --images samples --reference photos --network efficientnet_lite0 --json figures.json`
    - `cascade evaluate --model models:/image-cascade-gan@champion --images made --reference photos --feature-weights …`
    - `cascade evaluate --images made --reference photos --captions words.txt --clip-weights clip --feature-weights …`
    """
    share_cores()
    from components.configuration.config import refuse
    from components.evaluation.features import MeasureConfig
    from components.evaluation.given import ClipScore, evaluate_given, requests_for, sample_into
    from components.evaluation.image_sets import split_parts
    from components.runtime.storage.scratch import scratch_folder
    from components.runtime.storage.store import absolute
    from components.sampling.device import products
    from pipelines.command.loading import held_out_set, open_model

    check_given(images, reference, model, captions, clip_weights)
    check_figures(figures)
    with usage_errors(f"--captions {captions}: "):
        text = None if captions is None else captions.read_text("utf-8-sig")
        refuse(text == "", "the file is empty: give a caption in each line")
        words = text.removesuffix("\n").split("\n") if text else []  # no cut at U+2028 or U+0085, as of splitlines
    fields = {"feature_network": network, "feature_weights": feature_weights, "seed": seed}
    config = validated(MeasureConfig, fields)
    console, address, against, samples = Console(), None, reference or "", ()
    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    bar = Progress("images", *columns, console=console, transient=True)
    with usage_errors(), products("fp32"), scratch_folder("evaluate") as scratch, bar:
        task, place = bar.add_task("images", total=None), absolute(images or f"{scratch}/samples")
        clip = None if clip_weights is None else ClipScore(clip_weights)
        if model is not None:
            opened = open_model(model, like=None, tracking=tracking)
            address, cascade = opened.address, opened.cascade
            own = held_out_set(address, tracking) if reference is None else None
            asked = requests_for(cascade, words, own, count=count, seed=seed)
            samples, words = sample_into(Path(place), cascade, asked), [request.prompt or "" for request in asked]
            if own is not None:
                against = split_parts(own, "holdout", resolution=cascade.makers[cascade.generators[0]].size[0])
        found = evaluate_given(
            place,
            against,
            config,
            captions=words,
            clip=clip,
            samples=samples,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    found |= {"model": address, "images": images}
    show(found, console)
    if figures is not None:
        figures.write_text(json.dumps(found, indent=1) + "\n")


def check_given(
    images: str | None, reference: str | None, model: str | None, captions: Path | None, clip_weights: str | None
) -> None:
    """Raise UsageError for options that do not go together."""
    if model is None and (images is None or reference is None):
        raise UsageError("give --images and --reference, or a --model to sample and measure by its held-out images")
    if model is not None and images is not None and "://" in images:
        raise UsageError(f"--images {images}: samples of --model go to a folder of this machine; name one")
    if captions is not None and clip_weights is None and model is None:
        raise UsageError("--captions are read for a CLIP score: give --clip-weights")
    if clip_weights is not None and captions is None and model is None:
        raise UsageError("--clip-weights score images by captions: give --captions FILE")
    if captions is not None and not captions.is_file():
        raise UsageError(f"--captions {captions}: no such file")


def show(found: dict[str, Any], console: Console) -> None:
    """Print the figures as a table, and what they are of."""
    from components.evaluation.features import NETWORKS

    table = Table("figure", "value")
    for name, value in found["figures"].items():
        table.add_row(name, f"{value:.6g}")
    if (error := found["standard_error_of_distance"]) is not None:
        table.add_row("standard error of the distance", f"{error:.2g}")
    console.print(table)
    count = found["reference_samples"]
    rest = "published statistics" if found["published_statistics"] else ""
    against = " and ".join(filter(None, (rest, f"{count:,} images" if count else "")))
    console.print(f"{found['samples']:,} images against {against} of {found['reference']}", soft_wrap=True)
    known, sha256 = NETWORKS[found["feature_network"]].weights, found["sha256_of_weights"]
    if sha256 and "sha256" in known and sha256 not in known:
        console.print(f"not the published weights (sha256 {sha256}): no figure compares with a paper's", soft_wrap=True)
