"""The only imports from Ray's `_internal` and `_private` modules, without any promise of stability.

`tests/contracts/test_ray_assumptions.py` says of another version of Ray which of the assumptions about them broke.
"""

import logging
from typing import Any

# Prints pages of the memory killer and other errors of the cluster to the terminal; no setting leaves them out.
from ray._private import worker as ray_worker

# Tells a worker whether there is a dashboard. The public `ray.init(ignore_reinit_error=True).dashboard_url` names a
# dashboard in workers even if none was started (ray 2.60).
from ray._private.services import get_webui_url_from_internal_kv

# Messages of two calls that a cluster's head answers to any holder of its token: is the head there, its version of Ray,
# its nodes. Every public call joins the cluster first, and fails with twenty lines of native code.
from ray.core.generated import gcs_pb2, gcs_service_pb2

# The only way into the loop that runs a dataset: no public hook is called at each of its steps.
from ray.data._internal.execution.execution_callback import ExecutionCallback

# A callback to be removed where there is no dashboard; no setting removes it.
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# Knows in memory whether a node is about to be taken away. The public `ray.train.get_preemption_info` asks an actor
# each time: milliseconds a step.
from ray.train.v2._internal.execution.context import get_train_context

# Decides whether a training that lost workers is started again; `FailureConfig` counts all losses of a training.
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

# Decides how many workers an elastic training has; `ScalingConfig` knows no numbers that divide a batch.
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

__all__ = [
    "DefaultFailurePolicy",
    "EqualShares",
    "ExecutionCallback",
    "FailureDecision",
    "PlacementGroupCleanerCallback",
    "gcs_pb2",
    "gcs_service_pb2",
    "get_train_context",
    "get_webui_url_from_internal_kv",
    "quiet_ray_data",
    "ray_worker",
]


def quiet_ray_data() -> None:
    """Keeps Ray Data's lines out of the terminal: `ray-data.log` has them, and failures raise."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
            handler.setLevel(logging.CRITICAL)


class EqualShares(ElasticScalingPolicy):
    """Ray's elastic policy, restricted to numbers of workers that divide the batch."""

    def __init__(self, scaling_config: Any, worker_counts: list[int]) -> None:
        super().__init__(scaling_config)
        self.worker_counts = worker_counts

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self.worker_counts if count <= room), default=0)
