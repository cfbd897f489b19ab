from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry

from app.db.engine import Database
from app.web.figures import Figures
from app.web.metrics import Metrics, Rows
from tests.unit.deploy.composition import ROOT

RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((ROOT / "deploy/grafana/hone.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def exported(tmp_path: Path) -> set[str]:
    """Names of every series that `GET /metrics` can have."""
    rows = CollectorRegistry()
    rows.register(Rows(Figures({"queued": 1}, {"trained": 1}, {"tools": 1.0}, 0.0, 0, {"m": 1}, 0, {"runner": 1})))
    metrics = Metrics(Database(f"sqlite+aiosqlite:///{tmp_path / 'none.db'}"))
    metrics.requests.labels("GET", "/", "200").inc()
    metrics.seconds.labels("GET", "/").observe(1)
    return {
        sample.name
        for registry in (rows, metrics.registry)
        for family in registry.collect()
        for sample in family.samples
    }


def test_alerts_and_panels_ask_for_series_that_exist(tmp_path: Path) -> None:
    asked = {
        name for text in [*EXPRESSIONS, *(rule["expr"] for rule in RULES)] for name in re.findall(r"hone_\w+", text)
    }
    assert len(asked) >= 9
    assert asked - exported(tmp_path) == set()


def test_an_alert_waits_and_says_what_to_do() -> None:
    for rule in RULES:
        assert rule["for"]
        assert ":" in rule["annotations"]["summary"] or ";" in rule["annotations"]["summary"], rule["alert"]


def test_the_dashboard_names_no_source_of_its_own_and_overlaps_nowhere() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_rules_are_read() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"]
    assert {scrape["job_name"] for scrape in config["scrape_configs"]} >= {"hone"}
