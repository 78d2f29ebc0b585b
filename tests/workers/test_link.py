import os
import threading

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.workers.api import MicroBatch, SamplingSpec, SequenceSlice
from tightfit.workers.errors import LinkError
from tightfit.workers.link import Receiver, Sender, StepMessage

HERE, ELSEWHERE = "node-a", "node-b"


@pytest.fixture
def run_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("run"))


@pytest.fixture
def receiver(run_dir):
    receiver = Receiver(StepMessage, run_dir=run_dir, name="r", node_id=HERE, tcp_host="127.0.0.1")
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
    sender = Sender(receiver.endpoint, node_id=sender_node)
    sent = message()
    payload = os.urandom(sent.payload_bytes)
    sender.send(sent, payload)
    received, rows = receiver.receive(5)
    assert received == sent
    assert bytes(rows) == payload
    sender.close()


def test_a_large_payload_and_the_order_of_messages_survive(receiver):
    sender = Sender(receiver.endpoint, node_id=ELSEWHERE)
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


def test_a_tcp_peer_without_the_key_is_not_heard(receiver):
    context = zmq.Context()
    stranger = context.socket(zmq.PUSH)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(receiver.endpoint.tcp)
    stranger.send_multipart([msgspec.msgpack.encode(message()), b"\0" * 48])
    assert receiver.receive(0.3) is None
    stranger.close()
    context.term()


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
