"""The live page beyond this machine: TLS, tokens, and what is refused without them."""

import http.client
import json
import os
import ssl
from contextlib import ExitStack

import pytest
from certificates import Certificates
from fake_engine import FakeEngine
from free_ports import free_port
from prometheus_client import CollectorRegistry
from served import wait_for

from tightfit.cluster.config import serve_config
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.observing import show
from tightfit.cluster.security.tokens import digest, encode, read


def configured(**settings):
    return serve_config({"serve": {"model": "m", "stages": 1, **settings}})


@pytest.fixture
def files(tmp_path):
    certificates = Certificates(tmp_path / "tls")
    cert, key = certificates.issue("gateway")
    tokens = tmp_path / "tokens.json"
    entry = {"name": "alice", "sha256": digest("tft_alice"), "created": "2026-01-01T00:00:00Z"}
    late = {**entry, "name": "late", "sha256": digest("tft_late"), "expires": entry["created"]}
    tokens.write_text(json.dumps({"version": 1, "tokens": [entry, late]}))
    return certificates, cert, key, tokens


def ask(port, path="/live.json", *, trusts=None, **headers):
    if trusts is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    else:
        context = ssl.create_default_context(cafile=trusts)
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture
def shown():
    with ExitStack() as cleanup:

        def start(**settings):
            port = free_port()
            config = configured(live_listen=f"127.0.0.1:{port}", **settings)
            registry = CollectorRegistry()
            show(config, FakeEngine(), Metrics(registry), registry, cleanup)
            return port

        yield start


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "gateway.example"])
def test_beyond_this_machine_it_needs_tls_and_tokens(host, files):
    _, cert, key, tokens = files
    tls = {"tls_cert": str(cert), "tls_key": str(key)}
    with pytest.raises(ConfigError, match=r"live_listen: .* without TLS .* authentication"):
        configured(live_listen=f"{host}:8080")
    with pytest.raises(ConfigError, match=r"live_listen: .* without authentication"):
        configured(live_listen=f"{host}:8080", **tls)
    with pytest.raises(ConfigError, match=r"live_listen: .* without TLS"):
        configured(live_listen=f"{host}:8080", tokens_file=str(tokens))
    assert configured(live_listen=f"{host}:8080", tokens_file=str(tokens), **tls)
    assert configured(live_listen=f"{host}:8080", insecure_listen=True)
    assert configured(live_listen="localhost:8080")


def test_only_a_token_in_force_sees_the_service(shown, files):
    *_, tokens = files
    port = shown(tokens_file=str(tokens))
    for secret in ("tft_alice2", "tft_late", "alice", digest("tft_alice")):
        assert ask(port, Authorization=f"Bearer {secret}")[0] == 401
    assert ask(port)[0] == 401
    assert ask(port, Authorization="Bearer tft_alice")[0] == 200
    tokens.write_bytes(encode([token for token in read(tokens) if token.name != "alice"]))
    assert wait_for(lambda: ask(port, Authorization="Bearer tft_alice")[0] == 401)


def test_with_a_certificate_it_is_https_and_follows_its_renewal(shown, files):
    certificates, cert, key, _ = files
    port = shown(tls_cert=str(cert), tls_key=str(key))
    assert ask(port, trusts=certificates.ca)[0] == 200
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(port)  # plain HTTP
    other = Certificates(certificates.directory.parent / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(port, trusts=other.ca)
    for new, old in zip(other.issue("gateway"), (cert, key), strict=True):
        os.replace(new, old)
    assert ask(port, trusts=other.ca)[0] == 200
    cert.write_text("damaged")
    assert ask(port, trusts=other.ca)[0] == 200


def test_a_certificate_that_cannot_be_used_is_said_at_once(shown, files):
    certificates, cert, _, _ = files
    _, foreign_key = certificates.issue("other")
    with pytest.raises(ConfigError, match="cannot be used for HTTPS"):
        shown(tls_cert=str(cert), tls_key=str(foreign_key))


def test_with_mutual_tls_a_browser_needs_a_certificate(shown, files):
    certificates, cert, key, _ = files
    port = shown(tls_cert=str(cert), tls_key=str(key), tls_client_ca=str(certificates.ca))
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(port, trusts=certificates.ca)
    context = ssl.create_default_context(cafile=certificates.ca)
    context.load_cert_chain(*certificates.issue("browser"))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    connection.request("GET", "/live.json")
    assert connection.getresponse().status == 200
    connection.close()
