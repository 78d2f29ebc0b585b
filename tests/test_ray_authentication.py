"""Which Ray clusters are joined: only those that ask everybody for a token."""

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest
from certificates import Certificates

from tightfit.cluster import ray_session
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.ray_authentication import CHECK_ALIVE, answers_anyone

CODES = grpc.StatusCode


class Answering(grpc.GenericRpcHandler):
    """Ends every call with a status."""

    def __init__(self, status):
        self.status = status
        self.methods = []

    def service(self, handler_call_details):
        self.methods.append(handler_call_details.method)

        def answer(_request, context):
            if self.status is not CODES.OK:
                context.abort(self.status, "no")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextlib.contextmanager
def control_store(status, credentials=None):
    """What stands for a cluster's control store; its address."""
    server = grpc.server(ThreadPoolExecutor(2))
    handler = Answering(status)
    server.add_generic_rpc_handlers((handler,))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}", handler
    finally:
        server.stop(None)


@pytest.mark.parametrize("status", [CODES.OK, CODES.UNIMPLEMENTED, CODES.INTERNAL])
def test_a_cluster_that_answers_at_all_answers_anyone(status):
    with control_store(status) as (address, handler):
        assert answers_anyone(address)
    assert handler.methods == [CHECK_ALIVE]


def test_a_cluster_that_asks_for_a_token_does_not():
    with control_store(CODES.UNAUTHENTICATED) as (address, _):
        assert not answers_anyone(address)


def test_a_cluster_that_speaks_only_tls_does_not(tmp_path):
    cert, key = Certificates(tmp_path).issue("ray")
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    with control_store(CODES.OK, credentials) as (address, handler):
        assert not answers_anyone(address)
    assert handler.methods == []


@pytest.fixture
def ray_at(monkeypatch):
    """Has `ray_session` believe that it joins a cluster at an address; what it did to it."""

    def put(address):
        did = []
        context = SimpleNamespace(gcs_address=address)
        stand_in = SimpleNamespace(
            is_initialized=lambda: False,
            init=lambda **_: did.append("init"),
            shutdown=lambda: did.append("shutdown"),
            get_runtime_context=lambda: context,
        )
        monkeypatch.setattr(ray_session, "ray", stand_in)
        return did

    return put


def test_an_open_cluster_is_left_again_and_said_to_be_one(ray_at):
    with control_store(CODES.OK) as (address, _):
        did = ray_at(address)
        with pytest.raises(ConfigError, match="answers without a token: whoever reaches its ports"):
            ray_session.RaySession(ray_session.RayOptions(address=address))
    assert did == ["init", "shutdown"]


def test_an_open_cluster_is_joined_if_told_and_a_closed_one_without_being_told(ray_at):
    for status, insecure in ((CODES.OK, True), (CODES.UNAUTHENTICATED, False)):
        with control_store(status) as (address, _):
            did = ray_at(address)
            ray_session.RaySession(ray_session.RayOptions(address=address, insecure=insecure))
        assert did == ["init"]


def test_an_address_where_nothing_is_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert not answers_anyone(address)
