"""What a client sends of its token, and to whom."""

import asyncio

import pytest
from certificates import Certificates
from fake_engine import reply_ids, serving_in_thread

from tightfit.client import AsyncClient, Client, TightfitRpcError, read_token, tls_credentials
from tightfit.client import load as load_generator
from tightfit.client._security import call_metadata
from tightfit.cluster.cli import FAILED, OK, main
from tightfit.cluster.gateway.auth import GatewaySecurity
from tightfit.cluster.security.store import TokenStore
from tightfit.cluster.security.tls import ServerTls
from tightfit.cluster.security.tokens import editing

HERE = ("127.0.0.1:1", "localhost:1", "LOCALHOST:1", "[::1]:1", "unix:/s", "dns:///localhost:1",
        "ipv4:127.0.0.1:1", "dns://8.8.8.8/127.0.0.1:1", "127.0.0.1")  # fmt: skip
ELSEWHERE = ("10.0.0.1:1", "example.org:1", "localhost.example.org:1", "[2001:db8::1]:1",
             "dns:///example.org:1", "127.0.0.1.example.org:1", "0.0.0.0:1", "")  # fmt: skip


@pytest.fixture
def secured(tmp_path, capsys):
    """A gateway with TLS and tokens; its flags for clients, and its directory."""
    certificates = Certificates(tmp_path / "certificates")
    file = tmp_path / "tokens.json"
    for name in ("ann", "ops"):
        role = "admin" if name == "ops" else "user"
        main(["token", "create", name, "--role", role, "--tokens-file", str(file)])
        (tmp_path / name).write_text(capsys.readouterr().out)
    security = GatewaySecurity(
        credentials=ServerTls(*certificates.issue("gateway")).credentials(),
        tokens=TokenStore(file),
    )
    with serving_in_thread(security=security) as gateway:
        gateway.flags = ["--target", gateway.target, "--tls-ca", str(certificates.ca)]
        gateway.ca, gateway.directory = certificates.ca, tmp_path
        yield gateway


@pytest.mark.parametrize("target", HERE)
def test_a_token_may_go_to_this_machine_in_the_clear(target):
    sent = call_metadata(target, "t", is_encrypted=False, insecure_token=False)
    assert sent == (("authorization", "Bearer t"),)


@pytest.mark.parametrize("target", ELSEWHERE)
@pytest.mark.parametrize("make", [Client, AsyncClient])
def test_a_token_in_the_clear_is_not_sent_to_another_machine_unless_told(target, make):
    with pytest.raises(ValueError, match=r"would travel to .* without encryption") as caught:
        make(target, token="tft_x")
    assert "tft_x" not in str(caught.value)
    assert call_metadata(target, "t", is_encrypted=True, insecure_token=False)
    assert call_metadata(target, "t", is_encrypted=False, insecure_token=True)
    assert call_metadata(target, None, is_encrypted=False, insecure_token=False) == ()


@pytest.mark.parametrize("text", ["", "\n", "two words", "a\nb", "ä", "\0", "x" * 2000])
def test_a_file_without_one_token_is_refused_without_showing_it(tmp_path, text):
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ValueError, match="does not hold one token") as caught:
        read_token(file)
    assert not text.strip() or text.strip() not in str(caught.value)


def test_a_token_comes_from_its_file_or_else_from_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("tft_file\n")
    monkeypatch.delenv("TIGHTFIT_TOKEN", raising=False)
    assert read_token() is None
    monkeypatch.setenv("TIGHTFIT_TOKEN", " tft_environment\n")
    assert read_token() == "tft_environment"
    assert read_token(file) == "tft_file"


def test_both_clients_show_certificate_and_token_on_every_call(secured):
    options = {
        "credentials": tls_credentials(ca=secured.ca),
        "token": read_token(secured.directory / "ops"),
        "timeout_s": 10,
    }
    with Client(secured.target, **options) as client:
        assert list(client.generate("ab", max_tokens=4).token_ids) == reply_ids()[:4]
        assert [t for c in client.stream("ab", max_tokens=4) for t in c.token_ids]
        assert client.score("abc").token_ids == (97, 98, 99)
        assert client.detokenize(client.tokenize("ab")) == "ab"
        assert client.model().name == client.status().model == "fake"

    async def the_same():
        async with AsyncClient(secured.target, **options) as client:
            assert [t async for c in client.stream("ab", max_tokens=4) for t in c.token_ids]
            return await client.drain()

    assert asyncio.run(the_same()) == 0
    options["token"] = None
    with (
        Client(secured.target, **options) as client,
        pytest.raises(TightfitRpcError, match="UNAUTHENTICATED"),
    ):
        client.status()


def test_every_command_shows_certificate_and_token(secured, capsys, monkeypatch):
    monkeypatch.delenv("TIGHTFIT_TOKEN", raising=False)
    token = ["--token-file", str(secured.directory / "ann")]
    assert main(["generate", "ab", *secured.flags, *token]) == OK
    assert main(["status", *secured.flags, *token]) == OK
    assert main(["bench", "serve", "--requests", "3", *secured.flags, *token]) == OK
    assert main(["drain", *secured.flags, *token]) == FAILED
    assert "needs a token with the role admin" in capsys.readouterr().err
    assert main(["status", *secured.flags]) == FAILED
    assert "UNAUTHENTICATED: a token is needed" in capsys.readouterr().err
    secret = (secured.directory / "ops").read_text().strip()
    monkeypatch.setenv("TIGHTFIT_TOKEN", secret)
    assert main(["drain", *secured.flags]) == OK
    out, err = capsys.readouterr()
    assert secret not in out + err


def test_commands_name_the_file_that_cannot_be_used(tmp_path, capsys):
    missing = str(tmp_path / "missing")
    for flags in (["--token-file", missing], ["--tls-ca", missing]):
        assert main(["status", *flags]) == FAILED
        assert f"{missing}: cannot be read: No such file" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            load_generator.main(flags)
        assert f"{missing}: cannot be read: No such file" in capsys.readouterr().err


def test_a_token_that_was_revoked_a_moment_ago_is_refused_soon(secured):
    """Through a real file, its real poll, and the real clock."""
    token = read_token(secured.directory / "ann")
    with Client(
        secured.target, credentials=tls_credentials(ca=secured.ca), token=token, timeout_s=10
    ) as client:
        client.model()
        with editing(secured.directory / "tokens.json") as tokens:
            tokens[:] = [entry for entry in tokens if entry.name != "ann"]

        def until_refused():
            while True:
                client.model()

        with pytest.raises(TightfitRpcError, match="not known here, or was revoked"):
            until_refused()


def test_no_proxy_of_the_environment_sees_what_is_for_this_machine(monkeypatch):
    proxy = "http://127.0.0.1:9"  # nothing listens there
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, proxy)
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving_in_thread() as gateway, Client(gateway.target, token="tft_x") as client:
        assert client.model().name == "fake"
    with (
        Client("192.0.2.1:1", timeout_s=5) as client,
        pytest.raises(TightfitRpcError, match=r"127\.0\.0\.1:9"),
    ):
        client.model()  # what is for others goes there
