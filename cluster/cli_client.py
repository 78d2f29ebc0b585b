"""The commands that talk to a running service: generate, status, drain."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from tightfit.client import Chunk, Client, TightfitRpcError
from tightfit.client import Message as ChatMessage
from tightfit.client._security import connect_options
from tightfit.cluster.config import ClientConfig
from tightfit.cluster.errors import ConfigError, UnavailableError
from tightfit.cluster.units import format_bytes

SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "stop_token_ids",
    "ignore_eos", "logprobs", "n", "logit_bias",
)  # fmt: skip
"""Fields of a request's sampling that have a flag of the same name."""
WIDE_COLUMNS = 110
"""Width from which on the status has every column."""
WIDE_ONLY = ("pid", "weights", "KV cache", "rehearsed", "budget")
WORDS = ("format", "KV", "device")
"""Columns that are not numbers."""


def _client(config: ClientConfig) -> Client:
    """A client with the certificates and the token of a configuration.

    Raises:
        ConfigError: a file of them cannot be used, or the token would travel for all to read.
    """
    try:
        options = connect_options(
            config.target,
            tls=config.tls,
            ca=config.tls_ca,
            cert=config.tls_cert,
            key=config.tls_key,
            token_file=config.token_file,
            insecure_token=config.insecure_token,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Client(config.target, timeout_s=config.timeout_s, **options)


@contextmanager
def connected(config: ClientConfig) -> Iterator[Client]:
    """A client of the service at `config.target`; its errors become ours, with the address."""
    with _client(config) as client:
        try:
            yield client
        except TightfitRpcError as error:
            hint = f" Try again in {error.retry_after_s:g} s." if error.retry_after_s else ""
            raise UnavailableError(f"{config.target} answers {error}{hint}") from error
        except (TypeError, ValueError) as error:  # protobuf refuses a value before it is sent
            raise UnavailableError(f"the request cannot be sent: {error}") from error


# -- generate --------------------------------------------------------------------------------


def generate(config: ClientConfig, args: argparse.Namespace) -> int:
    """Stream the answer to a prompt to standard output; returns the exit code."""
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    prompt: str | list[ChatMessage] = text
    if args.chat or args.system is not None:
        prompt = [{"role": "system", "content": args.system}] if args.system is not None else []
        prompt.append({"role": "user", "content": text})
    with connected(config) as client:
        chunks = client.stream(
            prompt, model=args.model or "", priority=args.priority or 0, **_sampling(args)
        )
        if args.json:
            return _print_json(chunks)
        return _print_text(chunks, num_sequences=args.n or 1)


def _sampling(args: argparse.Namespace) -> Any:
    """The sampling that was asked for; what was not is left to the service."""
    values = {name: getattr(args, name) for name in SAMPLING}
    if values["logit_bias"] is not None:
        values["logit_bias"] = dict(values["logit_bias"])
    return {name: value for name, value in values.items() if value is not None}


def _print_json(chunks: Iterable[Chunk]) -> int:
    """One object per chunk and line."""
    for chunk in chunks:
        print(json.dumps(dataclasses.asdict(chunk)), flush=True)
    return 0


def _print_text(chunks: Iterable[Chunk], *, num_sequences: int) -> int:
    """Text as it comes; of several sequences, one after the other at the end."""
    texts = [""] * num_sequences
    for chunk in chunks:
        if num_sequences == 1:
            print(chunk.text, end="", flush=True)
        else:
            texts[chunk.index] += chunk.text
    if num_sequences > 1:
        print("\n".join(f"[{index}] {text}" for index, text in enumerate(texts)))
    else:
        print()
    return 0


# -- status ----------------------------------------------------------------------------------


def status(config: ClientConfig, *, as_json: bool) -> int:
    """Print stages, memory and load; the exit code is 1 when the service has failed."""
    with connected(config) as client:
        answer = plain(client.status())
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        # What reads a pipe has no width: it gets every column.
        print_status(answer, Console(width=None if sys.stdout.isatty() else WIDE_COLUMNS))
    return 1 if answer["health"] == "failed" else 0


def plain(message: Any) -> dict[str, Any]:
    """A protobuf message as JSON would have it; enumerations are lower-case words, and a number
    that is not there is None."""
    return {
        field.name: _plain_field(field, getattr(message, field.name))
        if field.message_type or not field.has_presence or message.HasField(field.name)
        else None
        for field in message.DESCRIPTOR.fields
    }


def _plain_field(field: Any, value: Any) -> Any:
    if field.is_repeated:
        return [plain(item) if field.message_type else item for item in value]
    if field.message_type:
        return plain(value)
    if field.enum_type:
        prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        return field.enum_type.values_by_number[value].name.removeprefix(prefix).lower()
    return value


def print_status(answer: dict[str, Any], console: Console) -> None:
    """The status as a person reads it."""
    load = answer["load"]
    reason = f" ({answer['reason']})" if answer["reason"] else ""
    number = answer["num_recoveries"]
    recoveries = f", {number} {'recovery' if number == 1 else 'recoveries'}" if number else ""
    console.print(
        f"{answer['model']}: {answer['health']}{reason}, epoch {answer['epoch']}{recoveries}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    used, blocks = load["kv_blocks_used"], load["kv_blocks"]
    console.print(
        f"{load['running_sequences']} sequences running, {load['waiting_sequences']} waiting with "
        f"{load['queued_tokens']} prompt tokens; {used} of {blocks} KV blocks in use; "
        f"{load['micro_batches_in_flight']} micro-batches in flight; "
        f"{load['preemptions']} preemptions",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if answer["better_plan"]:
        console.print(
            f"a better plan has become possible: {answer['better_plan']}; a restart takes it",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    stages = answer["stages"]
    if stages:
        console.print(_table([_stage_row(stage) for stage in stages], console.width))
        console.print("memory", style="dim")
        console.print(_table([_memory_row(stage) for stage in stages], console.width))
    for stage in stages:
        for difference in stage["memory"]["differences"]:
            console.print(
                f"stage {stage['index']} is not as predicted: {difference}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip


def _table(rows: list[dict[str, str]], width: int) -> Table:
    """One line per stage; fewer columns if narrow."""
    names = [name for name in rows[0] if width >= WIDE_COLUMNS or name not in WIDE_ONLY]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name in WORDS else "right")
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _stage_row(stage: dict[str, Any]) -> dict[str, str]:
    return {
        "stage": str(stage["index"]),
        "layers": f"{stage['first_layer']}-{stage['end_layer'] - 1}",
        "format": stage["format"],
        "KV": stage["kv_format"],
        "device": stage["planned_device"] or stage["device"],
        "pid": str(stage["pid"]),
        "busy": f"{100 * stage['busy_share']:.0f} %",
    }


def _memory_row(stage: dict[str, Any]) -> dict[str, str]:
    """What a stage keeps: as predicted, by its tensors, and seen from outside (RSS, or a GPU's
    allocator); then what a step needs, and what is left of the budget."""
    memory = stage["memory"]
    return {
        "stage": str(stage["index"]),
        "predicted": format_bytes(memory["predicted_held_bytes"]),
        "tensors": format_bytes(memory["held_bytes"]),
        "resident": format_bytes(memory["resident_bytes"]),
        "weights": format_bytes(memory["weight_bytes"]),
        "KV cache": format_bytes(memory["kv_cache_bytes"]),
        "KV tokens": f"{memory['kv_tokens']:,}",
        "workspace": format_bytes(memory["workspace_bytes"]),
        "rehearsed": _bytes_or(memory["measured_workspace_bytes"], "unknown"),
        "budget": format_bytes(memory["budget_bytes"]) if memory["budget_bytes"] else "none",
        "headroom": _bytes_or(memory["headroom_bytes"], "none"),
    }


def _bytes_or(num_bytes: int | None, word: str) -> str:
    return word if num_bytes is None else format_bytes(num_bytes)


# -- drain -----------------------------------------------------------------------------------


def drain(config: ClientConfig) -> int:
    """Ask the service to take no new requests; returns the exit code."""
    with connected(config) as client:
        unfinished = client.drain()
    print(f"{config.target} takes no new requests and ends after those that run: {unfinished}.")
    return 0
