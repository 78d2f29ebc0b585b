import random
from itertools import pairwise

import pytest
from doubles import Simulation, expected_output, request

from tightfit.cluster.request import FinishReason
from tightfit.cluster.scheduling.batching import MAX_LOSSES

VOCAB = Simulation.VOCAB


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


def test_a_lost_cache_is_computed_again_with_the_same_tokens():
    simulation = Simulation(depth=2)
    for i in range(6):
        simulation.add(request(f"r{i}", tokens(20, seed=i), max_tokens=30))
    for _ in range(15):
        simulation.send()
        simulation.receive()
    preemptions = simulation.scheduler.counts().num_preemptions
    simulation.lose_the_stages()
    counts = simulation.scheduler.counts()
    assert (counts.num_running, counts.num_waiting, counts.num_blocks_cached) == (0, 6, 0)
    assert counts.num_preemptions == preemptions  # those are for want of blocks
    simulation.run()
    for i in range(6):
        assert simulation.outputs[(f"r{i}", 0)] == expected_output(tokens(20, seed=i), 30, VOCAB)


def test_a_request_of_which_the_stages_may_die_is_not_tried_for_ever():
    """Those beside it are, as they get tokens between the losses; and so do those that wait."""
    simulation = Simulation(max_batch_sequences=2, max_running_sequences=3)
    simulation.add(request("deadly", tokens(20, seed=1), max_tokens=30))
    for loss in range(MAX_LOSSES):
        simulation.add(request(f"beside{loss}", tokens(8, seed=2 + loss), max_tokens=30))
        assert "deadly" not in {name for name, _ in simulation.ends}
        simulation.send()
        simulation.lose_the_stages()
    end = simulation.ends[("deadly", 0)]
    assert end.finish_reason is FinishReason.ERROR
    assert end.error == "the pipeline was lost 3 times in a row while it computed this request"
    simulation.run()
    for loss in range(1, MAX_LOSSES):
        expected = expected_output(tokens(8, seed=2 + loss), 30, Simulation.VOCAB)
        assert simulation.outputs[(f"beside{loss}", 0)] == expected


def test_losses_with_tokens_between_are_not_held_against_a_request():
    simulation = Simulation()
    simulation.add(request("a", tokens(20, seed=0), max_tokens=30))
    for _ in range(4 * MAX_LOSSES):
        simulation.step()
        simulation.send()
        simulation.lose_the_stages()
    simulation.run()
    expected = expected_output(tokens(20, seed=0), 30, Simulation.VOCAB)
    assert simulation.outputs[("a", 0)] == expected
    assert simulation.ends[("a", 0)].num_restarts == 4 * MAX_LOSSES


def test_what_a_smaller_cache_cannot_hold_ends_with_the_reason_and_the_rest_goes_on():
    simulation = Simulation(num_blocks=64)
    simulation.add(request("long", tokens(20, seed=0), max_tokens=150))
    simulation.add(request("short", tokens(20, seed=1), max_tokens=30))
    for _ in range(5):
        simulation.step()
    held = simulation.scheduler.counts().num_prompt_tokens
    simulation.lose_the_stages(num_blocks=20)
    assert simulation.ends[("long", 0)].error.startswith("the request may need 170 tokens")
    assert simulation.scheduler.counts().num_blocks == 20
    assert held <= simulation.scheduler.counts().num_replayed_tokens < held + 12
    simulation.run()
    expected = expected_output(tokens(20, seed=1), 30, Simulation.VOCAB)
    assert simulation.outputs[("short", 0)] == expected


@pytest.mark.parametrize("depth", [1, 2])
def test_when_not_all_decodes_fit_they_take_turns(depth):
    """More decodes than a micro-batch takes, or a pipeline that is kept less full than it has
    stages: nobody waits for another's end."""
    simulation = Simulation(depth=depth, num_stages=4, num_blocks=256, max_running_sequences=24)
    for i in range(24):
        simulation.add(request(f"r{i}", [i], max_tokens=30))
    simulation.run()
    for steps in simulation.token_steps.values():
        gaps = [after - before for before, after in pairwise(steps)]
        assert max(gaps) <= 12


def test_the_sequences_of_one_request_share_a_long_prompt():
    simulation = Simulation(depth=2, max_batch_tokens=16)
    prompt = tokens(80, seed=12)
    simulation.add(request("a", prompt, n=3, max_tokens=5))
    while not simulation.token_steps:
        simulation.step()
    simulation.step()
    assert simulation.scheduler.counts().num_blocks_used < 2 * 80 // 4
    simulation.run()
    assert simulation.stages.num_tokens < 80 + 3 * (4 + 5)
    for index in range(3):
        assert simulation.outputs[("a", index)] == expected_output(prompt, 5, VOCAB)
    assert [simulation.ends[("a", i)].num_cached_tokens for i in range(3)] == [0, 76, 76]


def test_a_sibling_takes_over_when_the_first_is_cancelled_in_its_prompt():
    simulation = Simulation(depth=1, max_batch_tokens=16)
    prompt = tokens(80, seed=12)
    simulation.add(request("a", prompt, n=3, max_tokens=5))
    simulation.step()
    simulation.note(simulation.scheduler.finish("a", 0, FinishReason.CANCELLED))
    simulation.run()
    assert simulation.outputs[("a", 2)] == expected_output(prompt, 5, VOCAB)


def test_one_of_several_sequences_is_ended_alone():
    simulation = Simulation()
    simulation.add(request("a", [1, 2], n=2, max_tokens=20))
    simulation.step()
    simulation.note(simulation.scheduler.finish("a", 1, FinishReason.STOP_SEQUENCE))
    assert simulation.scheduler.finish("a", 1, FinishReason.STOP_SEQUENCE) == []
    simulation.run()
    assert simulation.ends[("a", 1)].finish_reason is FinishReason.STOP_SEQUENCE
    assert simulation.outputs[("a", 1)] == simulation.outputs[("a", 0)][:1]
    assert len(simulation.outputs[("a", 0)]) == 20


def test_the_lowest_priority_and_latest_arrival_steps_back_first():
    simulation = Simulation(num_blocks=12, max_context_tokens=48)
    for name, priority in (("low", -1), ("early", 0), ("late", 0), ("high", 1)):
        simulation.add(request(name, tokens(7, seed=1), max_tokens=30, priority=priority))
    simulation.run()
    assert simulation.scheduler.counts().num_preemptions >= 2
    assert [name for name, _ in simulation.ends] == ["high", "early", "late", "low"]


def test_the_history_travels_only_with_a_penalty():
    simulation = Simulation()
    simulation.add(request("plain", [1, 2, 3]))
    simulation.add(request("penalty", [4, 5, 6], presence_penalty=0.5))
    simulation.step()
    simulation.send()
    plain, penalty = (part.sampling for part in simulation.in_flight[0][0])
    assert (plain.history_token_ids, plain.num_prompt_tokens) == ([], 3)
    assert penalty.history_token_ids == [4, 5, 6, *simulation.outputs[("penalty", 0)]]
    assert penalty.num_prompt_tokens == 3


def test_a_preempted_or_resumed_sequence_draws_with_the_same_seed_at_the_same_position():
    def keys(simulation):
        drawn = {}
        while simulation.send():
            for part in simulation.in_flight[0][0]:
                if part.sampling is not None:
                    position = part.start_position + len(part.token_ids)
                    drawn[(part.sampling.seed, position)] = True
            simulation.receive()
        return sorted(drawn)

    prompt = tokens(10, seed=3)
    plain = Simulation()
    plain.add(request("a", prompt, max_tokens=20, seed=5))
    resumed = Simulation()
    resumed.add(
        request("b", prompt, max_tokens=20, seed=5, resume=expected_output(prompt, 7, VOCAB))
    )
    whole = keys(plain)
    assert keys(resumed) == whole[7:]
    crowded = Simulation(num_blocks=9, max_context_tokens=36)
    crowded.add(request("c", tokens(9, seed=4), max_tokens=25, priority=1))
    crowded.add(request("a", prompt, max_tokens=20, seed=5))
    assert set(keys(crowded)) >= set(whole)
    assert crowded.scheduler.counts().num_preemptions > 0


def test_a_failure_ends_every_request_with_its_reason():
    simulation = Simulation(max_running_sequences=1)
    simulation.add(request("a", [1], max_tokens=9))
    simulation.add(request("b", [2], max_tokens=9, n=2))
    simulation.step()
    simulation.note(simulation.scheduler.fail_all("stage 1 is gone"))
    assert not simulation.scheduler.has_work
    assert {key: (end.finish_reason, end.error) for key, end in simulation.ends.items()} == {
        key: (FinishReason.ERROR, "stage 1 is gone") for key in (("a", 0), ("b", 0), ("b", 1))
    }
    simulation.run()


def test_a_turn_that_ends_in_stepping_back_passes_to_another():
    """The one whose turn it is finds no block and is the last in rank: the other runs on."""
    simulation = Simulation(
        depth=1, num_stages=2, num_blocks=3, block_size=2, max_running_sequences=2,
        enable_prefix_cache=False,
    )  # fmt: skip
    simulation.add(request("a", [0], n=2, max_tokens=4))
    simulation.run()
    for index in range(2):
        assert simulation.outputs[("a", index)] == expected_output([0], 4, VOCAB)


def cached_after(simulation, name, prompt):
    """Prompt tokens that a new request takes from the cache."""
    simulation.add(request(name, prompt, max_tokens=1))
    simulation.run()
    return simulation.ends[(name, 0)].num_cached_tokens


def test_the_prompt_that_was_used_longest_ago_is_forgotten_first():
    simulation = Simulation(num_blocks=20, block_size=4, max_context_tokens=80)
    first, second, third = (tokens(33, seed=i) for i in (1, 2, 3))
    cached_after(simulation, "first", first)
    cached_after(simulation, "second", second)
    assert cached_after(simulation, "first again", first) == 32
    cached_after(simulation, "third", third)
    assert cached_after(simulation, "first once more", first) == 32
    assert cached_after(simulation, "second again", second) < 32


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning():
    simulation = Simulation(num_blocks=12, block_size=4, max_context_tokens=48)
    prompt = tokens(33, seed=1)
    cached_after(simulation, "first", prompt)
    cached_after(simulation, "other", tokens(20, seed=2))
    assert 16 <= cached_after(simulation, "again", prompt) < 32


def test_a_higher_priority_speaks_in_every_step_when_not_all_fit():
    simulation = Simulation(depth=1, num_stages=4, num_blocks=256)
    for i in range(8):
        simulation.add(request(f"r{i}", [i], max_tokens=20))
    simulation.add(request("high", [9], max_tokens=20, priority=1))
    simulation.run()
    steps = simulation.token_steps[("high", 0)]
    assert {after - before for before, after in pairwise(steps)} == {1}


def test_the_stages_of_a_pipeline_share_a_lone_prompt():
    simulation = Simulation(depth=2, num_blocks=256, max_batch_tokens=512, max_context_tokens=500)
    simulation.add(request("a", tokens(300, seed=1)))
    while simulation.send():
        pass
    assert [len(slices[0].token_ids) for slices, _ in simulation.in_flight] == [150, 75]


def test_what_is_let_in_is_seldom_preempted_before_it_has_spoken():
    """Each running sequence may want a block soon: newcomers leave those alone."""
    simulation = Simulation(num_blocks=40, block_size=4, max_context_tokens=160)
    for i in range(60):
        simulation.add(request(f"r{i}", tokens(17, seed=i), max_tokens=30))
    simulation.run()
    assert simulation.scheduler.counts().num_preemptions < 50  # 65 without
