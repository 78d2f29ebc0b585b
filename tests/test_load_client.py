"""`tightfit bench serve`: what it sends, what it counts, and how it ends."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from real_gateway import CONTEXT, VOCAB, real_gateway

from tightfit.client import Chunk, Usage
from tightfit.client.load import Load, Outcome, main, percentile, run, summary


def chunk(offset, count, *, completion_tokens=None):
    usage = None
    if completion_tokens is not None:
        usage = Usage(prompt_tokens=1, completion_tokens=completion_tokens, cached_tokens=0)
    return Chunk(
        request_id="", index=0, token_offset=offset, text="", token_ids=tuple(range(count)),
        logprobs=(), finish_reason=None, usage=usage,
    )  # fmt: skip


def outcome_of(*chunks):
    outcome = Outcome()
    for i, one in enumerate(chunks):
        outcome.note(one, float(i))
    return outcome


def test_chunks_that_follow_each_other_lose_and_repeat_nothing():
    outcome = outcome_of(chunk(0, 1), chunk(1, 3), chunk(4, 0, completion_tokens=4))
    assert (outcome.num_wrong_offsets, outcome.num_lost, outcome.num_repeated) == (0, 0, 0)
    assert outcome.token_s == [0.0, 1.0, 1.0, 1.0]


def test_a_gap_between_offsets_is_lost_tokens():
    outcome = outcome_of(chunk(0, 2), chunk(5, 1))
    assert (outcome.num_wrong_offsets, outcome.num_lost, outcome.num_repeated) == (1, 3, 0)


def test_tokens_at_offsets_that_came_before_are_repeated_tokens():
    outcome = outcome_of(chunk(0, 4), chunk(2, 4), chunk(6, 1))
    assert (outcome.num_wrong_offsets, outcome.num_lost, outcome.num_repeated) == (1, 0, 2)


def test_tokens_that_the_service_counted_but_did_not_send_are_lost():
    outcome = outcome_of(chunk(0, 4, completion_tokens=6))
    assert (outcome.num_wrong_offsets, outcome.num_lost) == (1, 2)


@pytest.mark.parametrize(("percent", "value"), [(1, 1), (25, 1), (26, 2), (50, 2), (99, 4)])
def test_a_percentile_is_one_of_the_values(percent, value):
    assert percentile([4, 2, 1, 3], percent) == value


def test_a_load_without_end_is_refused():
    with pytest.raises(ValueError, match="without end"):
        Load(prompts=["a"], num_requests=None, max_tokens=1, ignore_eos=True)


def served(work, **settings):
    """`work(gateway)` in the event loop of a gateway on modelled stages."""

    async def inside():
        async with real_gateway(**settings) as (gateway, _):
            return await work(gateway)

    return asyncio.run(inside())


def load_of(count, **changes):
    fields = {
        "prompts": [[i + 2, 7] for i in range(20)], "num_requests": count, "max_tokens": 10,
        "ignore_eos": True, "timeout_s": 30.0,
    }  # fmt: skip
    return Load(**{**fields, **changes})


def test_a_closed_loop_keeps_as_many_requests_under_way_as_asked():
    most = 0

    async def work(gateway):
        nonlocal most
        running = asyncio.create_task(run(gateway.target, load_of(12, concurrency=3)))
        while not running.done():
            most = max(most, gateway.engine.num_unfinished)
            await asyncio.sleep(0.001)
        return await running

    outcomes, wall_s = served(work, delay_s=0.004)
    result = summary(outcomes, wall_s)
    assert most == 3
    assert result["requests"] == 12
    assert result["errors"] == {}
    assert result["output_tokens"] == 120
    assert result["lost_tokens"] == result["repeated_tokens"] == 0
    assert result["output_tokens_per_s"] == pytest.approx(120 / wall_s)


def test_times_between_tokens_are_those_of_the_stages():
    async def work(gateway):
        return await run(gateway.target, load_of(2))

    outcomes, wall_s = served(work, delay_s=0.02)
    result = summary(outcomes, wall_s)
    assert 20 <= result["itl_ms"]["p50"] < 60
    assert 20 <= result["ttft_ms"]["p50"] < 200
    assert result["e2e_ms"]["mean"] >= 10 * 20


@pytest.mark.parametrize("rate", [None, 50.0])
def test_no_request_is_sent_after_the_duration_and_none_is_cut(rate):
    load = load_of(None, duration_s=0.3, rate=rate)

    async def work(gateway):
        return await run(gateway.target, load)

    outcomes, wall_s = served(work, delay_s=0.002)
    assert 0.1 < wall_s < 0.85  # 0.3 s, and the requests that were under way then
    assert len(outcomes) > 3
    assert all(not o.error and len(o.token_s) == 10 for o in outcomes)


def test_an_open_loop_does_not_wait_for_answers():
    """20 requests of 10 steps at 10 ms, sent within 40 ms: one after the other would take 2 s."""

    async def work(gateway):
        return await run(gateway.target, load_of(20, rate=500.0))

    outcomes, wall_s = served(work, delay_s=0.01)
    assert [len(o.token_s) for o in outcomes] == [10] * 20
    assert wall_s < 1.5


def test_refused_requests_are_counted_by_status():
    load = load_of(5, prompts=[[2, 7], [VOCAB + 5], [3] * (CONTEXT + 1)], concurrency=2)

    async def work(gateway):
        return await run(gateway.target, load)

    result = summary(*served(work))
    assert result["errors"] == {"INVALID_ARGUMENT": 3}
    assert result["output_tokens"] == 20


def test_a_service_that_is_away_is_an_error_of_every_request():
    load = load_of(2, timeout_s=5.0)
    result = summary(*asyncio.run(run("127.0.0.1:1", load)))
    assert sum(result["errors"].values()) == 2
    assert "ttft_ms" not in result


# -- the command -------------------------------------------------------------------------------


@asynccontextmanager
async def command_against(gateway_settings):
    async with real_gateway(**gateway_settings) as (gateway, _):
        yield lambda *flags: asyncio.to_thread(main, ["--target", gateway.target, *flags])


def command(*flags, **settings):
    async def inside():
        async with command_against(settings) as call:
            return await call(*flags)

    return asyncio.run(inside())


def test_json_holds_every_figure(capsys):
    flags = ("--requests", "4", "--max-tokens", "6", "--ignore-eos", "--prompt-tokens", "5")
    assert command(*flags, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["requests"] == 4
    assert result["output_tokens"] == 24
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        assert set(result[name]) == {"p50", "p90", "p99", "mean"}


def test_the_table_shows_percentiles_and_errors(capsys):
    assert command("--requests", "2", "--max-tokens", "4", "--ignore-eos") == 0
    shown = capsys.readouterr().out
    assert "p99" in shown
    assert "ttft_ms" in shown
    assert "errors: none" in shown


def test_prompts_come_from_a_file_one_per_line(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("The quick brown fox\n\nEin Vöglein\n", encoding="utf-8")
    assert command("--prompts", str(file), "--requests", "3", "--max-tokens", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 3


def test_failed_requests_make_the_command_fail(capsys):
    too_long = str(CONTEXT + 10)
    assert command("--requests", "2", "--prompt-tokens", too_long, "--json") == 1
    assert json.loads(capsys.readouterr().out)["errors"] == {"INVALID_ARGUMENT": 2}


def test_a_service_that_is_away_is_said(capsys):
    assert main(["--target", "127.0.0.1:1", "--timeout-s", "5"]) == 1
    assert "tightfit bench serve: UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--requests", "0"], "--requests"),
        (["--rate", "0"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--duration", "-1"], "--duration"),
        (["--prompt-tokens", "0"], "--prompt-tokens"),
        (["--warmup", "-1"], "--warmup"),
        (["--prompts", "no/such/file"], "no/such/file"),
    ],
)
def test_wrong_usage_is_refused_by_name(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err
