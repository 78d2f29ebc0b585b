"""Any order of arrivals, steps, cancellations, deadlines and losses keeps every promise."""

import random

import pytest
from doubles import Simulation, expected_output, request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tightfit.cluster.request import FinishReason

VOCAB = Simulation.VOCAB
EOS = frozenset(range(0, VOCAB, 40))
"""One token in forty ends a sequence, so that some end early."""


def expected_end(new, max_context):
    """Output that the request has at its own end, and why it ends."""
    sampling, output = new.sampling, list(new.resume_token_ids)
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else EOS)
    length = min(sampling.max_tokens, max_context - len(new.prompt_token_ids))
    whole = expected_output(new.prompt_token_ids, length, VOCAB)
    assert whole[: len(output)] == output
    while True:
        if output and len(output) >= sampling.min_tokens and output[-1] in ends:
            return output, FinishReason.STOP
        if len(output) >= length:
            return output, FinishReason.LENGTH
        output.append(whole[len(output)])


def check_outcome(simulation, new, max_context):
    """Every sequence ended once, with what it would have said alone, as far as it came.

    Args:
        max_context: there was when it came.
    """
    for index in range(new.sampling.n):
        end = simulation.ends[(new.request_id, index)]
        output = [*new.resume_token_ids, *simulation.outputs[(new.request_id, index)]]
        own_end = (FinishReason.STOP, FinishReason.LENGTH)
        if new.score_only:
            assert output == []
            scores = tuple(-float(token) for token in new.prompt_token_ids[1:])
            assert end.scores == (scores if end.finish_reason in own_end else end.scores)
            assert end.scores == scores[: len(end.scores)]
            continue
        whole, reason = expected_end(new, max_context)
        assert output == whole[: len(output)]
        assert end.token_offset == len(output) - (end.token_id is not None)
        if end.finish_reason in own_end:
            assert (end.finish_reason, output) == (reason, whole)


class SchedulerMachine(RuleBasedStateMachine):
    """Small pools, so that blocks run out all the time; few prompts, so that they are shared."""

    def __init__(self):
        super().__init__()
        self.requests = {}
        self.contexts = {}
        self.by_command = set()

    @initialize(
        depth=st.integers(1, 4),
        num_stages=st.integers(1, 4),
        num_blocks=st.integers(3, 20),
        block_size=st.sampled_from([1, 2, 4, 7]),
        max_batch_tokens=st.integers(1, 20),
        max_batch_sequences=st.integers(1, 6),
        max_running_sequences=st.integers(1, 8),
        cache=st.booleans(),
    )
    def start(self, depth, num_stages, cache, **sizes):
        self.simulation = Simulation(
            depth=depth, num_stages=num_stages, max_context_tokens=50, eos_token_ids=EOS,
            enable_prefix_cache=cache, **sizes,
        )  # fmt: skip

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        max_tokens=st.integers(1, 25),
        min_tokens=st.integers(0, 5),
        ignore_eos=st.booleans(),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        deadline=st.none() | st.integers(1, 30),
        resumed=st.integers(0, 4),
        kind=st.sampled_from(["generate", "generate", "penalty", "score"]),
    )
    def arrive(self, prompt, max_tokens, n, resumed, deadline, kind, **more):
        context = self.simulation.config.max_context
        prompt = prompt[: max(1, context - 1)]
        if kind == "score" or len(prompt) >= context:
            more, resumed = {"score_only": True, "priority": more["priority"]}, 0
        elif kind == "penalty":
            more["presence_penalty"] = 1.0
        resumed = min(resumed, max_tokens, context - len(prompt)) if n == 1 else 0
        resume = expected_output(prompt, resumed, VOCAB)
        if EOS & set(resume[:-1]):
            resume = []  # it would have ended before
        name = f"r{len(self.requests)}"
        self.requests[name] = new = request(
            name, prompt, max_tokens=max_tokens, n=n, resume=resume,
            deadline_s=None if deadline is None else self.simulation.now_s + deadline, **more,
        )  # fmt: skip
        self.contexts[name] = context
        self.simulation.add(new)

    @rule()
    def send(self):
        self.simulation.send()

    @rule()
    def receive(self):
        self.simulation.receive()

    @rule(count=st.integers(1, 10))
    def run_on(self, count):
        for _ in range(count):
            self.simulation.step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.simulation.note(self.simulation.scheduler.cancel(name, FinishReason.CANCELLED))
        assert not self.simulation.scheduler.has_request(name)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), index=st.integers(0, 2))
    def finish(self, data, index):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        events = self.simulation.scheduler.finish(name, index, FinishReason.STOP_SEQUENCE)
        assert len(events) <= 1
        self.simulation.note(events)

    @rule(seconds=st.integers(1, 10))
    def time_passes(self, seconds):
        self.simulation.now_s += seconds
        self.simulation.note(self.simulation.scheduler.expire(self.simulation.now_s))
        for name, new in self.requests.items():
            is_late = new.deadline_s is not None and new.deadline_s <= self.simulation.now_s
            assert not (is_late and self.simulation.scheduler.has_request(name))

    @rule(num_blocks=st.none() | st.integers(3, 20))
    def lose_the_stages(self, num_blocks):
        self.simulation.lose_the_stages(num_blocks)

    @invariant()
    def nothing_is_lost_or_shared_wrongly(self):
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "simulation"):
            return
        self.simulation.run()
        for name, new in self.requests.items():
            check_outcome(self.simulation, new, self.contexts[name])


SchedulerMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyOrderOfEvents = SchedulerMachine.TestCase


def random_request(generator, number, now_s):
    """One of a few shared beginnings, an end of its own, and a bit of everything."""
    beginning = [generator.randrange(8)] * 40
    own = [generator.randrange(VOCAB) for _ in range(generator.randrange(1, 30))]
    prompt = beginning[: generator.randrange(40)] + own
    max_tokens = generator.randrange(1, 60)
    resumed = generator.randrange(max_tokens) if generator.random() < 0.1 else 0
    resume = expected_output(prompt, resumed, VOCAB)
    return request(
        f"r{number}",
        prompt,
        max_tokens=max_tokens,
        priority=generator.choice([0, 0, 0, 1, -1]),
        n=1 if resume else generator.choice([1, 1, 1, 2]),
        resume=[] if EOS & set(resume) else resume,
        deadline_s=now_s + generator.randrange(5, 100) if generator.random() < 0.2 else None,
        score_only=not resume and generator.random() < 0.1,
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_thousands_of_sequences_under_pressure_each_say_what_they_would_have_said_alone(depth):
    generator = random.Random(depth)
    simulation = Simulation(
        depth=depth, num_blocks=120, block_size=8, max_batch_tokens=128, max_batch_sequences=32,
        max_running_sequences=64, max_context_tokens=160, eos_token_ids=EOS,
        max_queued_requests=10_000,
    )  # fmt: skip
    requests = []
    while len(requests) < 1200:
        for _ in range(generator.randrange(4)):
            requests.append(random_request(generator, len(requests), simulation.now_s))
            simulation.add(requests[-1])
        simulation.step()
        simulation.now_s += 0.1
        simulation.note(simulation.scheduler.expire(simulation.now_s))
        if generator.random() < 0.05:
            name = generator.choice(requests).request_id
            simulation.note(simulation.scheduler.cancel(name, FinishReason.CANCELLED))
        if generator.random() < 0.003:
            simulation.lose_the_stages()
        if len(requests) % 50 == 0:
            simulation.scheduler.check_integrity()
    simulation.run()
    for new in requests:
        check_outcome(simulation, new, simulation.config.max_context)
    counts = simulation.scheduler.counts()
    assert counts.num_preemptions > 0
    assert counts.num_cached_tokens > 0


@pytest.mark.parametrize("depth", [1, 3])
def test_no_sequence_starves_while_others_keep_coming(depth):
    """When more comes than the stages can do, requests of equal priority still end nearly in order
    of arrival."""
    generator = random.Random(5)
    simulation = Simulation(depth=depth, num_blocks=60, max_batch_tokens=24, max_context_tokens=80)
    for number in range(400):
        prompt = [generator.randrange(VOCAB) for _ in range(generator.randrange(1, 40))]
        simulation.add(request(f"r{number}", prompt, max_tokens=generator.randrange(1, 30)))
        simulation.step()
    ended = [int(name[1:]) for name, _ in simulation.ends]
    assert 40 < len(ended) < 300
    for place, number in enumerate(ended):
        assert number <= place + simulation.config.max_running_sequences
    simulation.run()
    assert len(simulation.ends) == 400


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_turns_in_every_small_pool_lose_nothing(num_stages, block_size):
    """Sequences take turns and run out of blocks at once: one that already had its turn in a
    micro-batch may lose its blocks to one that comes after it."""
    for num_blocks in range(4, 14):
        for count in range(3, 7):
            simulation = Simulation(
                num_stages=num_stages, num_blocks=num_blocks, block_size=block_size,
                max_context_tokens=40,
            )  # fmt: skip
            length = min(20, num_blocks * block_size - 1)
            for i in range(count):
                simulation.add(request(f"r{i}", [i], max_tokens=length))
            simulation.run()
            for i in range(count):
                expected = expected_output([i], length, VOCAB)
                assert simulation.outputs[(f"r{i}", 0)] == expected
