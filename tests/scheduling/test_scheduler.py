import random
from collections import deque

import pytest
from doubles import ModelStages, expected_output
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tightfit.cluster.errors import DeadlineError, InvalidRequestError, OverloadedError
from tightfit.cluster.request import FinishReason, Request, SamplingParams
from tightfit.cluster.scheduling.batching import Scheduler, SchedulerConfig

VOCAB = 1000


class Simulation:
    """A scheduler with modelled stages behind it and several micro-batches in flight."""

    def __init__(self, *, depth=1, **changes):
        sizes = {
            "num_blocks": 64, "block_size": 4, "max_batch_tokens": 32, "max_batch_sequences": 8,
            "max_running_sequences": 16, "max_context_tokens": 200, "num_stages": depth,
        }  # fmt: skip
        self.config = SchedulerConfig(**{**sizes, **changes})
        self.scheduler = Scheduler(self.config)
        self.stages = ModelStages(
            num_blocks=self.config.num_blocks, block_size=self.config.block_size, vocab_size=VOCAB
        )
        self.depth = depth
        self.in_flight = deque()
        self.now_s = 0.0
        self.steps = 0
        self.outputs = {}
        self.ends = {}
        self.events = []
        self.resumed = {}

    def add(self, request):
        self.resumed[request.request_id] = len(request.resume_token_ids)
        self.note(self.scheduler.add(request, self.now_s))

    def note(self, events):
        for event in events:
            self.events.append(event)
            key = (event.request_id, event.index)
            assert key not in self.ends, f"{key} spoke after its end"
            output = self.outputs.setdefault(key, [])
            if event.token_id is not None:
                assert event.token_offset == self.resumed.get(event.request_id, 0) + len(output)
                output.append(event.token_id)
            if event.finish_reason is not None:
                self.ends[key] = event

    def send(self):
        """Fill the pipeline by one micro-batch, if there is room and work."""
        if len(self.in_flight) == self.depth:
            return False
        slices = self.scheduler.next_micro_batch(self.now_s)
        if slices is None:
            return False
        assert sum(len(s.token_ids) for s in slices) <= self.config.max_batch_tokens
        assert len(slices) <= self.config.max_batch_sequences
        assert len({s.sequence_id for s in slices}) == len(slices)
        self.in_flight.append((slices, self.stages.compute(slices, epoch=1, step=self.steps)))
        self.steps += 1
        return True

    def receive(self):
        if self.in_flight:
            slices, result = self.in_flight.popleft()
            self.note(self.scheduler.apply(slices, result, self.now_s))

    def run(self, limit=20_000):
        for _ in range(limit):
            while self.send():
                pass
            if not self.in_flight:
                break
            self.receive()
        assert not self.scheduler.has_work, "work is left that nothing runs"
        self.scheduler.check_integrity()
        assert self.scheduler.counts().num_blocks_used == 0


def request(request_id, prompt, *, max_tokens=8, resume=(), **more):
    sampling = {k: more.pop(k) for k in list(more) if k in SamplingParams.__dataclass_fields__}
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        resume_token_ids=tuple(resume),
        **more,
    )


def tokens(count, seed):
    generator = random.Random(seed)
    return [generator.randrange(VOCAB) for _ in range(count)]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_thousands_of_tokens_come_out_as_if_each_sequence_ran_alone(depth, prefix_cache):
    simulation = Simulation(depth=depth, enable_prefix_cache=prefix_cache)
    prompts = {f"r{i}": tokens(1 + (i * 7) % 60, seed=i % 20) for i in range(120)}
    for name, prompt in prompts.items():
        simulation.add(request(name, prompt, max_tokens=1 + len(prompt) % 40))
    simulation.run()
    for name, prompt in prompts.items():
        count = 1 + len(prompt) % 40
        assert simulation.outputs[(name, 0)] == expected_output(prompt, count, VOCAB)
        assert simulation.ends[(name, 0)].finish_reason is FinishReason.LENGTH


def test_running_out_of_blocks_preempts_and_loses_nothing():
    simulation = Simulation(depth=2, num_blocks=20, max_context_tokens=70)
    for i in range(12):
        simulation.add(request(f"r{i}", tokens(10, seed=i), max_tokens=50))
    simulation.run()
    assert simulation.scheduler.counts().num_preemptions > 0
    for i in range(12):
        assert simulation.outputs[(f"r{i}", 0)] == expected_output(tokens(10, seed=i), 50, VOCAB)


def test_the_stages_of_a_pipeline_get_equal_shares_of_the_decodes():
    simulation = Simulation(depth=4, num_blocks=256, max_batch_sequences=64)
    for i in range(16):
        simulation.add(request(f"r{i}", [i], max_tokens=100))
    while simulation.send():
        pass
    for _ in range(60):
        simulation.receive()
        while simulation.send():
            pass
    sizes = [len(slices) for slices, _ in simulation.in_flight]
    assert sizes == [4, 4, 4, 4]


def test_chunks_of_one_prompt_are_in_flight_together():
    simulation = Simulation(depth=3, max_batch_tokens=16)
    simulation.add(request("long", tokens(48, seed=1)))
    assert [simulation.send() for _ in range(4)] == [True, True, True, False]
    simulation.run()
    assert simulation.outputs[("long", 0)] == expected_output(tokens(48, seed=1), 8, VOCAB)


def test_decodes_go_on_while_a_long_prompt_is_prefilled():
    simulation = Simulation()
    simulation.add(request("short", [1, 2], max_tokens=30))
    simulation.send()
    simulation.receive()
    simulation.add(request("long", tokens(150, seed=2)))
    for _ in range(4):
        simulation.send()
        lengths = sorted(len(part.token_ids) for part in simulation.in_flight[0][0])
        assert lengths == [1, 31]
        simulation.receive()


def test_a_prompt_that_was_seen_before_is_taken_from_the_cache():
    simulation = Simulation()
    prompt = tokens(40, seed=3)
    simulation.add(request("first", prompt))
    simulation.run()
    simulation.add(request("second", prompt))
    simulation.run()
    assert simulation.outputs[("second", 0)] == simulation.outputs[("first", 0)]
    assert simulation.ends[("first", 0)].num_cached_tokens == 0
    assert simulation.ends[("second", 0)].num_cached_tokens == 36  # never the whole prompt


def test_cancelling_frees_the_blocks_at_once():
    simulation = Simulation(depth=2)
    simulation.add(request("a", tokens(50, seed=4), max_tokens=50))
    simulation.send()
    assert simulation.scheduler.counts().num_blocks_used > 0
    simulation.note(simulation.scheduler.cancel("a", FinishReason.CANCELLED))
    assert simulation.scheduler.counts().num_blocks_used == 0
    assert simulation.scheduler.cancel("a", FinishReason.CANCELLED) == []
    simulation.run()
    assert simulation.ends[("a", 0)].finish_reason is FinishReason.CANCELLED


def test_a_deadline_ends_the_request():
    simulation = Simulation()
    simulation.add(request("a", [1], deadline_s=5.0, max_tokens=100))
    assert simulation.scheduler.expire(4.9) == []
    simulation.note(simulation.scheduler.expire(5.0))
    assert simulation.ends[("a", 0)].finish_reason is FinishReason.DEADLINE
    with pytest.raises(DeadlineError):
        simulation.scheduler.add(request("b", [1], deadline_s=5.0), 5.0)


def test_end_tokens_stop_a_sequence_but_not_before_min_tokens():
    expected = expected_output([7], 20, VOCAB)
    stop = expected[5]
    simulation = Simulation(eos_token_ids=frozenset({expected[9]}))
    simulation.add(request("stop", [7], max_tokens=20, stop_token_ids=(stop,)))
    simulation.add(request("eos", [7], max_tokens=20))
    simulation.add(request("ignore", [7], max_tokens=20, ignore_eos=True))
    simulation.run()
    assert simulation.outputs[("stop", 0)] == expected[:6]
    assert simulation.outputs[("eos", 0)] == expected[:10]
    assert simulation.outputs[("ignore", 0)] == expected
    assert simulation.ends[("eos", 0)].finish_reason is FinishReason.STOP


def test_end_tokens_are_banned_before_min_tokens():
    simulation = Simulation(eos_token_ids=frozenset({3}))
    simulation.add(request("a", [7], max_tokens=4, min_tokens=2, stop_token_ids=(9,)))
    banned = []
    for _ in range(4):
        simulation.send()
        banned.append(simulation.in_flight[0][0][0].sampling.banned_token_ids)
        simulation.receive()
    assert banned == [[3, 9], [3, 9], [], []]


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


def test_scores_cover_every_token_but_the_first():
    simulation = Simulation(max_batch_tokens=8)
    prompt = tokens(30, seed=6)
    for name in ("a", "b"):  # the second must not be answered from the cache
        simulation.add(request(name, prompt, max_tokens=0, score_only=True))
        simulation.run()
        assert simulation.ends[(name, 0)].scores == tuple(-float(t) for t in prompt[1:])


def test_n_sequences_have_seeds_of_their_own():
    simulation = Simulation()
    simulation.add(request("a", [1, 2], n=3, temperature=1.0, seed=11))
    simulation.send()
    seeds = {part.sampling.seed for part in simulation.in_flight[0][0]}
    assert len(seeds) == 3
    simulation.run()
    assert {index for _, index in simulation.ends} == {0, 1, 2}


def test_a_higher_priority_runs_first():
    simulation = Simulation(max_running_sequences=1)
    for name, priority in (("low", -1), ("mid", 0), ("high", 5), ("mid2", 0)):
        simulation.add(request(name, [1], max_tokens=2, priority=priority))
    simulation.run()
    assert [name for name, _ in simulation.ends] == ["high", "mid", "mid2", "low"]


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


def test_a_lost_cache_is_computed_again_with_the_same_tokens():
    simulation = Simulation(depth=2)
    for i in range(6):
        simulation.add(request(f"r{i}", tokens(20, seed=i), max_tokens=30))
    for _ in range(15):
        simulation.send()
        simulation.receive()
    simulation.in_flight.clear()
    simulation.stages = ModelStages(num_blocks=64, block_size=4, vocab_size=VOCAB)
    simulation.scheduler.reset_in_flight()
    simulation.run()
    for i in range(6):
        assert simulation.outputs[(f"r{i}", 0)] == expected_output(tokens(20, seed=i), 30, VOCAB)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps, cancellations, deadlines and losses keeps every invariant."""

    def __init__(self):
        super().__init__()
        self.simulation = Simulation(
            depth=3, num_blocks=14, block_size=4, max_batch_tokens=12, max_batch_sequences=4,
            max_running_sequences=6, max_context_tokens=50,
        )  # fmt: skip
        self.requests = {}

    @rule(
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=30),
        max_tokens=st.integers(1, 25),
        n=st.integers(1, 2),
        priority=st.integers(-1, 1),
        deadline=st.none() | st.integers(1, 30),
        resumed=st.integers(0, 3),
    )
    def arrive(self, prompt, max_tokens, n, priority, deadline, resumed):
        name = f"r{len(self.requests)}"
        resumed = min(resumed, max_tokens) if n == 1 else 0
        resume = expected_output(prompt, resumed, VOCAB)
        deadline_s = None if deadline is None else self.simulation.now_s + deadline
        new = request(
            name, prompt, max_tokens=max_tokens, n=n, priority=priority, deadline_s=deadline_s,
            resume=resume,
        )  # fmt: skip
        self.requests[name] = new
        self.simulation.add(new)

    @rule()
    def send(self):
        self.simulation.send()

    @rule()
    def receive(self):
        self.simulation.receive()

    @rule(which=st.integers(0, 30))
    def cancel(self, which):
        self.simulation.note(self.simulation.scheduler.cancel(f"r{which}", FinishReason.CANCELLED))

    @rule(which=st.integers(0, 30), index=st.integers(0, 1))
    def finish(self, which, index):
        events = self.simulation.scheduler.finish(f"r{which}", index, FinishReason.STOP_SEQUENCE)
        self.simulation.note(events)

    @rule(seconds=st.integers(1, 10))
    def time_passes(self, seconds):
        self.simulation.now_s += seconds
        self.simulation.note(self.simulation.scheduler.expire(self.simulation.now_s))

    @rule()
    def lose_the_stages(self):
        self.simulation.in_flight.clear()
        self.simulation.stages = ModelStages(num_blocks=14, block_size=4, vocab_size=VOCAB)
        self.simulation.scheduler.reset_in_flight()

    @invariant()
    def nothing_is_lost_or_shared_wrongly(self):
        self.simulation.scheduler.check_integrity()

    def teardown(self):
        self.simulation.run()
        for name, new in self.requests.items():
            resumed = len(new.resume_token_ids)
            for index in range(new.sampling.n):
                end = self.simulation.ends[(name, index)]
                output = self.simulation.outputs[(name, index)]
                length = min(new.sampling.max_tokens, 50 - len(new.prompt_token_ids)) - resumed
                whole = expected_output(new.prompt_token_ids, resumed + max(length, 0), VOCAB)
                assert output == whole[resumed:][: len(output)]
                if end.finish_reason is FinishReason.LENGTH:
                    assert len(output) == max(length, 0)


SchedulerMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyOrderOfEvents = SchedulerMachine.TestCase
