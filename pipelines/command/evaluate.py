"""`cascade evaluate`: the field's figures of given images, or of a model's, against a reference."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipelines.command.options import share_cores

SEED = 2020  # torch-fidelity's own, so that both draw the same parts of a set


def evaluate(
    images: Annotated[str, typer.Option(help="A folder of images or archives, a tar, a zip or an npz (arr_0).")],
    reference: Annotated[str, typer.Option(help="Likewise; also ADM's npz with mu and sigma.")],
    network: Annotated[
        str, typer.Option(help="inception (as TensorFlow 1 resizes), inception_clean, dinov2, or efficientnet_lite0.")
    ] = "inception",
    feature_weights: Annotated[
        str | None, typer.Option(help="URI of the network's weights: they are never fetched by themselves.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the parts of a set that KID and IS are means over.", min=0)] = SEED,
    figures: Annotated[Path | None, typer.Option("--json", help="A file that gets the figures.")] = None,
) -> None:
    """Measure images against a reference: FID, KID, Inception score, precision and recall.

    Images are taken as they are. Features are kept beside them, so a command that was stopped goes on where it was. The
    names of figures have protocol and N: `fid_inception_50k`, `fid_clean_50k`, `fd_dinov2_50k`.

    **Examples**

    - `cascade evaluate --images samples --reference photos --feature-weights inception.pth`
    - `cascade evaluate --images made.npz --reference VIRTUAL_imagenet256_labeled.npz --feature-weights inception.pth`
    - `cascade evaluate --images s3://bucket/tars --reference photos.zip --network inception_clean --feature-weights …`
    - `cascade evaluate --images samples --reference photos --network efficientnet_lite0 --json figures.json`
    """
    share_cores()
    from pydantic import ValidationError

    from components.configuration.config import first_fault
    from components.configuration.usage import UsageError, usage_errors
    from components.evaluation.features import NETWORKS, MeasureConfig
    from components.evaluation.given import evaluate_given
    from components.sampling.device import products

    if figures is not None and not figures.absolute().parent.is_dir():
        raise UsageError(f"--json {figures}: there is no such folder; make it first")
    fields = {"feature_network": network, "feature_weights": feature_weights, "seed": seed}
    try:
        config = MeasureConfig.model_validate(fields)
    except ValidationError as error:
        raise UsageError(first_fault(error)) from error
    console = Console()
    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with usage_errors(), products("fp32"), Progress("images", *columns, console=console, transient=True) as bar:
        task = bar.add_task("images", total=None)
        found = evaluate_given(
            images, reference, config, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if figures is not None:
        figures.write_text(json.dumps(found, indent=1) + "\n")
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
