"""Dashboard, alerts and documents against the metrics that there are."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from tightfit.cluster.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "helm" / "tightfit" / "files"
DASHBOARD = json.loads((FILES / "dashboard.json").read_text())
RULES = yaml.safe_load((FILES / "rules.yaml").read_text())["groups"]
OPERATE = (ROOT / "docs" / "operate.md").read_text()
NOT_DRAWN: set[str] = set()
"""Metrics that the dashboard does without; each with a reason here."""
SUFFIX = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}


def families():
    registry = CollectorRegistry()
    Metrics(registry, num_stages=1)
    return list(registry.collect())


def existing():
    return {f.name + suffix for f in families() for suffix in SUFFIX[f.type]}


def panels():
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions():
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def alert_rules():
    return [rule for group in RULES for rule in group["rules"]]


def named(text):
    return set(re.findall(r"\btightfit_[a-z0-9_]+", text))


def test_every_metric_of_the_dashboard_and_of_the_alerts_exists():
    for text in (*expressions(), *(rule["expr"] for rule in alert_rules())):
        assert named(text), text
        assert named(text) <= existing(), text
    for variable in DASHBOARD["templating"]["list"][1:]:
        assert named(variable["query"]["query"]) <= existing()


def test_every_metric_is_drawn_or_says_why_not():
    drawn = named(" ".join(expressions()))
    missing = {
        family.name
        for family in families()
        if not drawn & {family.name + suffix for suffix in SUFFIX[family.type]}
    }
    assert missing == NOT_DRAWN


def test_every_metric_and_every_alert_is_explained_for_operators():
    explained = named(OPERATE)
    names = {f.name + ("_total" if f.type == "counter" else "") for f in families()}
    assert explained == names
    headings = re.findall(r"^#### (\w+)$", OPERATE, re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in alert_rules())


def test_every_alert_has_a_severity_and_says_what_it_is():
    for rule in alert_rules():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["annotations"]["description"].endswith(".")


def test_the_dashboard_can_be_imported_anywhere():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) > 25
    assert DASHBOARD["uid"] == "tightfit"
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert all(t["datasource"]["uid"] == "${datasource}" for t in panel["targets"])
        assert all('instance=~"$instance"' in t["expr"] for t in panel["targets"]), panel["title"]
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource", "job", "instance"]


def test_no_two_panels_lie_on_each_other():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_prometheus_can_read_every_expression_of_the_dashboard(tmp_path):
    texts = [e.replace("$__rate_interval", "1m").replace("$", "") for e in expressions()]
    rules = [{"record": f"panel:{i}", "expr": text} for i, text in enumerate(texts)]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout
