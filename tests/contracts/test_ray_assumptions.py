"""What is assumed of Ray beyond what it promises, a case each: on another version they say which assumption broke.

They start no Ray: that the whole works is the matter of tests that train and read (`distributed/`, `integration/`).
Every part is looked up in the case that needs it, so that one which is gone fails no other case.
"""

import ast
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name as part
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
from ray.data import DataContext, Datasource, ExecutionOptions, ReadTask
from ray.data.block import BlockMetadata

DOOR = Path(__file__).parents[2] / "components" / "runtime" / "ray_internals.py"
ELASTIC = {"num_workers": (1, 4), "resources_per_worker": {"CPU": 1}}
METADATA = BlockMetadata(num_rows=1, size_bytes=1024, exec_stats=None, input_files=None)


def context() -> DataContext:
    return DataContext.get_current().copy()


def source_of_three_tasks() -> Any:
    class Source(part("components.data.stream:StreamDatasource")):
        def __init__(self) -> None:
            Datasource.__init__(self)
            self.ahead = 2

        def get_name(self) -> str:
            return "Assumed"

        def estimate_inmemory_data_size(self) -> int:
            return 1

        def tasks(self) -> Iterator[ReadTask]:
            return (ReadTask(list, METADATA) for _ in range(3))

    return Source()


def planned(source: Any, context: DataContext) -> tuple[Any, list[Any]]:
    """The read operator of a source, and the callbacks of its run."""
    read = part("ray.data._internal.logical.operators:Read")(
        datasource=source, datasource_or_legacy_reader=source, parallelism=1
    )
    plan = part("ray.data._internal.logical.interfaces:LogicalPlan")(read, context)
    plan, callbacks = part("ray.data._internal.planner:create_planner")().plan(plan)
    return plan.dag, callbacks


def bundle() -> Any:
    entry = part("components.runtime.ray_internals:BlockEntry")(ray.ObjectRef.from_random(), METADATA)
    return part("components.runtime.ray_internals:RefBundle")((entry,), owns_blocks=False, schema=None)


def started_input() -> tuple[Any, dict[Any, Any]]:
    """An input operator of one task, as it is when a dataset starts, and its topology."""
    buffer = part("components.runtime.ray_internals:InputDataBuffer")(context(), input_data=[bundle()])
    build = part("ray.data._internal.execution.streaming_executor_state:build_streaming_topology")
    return buffer, build(buffer, ExecutionOptions(), None)


def executor() -> Any:
    return part("ray.data._internal.execution.streaming_executor:StreamingExecutor")(context())


def trainer(folder: Path, **scaling: Any) -> Any:
    return part("components.training.launch:Trainer")(
        print,
        worker_counts=[1, 2, 4],
        scaling_config=ray.train.ScalingConfig(**scaling),
        run_config=ray.train.RunConfig(name="assumed", storage_path=str(folder)),
    )


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


# Each of these says in its docstring what is assumed, and where, and returns whether it holds.


def callbacks_come_by_class() -> bool:
    """Ray Data runs an instance of each class in DataContext.custom_execution_callback_classes (data/stream.py)"""
    with_feeder, feeder = context(), part("components.data.stream:Feeder")
    with_feeder.custom_execution_callback_classes = [feeder]
    _, callbacks = planned(source_of_three_tasks(), with_feeder)
    return any(isinstance(callback, feeder) for callback in callbacks)


def callbacks_hear_of_start_and_steps() -> bool:
    """the executor calls an ExecutionCallback's before_execution_starts(executor) and on_execution_step(executor)
    (data/stream.py: Feeder)"""
    callback, runs = part("components.runtime.ray_internals:ExecutionCallback"), inspect.getsource(type(executor()))
    names = ("before_execution_starts", "on_execution_step")
    return all(
        parameters(getattr(callback, name)) == ["self", "executor"] and f"callback.{name}(self)" in runs
        for name in names
    )


def the_executor_has_its_topology_when_callbacks_start() -> bool:
    """StreamingExecutor._topology holds the operators when before_execution_starts is called
    (data/stream.py: Feeder)"""
    body = inspect.getsource(type(executor()).execute)
    built, started = body.index("self._topology = build"), body.index(".before_execution_starts(self)")
    return executor()._topology is None and built < started


def the_executor_says_that_a_rank_waits() -> bool:
    """StreamingExecutor._consumer_idling() is whether there is no block to take (data/stream.py: Feeder)"""
    running, found = executor(), []
    for queue in ([], ["a block"]):
        running._output_node = (None, SimpleNamespace(output_queue=queue))
        found.append(running._consumer_idling())
    return found == [True, False]


def a_read_has_one_input_that_knows_its_source() -> bool:
    """a read is one operator after one InputDataBuffer, whose _logical_operators[0].datasource is the source
    (data/stream.py: Feeder)"""
    source = source_of_three_tasks()
    read, _ = planned(source, context())
    (buffer,) = read.input_dependencies
    (reading,) = buffer.output_dependencies
    is_buffer = isinstance(buffer, part("components.runtime.ray_internals:InputDataBuffer"))
    return is_buffer and buffer._logical_operators[0].datasource is source and reading is read


def a_source_is_asked_for_its_tasks_when_reading_starts() -> bool:
    """Datasource.get_read_tasks is called, with arguments of any names, when the input operator starts
    (data/stream.py: StreamDatasource)"""
    plan = inspect.getsource(part("ray.data._internal.planner.plan_read_op:plan_read_op"))
    first = source_of_three_tasks().get_read_tasks(1, per_task_row_limit=None, data_context=context())
    return ".get_read_tasks(" in plan and "input_data_factory=get_input_data" in plan and len(first) == 1


def an_input_counts_as_finished_until_that_is_put_off() -> bool:
    """InputDataBuffer counts as finished from its start by _is_execution_marked_finished and _inputs_complete, goes on
    if both are False, and is finished by mark_execution_finished() (data/stream.py: Feeder)"""
    buffer, _ = started_input()
    found = [buffer.has_execution_finished()]
    buffer._is_execution_marked_finished = buffer._inputs_complete = False
    found.append(buffer.has_execution_finished())
    buffer.mark_execution_finished()
    return [*found, buffer.has_execution_finished()] == [True, False, True]


def an_input_is_not_ended_by_the_loop() -> bool:
    """OpState.inputs_done_called = True keeps the loop from ending an operator without inputs
    (data/stream.py: Feeder)"""
    update, found = part("ray.data._internal.execution.streaming_executor_state:update_operator_states"), []
    for told in (True, False):
        buffer, topology = started_input()
        buffer._is_execution_marked_finished = buffer._inputs_complete = False
        topology[buffer].inputs_done_called = told
        update(topology)
        found.append(buffer.has_execution_finished())
    return found == [False, True]


def tasks_that_are_appended_are_handed_out() -> bool:
    """InputDataBuffer hands out _input_data in order, what is appended later too, and looks at none twice
    (data/stream.py: Feeder)"""
    buffer, _ = started_input()
    first, second = buffer._input_data[0], bundle()
    taken, drained = [buffer._get_next_inner()], not buffer.has_next()
    buffer._input_data.append(second)
    buffer._input_data[0] = None
    return drained and buffer.has_next() and [*taken, buffer._get_next_inner()] == [first, second]


def operators_count_what_they_were_given() -> bool:
    """metrics.num_inputs_received of an operator counts the bundles that it was given (data/stream.py: Feeder)"""
    buffer, _ = started_input()
    before = buffer.metrics.num_inputs_received
    buffer.metrics.on_input_received(bundle())
    return buffer.metrics.num_inputs_received == before + 1


def blocks_a_quarter_larger_than_the_target_are_kept_whole() -> bool:
    """Ray Data slices a block only from 1.5 times DataContext.target_max_block_size on (data/stream.py)"""
    return part("ray.data.context:MAX_SAFE_BLOCK_SIZE_FACTOR") >= 1.25 and context().target_max_block_size > 0


def a_gang_is_packed_onto_as_few_nodes_as_hold_it() -> bool:
    """Train packs its workers where nothing else is said, and counts their ranks node by node (docs/CLUSTERS.md)"""
    group = part("ray.train.v2._internal.execution.worker_group.worker_group:WorkerGroup")
    nodes = ("one", "other", "one", "other")
    workers = [
        SimpleNamespace(metadata=SimpleNamespace(node_id=node, accelerator_ids={"GPU": [str(gpu)]}))
        for gpu, node in enumerate(nodes)
    ]
    ranks = [worker.metadata.node_id for worker in group._sort_workers_by_gpu_id_grouped_by_node(workers)]
    return ray.train.ScalingConfig(**ELASTIC).placement_strategy == "PACK" and ranks == ["one", "one", "other", "other"]


def default_callbacks_hold_a_cleaner(folder: Path) -> bool:
    """TorchTrainer._create_default_callbacks() makes one PlacementGroupCleanerCallback (training/launch.py: Trainer)"""
    cleaner = part("components.runtime.ray_internals:PlacementGroupCleanerCallback")
    callbacks = ray.train.torch.TorchTrainer._create_default_callbacks(trainer(folder, num_workers=1))
    return sum(isinstance(callback, cleaner) for callback in callbacks) == 1


def fit_makes_its_controller_by_keyword() -> bool:
    """TorchTrainer.fit calls _initialize_and_run_controller with scaling_policy= and with callbacks= of
    _create_default_callbacks() (training/launch.py: Trainer)"""
    body = ast.parse(textwrap.dedent(inspect.getsource(ray.train.torch.TorchTrainer.fit)))
    calls = [node for node in ast.walk(body) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if ast.unparse(call.func) == "self._initialize_and_run_controller"]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return "scaling_policy" in given and given["callbacks"] == "self._create_default_callbacks()"


def the_dashboard_s_address_is_in_the_internal_store() -> bool:
    """get_webui_url_from_internal_kv() takes nothing and reads the address that a dashboard writes
    (training/launch.py: Trainer)"""
    function = part("components.runtime.ray_internals:get_webui_url_from_internal_kv")
    return parameters(function) == [] and "webui:url" in inspect.getsource(function)


def a_range_of_workers_is_elastic(folder: Path) -> bool:
    """ScalingConfig.elasticity_enabled is whether num_workers is a pair (training/launch.py: Trainer)"""
    kinds = (trainer(folder, **ELASTIC), trainer(folder, num_workers=2))
    return [kind.scaling_config.elasticity_enabled for kind in kinds] == [True, False]


def an_elastic_policy_starts_as_many_as_it_counts() -> bool:
    """ElasticScalingPolicy starts as many workers as _count_possible_workers(resources by node) says
    (runtime/ray_internals.py: EqualShares)"""
    policy = part("components.runtime.ray_internals:EqualShares")(ray.train.ScalingConfig(**ELASTIC), [1, 2, 4])
    policy._maybe_send_resource_request = lambda: None
    policy._get_reserved_resources = lambda: {"a node": {"CPU": 3.0}}
    return policy.make_decision_for_non_running_worker_group().num_workers == 2


def what_stands_for_a_dataset_is_called_whenever_workers_start() -> bool:
    """Train calls what stands in place of a dataset when workers start, and hands on what it returns as it is
    (training/launch.py: resumed)"""
    callback = part("ray.train.v2._internal.callbacks.datasets:DatasetsCallback")
    return "v() if callable(v) else v" in inspect.getsource(callback.before_init_train_context)


def a_data_config_makes_the_shards_of_all_ranks() -> bool:
    """DataConfig.configure(datasets, world_size, …) makes what each rank reads (data/crews.py)"""
    return parameters(ray.train.DataConfig.configure)[:3] == ["self", "datasets", "world_size"]


def an_iterator_asks_its_coordinator_for_no_more_than_a_dealer_knows() -> bool:
    """a split's iterator is made of (actor, place, count), keeps them, and of its actor calls what a dealer has
    (data/crews.py)"""
    kind = part("components.runtime.ray_internals:StreamSplitDataIterator")
    asked = set(re.findall(r"_coord_actor\.(\w+)\.remote", inspect.getsource(kind)))
    made = kind("actor", 3, 5)
    kept = (made._coord_actor, made._output_split_idx, made._world_size) == ("actor", 3, 5)
    unused = {"stats", "get_dataset_schema"}  # nobody asks a rank's iterator for them
    return kept and asked - unused <= set(dir(part("components.data.crews:CrewDealer")))


def train_shuts_the_coordinator_of_an_iterator_down() -> bool:
    """Train calls shutdown_executor of what _coord_actor an iterator of splits has (data/crews.py: CrewDealer)"""
    body = inspect.getsource(part("ray.train.v2._internal.data_integration.dataset_manager:DatasetManager"))
    known = "isinstance(iterator, StreamSplitDataIterator)" in body and "coord.shutdown_executor.remote()" in body
    return known and hasattr(part("components.data.crews:CrewDealer"), "shutdown_executor")


def blocks_that_are_not_taken_hold_a_reading_task() -> bool:
    """the context says how many blocks of a task may wait to be taken (data/stream.py: _configure)"""
    return isinstance(context()._max_num_blocks_in_streaming_gen_buffer, int)


def a_failed_training_names_its_workers_errors() -> bool:
    """the error of workers that failed has worker_failures, by rank (training/launch.py: last_line)"""
    return ray.train.WorkerGroupError("failed", {1: ValueError("why")}).worker_failures[1].args == ("why",)


def a_worker_knows_that_its_node_is_taken_away() -> bool:
    """get_train_context().preemption_context.preemption_info is None until a node is taken away
    (training/worker.py: is_leaving)"""
    function = part("components.runtime.ray_internals:get_train_context")
    fields = part("ray.train.v2._internal.execution.context:TrainContext").__dataclass_fields__
    preemption = part("ray.train.v2._internal.execution.preemption:PreemptionContext")
    return parameters(function) == [] and "preemption_context" in fields and preemption().preemption_info is None


def a_worker_knows_its_storage(folder: Path) -> bool:
    """get_context().get_storage() has build_checkpoint_path_from_name(name) and storage_filesystem
    (training/worker.py: Saver)"""
    storage = part("ray.train.v2._internal.execution.storage:StorageContext")(str(folder), "run")
    path = storage.build_checkpoint_path_from_name("step-1")
    return path == f"{folder}/run/step-1" and storage.storage_filesystem is not None


def checkpoints_are_listed_in_the_fields_that_are_rewritten() -> bool:
    """Train lists checkpoints in checkpoint_manager_snapshot.json: checkpoint_results, checkpoint_report_indices,
    latest_checkpoint_result, and in each result checkpoint_dir_name (training/run_folder.py)"""
    manager = part("ray.train.v2._internal.execution.checkpoint.checkpoint_manager")
    wanted = {"checkpoint_results", "checkpoint_report_indices", "latest_checkpoint_result"}
    return (
        part("ray.train.v2._internal.constants:CHECKPOINT_MANAGER_SNAPSHOT_FILENAME")
        == part("components.training.run_folder:SNAPSHOT")
        and wanted <= manager._CheckpointManagerState.model_fields.keys()
        and "checkpoint_dir_name" in manager._TrainingResultState.model_fields
    )


def train_reads_the_variables_that_are_set() -> bool:
    """Train reads the RAY_TRAIN_… variables that are set (pipelines/engine/session.py)"""
    read = {value for name, value in vars(part("ray.train.v2._internal.constants")).items() if name.endswith("ENV_VAR")}
    given = {*part("pipelines.engine.session:ENVIRONMENT"), *part("pipelines.engine.session:LOCAL")}
    given |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"}
    return {name for name in given if name.startswith("RAY_TRAIN_")} <= read


def workers_may_be_told_to_start_late() -> bool:
    """Ray has the option worker_register_timeout_seconds, in whole seconds (pipelines/engine/session.py)"""
    seconds = part("ray._raylet:Config").worker_register_timeout_seconds()
    return seconds <= int(part("pipelines.engine.session:LOCAL")["RAY_worker_register_timeout_seconds"])


def a_submitted_job_is_known_by_a_variable() -> bool:
    """the driver of a submitted job has RAY_JOB_CONFIG_JSON_ENV_VAR in its environment (pipelines/engine/session.py)"""
    name = part("ray._private.runtime_env.constants:RAY_JOB_CONFIG_JSON_ENV_VAR")
    return name == part("pipelines.engine.session:JOB_VARIABLE")


def the_access_token_is_where_it_is_made_private() -> bool:
    """Ray keeps its access token in ~/.ray/auth_token (pipelines/engine/session.py: _protect_token)"""
    setup = part("ray._private.authentication.authentication_token_setup")
    return setup._get_default_token_path() == Path.home() / ".ray" / "auth_token"


def a_head_says_its_version_and_its_nodes() -> bool:
    """a head answers two calls with its version, and its nodes' states and sockets (pipelines/planning/joining.py)"""
    protocol, nodes = part("ray.core.generated.gcs_service_pb2"), part("ray.core.generated.gcs_pb2")
    calls = protocol.DESCRIPTOR.services_by_name["NodeInfoGcsService"].methods_by_name
    node = nodes.GcsNodeInfo(state=nodes.GcsNodeInfo.ALIVE, raylet_socket_name="/tmp/raylet")
    asked = [calls[name].input_type.fields for name in ("CheckAlive", "GetAllNodeInfo")]
    return (
        all(not field.is_required for fields in asked for field in fields)
        and protocol.CheckAliveReply(ray_version="2").ray_version == "2"
        and protocol.GetAllNodeInfoReply(node_info_list=[node]).node_info_list[0] == node
    )


PRIVATE = [  # module and name of each import of the door
    (str(node.module), alias.name)
    for node in ast.parse(DOOR.read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
]
ASSUMPTIONS = [
    value
    for value in list(globals().values())
    if inspect.isfunction(value) and inspect.signature(value).return_annotation is bool
]


@pytest.mark.parametrize(("module", "name"), PRIVATE, ids=lambda text: text.rpartition(".")[2])
def test_ray_still_has_what_the_door_imports(module: str, name: str):
    assert hasattr(part(module), name), (
        f"ray {ray.__version__}: {module} has no {name} (components/runtime/ray_internals.py)"
    )


@pytest.mark.parametrize("holds", ASSUMPTIONS, ids=lambda function: function.__name__)
def test_what_is_assumed_of_ray_holds(holds: Callable[..., bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(os.environ, "RAY_TRAIN_V2_ENABLED", "1")
    assumed = f"ray {ray.__version__}: it holds no longer that {' '.join((holds.__doc__ or '').split())}"
    before = ray.is_initialized()
    try:
        held = holds(tmp_path) if parameters(holds) else holds()
    except Exception as error:
        raise AssertionError(f"{assumed}: {type(error).__name__}: {error}") from error
    assert held, assumed
    assert ray.is_initialized() == before
