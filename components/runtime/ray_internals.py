"""What is used here of Ray that Ray does not promise to keep: the one door to its `_internal` and `_private` modules.

`tests/contracts/test_ray_assumptions.py` says of another version of Ray which of the assumptions made about them broke.
"""

# Says in a worker whether there is a dashboard. The public `ray.init(ignore_reinit_error=True).dashboard_url` names one
# there even if none was started (ray 2.60).
from ray._private.services import get_webui_url_from_internal_kv

# The messages of two calls that a cluster's head answers to whoever has its token: is it there, which Ray is it, which
# nodes has it. Everything public joins the cluster first, and says in twenty lines of native code that it can't.
from ray.core.generated import gcs_pb2, gcs_service_pb2

# The only way into the loop that runs a dataset: no public hook is called at each of its steps.
from ray.data._internal.execution.execution_callback import ExecutionCallback

# What waits to be read, one task each; datasets make all their tasks at once, however many.
from ray.data._internal.execution.interfaces import BlockEntry, RefBundle
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer

# What a rank iterates of a stream that several read. Public calls give what is in a block and never where it lies, and
# ranks that share one would each be sent a copy.
from ray.data._internal.iterator.stream_split_iterator import StreamSplitDataIterator

# To be left out where there is no dashboard; no setting leaves it out.
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# Says in memory whether a node is about to be taken away. The public `ray.train.get_preemption_info` says the same, but
# asks an actor each time: milliseconds a step.
from ray.train.v2._internal.execution.context import get_train_context

# Decides how many workers an elastic training has; `ScalingConfig` knows a least and a most, but not which numbers
# between them divide a batch.
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

__all__ = [
    "BlockEntry",
    "ElasticScalingPolicy",
    "ExecutionCallback",
    "InputDataBuffer",
    "PlacementGroupCleanerCallback",
    "RefBundle",
    "StreamSplitDataIterator",
    "gcs_pb2",
    "gcs_service_pb2",
    "get_train_context",
    "get_webui_url_from_internal_kv",
]
