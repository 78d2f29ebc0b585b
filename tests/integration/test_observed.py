"""A real service with all of its eyes open: metrics, traces of its stages, logs, the live page."""

import json
import shutil
import subprocess
import urllib.request

import pytest
from browser import CHROMIUM, Browser
from free_ports import free_port
from otlp_receiver import Receiver
from prometheus_client.parser import text_string_to_metric_families
from served import Served, save_model, wait_for

from tightfit.client import Client

pytestmark = pytest.mark.slow
NUM_STAGES, NUM_STEPS = 2, 5


def fetched(address):
    with urllib.request.urlopen(f"http://{address}", timeout=10) as answer:
        return answer.read().decode()


class Observed:
    """One service, and what was seen of it after three requests."""

    def __init__(self, model):
        config = model.with_suffix(".yaml")
        config.write_text("serve: {log_level: info, log_format: json}\n")
        self.metrics, self.live = (f"127.0.0.1:{free_port()}" for _ in range(2))
        with Receiver() as receiver:
            served = Served(
                model, "--format", "fp32", "--stages", str(NUM_STAGES), "--kv-blocks", "64",
                "--metrics-listen", self.metrics, "--live-listen", self.live,
                "--trace-endpoint", receiver.address, "--trace-steps", str(NUM_STEPS),
                "--config", str(config),
            )  # fmt: skip
            with served:
                with Client(served.target, timeout_s=60) as client:
                    for i in range(3):
                        client.generate([7, 8, 9], max_tokens=12, request_id=f"r-{i}")
                assert wait_for(lambda: "generated_per_s" in fetched(f"{self.live}/live.json"))
                # Until the last samples have been taken, which follow at one a second.
                assert wait_for(lambda: self.shown()["load"]["generated_tokens"] == 36)
                self.scraped = fetched(f"{self.metrics}/metrics")
                self.page = self.look() if CHROMIUM else None
                assert served.stop(15, limit_s=60) == 0
            assert wait_for(lambda: len(receiver.spans) >= 3 * (1 + NUM_STAGES * NUM_STEPS))
            self.spans = list(receiver.spans)
        self.lines = [json.loads(x) for x in served.errors.splitlines() if x.startswith("{")]

    def shown(self):
        return json.loads(fetched(f"{self.live}/live.json"))

    def look(self):
        with Browser() as browser:
            browser.open(f"http://{self.live}/")
            assert browser.wait_for("document.querySelectorAll('.stage').length === 2")
            assert browser.problems == []
            return browser.run("document.body.innerText")


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    model = save_model("llama", tmp_path_factory.mktemp("models") / "tiny")
    return Observed(model.path)


def test_its_metrics_are_those_of_what_it_did_and_holds(observed):
    samples = {
        (sample.name, sample.labels.get("stage") or sample.labels.get("finished_reason")): sample
        for family in text_string_to_metric_families(observed.scraped)
        for sample in family.samples
    }
    assert samples["tightfit_requests_total", "length"].value == 3
    assert samples["tightfit_generation_tokens_total", None].value == 36
    for stage in ("0", "1"):
        assert samples["tightfit_stage_busy_seconds_total", stage].value > 0
        weights = samples["tightfit_stage_weight_bytes", stage].value
        assert weights == samples["tightfit_stage_predicted_weight_bytes", stage].value > 0
        assert samples["tightfit_stage_rss_anon_bytes", stage].value > 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_promtool_has_nothing_to_say_of_its_metrics(observed):
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=observed.scraped, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_its_traces_show_each_stage_of_the_first_steps_within_its_request(observed):
    requests = {s.span_id: s for s in observed.spans if s.name.endswith("/Generate")}
    assert len(requests) == 3
    stages = [span for span in observed.spans if span.name.startswith("stage ")]
    assert len(stages) == 3 * NUM_STAGES * NUM_STEPS
    for span in stages:
        parent = requests[span.parent_span_id]
        assert parent.start_time_unix_nano < span.start_time_unix_nano
        assert span.end_time_unix_nano < parent.end_time_unix_nano
        assert span.start_time_unix_nano < span.end_time_unix_nano
    first, second = (s for s in stages[:NUM_STAGES])
    assert (first.name, second.name) == ("stage 0", "stage 1")
    assert first.end_time_unix_nano <= second.start_time_unix_nano


def test_its_log_has_a_line_for_each_request_with_the_id_of_its_trace(observed):
    finished = [line for line in observed.lines if line["message"] == "finished"]
    assert [line["request_id"] for line in finished] == ["r-0", "r-1", "r-2"]
    traces = {span.trace_id.hex() for span in observed.spans}
    assert {line["trace_id"] for line in finished} == traces
    assert all(line["generated_tokens"] == 12 for line in finished)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")
def test_its_live_page_shows_its_stages(observed):
    assert "Stage 0" in observed.page
    assert "Stage 1" in observed.page
    assert "off +0.00 %" in observed.page
