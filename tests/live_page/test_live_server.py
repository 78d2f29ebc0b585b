"""What the live page's server answers, and to whom."""

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from made_up import MadeUp

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.live_page import server as live
from tightfit.cluster.live_page.server import LiveServer, page

TOKEN = "tft_secret"


@pytest.fixture
def made_up():
    return MadeUp(3)


@pytest.fixture
def server(made_up):
    server = LiveServer(made_up, "127.0.0.1", 0)
    yield server
    server.close()


@pytest.fixture
def guarded(made_up):
    server = LiveServer(made_up, "127.0.0.1", 0, is_allowed=lambda token: token == TOKEN)
    yield server
    server.close()


def ask(server, path="/live.json", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def test_the_json_has_the_deployment_and_nobodys_words(server):
    answer, body = ask(server)
    shown = json.loads(body)
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    assert [stage["first_layer"] for stage in shown["stages"]] == [0, 32, 64]
    assert shown["stages"][1]["busy_share"] == pytest.approx(0.62 + 0.2158, abs=0.01)
    assert 30 < shown["now"]["generated_per_s"] < 46
    assert shown["load"]["waiting"] == 9
    assert len(shown["history"]) == 90
    words = {"prompt", "text", "request_id", "token", "client"}
    assert not words & set(re.findall(r'"(\w+)":', body.decode()))
    assert len(body) < 20_000


def test_before_the_first_sample_it_says_that_nothing_is_known(server, made_up):
    made_up.is_known = False
    assert json.loads(ask(server)[1]) == {"is_known": False}


def test_a_count_that_began_anew_is_no_negative_rate(server, made_up):
    whole = made_up.watch
    made_up.watch = lambda: tuple(reversed([s for s in whole()][:2]))[:1] + whole()[:1]
    shown = json.loads(ask(server)[1])
    assert shown["now"]["generated_per_s"] == 0


def test_a_recovery_is_in_the_json_with_when_and_how_long_as_far_as_samples_tell(server, made_up):
    # Seen from beginning to end, and come and gone between two samples.
    made_up.outages = [(40.0, 52.0), (100.5, 101.5), (130.0, 999.0)]
    shown = json.loads(ask(server)[1])
    assert (shown["health"], shown["reason"]) == ("recovering", "stage 1's process ended")
    assert (shown["recoveries"], shown["epoch"]) == (2, 3)
    seen, unseen, now = shown["outages"]
    assert (seen["took_s"], seen["is_over"], seen["bound"]) == (12, True, "about")
    assert seen["reason"] == "stage 1's process ended"
    assert seen["ago_s"] == pytest.approx(140, abs=5)
    assert seen["lost_unix_s"] == pytest.approx(time.time() - 140, abs=6)
    assert (unseen["took_s"], unseen["bound"], unseen["reason"]) == (2, "at most", "")
    assert (now["is_over"], now["bound"]) == (False, "about")
    assert now["took_s"] == pytest.approx(50, abs=5)


def test_a_recovery_that_began_before_the_oldest_sample_took_at_least_what_was_seen(
    server, made_up
):
    made_up.outages = [(-1000.0, 30.0)]
    (outage,) = json.loads(ask(server)[1])["outages"]
    assert (outage["took_s"], outage["bound"]) == (30, "at least")


def test_two_recoveries_with_no_sample_between_them_are_two(server, made_up):
    made_up.outages = [(40.0, 53.0), (53.5, 61.0)]
    first, second = json.loads(ask(server)[1])["outages"]
    assert (first["took_s"], second["took_s"]) == (14, 8)


def test_the_page_is_in_one_piece_and_its_policy_allows_nothing_else(server):
    answer, body = ask(server, "/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    html = body.decode()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert not re.findall(r"https?://(?!www\.w3\.org)", html)
    for header in ("X-Content-Type-Options", "Referrer-Policy"):
        assert answer.headers[header]


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/nothing", "GET", 404), ("/../etc/passwd", "GET", 404), ("/", "POST", 501),
     ("/live.json", "DELETE", 501)],
)  # fmt: skip
def test_there_is_nothing_else_and_nothing_to_change(server, path, method, status):
    assert ask(server, path, method)[0].status == status


def test_a_page_of_another_name_that_points_here_is_refused(server, guarded):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert ask(server, Host=host)[0].status == 421
    for host in ("localhost", "localhost:80", "127.0.0.1:9", "[::1]:80", "[::1]"):
        assert ask(server, Host=host)[0].status == 200
    # With tokens a name does not matter: the foreign page has none.
    assert ask(guarded, Host="gateway.example", Authorization=f"Bearer {TOKEN}")[0].status == 200


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer", TOKEN, f"Basic {TOKEN}", "Bearer "]
)
def test_without_the_token_only_the_empty_page_is_answered(guarded, given):
    headers = {} if given is None else {"Authorization": given}
    answer, body = ask(guarded, **headers)
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert json.loads(body) == {"error": "a token is needed"}
    assert ask(guarded, "/")[1] == page()[0]


def test_raw_bytes_and_half_open_connections_do_not_keep_others_out(server, monkeypatch):
    monkeypatch.setattr(live._Handler, "timeout", 0.3)
    monkeypatch.setattr(live, "CONNECTION_LIMIT_S", 0.3)
    sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    sockets[0].sendall(b"\x16\x03\x01" + bytes(range(256)))
    sockets[1].sendall(b"GET /live.json HTTP/1.1\r\nX: " + b"a" * 100_000)
    deadline = time.monotonic() + 10
    while True:
        try:
            assert ask(server)[0].status == 200
            break
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline, "kept out for good"
            time.sleep(0.1)
    for each in sockets:
        each.close()


def test_a_port_in_use_is_said(server, made_up):
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        LiveServer(made_up, "127.0.0.1", server.port)


def test_closing_leaves_no_thread(made_up):
    LiveServer(made_up, "127.0.0.1", 0).close()
    assert "live" not in {thread.name for thread in threading.enumerate()}


def test_the_page_is_in_the_package():
    code = "from tightfit.cluster.live_page.server import page; print(len(page()[0]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 15_000 < int(done.stdout) < 60_000
