import random
import tracemalloc

import pytest
from doubles import Simulation, expected_output, request

from tightfit.cluster.errors import DeadlineError, InvalidRequestError, OverloadedError
from tightfit.cluster.request import FinishReason

VOCAB = Simulation.VOCAB


def tokens(count, seed):
    generator = random.Random(seed)
    return [generator.randrange(VOCAB) for _ in range(count)]


def test_a_deadline_ends_the_request():
    simulation = Simulation()
    simulation.add(request("a", [1], deadline_s=5.0, max_tokens=100))
    assert simulation.scheduler.expire(4.9) == []
    simulation.note(simulation.scheduler.expire(5.0))
    assert simulation.ends[("a", 0)].finish_reason is FinishReason.DEADLINE
    with pytest.raises(DeadlineError):
        simulation.scheduler.add(request("b", [1], deadline_s=5.0), 5.0)


def test_a_resumed_request_continues_where_it_was():
    prompt, expected = tokens(9, seed=5), expected_output(tokens(9, seed=5), 20, VOCAB)
    simulation = Simulation()
    simulation.add(request("again", prompt, max_tokens=20, resume=expected[:8]))
    simulation.run()
    assert simulation.outputs[("again", 0)] == expected[8:]


def test_a_request_resumed_at_its_end_ends_at_once():
    simulation = Simulation(eos_token_ids=frozenset({5}))
    simulation.add(request("full", [1], max_tokens=3, resume=[8, 8, 8]))
    simulation.add(request("eos", [1], max_tokens=9, resume=[8, 5]))
    assert simulation.ends[("full", 0)].finish_reason is FinishReason.LENGTH
    assert simulation.ends[("eos", 0)].finish_reason is FinishReason.STOP
    assert simulation.ends[("eos", 0)].token_offset == 2
    simulation.run()


def test_what_can_never_run_and_what_cannot_wait_is_refused():
    simulation = Simulation(max_queued_requests=2, max_queued_tokens=30)
    scheduler = simulation.scheduler
    with pytest.raises(InvalidRequestError, match="prompt: is empty"):
        scheduler.add(request("a", []), 0.0)
    with pytest.raises(InvalidRequestError, match=r"has 200 tokens.*199"):
        scheduler.add(request("a", [1] * 200), 0.0)
    simulation.add(request("a", [1] * 20))
    with pytest.raises(InvalidRequestError, match="in use"):
        scheduler.add(request("a", [1]), 0.0)
    with pytest.raises(OverloadedError, match="prompt tokens"):
        scheduler.add(request("b", [1] * 11), 0.0)
    simulation.add(request("b", [1]))
    with pytest.raises(OverloadedError, match="the limit is 2"):
        scheduler.add(request("c", [1]), 0.0)
    simulation.run()


def test_a_deadline_does_not_outlive_its_request():
    """A client whose stream broke sends the same id again, with more time."""
    simulation = Simulation()
    simulation.add(request("a", [1], deadline_s=5.0, max_tokens=100))
    simulation.scheduler.cancel("a", FinishReason.CANCELLED)
    simulation.add(request("a", [1], deadline_s=50.0, max_tokens=100))
    assert simulation.scheduler.expire(6.0) == []
    assert len(simulation.scheduler.expire(50.0)) == 1


def test_requests_that_came_and_went_hold_no_memory():
    simulation = Simulation()
    simulation.add(request("long", tokens(150, seed=1), max_tokens=40))
    simulation.step()  # its first chunk; what comes now waits
    tracemalloc.start()
    try:
        for i in range(3000):
            simulation.scheduler.add(
                request(f"r{i}", [1] * 100, deadline_s=1e9, priority=-i % 7), 0.0
            )
            simulation.scheduler.cancel(f"r{i}", FinishReason.CANCELLED)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 500_000  # 3,000 of them are 7 MB
    simulation.run()


def test_a_request_resumed_when_its_context_was_full_ends_at_once():
    simulation = Simulation(max_context_tokens=20)
    simulation.add(request("a", [1] * 8, max_tokens=100, resume=[2] * 12))
    end = simulation.ends[("a", 0)]
    assert (end.finish_reason, end.token_offset) == (FinishReason.LENGTH, 12)
    simulation.run()


def test_a_full_kv_cache_ends_a_sequence_as_a_full_context_does():
    simulation = Simulation(num_blocks=5, block_size=4, max_context_tokens=1000)
    simulation.add(request("a", [1] * 8, max_tokens=100))
    simulation.run()
    assert simulation.ends[("a", 0)].finish_reason is FinishReason.LENGTH
    assert len(simulation.outputs[("a", 0)]) == 12
    with pytest.raises(InvalidRequestError, match="context of 20 tokens is 19"):
        simulation.add(request("b", [1] * 20))


def test_a_request_for_no_tokens_ends_at_once():
    simulation = Simulation()
    simulation.add(request("a", [1, 2], max_tokens=0))
    assert simulation.ends[("a", 0)].finish_reason is FinishReason.LENGTH
    assert simulation.steps == 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"resume": [1] * 193}, "resume_token_ids"),
        ({"resume": [1], "n": 2}, "resume_token_ids"),
        ({"resume": [1], "score_only": True}, "resume_token_ids"),
        ({"resume": [1, 1000]}, "resume_token_ids"),
        ({"prompt": [3, 1000]}, "prompt"),
        ({"prompt": [-1, 3]}, "prompt"),
        ({"prompt": [1] * 201, "score_only": True}, "prompt"),
    ],
)
def test_a_request_that_can_never_run_is_refused_by_field(changes, field):
    simulation = Simulation(vocab_size=1000)
    with pytest.raises(InvalidRequestError, match=f"^{field}: ") as caught:
        simulation.add(request("a", **{"prompt": [1] * 8, **changes}))
    assert caught.value.field == field
    assert not simulation.scheduler.has_work
    simulation.add(request("a", [999], max_tokens=1))  # its id was not taken
    simulation.run()


def test_a_refused_client_is_told_when_the_queue_will_have_moved_on():
    simulation = Simulation(max_queued_requests=1, max_running_sequences=1)
    for i in range(12):
        simulation.add(request(f"r{i}", [1], max_tokens=1))
        simulation.step()
        simulation.now_s += 3.0
    simulation.add(request("running", [1], max_tokens=99))
    simulation.step()
    simulation.add(request("waiting", [1]))
    with pytest.raises(OverloadedError) as caught:
        simulation.add(request("two more", [1], n=2))
    assert caught.value.retry_after_s == pytest.approx(6.0)


def test_the_time_in_the_queue_is_told_once():
    simulation = Simulation(max_running_sequences=1)
    simulation.add(request("a", [1], max_tokens=2))
    simulation.add(request("b", [1], max_tokens=2))
    for _ in range(5):
        simulation.step()
        simulation.now_s += 1.0
    assert simulation.scheduler.take_queue_times() == [0.0, 2.0]
    assert simulation.scheduler.take_queue_times() == []
