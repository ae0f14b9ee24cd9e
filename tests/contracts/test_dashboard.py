"""A dashboard asks for metrics that exist, by the names under which Ray exports them."""

import json
import re
from pathlib import Path

import pytest
import ray

from components.serving.replica import Measures
from pipelines.engine.recorder import RunRecorder
from tests.contracts.manifests import build, only
from tests.metric_names import FROM_PROMETHEUS, Query, declared, exported, queries

RAY = Path(ray.__file__).parent
SERVING, TRAINING = "cascade-serving", "cascade-training"
OWN = {SERVING: "ray_cascade_serve_", TRAINING: "ray_cascade_train_"}
NODES = {"ray_node_gpus_utilization"}


@pytest.fixture(params=OWN)
def board(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dashboard(repository: Path, board: str) -> Path:
    return repository / f"infra/monitoring/{board}.json"


@pytest.fixture
def asked(dashboard: Path) -> list[Query]:
    return queries(dashboard)


@pytest.fixture
def own(board: str) -> dict[str, frozenset[str]]:
    """What Ray exports of a replica's measures, or of a training's -> its labels."""
    measures = vars(Measures("tiny")) if board == SERVING else RunRecorder().gauges
    return {name: labels for measure in measures.values() for name, labels in exported(measure).items()}


def family(metric: str) -> str:
    return re.sub(r"_(total|bucket|sum|count)$", "", metric)


def test_own_metrics_and_labels_of_a_dashboard_are_those_that_are_exported_and_all_of_those_are_shown(
    asked, own, board
):
    shown = {metric for query in asked for metric in query.metrics if metric.startswith(OWN[board])}
    assert shown - own.keys() == set()
    assert {family(metric) for metric in own} == {family(metric) for metric in shown}
    for query in asked:
        for metric in query.metrics & own.keys():
            assert query.labels - FROM_PROMETHEUS <= own[metric], query.text


@pytest.fixture(scope="module")
def rays() -> list[re.Pattern[str]]:
    return declared(
        [*sorted((RAY / "serve/_private").glob("*.py")), RAY / "dashboard/modules/reporter/reporter_agent.py"]
    )


def test_all_other_metrics_of_a_dashboard_are_declared_in_ray(asked, rays, board):
    others = {metric for query in asked for metric in query.metrics if not metric.startswith(OWN[board])}
    assert others >= NODES | ({"ray_serve_num_http_requests_total"} if board == SERVING else set())
    assert [metric for metric in others if not any(pattern.fullmatch(metric) for pattern in rays)] == []


def test_a_dashboard_has_a_place_for_each_panel_and_names_no_prometheus_of_its_own(repository, dashboard, board):
    text = dashboard.read_text()
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len({str(panel["gridPos"]) for panel in panels}) == len(panels)
    assert set(re.findall(r'"uid": "([^"]*)"', text)) == {board, "${datasource}"}
    shipped = only(build(repository / "infra/monitoring"), "ConfigMap", f"{board}-dashboard")
    assert shipped["data"] == {dashboard.name: text}
    assert shipped["metadata"]["labels"]["grafana_dashboard"] == "1"
