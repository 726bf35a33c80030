# SPDX-License-Identifier: Apache-2.0
"""What contrib/ says of metrics, beside those that the command gives."""

from __future__ import annotations

from collections.abc import Iterator
import itertools
import json
import pathlib
import re
from typing import Any, get_args

import pytest

from imgprealloc.cli import metrics
from imgprealloc.image import State

CONTRIB = pathlib.Path(__file__).parent.parent.parent / "contrib"
RULES = (CONTRIB / "prometheus" / "rules.yaml").read_text()
DASHBOARD = json.loads((CONTRIB / "grafana" / "imgprealloc.json").read_text())

# Prometheus's own.
_ITS_LABELS = {"instance", "job"}


def given() -> dict[str, set[str]]:
    """List the metrics that the command gives, and their labels."""
    registry: Any = metrics._registry([], 0)
    return {family.name: set(registry._names_to_collectors[family.name]._labelnames) for family in registry.collect()}


def expressions(panels: list[dict[str, Any]]) -> Iterator[str]:
    for panel in panels:
        for target in panel["targets"]:
            yield target["expr"]


EXPRESSIONS = [*re.findall(r"^ +expr: (.*)$", RULES, re.MULTILINE), *expressions(DASHBOARD["panels"])]


def test_rules_and_dashboard_have_expressions() -> None:
    assert len(EXPRESSIONS) > 10


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_metrics_and_labels_that_are_asked_for_are_given(expression: str) -> None:
    asked = re.findall(r"(imgprealloc_\w+)(?:{(.*?)})?", expression)

    assert asked
    for name, selected in asked:
        assert name in given()
        assert set(re.findall(r"(\w+)=", selected)) <= given()[name] | _ITS_LABELS
        for states in re.findall(r'state=~?"(.*?)"', selected):
            assert set(states.split("|")) <= set(get_args(State))


def test_each_metric_is_shown_and_alerted_of() -> None:
    for name in given():
        assert name in RULES
        assert any(name in expression for expression in expressions(DASHBOARD["panels"]))


def test_labels_in_the_texts_of_alerts_are_those_of_their_metrics() -> None:
    for rule in RULES.split("- alert: ")[1:]:
        (name, *_) = re.findall(r"imgprealloc_\w+", rule)
        assert set(re.findall(r"\$labels\.(\w+)", rule)) <= given()[name] | _ITS_LABELS


def test_dashboard_s_panels_have_titles_units_and_the_data_source_that_is_chosen() -> None:
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "instance"]
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_dashboard_s_panels_do_not_cover_each_other() -> None:
    covered = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]

    assert len(covered) == len(set(covered))
    assert max(x for x, _ in covered) == 23


def test_metrics_are_written_where_the_unit_and_the_page_look_for_them() -> None:
    service = (CONTRIB / "systemd" / "imgprealloc-metrics.service").read_text()

    (command,) = re.findall("^ExecStart=/usr/bin/env (.*)$", service, re.MULTILINE)
    (folder,) = re.findall("^ConditionPathIsDirectory=(.*)$", service, re.MULTILINE)
    assert command == f"imgprealloc metrics -o {folder}/imgprealloc.prom"
