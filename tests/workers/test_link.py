import contextlib
import dataclasses
import mmap
import os
import pickle
import resource
import socket as socket_module
import threading
from random import Random

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.workers.api import MicroBatch, SamplingSpec, SequenceSlice
from tightfit.workers.errors import LinkError
from tightfit.workers.link import Receiver, Sender, StepMessage
from tightfit.workers.link_keys import MAX_FRAME_BYTES, LinkKeys

HERE, ELSEWHERE = "node-a", "node-b"
UPSTREAM = LinkKeys.new()


@pytest.fixture
def run_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("run"))


@pytest.fixture
def receiver(run_dir):
    receiver = Receiver(StepMessage, run_dir=run_dir, name="r", node_id=HERE, tcp_host="127.0.0.1")
    receiver.admit(UPSTREAM.public)
    yield receiver
    receiver.close()


def message(step=0, num_tokens=3, hidden_size=4):
    part = SequenceSlice(
        sequence_id=7,
        start_position=5,
        token_ids=list(range(num_tokens)),
        block_table=[3, 1],
        sampling=SamplingSpec(temperature=0.5, logit_bias=[(3, -1.5)], num_logprobs=2),
    )
    batch = MicroBatch(epoch=1, step=step, slices=[part])
    return StepMessage(batch=batch, hidden_size=hidden_size, dtype="fp32", forward_s=[0.25])


@pytest.mark.parametrize("sender_node", [HERE, ELSEWHERE])
def test_a_message_arrives_as_it_was_sent(receiver, sender_node):
    sender = Sender(receiver.endpoint, node_id=sender_node, keys=UPSTREAM)
    sent = message()
    payload = os.urandom(sent.payload_bytes)
    sender.send(sent, payload)
    received, rows = receiver.receive(5)
    assert received == sent
    assert bytes(rows) == payload
    sender.close()


def test_a_large_payload_and_the_order_of_messages_survive(receiver):
    sender = Sender(receiver.endpoint, node_id=ELSEWHERE, keys=UPSTREAM)
    payload = os.urandom(3_000_000)
    for step in range(20):
        sender.send(message(step), payload)
    for step in range(20):
        received, rows = receiver.receive(5)
        assert received.batch.step == step
        assert bytes(rows) == payload
    sender.close()


def test_receive_returns_none_at_its_time_limit(receiver):
    assert receiver.receive(0.01) is None


def test_a_watched_descriptor_ends_the_wait(receiver):
    fd = os.eventfd(0)
    receiver.watch(fd)
    timer = threading.Timer(0.05, os.eventfd_write, (fd, 1))
    timer.start()
    assert receiver.receive(30) is None
    timer.join()
    os.close(fd)


def test_the_socket_directory_is_closed_to_others(run_dir):
    private = f"{run_dir}/private"
    receiver = Receiver(StepMessage, run_dir=private, name="r", node_id=HERE)
    assert os.stat(private).st_mode & 0o777 == 0o700
    receiver.close()


def test_another_host_cannot_be_reached_without_tcp(run_dir):
    receiver = Receiver(StepMessage, run_dir=run_dir, name="local", node_id=HERE)
    with pytest.raises(LinkError, match="only on its own host"):
        Sender(receiver.endpoint, node_id=ELSEWHERE)
    receiver.close()


# -- who is heard ----------------------------------------------------------------------------


def peer(endpoint, *, configure=lambda socket: None):
    """A PUSH socket of a stranger, connected, with a whole message on its way."""
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 0)
    configure(socket)
    socket.connect(endpoint.tcp)
    socket.send_multipart([msgspec.msgpack.encode(message(666)), b"\0" * 48])
    return context, socket


def still_hears_its_neighbour(receiver):
    sender = Sender(receiver.endpoint, node_id=ELSEWHERE, keys=UPSTREAM)
    sender.send(message(8), b"\0" * 48)
    received, _ = receiver.receive(5)
    sender.close()
    return received.batch.step == 8


def as_client(keys):
    return lambda server_key: lambda socket: keys.use(socket, server_key)


STRANGERS = {
    "in plaintext": lambda server_key: lambda socket: None,
    "with a key of its own": as_client(LinkKeys.new()),
    "with the neighbour's public key, but not its secret": as_client(
        LinkKeys(UPSTREAM.public, LinkKeys.new().secret)
    ),
    "that takes us for another": lambda _: (
        lambda socket: UPSTREAM.use(socket, LinkKeys.new().public)
    ),
    "as a server": lambda _: lambda socket: LinkKeys.new().serve(socket),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_peer_is_not_heard(receiver, kind):
    context, socket = peer(
        receiver.endpoint, configure=STRANGERS[kind](receiver.endpoint.public_key)
    )
    assert receiver.receive(0.4) is None
    assert still_hears_its_neighbour(receiver)
    assert receiver.receive(0.1) is None
    socket.close()
    context.term()


def test_nobody_is_heard_before_the_neighbour_is_known(run_dir):
    receiver = Receiver(StepMessage, run_dir=run_dir, name="n", node_id=HERE, tcp_host="127.0.0.1")
    context, socket = peer(
        receiver.endpoint, configure=as_client(UPSTREAM)(receiver.endpoint.public_key)
    )
    assert receiver.receive(0.4) is None
    receiver.admit(UPSTREAM.public)
    assert still_hears_its_neighbour(receiver)
    socket.close()
    context.term()
    receiver.close()


def test_a_neighbour_that_was_replaced_cannot_connect_again(receiver, caplog):
    assert still_hears_its_neighbour(receiver)
    other = LinkKeys.new()
    receiver.admit(other.public)
    late = Sender(receiver.endpoint, node_id=ELSEWHERE, keys=UPSTREAM)
    late.send(message(9))
    assert receiver.receive(0.3) is None
    assert "a link refused a connection from 127.0.0.1" in caplog.text
    new = Sender(receiver.endpoint, node_id=ELSEWHERE, keys=other)
    new.send(message(10))
    assert receiver.receive(5)[0].batch.step == 10
    late.close()
    new.close()


def test_raw_bytes_and_huge_frames_on_the_port_do_no_harm(receiver):
    host, _, port = receiver.endpoint.tcp.removeprefix("tcp://").rpartition(":")
    rng = Random(3)
    greeting = b"\xff" + b"\0" * 8 + b"\x7f\x03\x01CURVE" + b"\0" * 15 + b"\0" * 32
    # A frame that says it has 4 EiB, in plaintext and after a greeting.
    huge = b"\x02" + (2**62).to_bytes(8, "big") + b"x" * 5000
    data = [b"", b"GET / HTTP/1.1\r\n\r\n", greeting, greeting + huge, huge,
            greeting + b"\x06" + (MAX_FRAME_BYTES + 1).to_bytes(8, "big") + b"\x05HELLO",
            *(greeting[: rng.randrange(64)] + rng.randbytes(rng.randrange(900)) for _ in range(40)),
            ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    open_ones = []
    for each in data:
        connection = socket_module.create_connection((host, int(port)), timeout=5)
        with contextlib.suppress(ConnectionError):
            connection.sendall(each)
        open_ones.append(connection)
    assert receiver.receive(0.5) is None
    assert still_hears_its_neighbour(receiver)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    for connection in open_ones:
        connection.close()


def test_what_travels_over_tcp_cannot_be_read(receiver):
    """Everything that passes a relay between the two: the tokens of a prompt are not in it."""
    host, _, port = receiver.endpoint.tcp.removeprefix("tcp://").rpartition(":")
    seen, relay = bytearray(), socket_module.create_server(("127.0.0.1", 0))

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                seen.extend(data)
                sink.sendall(data)

    def serve():
        ours, _ = relay.accept()
        theirs = socket_module.create_connection((host, int(port)))
        back = threading.Thread(target=pump, args=(theirs, ours))
        back.start()
        pump(ours, theirs)
        theirs.shutdown(socket_module.SHUT_RDWR)
        back.join()
        ours.close()
        theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    address = f"tcp://127.0.0.1:{relay.getsockname()[1]}"
    endpoint = dataclasses.replace(receiver.endpoint, tcp=address)
    sender = Sender(endpoint, node_id=ELSEWHERE, keys=UPSTREAM)
    payload = b"the hidden states" * 1000
    sender.send(message(), payload)
    assert bytes(receiver.receive(5)[1]) == payload
    sender.close()
    thread.join()
    relay.close()
    assert len(seen) > len(payload)
    assert b"hidden" not in seen
    assert b"token_ids" not in seen


def test_a_secret_key_is_neither_shown_nor_pickled():
    keys = LinkKeys.new()
    assert keys.secret.decode() not in f"{keys} {keys!r}"
    with pytest.raises(TypeError, match="does not leave its process"):
        pickle.dumps(keys)


def test_a_message_larger_than_the_neighbour_takes_is_refused_before_it_is_sent(receiver):
    sender = Sender(receiver.endpoint, node_id=ELSEWHERE, keys=UPSTREAM)
    # Zeros that take no memory.
    with (
        mmap.mmap(-1, MAX_FRAME_BYTES + 1) as zeros,
        memoryview(zeros) as huge,
        pytest.raises(LinkError, match="lower max_batch_tokens"),
    ):
        sender.send(message(), huge)
    sender.close()


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701])
def test_a_socket_directory_that_others_can_enter_is_refused(tmp_path, mode):
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(LinkError, match="is not a directory of user"):
        Receiver(StepMessage, run_dir=str(directory), name="r", node_id=HERE)


def test_a_socket_directory_that_is_a_link_elsewhere_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with pytest.raises(LinkError, match="is not a directory of user"):
        Receiver(StepMessage, run_dir=str(tmp_path / "run"), name="r", node_id=HERE)


# -- nonsense --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(frames=st.lists(st.binary(max_size=200), min_size=1, max_size=4))
def test_nonsense_is_a_link_error_and_the_link_goes_on(frames, tmp_path_factory):
    run_dir = str(tmp_path_factory.mktemp("x"))
    receiver = Receiver(StepMessage, run_dir=run_dir, name="r", node_id=HERE)
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(receiver.endpoint.ipc)
    socket.send_multipart(frames)
    with pytest.raises(LinkError):
        receiver.receive(5)
    socket.send_multipart([msgspec.msgpack.encode(message(4)), b""])
    received, _ = receiver.receive(5)
    assert received.batch.step == 4
    socket.close()
    context.term()
    receiver.close()
