"""A driver that starts none of the runs that it is told of: it asks the nodes whether they could, and says why not.

python -m tests.integration.ask_nodes '{"name": {"storage": "…", "set": […]}}' -> {"name": "why not, or nothing"}
"""

import json
import sys

from components.configuration.usage import UsageError
from pipelines.engine.driver import RunOptions, prepare
from pipelines.engine.session import start_ray
from pipelines.planning.preflight import check_nodes, space_of


def ask(options: RunOptions) -> str:
    prepared = prepare(options)
    try:
        check_nodes(prepared.needs, prepared.root, space_of(prepared.workflow, prepared.planned))
    except UsageError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    start_ray(worker_start_timeout=120, verbose=False)
    runs = json.loads(sys.argv[1])
    print(json.dumps({name: ask(RunOptions("smoke", tracking="none", **options)) for name, options in runs.items()}))
