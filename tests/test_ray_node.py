"""A node of this process's own: when it joins, what it says when it cannot, how it leaves."""

import socket
import stat
import sys
import threading
import time

import pytest

from tightfit.cluster.config import serve_config
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.ray_node import JoinedNode


@pytest.fixture(name="listener")
def _listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture(name="instead_of_ray")
def _instead_of_ray(tmp_path, monkeypatch):
    def put(script):
        """`ray start` is this shell script."""
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(file))

    return put


def address_of(server):
    return f"127.0.0.1:{server.getsockname()[1]}"


def until(condition, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_where_no_head_listens_in_time_that_is_said(listener):
    address = address_of(listener)
    listener.close()
    node = JoinedNode(address)
    with pytest.raises(ConfigError, match=rf"no Ray cluster listens at {address}: .*refused"):
        node.start(timeout_s=0)
    node.close()


def test_a_head_that_comes_up_later_is_waited_for(listener, instead_of_ray, tmp_path):
    instead_of_ray(f'echo "$@" > {tmp_path}/arguments; exec sleep 60')
    port = listener.getsockname()[1]
    listener.close()
    later = []

    def listen():
        time.sleep(0.3)
        later.append(socket.create_server(("127.0.0.1", port)))

    thread = threading.Thread(target=listen)
    thread.start()
    node = JoinedNode(f"127.0.0.1:{port}")
    node.start(timeout_s=10)
    thread.join()
    assert until(lambda: (tmp_path / "arguments").exists())
    arguments = (tmp_path / "arguments").read_text().split()
    assert {f"--address=127.0.0.1:{port}", "--num-cpus=0", "--num-gpus=0"} < set(arguments)
    assert node.why_ended() is None
    node.close()
    later[0].close()


def test_what_ray_said_last_is_kept(listener, instead_of_ray):
    instead_of_ray("echo a; echo; echo the version differs >&2; exit 3")
    node = JoinedNode(address_of(listener))
    node.start(timeout_s=1)
    assert until(lambda: node.why_ended() is not None)
    assert node.why_ended() == "ray start ended with 3: a the version differs"
    node.close()


def test_a_node_that_leaves_is_asked_to_and_waited_for(listener, instead_of_ray, tmp_path):
    instead_of_ray(
        f"trap 'touch {tmp_path}/left; exit 0' TERM; touch {tmp_path}/up; "
        "while :; do sleep 0.05; done"
    )
    node = JoinedNode(address_of(listener))
    node.start(timeout_s=1)
    assert until((tmp_path / "up").exists)
    node.close()
    assert (tmp_path / "left").exists()


@pytest.mark.parametrize("address", [None, "auto"])
def test_to_join_takes_the_heads_address(address):
    flags = {"model": "m", "ray_join": True, "ray_address": address}
    with pytest.raises(ConfigError, match=r"serve\.ray_join needs the head's address"):
        serve_config({}, flags)
    assert serve_config({}, {**flags, "ray_address": "head:6379"}).ray_join
