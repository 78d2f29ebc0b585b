"""Stages that are killed while they serve: what comes back, and what clients see of it."""

import os
import signal
import threading
import urllib.request

import grpc
import psutil
import pytest
from free_ports import free_port
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from served import Served, save_model, wait_for

from tightfit.client import Client, TightfitRpcError
from tightfit.v1 import cluster_pb2

pytestmark = pytest.mark.slow

FLAGS = ("--format", "fp32", "--stages", "3", "--kv-blocks", "64")
COUNT = 400
"""Tokens of a stream, which a kill has to meet."""
BACK_LIMIT_S = 90.0
"""A stage's process imports torch, on cores that others use."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("models") / "tiny")


def is_serving(target, service=""):
    with grpc.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status
    return status == health_pb2.HealthCheckResponse.SERVING


def health_of(client):
    return cluster_pb2.Health.Name(client.status().health).removeprefix("HEALTH_").lower()


class Reader:
    """A client that reads a long stream slowly enough to be met by what happens."""

    def __init__(self, target, prompt, count, **sampling):
        self.prompt, self.count, self.sampling = prompt, count, sampling
        self.tokens, self.error = [], None
        self._target = target
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        try:
            with Client(self._target, timeout_s=BACK_LIMIT_S * 3) as client:
                for chunk in client.stream(self.prompt, max_tokens=self.count, **self.sampling):
                    assert chunk.token_offset == len(self.tokens), "a token was lost or repeated"
                    self.tokens += chunk.token_ids
        except (TightfitRpcError, AssertionError) as error:
            self.error = error

    def join(self):
        self._thread.join()
        return self.tokens


def metrics_of(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }


def test_every_stream_outlives_the_loss_of_each_stage_with_the_tokens_of_transformers(model):
    port = free_port()
    prompts = [list(range(2, 12 + 20 * i)) for i in range(4)]
    flags = (*FLAGS, "--metrics-listen", f"127.0.0.1:{port}")
    with Served(model.path, *flags) as served, Client(served.target, timeout_s=60) as client:
        for lost in range(3):
            before = served.stage_pids()
            readers = [Reader(served.target, prompt, COUNT) for prompt in prompts]
            assert wait_for(lambda readers=readers: all(len(r.tokens) > 5 for r in readers))
            os.kill(before[lost], signal.SIGKILL)
            assert wait_for(lambda: health_of(client) == "recovering")
            assert f"stage {lost}'s process ended" in client.status().reason
            assert is_serving(served.target, "liveness")
            assert all(len(r.tokens) < COUNT for r in readers), "the loss came after the end"
            for reader in readers:
                assert reader.join() == model.greedy(reader.prompt, COUNT)
                assert reader.error is None
            after = served.stage_pids()
            assert [b == a for b, a in zip(before, after, strict=True)] == [
                index != lost for index in range(3)
            ]
            assert not psutil.pid_exists(before[lost])
            status = client.status()
            assert (status.epoch, status.num_recoveries, status.reason) == (lost + 2, lost + 1, "")
            assert {stage.epoch for stage in status.stages} == {lost + 2}
        assert wait_for(lambda: is_serving(served.target))
        found = metrics_of(port)
        assert found["tightfit_recoveries_total"] == 3
        assert found["tightfit_replayed_tokens_total"] > 3 * sum(map(len, prompts))
        assert 0 < found["tightfit_recovery_seconds_sum"] < 3 * BACK_LIMIT_S
        assert served.stop(signal.SIGTERM, 30) == 0
        assert served.left_behind() == []


@pytest.mark.parametrize(
    ("number", "streams_end"),
    [
        pytest.param(signal.SIGTERM, True, id="SIGTERM lets streams finish first"),
        pytest.param(signal.SIGINT, False, id="SIGINT does not wait"),
    ],
)
def test_a_service_that_is_told_to_end_while_a_stage_comes_back_leaves_nothing_behind(
    model, number, streams_end
):
    flags = (*FLAGS, "--drain-grace-s", str(BACK_LIMIT_S))
    with Served(model.path, *flags) as served, Client(served.target, timeout_s=60) as client:
        reader = Reader(served.target, [5, 6, 7], COUNT)
        assert wait_for(lambda: len(reader.tokens) > 5)
        os.kill(served.stage_pids()[1], signal.SIGKILL)
        assert wait_for(lambda: health_of(client) == "recovering")
        assert served.stop(number, BACK_LIMIT_S + 20 if streams_end else 20) == 0
        tokens = reader.join()
        assert tokens == model.greedy([5, 6, 7], COUNT)[: len(tokens)]
        assert (len(tokens) == COUNT, reader.error is None) == (streams_end, streams_end)
        assert served.left_behind() == []


def test_two_stages_lost_at_once_and_one_more_while_they_come_back(model):
    with Served(model.path, *FLAGS) as served, Client(served.target, timeout_s=60) as client:
        pids = served.stage_pids()
        reader = Reader(served.target, [5, 6, 7], COUNT, temperature=0.8, seed=3)
        assert wait_for(lambda: len(reader.tokens) > 5)
        os.kill(pids[0], signal.SIGKILL)
        os.kill(pids[2], signal.SIGKILL)
        assert wait_for(lambda: health_of(client) == "recovering")
        os.kill(pids[1], signal.SIGKILL)
        tokens = reader.join()
        if reader.error is not None:  # the third was lost before the two were back: it is said
            assert "It is not back yet" in str(reader.error)
        assert wait_for(lambda: health_of(client) == "idle", BACK_LIMIT_S)
        again = client.generate([5, 6, 7], max_tokens=COUNT, temperature=0.8, seed=3)
        assert list(again.token_ids)[: len(tokens)] == tokens
        assert not set(pids) & set(served.stage_pids())


def test_what_cannot_come_back_is_said_and_comes_back_when_it_can(model, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    for file in model.path.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights, away = path / "model.safetensors", tmp_path / "away"
    with Served(path, *FLAGS) as served, Client(served.target, timeout_s=60) as client:
        reader = Reader(served.target, [5, 6, 7], COUNT)
        assert wait_for(lambda: len(reader.tokens) > 5)
        weights.rename(away)
        os.kill(served.stage_pids()[1], signal.SIGKILL)
        tokens = reader.join()
        assert tokens == model.greedy([5, 6, 7], COUNT)[: len(tokens)]
        assert reader.error.code is grpc.StatusCode.UNAVAILABLE
        assert "It is not back yet" in str(reader.error)
        assert "model" in str(reader.error)
        with pytest.raises(TightfitRpcError, match="stage 1"):
            client.generate("a", max_tokens=1)
        assert health_of(client) == "failed"
        assert wait_for(lambda: not is_serving(served.target))
        away.rename(weights)
        assert wait_for(lambda: health_of(client) == "idle", BACK_LIMIT_S)
        answer = client.generate([5, 6, 7], max_tokens=30)
        assert list(answer.token_ids) == model.greedy([5, 6, 7], 30)
        assert wait_for(lambda: is_serving(served.target))
