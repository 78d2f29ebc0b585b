"""TLS on the gateway's port, with real certificates and real sockets, good and bad."""

import asyncio
import os
import shutil
import socket
import ssl
from contextlib import asynccontextmanager
from functools import partial
from random import Random

import grpc
import pytest
from certificates import Certificates
from fake_engine import in_loop, reply_ids, serving
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tightfit.client import AsyncClient, TightfitRpcError
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.gateway import server
from tightfit.cluster.gateway.auth import GatewaySecurity
from tightfit.cluster.security.audit import AuditLog
from tightfit.cluster.security.tls import ServerTls
from tightfit.v1 import cluster_pb2, cluster_pb2_grpc

LIMIT_S = 10.0


@pytest.fixture
def ours(tmp_path):
    return Certificates(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path):
    return Certificates(tmp_path / "theirs")


@asynccontextmanager
async def encrypted(cert, key, client_ca=None, audit=None):
    """A gateway that speaks TLS."""
    credentials = ServerTls(cert, key, client_ca).credentials()
    async with serving(security=GatewaySecurity(credentials=credentials, audit=audit)) as gateway:
        yield gateway


async def is_answered(target, credentials=None):
    """Whether a client with these credentials (None: plaintext) gets the right tokens."""
    async with AsyncClient(target, timeout_s=3.0, credentials=credentials) as client:
        try:
            answer = await client.generate("ab", max_tokens=4)
        except TightfitRpcError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                raise  # it got through
            return False
    return list(answer.token_ids) == reply_ids()[:4]


def handshake(target, *, least, most):
    """Version that a TLS client limited to these comes to, or why the server refused it."""
    host, _, port = target.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")  # else OpenSSL itself would not offer what is old
    context.minimum_version, context.maximum_version = least, most
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), timeout=LIMIT_S) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as connection:
                return connection.version()
        except ssl.SSLError as error:
            return error.reason


def send_raw(target, data):
    """Send bytes, and read until the other end closes or has nothing to say for a while."""
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=LIMIT_S) as connection:
        try:
            connection.sendall(data)
            connection.settimeout(0.3)
            while connection.recv(65536):
                pass
        except (TimeoutError, ConnectionError):
            pass


# -- who is let in ---------------------------------------------------------------------------


@in_loop
async def test_only_who_trusts_the_right_authority_gets_through(ours, theirs):
    async with encrypted(*ours.issue("gateway")) as gateway:
        assert await is_answered(gateway.target, ours.trusting())
        assert not await is_answered(gateway.target, theirs.trusting())
        assert not await is_answered(gateway.target, None)  # plaintext to a TLS port
        assert await is_answered(gateway.target, ours.trusting())
        assert len(gateway.engine.requests) == 2


@in_loop
async def test_a_certificate_that_has_expired_is_refused_by_clients(ours):
    async with encrypted(*ours.issue("gateway", expired=True)) as gateway:
        assert not await is_answered(gateway.target, ours.trusting())


@in_loop
async def test_a_certificate_of_another_host_is_refused_by_clients(ours):
    cert, key = ours.issue("gateway", hosts=("elsewhere.example",))
    async with encrypted(cert, key) as gateway:
        assert not await is_answered(gateway.target, ours.trusting())


@in_loop
async def test_with_a_client_authority_only_its_clients_are_answered(ours, theirs, tmp_path):
    audit = AuditLog(str(tmp_path / "audit.jsonl"))
    async with encrypted(*ours.issue("gateway"), ours.ca, audit) as gateway:
        good = ours.trusting(*ours.issue("ops"))
        assert await is_answered(gateway.target, good)
        assert not await is_answered(gateway.target, ours.trusting())
        assert not await is_answered(gateway.target, ours.trusting(*theirs.issue("ops")))
        assert not await is_answered(
            gateway.target, ours.trusting(*ours.issue("late", expired=True))
        )
        assert not await is_answered(gateway.target, None)
        async with grpc.aio.secure_channel(gateway.target, good) as channel:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            await stub.GetStatus(cluster_pb2.GetStatusRequest())
        assert len(gateway.engine.requests) == 1
    assert '"certificate": "ops"' in (tmp_path / "audit.jsonl").read_text()


@in_loop
async def test_tls_older_than_1_2_is_refused(ours):
    async with encrypted(*ours.issue("gateway")) as gateway:
        for version, name in (("TLSv1_2", "TLSv1.2"), ("TLSv1_3", "TLSv1.3")):
            exactly = getattr(ssl.TLSVersion, version)
            done = partial(handshake, gateway.target, least=exactly, most=exactly)
            assert await asyncio.to_thread(done) == name
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            old = await asyncio.to_thread(
                handshake, gateway.target, least=ssl.TLSVersion.TLSv1, most=ssl.TLSVersion.TLSv1_1
            )
        assert old == "UNEXPECTED_EOF_WHILE_READING"  # the server hung up on what was offered
        assert await is_answered(gateway.target, ours.trusting())


@pytest.mark.parametrize("with_tls", [True, False])
@in_loop
async def test_raw_bytes_and_connections_that_say_nothing_do_no_harm(ours, with_tls):
    credentials = ServerTls(*ours.issue("gateway")).credentials() if with_tls else None
    rng = Random(5)
    nonsense = [
        b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + rng.randbytes(3000),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(5000), b"\0" * 100_000,
        *(rng.randbytes(rng.randrange(1, 4000)) for _ in range(10)),
    ]  # fmt: skip
    async with serving(security=GatewaySecurity(credentials=credentials)) as gateway:
        host, _, port = gateway.target.rpartition(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(50)]
        await asyncio.gather(
            *(asyncio.to_thread(send_raw, gateway.target, data) for data in nonsense)
        )
        assert await is_answered(gateway.target, ours.trusting() if with_tls else None)
        assert len(gateway.engine.requests) == 1
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("with_tls", [True, False])
@in_loop
async def test_a_connection_that_says_nothing_is_closed(ours, with_tls, monkeypatch):
    name = "grpc.server_handshake_timeout_ms"
    assert dict(server.OPTIONS)[name] == 10_000
    monkeypatch.setattr(server, "OPTIONS", tuple({**dict(server.OPTIONS), name: 500}.items()))
    credentials = ServerTls(*ours.issue("gateway")).credentials() if with_tls else None
    async with serving(security=GatewaySecurity(credentials=credentials)) as gateway:
        host, _, port = gateway.target.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=LIMIT_S) as silent:

            def until_closed():
                while silent.recv(1000):
                    pass

            await asyncio.to_thread(until_closed)


# -- certificates change ---------------------------------------------------------------------


def replace(source, target):
    """As certificate managers do: all of the new file or all of the old one."""
    shutil.copy(source, f"{target}.new")
    os.replace(f"{target}.new", target)


@in_loop
async def test_new_certificates_are_used_without_a_restart(ours, theirs, caplog):
    cert, key = ours.issue("gateway")
    async with encrypted(cert, key) as gateway:
        assert await is_answered(gateway.target, ours.trusting())
        for source, target in zip(theirs.issue("gateway"), (cert, key), strict=True):
            replace(source, target)
        assert await is_answered(gateway.target, theirs.trusting())
        assert not await is_answered(gateway.target, ours.trusting())
    assert "read again" in caplog.text


@in_loop
async def test_certificates_that_are_damaged_later_leave_the_old_ones_in_use(ours, theirs, caplog):
    cert, key = ours.issue("gateway")
    async with encrypted(cert, key) as gateway:
        other, _ = theirs.issue("gateway")
        replace(other, cert)  # and not the key: half of a change
        assert await is_answered(gateway.target, ours.trusting())
        assert "the certificates read last stay in use" in caplog.text
        cert.unlink()
        assert await is_answered(gateway.target, ours.trusting())
        assert not await is_answered(gateway.target, theirs.trusting())


def test_files_that_do_not_go_together_are_refused_by_name(ours, theirs, tmp_path):
    cert, key = ours.issue("gateway")
    _, other_key = theirs.issue("gateway")
    with pytest.raises(ConfigError, match="are no certificate and its key"):
        ServerTls(cert, other_key)
    with pytest.raises(ConfigError, match="are no certificate and its key"):
        ServerTls(key, key)
    with pytest.raises(ConfigError, match=r"nowhere.*: cannot be read: No such file"):
        ServerTls(cert, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no certificates in PEM"):
        ServerTls(cert, key, key)


def test_an_encrypted_key_is_refused_not_asked_for(ours):
    from cryptography.hazmat.primitives import serialization

    cert, key = ours.issue("gateway")
    plain = serialization.load_pem_private_key(key.read_bytes(), password=None)
    key.write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    with pytest.raises(ConfigError, match="the private key is encrypted"):
        ServerTls(cert, key)


def test_a_key_that_everybody_can_read_is_complained_about(ours, caplog):
    cert, key = ours.issue("gateway")
    ServerTls(cert, key)
    assert caplog.text == ""
    key.chmod(0o644)
    ServerTls(cert, key)
    assert f"{key} can be read by every user of this machine" in caplog.text


# -- the port for probes ---------------------------------------------------------------------


@in_loop
async def test_the_port_for_probes_answers_health_checks_and_nothing_else(ours):
    async with encrypted(*ours.issue("gateway"), ours.ca) as gateway:
        target = f"127.0.0.1:{await gateway.server.start_health('127.0.0.1', 0)}"
        async with grpc.aio.insecure_channel(target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for state, failure in (("SERVING", ""), ("NOT_SERVING", "gone"), ("SERVING", "")):
                gateway.engine.failure = failure
                async with asyncio.timeout(LIMIT_S):
                    wanted = health_pb2.HealthCheckResponse.ServingStatus.Value(state)
                    while (await stub.Check(health_pb2.HealthCheckRequest())).status != wanted:
                        await asyncio.sleep(0.02)
            for method in (
                "/tightfit.v1.InferenceService/Generate",
                "/tightfit.v1.ClusterService/Drain",
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(method)(b"")
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/grpc.health.v1.Health/Check")(b"x" * 10_000)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert gateway.engine.requests == []
        assert not gateway.server.drain_requested.is_set()
