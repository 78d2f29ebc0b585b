"""Samples of the deployment, for gauges and the live page."""

import threading
import time

import pytest
from fake_engine import FakeEngine
from prometheus_client import CollectorRegistry
from served import wait_for

from tightfit.cluster.errors import UnavailableError
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.monitor import Monitor


class AskedEngine(FakeEngine):
    """Counts how often it was asked; may fail to answer."""

    def __init__(self):
        super().__init__()
        self.num_asked = 0
        self.trouble = None

    def status(self):
        self.num_asked += 1
        if self.trouble is not None:
            raise self.trouble
        status = super().status()
        if self.failure:
            object.__setattr__(status, "stages", ())
        return status


@pytest.fixture
def watched():
    engine, registry = AskedEngine(), CollectorRegistry()
    monitor = Monitor(engine, Metrics(registry), idle_poll_s=60, watched_poll_s=0.02)
    monitor.start()
    assert wait_for(monitor.watch)
    yield engine, registry, monitor
    monitor.close()


def test_gauges_follow_the_deployment(watched):
    engine, registry, _ = watched

    def value(name, **labels):
        return registry.get_sample_value(f"tightfit_{name}", labels)

    assert value("num_requests_waiting") == 1
    assert value("kv_cache_usage_ratio") == 5 / 25
    assert value("stage_weight_bytes", stage="1") == 101
    assert value("stage_status_timestamp_seconds") == pytest.approx(time.time(), abs=30)
    assert value("health_state", state="idle") == 1
    engine.failure = "stage 1 is gone"
    assert wait_for(lambda: value("health_state", state="failed") == 1)
    assert value("health_state", state="idle") == 0


def test_a_lost_deployment_still_shows_the_stages_that_it_had(watched):
    engine, _, monitor = watched
    engine.failure = "stage 1 is gone"
    assert wait_for(lambda: monitor.watch()[-1].status.health == "failed")
    assert len(monitor.watch()[-1].status.stages) == 2


@pytest.mark.parametrize("trouble", [UnavailableError("no answer"), RuntimeError("a bug")])
def test_stages_that_do_not_answer_are_asked_again(watched, trouble, caplog):
    engine, _, monitor = watched
    engine.trouble = trouble
    asked = engine.num_asked
    assert wait_for(lambda: monitor.watch() and engine.num_asked > asked + 2)
    engine.trouble = None
    num = len(monitor.watch())
    assert wait_for(lambda: len(monitor.watch()) > num)
    assert str(trouble) in caplog.text


def test_nobody_is_asked_often_when_nobody_watches():
    engine = AskedEngine()
    monitor = Monitor(engine, Metrics(CollectorRegistry()), idle_poll_s=0.2, watched_poll_s=0.01)
    monitor.start()
    time.sleep(0.5)
    assert engine.num_asked <= 4
    assert wait_for(lambda: monitor.watch() and engine.num_asked > 20, limit_s=5)
    monitor.close()
    asked = engine.num_asked
    time.sleep(0.3)
    assert engine.num_asked == asked
    assert "monitor" not in {thread.name for thread in threading.enumerate()}
