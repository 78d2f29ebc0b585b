"""Each alert fires in its trouble, alone, and none does while all is well: promtool plays it."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tightfit.cluster.metrics import HEALTH_STATES

RULES = Path(__file__).resolve().parents[2] / "helm" / "tightfit" / "files" / "rules.yaml"
L = 'job="gw",namespace="ns",instance="a"'
STEP_S, STEPS = 30, 160
"""80 minutes in scrapes."""

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)"
)


def constant(value):
    return f"{value}+0x{STEPS}"


def rising(per_s):
    return f"0+{per_s * STEP_S}x{STEPS}"


def histogram(name, at_most, per_s=2):
    """A histogram all of whose values lie between half of `at_most` and `at_most` seconds."""
    return {
        f'tightfit_{name}_bucket{{{L},le="{at_most / 2}"}}': constant(0),
        f'tightfit_{name}_bucket{{{L},le="{at_most}"}}': rising(per_s),
        f'tightfit_{name}_bucket{{{L},le="+Inf"}}': rising(per_s),
    }


def health(state):
    return {
        f'tightfit_health_state{{{L},state="{name}"}}': constant(int(name == state))
        for name in HEALTH_STATES
    }


def stages(name, first, second):
    return {
        f'tightfit_{name}{{{L},stage="0"}}': first,
        f'tightfit_{name}{{{L},stage="1"}}': second,
    }


def ended(reason, per_s):
    return {f'tightfit_requests_total{{{L},finished_reason="{reason}"}}': rising(per_s)}


def refused(status, per_s):
    return {f'tightfit_requests_refused_total{{{L},status="{status}"}}': rising(per_s)}


WELL = {
    f'tightfit_build_info{{{L},version="1"}}': constant(1),
    f"tightfit_start_time_seconds{{{L}}}": constant(1),
    f"tightfit_stage_status_timestamp_seconds{{{L}}}": rising(1),
    f"tightfit_kv_cache_usage_ratio{{{L}}}": constant(0.95),
    f"tightfit_num_preemptions_total{{{L}}}": rising(0.05),
    **health("ok"),
    f"tightfit_recoveries_total{{{L}}}": f"0+0x80 1+0x{STEPS - 81}",
    **ended("stop", 2),
    **ended("error", 0.01),
    **ended("deadline", 0.05),
    **refused("RESOURCE_EXHAUSTED", 0.05),
    **refused("UNAUTHENTICATED", 0.5),
    **histogram("request_queue_time_seconds", 2.0),
    **histogram("time_to_first_token_seconds", 2.5),
    **histogram("inter_token_latency_seconds", 0.1),
    **histogram("step_overhead_per_stage_seconds", 0.001),
    **stages("stage_busy_seconds_total", rising(0.8), rising(0.5)),
    **stages("stage_memory_differences", constant(0), constant(0)),
    **stages("stage_memory_budget_bytes", constant(2e9), constant(2e9)),
    **stages("stage_rss_anon_bytes", constant(2.1e9), constant(1e9)),
}

TROUBLE = {
    "TightfitAbsent": {f'tightfit_build_info{{{L},version="1"}}': f"_x{STEPS}"},
    "TightfitFailed": health("failed"),
    "TightfitStalled": health("stalled"),
    "TightfitRecovering": {
        **health("recovering"),
        f"tightfit_stage_status_timestamp_seconds{{{L}}}": constant(1),  # known to be away
    },
    "TightfitRecovered": {f"tightfit_recoveries_total{{{L}}}": f"0+0x150 1+0x{STEPS - 151}"},
    "TightfitRestarting": {f"tightfit_start_time_seconds{{{L}}}": " ".join(
        str(i // 15) for i in range(STEPS))},
    "TightfitDraining": health("draining"),
    "TightfitErrors": ended("error", 0.1),
    "TightfitDeadlines": ended("deadline", 0.5),
    "TightfitRefusing": refused("RESOURCE_EXHAUSTED", 0.5),
    "TightfitUnauthenticated": refused("UNAUTHENTICATED", 3),
    "TightfitQueueSlow": histogram("request_queue_time_seconds", 20.0),
    "TightfitFirstTokenSlow": histogram("time_to_first_token_seconds", 20.0),
    "TightfitTokensSlow": histogram("inter_token_latency_seconds", 1.0),
    "TightfitPreempting": {f"tightfit_num_preemptions_total{{{L}}}": rising(1)},
    "TightfitStagesSilent": {
        f"tightfit_stage_status_timestamp_seconds{{{L}}}": f"0+{STEP_S}x100 3000+0x{STEPS - 100}"
    },
    "TightfitStageMemoryGrows": stages("stage_rss_anon_bytes", constant(2.6e9), constant(1e9)),
    "TightfitMemoryMispredicted": stages("stage_memory_differences", constant(0), constant(2)),
    "TightfitStagesUnbalanced": stages("stage_busy_seconds_total", rising(0.9), rising(0.3)),
    "TightfitStepOverheadHigh": histogram("step_overhead_per_stage_seconds", 0.02),
}  # fmt: skip


def alerts():
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"]]


def played(name, series):
    """One of promtool's tests: at the end exactly `name` fires, or nothing for None."""
    gone = {key.partition("{")[0] for key in TROUBLE.get(name, {})} if name else set()
    # A histogram that changes its buckets replaces the old one.
    kept = {k: v for k, v in WELL.items() if k.partition("{")[0] not in gone or "bucket" not in k}
    values = {**kept, **series}
    firing = {} if name is None else {"labels": f'{{alertname="{name}"}}', "value": 1}
    return {
        "name": name or "all is well",
        "interval": f"{STEP_S}s",
        "input_series": [{"series": k, "values": v} for k, v in values.items()],
        "promql_expr_test": [
            {
                "expr": 'max by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{STEPS * STEP_S}s",
                "exp_samples": [firing] if firing else [],
            }
        ],
    }


def test_every_alert_has_its_trouble_played():
    assert sorted(TROUBLE) == sorted(alerts())


@pytest.mark.slow
def test_each_alert_fires_alone_and_none_fires_while_all_is_well(tmp_path):
    tests = [played(None, {}), *(played(name, series) for name, series in TROUBLE.items())]
    file = tmp_path / "rules_test.yaml"
    file.write_text(
        yaml.safe_dump(
            {"rule_files": [str(RULES)], "evaluation_interval": f"{STEP_S}s", "tests": tests}
        )
    )
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules():
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts())} rules found" in done.stdout
