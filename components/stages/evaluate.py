"""Evaluation of images by figures in the features of a network, and the stage of every study.

A study's configuration names the study; its other inputs are the models."""

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import Field

from components.configuration.config import refuse
from components.data.encoding import describe_autoencoder
from components.data.held_out import read_split
from components.data.shards import Member, ShardIndex, View, load_index
from components.evaluation import features, image_sets, reconstructions
from components.evaluation.generated import measured_stages
from components.evaluation.grids import labelled_grid, readable
from components.evaluation.image_sets import HELD_OUT, KNOWN, REFERENCE, ImageSet, MadeStage, held_out_parts
from components.evaluation.metrics import METRICS, USUAL, DistanceRow
from components.evaluation.obedience import WEIGHTS, SceneJudgeConfig, train_judge
from components.evaluation.reconstructions import PairsConfig
from components.evaluation.study import Findings, ModelStudy
from components.models.bundle import DESCRIPTION, describe_bundle
from components.runtime import events
from components.runtime.storage.artifact import Artifact
from components.stages.context import StageContext
from components.weights.perceptual import check_perceptual_network

RECONSTRUCTED = "reconstructions of "  # the set's name follows
REAL, COLUMNS = "real_images", 8  # name of the grid of held-out images, and images in a row
READ, CLASSES = 96, 12  # held-out images to choose from, and classes shown


class EvaluationConfig(PairsConfig):
    """Feature network, precision and image counts of distances, with the metrics and the size of windows."""

    stage_version = 4  # precision, recall and standard errors beside distances

    held_out_samples: int = Field(1024, ge=2)  # at most so many to reconstruct
    window: int | None = Field(None, ge=8)  # pixels; larger images are also compared window by window
    metrics: features.MetricNames = USUAL  # the distance in any case, its error where named

    def _check(self) -> None:
        super()._check()
        for name in self.metrics:
            lacking = METRICS[name].reads == "logits" and not self.feature_network.startswith("inception")
            refuse(lacking, f"metrics: {name} needs a classifier; feature_network {self.feature_network} is none")


def evaluate(
    config: EvaluationConfig,
    context: StageContext,
    *,
    images: Artifact,
    tokenizer: Artifact | None = None,
    samples: Artifact | None = None,
) -> Artifact:
    """Reconstruct held-out images and measure all images against the training images.
    Features stay beside the images that they are of, so an evaluation with other metrics measures none again.
    Returns an artifact of kind `report`: images, and all figures as metadata.
    Raises, before any work, FeatureNetworkError or PerceptualWeightsError for networks or weights that are missing, and
    ValueError for figures of an autoencoder where there is none."""
    config.check_network()
    check_perceptual_network("vgg16_lpips" if "lpips" in config.pairs else "none", weights_uri=config.lpips_weights)
    refuse(config.pairs and tokenizer is None, "evaluation.pairs: there is no autoencoder to judge; leave them out")
    metadata: dict[str, Any] = {"feature_network": config.feature_network, "distances": [], "summary": {}}
    folder, index, kept, side = context.scratch(), load_index(images.url("index.json")), list[features.FeatureJob](), 0
    member: Member = "image"
    with context.pool() as pool:
        work = features.Measuring(pool, context.report_images, context.work_store if context.forced else None)
        if tokenizer is not None:
            side = describe_autoencoder(tokenizer).resolution
            member = describe_bundle(tokenizer.read(DESCRIPTION)).settings.get("member", member)
            limit = config.held_out_samples
            held_out = held_out_parts(index, resolution=side, limit=limit, member=member)
            kept = reconstructions.reconstruction_jobs(tokenizer, held_out, config, work)
            drawn = pool.call(partial(reconstructions.draw_kept, tokenizer, held_out))
            context.write_images(folder, drawn)
            originals = ImageSet(tuple(held_out), "scale")
            use, means = pool.call(partial(reconstructions.kept_figures, kept, config))
            metadata |= {"held_out_codebook": use} if use else {}
            metadata["summary"] |= means | reconstructions.measure_rfid(config, originals, kept, work)
        if config.feature_network != "none":
            made = [] if samples is None else measured_stages(samples)
            rows, near = measure(config, index, made, kept, side, work, member)
            figures = [row.metrics(config.feature_network) for row in rows]
            metadata["summary"] |= {name: value for row in figures for name, value in row.items()}
            metadata["distances"] = [row.model_dump() for row in rows]
            metadata["nearest"] = {stage.name: facts for stage, _, facts in near}
            context.write_images(folder, {f"{stage.generator}_nearest": png for stage, png, _ in near})
            if made:
                context.write_images(folder, pool.call(partial(draw_real, index, max(stage.side for stage in made))))
        if metadata["summary"]:
            context.recorder.emit(events.Metrics(context.stage, 0, metadata["summary"]))
    return context.commit("report", folder=folder, metadata=metadata)


def measure(
    config: EvaluationConfig,
    index: ShardIndex,
    made: list[MadeStage],
    kept: list[features.FeatureJob],
    side: int,
    work: features.Measuring,
    member: Member,
) -> tuple[list[DistanceRow], list[tuple[MadeStage, bytes, dict[str, float]]]]:
    """Figures of images made against training images, and nearest images.
    Training images are read at the largest size of all sets, reconstructions (`kept`) having `side` pixels."""
    seed, pool = config.seed, work.pool
    whole = max([side, *(stage.side for stage in made)])
    read: dict[str, Any] = {"resolution": whole, "member": member}
    trained = image_sets.trained_parts(index, samples=config.reference_samples, seed=seed, **read)
    held_out = held_out_parts(index, limit=config.held_out_samples, **read)
    sets, windows = image_sets.compared_sets(trained, held_out, made, seed=seed), {}
    if config.window is not None and config.window < whole:
        windows = image_sets.window_sets(sets, made, side=config.window, whole=whole, seed=seed)
    measured = features.measure_features(sets | windows, config, work)
    wholes = [images for images in measured if images.name in sets]
    several = sum(job.part.num_images for job in kept) > 1  # a distance is of a covariance
    name = f"{RECONSTRUCTED}{KNOWN[held_out[0].split]}"
    wholes += [features.FeatureSet(name, "model", tuple(kept))] if several else []
    rows = features.distance_rows(wholes, pool=pool, seed=seed, metrics=config.metrics)
    if windows:
        cut = [images for images in measured if images.name in windows]
        rows += features.distance_rows(cut, pool=pool, seed=seed, metrics=config.metrics, reference=next(iter(windows)))
    ordered = sorted(rows, key=lambda row: (row.purpose == "model", not row.name.startswith(RECONSTRUCTED)))
    near, found = [], {images.name: images for images in wholes}
    for stage in {stage.generator: stage for stage in made}.values():  # the finished images
        if stage.name in found and HELD_OUT in found:
            theirs = [found[REFERENCE], found[HELD_OUT]]
            if stage.side < whole:  # blur would outweigh copying
                own = {name: sets[name].shrunk(stage.side) for name in (REFERENCE, HELD_OUT)}
                theirs = features.measure_features(own, config, work)
            near.append((stage, *pool.call(partial(features.draw_nearest, stage, trained, found[stage.name], *theirs))))
    return ordered, near


def draw_real(index: ShardIndex, resolution: int) -> dict[str, bytes]:
    """Grid (PNG) of held-out images, a row for each class, or with captions; none where none are held out."""
    if all(entry.samples == entry.train_samples for entry in index.shards):
        return {}
    split = read_split(index, "holdout", View(resolution), limit=READ)
    if len(index.classes) == 1:
        return {REAL: labelled_grid(list(split.image[: 2 * COLUMNS]), split.caption[: 2 * COLUMNS])}
    rows = [row for label in np.unique(split.label)[:CLASSES] for row in np.flatnonzero(split.label == label)[:COLUMNS]]
    return {REAL: labelled_grid(list(split.image[rows]), [readable(index.classes[split.label[row]]) for row in rows])}


def run_study(config: Any, context: StageContext, *, images: Artifact, **models: Artifact) -> Artifact:
    """Plans and does the jobs of `config.study`, measures the images made, and commits the findings.

    Returns an artifact of kind `report`: plots, tables, figures and images.
    Raises, before any work, FeatureNetworkError if the feature network is not installed, and ValueError of one line for
    models or images that do not fit the study."""
    if isinstance(config, features.MeasureConfig):
        config.check_network()
    index, files, done = load_index(images.url("index.json")), context.files_store, 0
    study: ModelStudy[Any] = config.study(config, index, models, files, context.stage)
    with context.pool() as pool:
        plan = pool.call(study.plan)
        total = sum(map(study.images_of, plan.jobs))
        for job in pool.finish(study.worker, plan.jobs, files=files):
            context.report_images(done := done + study.images_of(job), total)
        work = features.Measuring(pool, context.report_images, context.work_store if context.forced else None)
        measured = study.measure(plan, work)
        findings = pool.call(partial(study.findings, plan, measured))
    return commit_findings(context, findings)


def train_scene_judge(config: SceneJudgeConfig, context: StageContext) -> Artifact:
    """Trains the judge of scenes and measures it on held-out renderings.
    Returns an artifact of kind `report` with the judge's weights. Raises ValueError of one line for an accuracy below
    the configuration's bar."""
    with context.pool() as pool:
        weights, accuracy = pool.call(partial(train_judge, config))
    least = config.least_accuracy
    worst = min(accuracy, key=lambda name: accuracy[name])
    fault = f"the judge of scenes reads {worst} in {accuracy[worst]:.1%} of renderings, not in {least:.1%}"
    refuse(accuracy[worst] < least, f"{fault}: raise judge.steps or lower judge.least_accuracy")
    columns, rows = ["attribute", "right, %"], [[name, f"{100 * share:.1f}"] for name, share in accuracy.items()]
    summary = {f"accuracy_{name.replace(' ', '_')}": share for name, share in accuracy.items()}
    findings = Findings({}, {"Held-out renderings": {"columns": columns, "rows": rows}}, summary, {}, {})
    return commit_findings(context, findings, {WEIGHTS: weights})


def commit_findings(
    context: StageContext, findings: Findings, files: Mapping[str, bytes] = MappingProxyType({})
) -> Artifact:
    """Records and commits findings of a study, and files: an artifact of kind `report`.
    Figures that are not finite, as the standard error of a single image, are left out."""
    folder, names = context.scratch(), {title: f"plot-{number}.svg" for number, title in enumerate(findings.plots)}
    for title, svg in findings.plots.items():
        (folder / names[title]).write_text(svg)
        context.recorder.emit(events.Text(context.stage, names[title], svg))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    context.write_images(folder, findings.images)
    figures = (findings.summary, findings.headline)
    summary, headline = ({name: value for name, value in each.items() if math.isfinite(value)} for each in figures)
    context.recorder.emit(events.Metrics(context.stage, 0, summary))
    metadata = {"plots": names, "tables": findings.tables, "summary": summary, "headline": headline}
    return context.commit("report", folder=folder, metadata=metadata)
