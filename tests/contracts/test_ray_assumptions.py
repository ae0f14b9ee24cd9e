"""What is assumed of Ray beyond what it promises, a case each: on another version they say which assumption broke.

They start no Ray: that the whole works is the matter of tests that train and read (`distributed/`, `integration/`).
Every part is looked up in the case that needs it, so that one which is gone fails no other case.
"""

import ast
import inspect
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name as part
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
from ray.data import DataContext, Datasource

DOOR = Path(__file__).parents[2] / "components" / "runtime" / "ray_internals.py"
ELASTIC = {"num_workers": (1, 4), "resources_per_worker": {"CPU": 1}}


def context() -> DataContext:
    return DataContext.get_current().copy()


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
    with_rest, rest = context(), part("components.data.stream:Rest")
    with_rest.custom_execution_callback_classes = [rest]
    source = part("ray.data._internal.logical.operators:Read")(
        datasource=Datasource(), datasource_or_legacy_reader=Datasource(), parallelism=1
    )
    plan = part("ray.data._internal.logical.interfaces:LogicalPlan")(source, with_rest)
    _, callbacks = part("ray.data._internal.planner:create_planner")().plan(plan)
    return any(isinstance(callback, rest) for callback in callbacks)


def callbacks_hear_of_steps() -> bool:
    """the executor calls an ExecutionCallback's on_execution_step(executor) (data/stream.py: Rest)"""
    callback, runs = part("components.runtime.ray_internals:ExecutionCallback"), inspect.getsource(type(executor()))
    said = parameters(callback.on_execution_step) == ["self", "executor"]
    return said and "callback.on_execution_step(self)" in runs


def the_executor_says_that_a_rank_waits() -> bool:
    """StreamingExecutor._consumer_idling() is whether there is no block to take (data/stream.py: Rest)"""
    running, found = executor(), []
    for queue in ([], ["a block"]):
        running._output_node = (None, SimpleNamespace(output_queue=queue))
        found.append(running._consumer_idling())
    return found == [True, False]


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
    """TorchTrainer.fit calls _initialize_and_run_controller with scaling_policy=, failure_policy= and callbacks= of
    _create_default_callbacks() (training/launch.py: Trainer)"""
    body = ast.parse(textwrap.dedent(inspect.getsource(ray.train.torch.TorchTrainer.fit)))
    calls = [node for node in ast.walk(body) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if ast.unparse(call.func) == "self._initialize_and_run_controller"]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return {"scaling_policy", "failure_policy"} <= given.keys() and given[
        "callbacks"
    ] == "self._create_default_callbacks()"


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


def a_failure_policy_counts_losses_of_workers() -> bool:
    """DefaultFailurePolicy counts losses of workers in _worker_group_failures (training/launch.py: ByProgress)"""
    policy = part("components.runtime.ray_internals:DefaultFailurePolicy")(ray.train.FailureConfig(max_failures=1))
    said = [policy.make_decision(ray.train.WorkerGroupError("lost", {0: ValueError()})).name for _ in range(2)]
    return said == ["RETRY", "RAISE"] and policy._worker_group_failures == 2


def blocks_that_are_not_taken_hold_a_reading_task() -> bool:
    """the context says how many blocks of a task may wait to be taken (data/stream.py: rank_batches)"""
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


def the_reader_of_logs_may_be_told_to_open_none() -> bool:
    """the log monitor looks for files, and opens as many, as three variables say (pipelines/engine/session.py)"""
    sources = "".join(inspect.getsource(part(f"ray._private.{name}")) for name in ("ray_constants", "log_monitor"))
    return all(f'"{name}"' in sources for name in part("pipelines.engine.session:UNREAD"))


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
