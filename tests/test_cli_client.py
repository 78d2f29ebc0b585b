"""The commands that talk to a service, against a gRPC server that answers from a script."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from rich.console import Console

from tightfit.cluster import cli
from tightfit.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
)


class Script(inference_pb2_grpc.InferenceServiceServicer, cluster_pb2_grpc.ClusterServiceServicer):
    """Streams "one two" for each sequence; keeps the requests that it got."""

    def __init__(self):
        self.requests = []
        self.failure = None
        self.health, self.reason = cluster_pb2.HEALTH_IDLE, ""
        self.num_recoveries = 0

    def GenerateStream(self, request, context):
        self.requests.append(request)
        if self.failure is not None:
            context.set_trailing_metadata((("retry-after-ms", "1500"),))
            context.abort(*self.failure)
        last = max(1, request.sampling.n) - 1
        for offset, text in enumerate(("one", " two")):
            for index in range(last + 1):
                done = offset == 1
                yield inference_pb2.GenerateStreamResponse(
                    request_id="r",
                    index=index,
                    token_offset=offset,
                    text=text,
                    token_ids=[7 + offset],
                    finish_reason=common_pb2.FINISH_REASON_LENGTH if done else 0,
                    usage=common_pb2.Usage(prompt_tokens=3) if done and index == last else None,
                )

    def GetStatus(self, request, context):
        memory = cluster_pb2.StageMemory(
            predicted_weight_bytes=100 * 2**20,
            weight_bytes=101 * 2**20,
            kv_cache_bytes=2**30,
            predicted_held_bytes=2**30 + 100 * 2**20,
            held_bytes=2**30 + 101 * 2**20,
            resident_bytes=2**31,
            workspace_bytes=2**20,
            measured_workspace_bytes=2**19,
            budget_bytes=2**32,
            headroom_bytes=-(2**30),
            kv_tokens=4096,
            differences=["device memory: 2 bytes, 1 predicted"],
        )
        return cluster_pb2.GetStatusResponse(
            model="tiny",
            health=self.health,
            reason=self.reason,
            epoch=1 + self.num_recoveries,
            num_recoveries=self.num_recoveries,
            stages=[
                cluster_pb2.Stage(index=0, end_layer=15, format="int8", device="cpu", pid=11,
                                  busy_share=0.5, memory=memory),
                cluster_pb2.Stage(index=1, first_layer=15, end_layer=30, format="int8"),
            ],
            load=cluster_pb2.Load(running_sequences=2, kv_blocks=100, kv_blocks_used=4),
        )  # fmt: skip

    def Drain(self, request, context):
        return cluster_pb2.DrainResponse(unfinished_requests=2)


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def target(script):
    server = grpc.server(ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(script, server)
    cluster_pb2_grpc.add_ClusterServiceServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield ["--target", f"127.0.0.1:{port}"]
    server.stop(None).wait()


def test_generate_prints_the_text_and_a_new_line(target, capsys):
    assert cli.main(["generate", *target, "hello"]) == 0
    assert capsys.readouterr().out == "one two\n"


def test_several_sequences_are_printed_one_after_the_other(target, capsys):
    assert cli.main(["generate", *target, "-n", "2", "hello"]) == 0
    assert capsys.readouterr().out == "[0] one two\n[1] one two\n"


def test_json_lines_have_every_field_of_a_chunk(target, capsys):
    assert cli.main(["generate", *target, "--json", "hello"]) == 0
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == "one"
    assert first["token_ids"] == [7]
    assert first["finish_reason"] is None
    assert last["token_offset"] == 1
    assert last["finish_reason"] == "length"
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "cached_tokens": 0}


def test_what_is_not_asked_for_is_left_to_the_service(script, target):
    cli.main(["generate", *target, "hello"])
    (request,) = script.requests
    assert request == inference_pb2.GenerateRequest(
        prompt="hello", sampling=inference_pb2.Sampling()
    )


def test_every_sampling_flag_reaches_the_request(script, target):
    flags = (
        "--max-tokens 9 --min-tokens 2 --temperature 0.5 --top-p 0.75 --top-k 5 --min-p 0.25 "
        "--seed 0 --repetition-penalty 1.5 --presence-penalty 0.5 --frequency-penalty -0.5 "
        "--stop a --stop b --stop-token-id 4 --stop-token-id 0 --ignore-eos --logprobs 0 -n 1 "
        "--logit-bias 3=-2.5 --logit-bias 4=1 --priority 2 --model m"
    )
    assert cli.main(["generate", *target, *flags.split(), "hello"]) == 0
    (request,) = script.requests
    assert request.model == "m"
    assert request.priority == 2
    assert request.sampling == inference_pb2.Sampling(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.75, top_k=5, min_p=0.25, seed=0,
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, stop=["a", "b"],
        stop_token_ids=[4, 0], ignore_eos=True, logprobs=0, n=1, logit_bias={3: -2.5, 4: 1.0},
    )  # fmt: skip
    assert request.sampling.HasField("seed")
    assert request.sampling.HasField("logprobs")


def test_every_field_of_the_request_s_sampling_has_a_flag():
    from tightfit.cluster.cli_client import SAMPLING

    assert set(SAMPLING) == {field.name for field in inference_pb2.Sampling.DESCRIPTOR.fields}


def test_a_system_message_makes_a_conversation(script, target):
    assert cli.main(["generate", *target, "--system", "be brief", "hello"]) == 0
    messages = script.requests[0].chat.messages
    assert [(m.role, m.content) for m in messages] == [("system", "be brief"), ("user", "hello")]
    assert cli.main(["generate", *target, "--chat", "hello"]) == 0
    assert [m.role for m in script.requests[1].chat.messages] == ["user"]


def test_a_dash_reads_the_prompt_from_standard_input(script, target, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from a file\n"))
    assert cli.main(["generate", *target, "-"]) == 0
    assert script.requests[0].prompt == "from a file\n"


def test_a_refusal_exits_with_1_and_says_the_status_the_reason_and_when_to_try_again(
    script, target, capsys
):
    script.failure = (grpc.StatusCode.RESOURCE_EXHAUSTED, "1024 requests wait")
    assert cli.main(["generate", *target, "hello"]) == 1
    error = capsys.readouterr().err
    assert "RESOURCE_EXHAUSTED: 1024 requests wait" in error
    assert "Try again in 1.5 s" in error


def test_a_number_that_the_protocol_cannot_carry_exits_with_1_and_one_line(target, capsys):
    assert cli.main(["generate", *target, "--top-k", "-1", "hello"]) == 1
    error = capsys.readouterr().err
    assert "the request cannot be sent" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [["generate", "hello"], ["status"], ["drain"]])
def test_a_service_that_is_not_there_is_named(command, capsys):
    assert cli.main([*command, "--target", "127.0.0.1:1", "--timeout-s", "5"]) == 1
    error = capsys.readouterr().err
    assert "127.0.0.1:1 answers UNAVAILABLE" in error


def test_status_shows_predicted_and_measured_bytes_of_every_stage(target, capsys):
    assert cli.main(["status", *target]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny: idle, epoch 1"
    assert "2 sequences running" in lines[1]
    assert "4 of 100 KV blocks in use" in lines[1]
    assert [" ".join(line.split()) for line in lines[3:5]] == [
        "0 0-14 int8 cpu 11 50 %", "1 15-29 int8 0 0 %",
    ]  # fmt: skip
    assert lines[5] == "memory"
    names = "stage predicted tensors resident weights KV cache KV tokens workspace rehearsed budget"
    assert " ".join(lines[6].split()) == f"{names} headroom"
    assert " ".join(lines[7].split()) == (
        "0 1.10 GiB 1.10 GiB 2.00 GiB 101.0 MiB 1.00 GiB 4,096 1.0 MiB 512.0 KiB 4.00 GiB -1.00 GiB"
    )
    assert lines[8].split()[-3:] == ["unknown", "none", "none"]
    assert lines[9:] == ["stage 0 is not as predicted: device memory: 2 bytes, 1 predicted"]


def test_on_a_narrow_terminal_every_stage_keeps_one_line(target):
    from tightfit.cluster.cli_client import plain, print_status

    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    print_status(plain(Script().GetStatus(None, None)), console)
    _, _, *stages, memory, header, first, second, _ = out.getvalue().splitlines()
    assert [line.split()[0] for line in stages] == ["stage", "0", "1"]
    assert memory.strip() == "memory"
    assert header.split()[-1] == "headroom"
    assert " ".join(first.split()) == "0 1.10 GiB 1.10 GiB 2.00 GiB 4,096 1.0 MiB -1.00 GiB"
    assert second.split()[0] == "1"


def test_status_as_json_has_numbers_as_numbers_and_states_as_words(target, capsys):
    assert cli.main(["status", *target, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["health"] == "idle"
    memory, other = (stage["memory"] for stage in answer["stages"])
    assert (memory["weight_bytes"], memory["headroom_bytes"]) == (101 * 2**20, -(2**30))
    assert (other["headroom_bytes"], other["measured_workspace_bytes"]) == (None, None)
    assert answer["load"]["kv_blocks"] == 100


def test_status_of_a_failed_service_exits_with_1_and_the_reason_as_it_is(script, target, capsys):
    script.health, script.reason = cluster_pb2.HEALTH_FAILED, "stage 1 [gone]"
    assert cli.main(["status", *target]) == 1
    assert "tiny: failed (stage 1 [gone])" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "epoch 1\n"), (1, "epoch 2, 1 recovery\n"), (2, "epoch 3, 2 recoveries\n")],
)
def test_status_of_a_service_that_recovers_has_the_reason_and_how_often_it_did_before(
    script, target, capsys, number, said
):
    script.health, script.reason = cluster_pb2.HEALTH_RECOVERING, "stage 1 [gone]"
    script.num_recoveries = number
    assert cli.main(["status", *target]) == 0
    assert f"tiny: recovering (stage 1 [gone]), {said}" in capsys.readouterr().out
    assert cli.main(["status", *target, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["health"], answer["reason"]) == ("recovering", "stage 1 [gone]")
    assert (answer["num_recoveries"], answer["epoch"]) == (number, 1 + number)


def test_drain_says_how_many_requests_are_unfinished(target, capsys):
    assert cli.main(["drain", *target]) == 0
    assert "ends after those that run: 2." in capsys.readouterr().out
