"""A whole service with TLS, tokens and every port that it can have."""

import contextlib
import json
import socket
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
from certificates import Certificates
from grpc_health.v1 import health_pb2, health_pb2_grpc
from noise import send_noise
from served import Served, save_model, wait_for

from tightfit.client import Client, TightfitRpcError
from tightfit.cluster.cli import main

PROMPT = "what nobody else may read"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def listening(processes):
    """TCP ports that these processes listen on."""
    ports = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            ports |= {
                c.laddr.port
                for c in process.net_connections(kind="tcp")
                if c.status == psutil.CONN_LISTEN
            }
    return ports


def shown_by(processes):
    """What every user of the machine sees of them."""
    lines = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return "\n".join(lines)


def ray_token(processes):
    """Of the private cluster, out of its processes' environment."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if token := process.environ().get("RAY_AUTH_TOKEN"):
                return token
    raise AssertionError("no process has Ray's token")


@pytest.mark.slow
def test_a_secured_service_answers_its_callers_and_nobody_else_on_any_port(tmp_path, capsys):
    model = save_model("llama", tmp_path / "tiny")
    certificates, tokens = Certificates(tmp_path / "certificates"), tmp_path / "tokens.json"
    secrets = {}
    for name, role in (("ann", "user"), ("ops", "admin")):
        main(["token", "create", name, "--role", role, "--tokens-file", str(tokens)])
        secrets[name] = capsys.readouterr().out.strip()
    cert, key = certificates.issue("gateway")
    metrics, health = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with Served(
        model.path, "--tls-cert", str(cert), "--tls-key", str(key), "--tokens-file", str(tokens),
        "--audit-log", str(tmp_path / "audit.jsonl"), "--metrics-listen", metrics,
        "--health-listen", health, "--log-level", "debug", "--format", "fp32",
    ) as service:  # fmt: skip
        everybody = [psutil.Process(service.process.pid), *service.family]
        credentials = certificates.trusting()

        def ask(secret):
            with Client(
                service.target, timeout_s=60, credentials=credentials, token=secret
            ) as client:
                return client.generate(PROMPT, max_tokens=8).token_ids

        before = ask(secrets["ann"])
        ports = listening(everybody)
        named = {int(address.rpartition(":")[2]) for address in (service.target, metrics, health)}
        assert named < ports
        assert len(ports) > len(named) + 3  # Ray's
        assert send_noise(ports) >= 4 * len(ports) - 8

        for secret in (None, "tft_wrong"):
            with pytest.raises(TightfitRpcError, match="UNAUTHENTICATED"):
                ask(secret)
        with grpc.insecure_channel(health) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        scraped = urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10).read().decode()
        assert "tightfit_generation_tokens_total" in scraped
        assert ask(secrets["ann"]) == before

        main(["token", "revoke", "ann", "--tokens-file", str(tokens)])

        def is_refused():
            try:
                ask(secrets["ann"])
            except TightfitRpcError as error:
                return error.code is grpc.StatusCode.UNAUTHENTICATED
            return False

        assert wait_for(is_refused, 10)
        seen = shown_by(everybody) + scraped
        hidden = [*secrets.values(), ray_token(everybody), PROMPT]
        with Client(
            service.target, timeout_s=30, credentials=credentials, token=secrets["ops"]
        ) as client:
            seen += str(client.status())
            client.drain()
        _, errors = service.process.communicate(timeout=60)
        assert service.process.returncode == 0
        audit = (tmp_path / "audit.jsonl").read_text()
        assert [json.loads(line)["method"] for line in audit.splitlines()] == ["GetStatus", "Drain"]
        for text in (seen, errors, audit):
            assert not [secret for secret in hidden if secret in text]
    assert not Path(f"/proc/{service.process.pid}").exists()
