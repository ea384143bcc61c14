"""The Grafana dashboard: something Grafana imports, and every metric in it is exposed."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.server.requests import CHAT, chat_body
from tests.server.serving import NAME, Server
from vllm_flow.engine.front_end.metrics import NO_IMAGE
from vllm_flow.policy_keys import BASELINE

FILE = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"
ALERTS = FILE.with_name("alerts.yml")
COLUMNS = 24
METRIC = re.compile(r"\b(?:vllm|vllm_flow):\w+")
VARIABLE = re.compile(r"\$\{?(\w+)")
GRAFANAS = {"__rate_interval", "__range", "__interval"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def queries(dashboard: dict[str, Any]) -> list[str]:
    """Every query of a panel or a variable."""
    panels = [target["expr"] for panel in drawn(dashboard) for target in panel["targets"]]
    variables = [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    return panels + variables


def drawn(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_grafana_can_import_it(dashboard: dict[str, Any]) -> None:
    """What Grafana's import asks for: no id of its own, a short uid, a schema version it can migrate."""
    assert dashboard["id"] is None
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", dashboard["uid"])
    assert dashboard["schemaVersion"] >= 36  # data sources as objects, time series for graphs
    assert dashboard["title"] and dashboard["time"].keys() == {"from", "to"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in drawn(dashboard):
        assert panel["title"] and panel["description"] and panel["targets"]
        assert panel["type"] in ("timeseries", "stat")
        assert panel["fieldConfig"]["defaults"]["unit"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    for box in boxes:
        assert box["x"] >= 0 and box["y"] >= 0 and box["w"] > 0 and box["h"] > 0
        assert box["x"] + box["w"] <= COLUMNS
    for one, other in itertools.combinations(boxes, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_source_and_model_are_variables(dashboard: dict[str, Any], queries: list[str]) -> None:
    declared = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert declared == {"datasource", "model_name"}
    used = {name for query in queries for name in VARIABLE.findall(query)}
    assert used - GRAFANAS == {"model_name"}
    for panel in drawn(dashboard):
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            # Of a metric without the model's name, another model's figures would be shown.
            braces = re.findall(r"\{[^{}]*\}", target["expr"])
            assert len(braces) == len(METRIC.findall(target["expr"]))
            assert all('model_name=~"$model_name"' in brace for brace in braces)
            assert target["expr"].count("(") == target["expr"].count(")")


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    assert group["name"] == "vllm-flow"
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_prometheus_can_read_the_alerts() -> None:
    """What Prometheus asks of a rule; a parsed file has no key twice and no other."""
    assert len({rule["alert"] for rule in alerts()}) == 3
    for rule in alerts():
        assert {"alert", "expr", "labels", "annotations"} <= rule.keys()
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"[A-Za-z_]\w*", rule["alert"])
        assert re.fullmatch(r"\d+[smhd]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        expression = rule["expr"]
        assert expression.count("(") == expression.count(")") and METRIC.search(expression)
        # The summary names the model, so each part of the expression must keep that label.
        assert "{{ $labels.model_name }}" in rule["annotations"]["summary"]
        assert expression.count("sum by (model_name)") == len(METRIC.findall(expression))


def test_labels_that_queries_choose_by_are_those_that_are_counted(queries: list[str]) -> None:
    expressions = [*queries, *(rule["expr"] for rule in alerts())]
    named = {value for query in expressions for value in re.findall(r'policy!?="([^"]+)"', query)}
    assert named == {BASELINE, NO_IMAGE}


def test_every_metric_is_exposed_by_the_server(small: Server, queries: list[str]) -> None:
    assert small.post(CHAT, chat_body(72, 2)).status_code == 200
    text = small.client.get("/metrics").text
    exposed = {line.partition("{")[0] for line in text.splitlines() if "{" in line}
    named = {name for query in queries for name in METRIC.findall(query)}
    assert named <= exposed, named - exposed
    assert {name for rule in alerts() for name in METRIC.findall(rule["expr"])} <= exposed
    assert {name for name in named if name.startswith("vllm_flow:")} == {
        name for name in exposed if name.startswith("vllm_flow:") and name.endswith("_total")
    }
    for name in named:
        assert re.search(rf'^{name}\{{[^}}]*model_name="{NAME}"', text, re.MULTILINE), name
