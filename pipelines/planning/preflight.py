"""Checks packages, sources and room on this machine and on working nodes, before the start.

Nodes share the network, and maybe a mounted folder; their packages, variables and disks are their own.
"""

import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from components.configuration.config import Config
from components.configuration.families import family_of
from components.configuration.optimization import Training
from components.configuration.usage import UsageError, usage_errors
from components.data.ingest import PACKAGED
from components.data.listing import FileVersion, SourceError
from components.data.source_check import check_file, check_source, detect_source, file_to_try, shard_in_place
from components.evaluation.features import MeasureConfig
from components.evaluation.reconstructions import PairsConfig
from components.runtime.execution import Resources
from components.runtime.pool import one_line, portable
from components.runtime.storage import outages
from components.runtime.storage.connection import shown
from components.runtime.storage.store import Store, StoreError
from components.sampling.frozen_text import check_transformers
from components.stages.images import ImagesConfig
from components.stages.precompute import TextEncoderConfig
from components.training.adapters import check_adapters
from components.training.launch import CHECKPOINTS_KEPT
from components.training.subject import SubjectConfig
from components.weights.files import encoder_places
from components.weights.perceptual import check_perceptual_network
from components.weights.starts import open_start, planned_counts
from pipelines.planning import memory
from pipelines.planning.memory import MANY_CLASSES, model_of
from pipelines.planning.room import Space, is_local
from pipelines.planning.shares import concurrent_stages, trainings
from pipelines.workflow import PlannedStage, Workflow

logger = logging.getLogger("cascade")
ANSWER_SECONDS = 300.0  # beyond those that storage may be away
UNKNOWN = ("num_classes", "vocab_size", "image_embedding_dim", "text_states_dim")  # of an unread set
IN_FLIGHT = 1  # checkpoints written while those that are kept are still there


class Needs(NamedTuple):
    """Needs of stages on every working node."""

    configs: tuple[Config, ...] = ()
    packaged: str | None = None  # the source that is read, where packages make it
    source: FileVersion | None = None  # a file of any other source, by its absolute URL
    pretrained_text: bool = False  # whether a pretrained text encoder is loaded

    def addresses(self) -> list[str]:
        """Addresses of the source, weights and encoders, spelled like the recipe's."""
        trainings = [config for config in self.configs if isinstance(config, Training)]
        trained = [config.needs().perceptual_weights_uri for config in trainings]
        trained += [config.init_from.uri for config in trainings if config.init_from is not None]
        measured = [config.feature_weights for config in self.configs if isinstance(config, MeasureConfig)]
        measured += [config.lpips_weights for config in self.configs if isinstance(config, PairsConfig)]
        encoders = [config.uri for config in self.configs if isinstance(config, TextEncoderConfig)]
        return [*([self.source.path] if self.source else []), *filter(None, trained + measured), *encoders]


def needs_of(workflow: Workflow, planned: Sequence[PlannedStage]) -> Needs:
    """Needs of the stages to run; of cached stages, only files outside of storage."""
    running = {entry.stage.name for entry in planned if entry.wanted}
    read = running.union(*(workflow.before(name) for name in running))
    used = [entry for entry in planned if entry.stage.name in read]
    source = Needs()
    for entry in used:  # the source of the images or, after ingestion, the tars in the user's place
        if isinstance(entry.stage.config, ImagesConfig) and entry.wanted:
            source = needs_of_source(*detect_source(entry.stage.config.source))
        elif isinstance(entry.stage.config, ImagesConfig) and entry.cached is not None:
            source = Needs(source=shard_in_place(entry.cached))
    configs = tuple(entry.stage.config for entry in planned if entry.wanted)
    pretrained_text = any(isinstance(entry.stage.config, TextEncoderConfig) for entry in used)
    return source._replace(configs=configs, pretrained_text=pretrained_text)


def needs_of_source(source: str, path: str | None) -> Needs:
    """Needs of a reader of a source."""
    return Needs(packaged=source) if source in PACKAGED else Needs(source=file_to_try(source, path))


def check_needs(needs: Needs) -> None:
    """Raise UsageError or SourceError, in one line, for a missing package, weight, encoder or source."""
    if needs.packaged is not None:
        check_source(needs.packaged, None)
    if needs.source is not None:
        check_file(needs.source)
    with usage_errors():
        if needs.pretrained_text:
            check_transformers()
        for config in needs.configs:
            if isinstance(config, Training):
                own = config.needs()
                if config.trains:
                    check_perceptual_network(own.perceptual_network, weights_uri=own.perceptual_weights_uri)
                if config.adapter is not None:
                    check_adapters()
                if config.init_from is not None:
                    with usage_errors("init_from: "):
                        open_start(config.init_from)
            if isinstance(config, SubjectConfig) and config.init_from is not None:
                with usage_errors("subject: "):
                    config.requests(open_start(config.init_from).model)
            if isinstance(config, MeasureConfig):
                config.check_network()
            if isinstance(config, PairsConfig) and "lpips" in config.pairs:
                check_perceptual_network("vgg16_lpips", weights_uri=config.lpips_weights)
            if isinstance(config, TextEncoderConfig):
                check_transformers()
                encoder_places(config.uri)


def check_shares(workflow: Workflow, shares: Mapping[str, Resources]) -> None:
    """Raise UsageError for workers that can't share a batch, or shards of what has to stay whole."""
    for name, config in trainings(workflow).items():
        if (resources := shares.get(name)) is None:
            continue
        kind, size = config.network.kind, config.optimization.global_batch_size
        if not resources.worker_counts(size):
            least, most = resources.min_workers, resources.num_workers
            workers = most if least is None else f"{least} to {most}"
            copies = f", {resources.sharding} a copy" if isinstance(resources.sharding, int) else ""
            raise UsageError(
                f"{name}.global_batch_size {size} can't be shared by {workers} workers{copies}; change one of them"
            )
        why = f"its {kind} ({reason})" if (reason := family_of(kind).whole) else ""
        if resources.sharding != "none" and why:
            remedy = f"add to the profile: stages: {{{name}: {{sharding: none}}}}"
            raise UsageError(f"{name}: sharding {resources.sharding} is not for {why}; {remedy}")
        copies = resources.num_workers > resources.shards(resources.num_workers) > 1
        if copies and resources.gpus_per_worker and resources.max_batch_per_device is None:
            raise UsageError(
                f"{name}: copies of a network in shards can't try how many samples have room: set max_batch_per_device "
                f"in the profile beside sharding {resources.sharding}"
            )


def check_starts(planned: Sequence[PlannedStage]) -> list[str]:
    """A line for each training to run that begins with given weights: how many of its tensors they are.
    Raises UsageError for weights that do not fit, and for parts that a network does not have."""
    lines, classes = list[str](), known_classes(planned)
    for stage in (entry.stage for entry in planned if entry.wanted):
        config = stage.config
        if isinstance(config, Training) and config.optimization.parts:
            model_of(stage)
        if not isinstance(config, Training) or config.init_from is None:
            continue
        info = memory.assumed_dataset_info(stage, classes=classes or MANY_CLASSES)
        other = {name: size + 1 for name, size in info.model_dump(include={*UNKNOWN}).items() if size}
        if classes is not None:
            other.pop("num_classes", None)
        with usage_errors(f"{stage.name}.init_from: "):
            counts = planned_counts(config, [info, info.model_copy(update=other)], memory.tokens_of(stage, "tokens"))
        does = "starts from" if config.trains else "is taken as it is from"
        lines.append(f"{stage.name} {does} {shown(config.init_from.uri)}: {counts}")
    return lines


def known_classes(planned: Sequence[PlannedStage]) -> int | None:
    """Number of classes of the set that is learned; None as long as nobody has counted them."""
    *_, images = (entry.cached for entry in planned if isinstance(entry.stage.config, ImagesConfig | SubjectConfig))
    return None if images is None else len(images.metadata["classes"])


def space_of(workflow: Workflow, planned: Sequence[PlannedStage]) -> Space:
    """Count the room for the trainings to run, less the files of earlier tries.
    All may write at once on one node, as far as none waits for another, each one checkpoint at a time (the next is
    written when that is in storage, and ranks that resume fetch one between them) and in the end its model."""
    storage, temporary = 0, {}
    known = known_classes(planned)
    classes = MANY_CLASSES if known is None else known
    for entry in planned:
        if entry.wanted and isinstance(entry.stage.config, Training) and entry.stage.config.trains:
            model, store = model_of(entry.stage, classes=classes), entry.store
            checkpoint, finished = memory.checkpoint_bytes(model), memory.model_bytes(model)
            folders = store.folders() if is_local(store.uri) else []
            tries = [name for name in folders if name.partition("-")[0] == "train"]
            there = sum(info.bytes for name in tries for info in store.list(name))
            storage += max(0, (CHECKPOINTS_KEPT + IN_FLIGHT) * checkpoint + finished - there)
            temporary[entry.stage.name] = max(checkpoint, finished)
    crowds = concurrent_stages(workflow, temporary)
    return Space(storage, max(sum(temporary[name] for name in crowd) for crowd in crowds), tuple(temporary))


def check_nodes(needs: Needs, root: Store, space: Space) -> None:
    """Ask all working nodes for packages, room, the source and storage.
    Raises UsageError or StoreError, in one line, for the first node that lacks one."""
    if not (nodes := working_nodes()):
        logger.warning("no node is there yet that works: what nodes need is not asked")
    own = ray.get_runtime_context().get_node_id()
    others = {node: address for node, address in nodes.items() if node != own}
    space.check(root=None, works=own in nodes)
    if not others:
        return
    probe = f".probe-{uuid.uuid4().hex[:8]}"
    root.write(probe, probe.encode())
    try:
        answers = {}
        for node in others:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(try_node)
            answers[node] = task.remote(*portable((needs, root, probe, space), what="what a node is asked"))
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=ANSWER_SECONDS + outages.patience())
        lines = {node: _line(node, answer) for node, answer in answers.items()}
    finally:
        root.delete(probe)
    for node, line in lines.items():
        if line:
            raise UsageError(f"worker node {others[node]}: {line}{path_remedy(line, [root.uri, *needs.addresses()])}")


def working_nodes() -> dict[str, str]:
    """Id -> address of the nodes with logical CPUs or GPUs."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    working = [node for node in alive if any(node["Resources"].get(kind, 0) > 0 for kind in ("CPU", "GPU"))]
    return {node["NodeID"]: node["NodeManagerAddress"] for node in working}


def try_node(needs: Needs, root: Store, probe: str, space: Space) -> str:
    """The defect of the calling node, in one line; "" for a sound node."""
    try:
        if not root.exists(probe):
            raise StoreError(f"storage {root.uri} is another place there than on the driver's node")
        root.check_writable()
        check_needs(needs)
        space.check(root=None, works=True)
    except (UsageError, SourceError, StoreError) as error:
        return str(error)
    return ""


def _line(node: str, answer: Any) -> str:
    try:
        return ray.get(answer, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return f"no answer in {ANSWER_SECONDS + outages.patience():.0f} s whether it has what the stages need"
    except RayError as error:
        remedy = "give it the program's image, or submit with --working-dir"
        gone = node not in working_nodes()  # and what it lacks does not matter
        return "" if gone else f"it can't run this program ({one_line(error)}); {remedy}"


def path_remedy(line: str, addresses: list[str]) -> str:
    """The remedy for a path that only some nodes see."""
    if not any("://" not in address and address in line for address in addresses):
        return ""
    return "; every node must see it: give a URL such as s3://bucket/path, or a folder that all of them mount"
