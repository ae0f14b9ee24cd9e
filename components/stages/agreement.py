"""Agreement of images with labels and prompts, judged by independent models.

Each image is asked for by a label alone or by a caption alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from components.data.held_out import read_split
from components.data.shards import ShardIndex, Split, load_index
from components.evaluation.agreement import (
    Agreement,
    AgreementConfig,
    AskedPart,
    CaptionRanker,
    ClassJudge,
    JobImages,
    caption_agreement,
    class_agreement,
    label_table,
    prompt_table,
)
from components.evaluation.generated import JOB_SIZE, SampleJob, accepts, jobs_of
from components.evaluation.image_sets import branch_name, some_of, split_parts
from components.evaluation.job_sampler import sample_jobs
from components.runtime.pool import Pool
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade
from components.sampling.model import describe_model
from components.sampling.requests import Request
from components.stages.context import StageContext

AskedBy = Literal["label", "prompt"]
TITLES: dict[AskedBy, str] = {  # of the tables
    "label": "Asked for by label: the class that an independent classifier sees",
    "prompt": "Asked for by prompt: the own caption among others, by a contrastive encoder",
}
KNOWN: dict[Split, str] = {"holdout": "held-out images", "train": "training images"}
READ_RESOLUTION = 8  # pixels: only captions and labels are wanted


def measure_agreement(
    config: AgreementConfig,
    context: StageContext,
    *,
    images: Artifact,
    cascade: Artifact,
    judge: Artifact | None = None,
    matcher: Artifact | None = None,
) -> Artifact:
    """Asks each generator for labels alone and for captions alone, and judges the images.

    Labels and captions are those of held-out images.

    Args:
        judge: a classifier of clean images; None: no image is asked for by label.
        matcher: a contrastive encoder; None: no image is asked for by prompt.

    Returns an artifact of kind `report`: a table for labels and one for prompts, with held-out images and chance. A set
    that holds nothing out is asked for what is known of its training images.
    """
    index, files, done = load_index(images.url("index.json")), context.files_store, 0
    models: dict[AskedBy, Artifact | None] = {"label": judge, "prompt": matcher}
    judges = {by: model for by, model in models.items() if model is not None}
    with context.pool() as pool:
        plan = pool.call(partial(plan_agreement, config, index, cascade, judges))
        jobs = [asked.job for made in plan.made.values() for group in made.values() for asked in group]
        total = sum(len(job.requests) for job in jobs)
        for job in sample_jobs(jobs, cascade, files=files, pool=pool):
            context.report_images(done := done + len(job.requests), total)
        known = KNOWN[known_split(index)]
        found = {by: judged(by, model, plan, files, pool, known=known) for by, model in judges.items()}
    tables = {TITLES[by]: (label_table if by == "label" else prompt_table)(sets) for by, sets in found.items() if sets}
    return context.commit_study(plots={}, tables=tables, summary=summary(found), headline=headline(found))


class Wanted(NamedTuple):
    """A label or a caption of an image of the set, as a request."""

    row: int  # number among the images of the split
    asked: int  # class id, or number of the caption
    request: Request  # for the label alone, or for the caption alone


class AskedJob(NamedTuple):
    """A job, with the requested class id or caption number of each image."""

    job: SampleJob
    asked: tuple[int, ...]


class AgreementPlan(NamedTuple):
    """Requests by generator, and the images of the set to judge."""

    captions: tuple[str, ...]  # all different
    made: dict[AskedBy, dict[str, list[AskedJob]]]  # of each generator
    known: dict[AskedBy, list[AskedPart]]  # images of the set under their own labels and captions


def plan_agreement(
    config: AgreementConfig, index: ShardIndex, cascade: Artifact, judges: dict[AskedBy, Artifact]
) -> AgreementPlan:
    """Requests for labels and captions of images of the set, and the judged images. Runs in a worker."""
    with cascade.local_copy() as folder:
        models = Cascade.load(folder)
    wanted, made, known = wanted_of(index, config.samples), dict[AskedBy, Any](), dict[AskedBy, list[AskedPart]]()
    for by, judge in judges.items():
        made[by] = {name: asked_jobs(models, name, by, wanted[by], seed=config.seed) for name in models.generators}
        with judge.local_copy() as folder:
            side = describe_model(by, folder).settings["resolution"]
        known[by] = known_parts(index, wanted[by], resolution=side)
    return AgreementPlan(tuple(str(each.request.prompt) for each in wanted["prompt"]), made, known)


def known_split(index: ShardIndex) -> Split:
    """The split for conditions: held-out images where there are any, as in `held_out_parts`."""
    return "holdout" if index.samples > index.train_samples else "train"


def wanted_of(index: ShardIndex, samples: int) -> dict[AskedBy, list[Wanted]]:
    """Labels of the first images of the split, and captions of the first images, each caption once."""
    known = read_split(index, known_split(index), resolution=READ_RESOLUTION, limit=4 * samples)
    labels = [Wanted(row, label, Request(label=label)) for row, label in enumerate(known.label.tolist())]
    first = {caption: known.caption.index(caption) for caption in dict.fromkeys(known.caption) if caption}
    prompts = [Wanted(row, n, Request(prompt=caption)) for n, (caption, row) in enumerate(first.items())]
    return {"label": labels[:samples], "prompt": prompts[:samples]}


def asked_jobs(models: Cascade, generator: str, by: AskedBy, wanted: Sequence[Wanted], *, seed: int) -> list[AskedJob]:
    """Jobs of a generator for the wanted labels or captions that the generator takes alone."""
    asked = [
        (each.asked, request)
        for number, each in enumerate(wanted)
        if accepts(models, request := each.request.replace(seed=seed + number, generator=generator))
    ]
    jobs, values = jobs_of(f"{generator}_by_{by}", [request for _, request in asked]), [value for value, _ in asked]
    return [AskedJob(job, tuple(values[n * JOB_SIZE : (n + 1) * JOB_SIZE])) for n, job in enumerate(jobs)]


def known_parts(index: ShardIndex, wanted: Sequence[Wanted], *, resolution: int) -> list[AskedPart]:
    """Images of the set in parts, each image with the true label or caption."""
    rows, first, found = np.array([each.row for each in wanted], dtype=np.int64), 0, []
    limit = int(rows.max(initial=-1)) + 1
    for part in some_of(split_parts(index, known_split(index), resolution=resolution, limit=limit), rows):
        asked = tuple(each.asked for each in wanted[first : first + part.num_images])
        found.append(AskedPart(part, asked))
        first += part.num_images
    return found


def judged(
    by: AskedBy, model: Artifact, plan: AgreementPlan, files: Store, pool: Pool, *, known: str
) -> dict[str, Agreement]:
    """Agreement of each generator's images, and of the images of the set, by name of the set."""
    sets = {
        branch_name(generator): [AskedPart(JobImages(files, job.name, len(asked)), asked) for job, asked in group]
        for generator, group in plan.made[by].items()
    }
    sets = {name: group for name, group in (sets | {known: plan.known[by]}).items() if group}
    parts = [part for group in sets.values() for part in group]
    make_worker = partial(ClassJudge, model) if by == "label" else partial(CaptionRanker, model, plan.captions)
    values = pool.map(make_worker, parts)
    found = {name: np.concatenate([next(values) for _ in group]) for name, group in sets.items()}
    if by == "prompt":
        return {name: caption_agreement(ranks, candidates=len(plan.captions)) for name, ranks in found.items()}
    asked = {name: np.concatenate([part.asked for part in group]) for name, group in sets.items()}
    return {name: class_agreement(seen, asked[name]) for name, seen in found.items()}


def summary(found: dict[AskedBy, dict[str, Agreement]]) -> dict[str, float]:
    """Metrics of every set of images."""
    figures = {}
    for by, sets in found.items():
        for name, each in sets.items():
            end = f"{by}_{name.replace(' ', '_').replace('-', '_')}"
            figures |= {f"accuracy_{end}": each.accuracy, f"chance_{end}": each.chance}
            figures |= {f"median_rank_{end}": each.median_rank} if by == "prompt" else {}
    return figures


def headline(found: dict[AskedBy, dict[str, Agreement]]) -> dict[str, float]:
    """Share of images with the right class first, and with the right caption first."""
    words = {"label": "class seen", "prompt": "own caption first"}
    return {
        f"{words[by]}, {name} (N {each.count})": each.accuracy
        for by, sets in found.items()
        for name, each in sets.items()
    }
