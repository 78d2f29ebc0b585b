"""Protobuf to requests and back: the only place where both meet. Every range is checked here.

All functions raise InvalidRequestError naming the field as the proto spells it.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterable, Sequence

from tightfit.cluster.deployment_status import DeploymentStatus, ModelInfo
from tightfit.cluster.errors import InvalidRequestError, ModelNotFoundError
from tightfit.cluster.request import FinishReason, SamplingParams, TokenEvent
from tightfit.v1 import cluster_pb2, common_pb2, inference_pb2
from tightfit.workers.api import StageMemory, StageStatus

DEFAULT_MAX_TOKENS = 128
MAX_REQUEST_ID = 128
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
MAX_N = 16
MAX_MESSAGES, MAX_ROLE_CHARACTERS = 1024, 32
ROLE = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_ROLE_CHARACTERS}}}")
MAX_PRIORITY = 100

FINISH_REASONS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.STOP_SEQUENCE: common_pb2.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
HEALTH = {
    "ok": cluster_pb2.HEALTH_OK,
    "idle": cluster_pb2.HEALTH_IDLE,
    "stalled": cluster_pb2.HEALTH_STALLED,
    "failed": cluster_pb2.HEALTH_FAILED,
    "draining": cluster_pb2.HEALTH_DRAINING,
    "recovering": cluster_pb2.HEALTH_RECOVERING,
}


def check_model(wanted: str, model: ModelInfo) -> None:
    """Raise ModelNotFoundError unless `wanted` is empty or what is served."""
    if wanted and wanted != model.name:
        raise ModelNotFoundError(
            f"model {wanted[:100]!r} is not served here; {model.name!r} is (or leave it empty)"
        )


def request_id(given: str) -> str:
    """The request's id, or a new one."""
    if not given:
        return secrets.token_hex(8)
    if len(given) > MAX_REQUEST_ID or not all("!" <= c <= "~" for c in given):
        raise InvalidRequestError(
            "request_id", f"must be 1 to {MAX_REQUEST_ID} printable ASCII characters without spaces"
        )
    return given


def priority(given: int) -> int:
    """Within its range."""
    _in_range("priority", given, -MAX_PRIORITY, MAX_PRIORITY)
    return given


def token_ids(field: str, ids: Iterable[int], model: ModelInfo) -> tuple[int, ...]:
    """Known token ids."""
    checked = tuple(ids)
    if checked and max(checked) >= model.vocab_size:
        unknown = next(i for i in checked if i >= model.vocab_size)
        raise InvalidRequestError(
            field, f"token id {unknown} is not in the vocabulary of {model.vocab_size}"
        )
    return checked


def resumed(ids: Sequence[int], sampling: SamplingParams, model: ModelInfo) -> tuple[int, ...]:
    """Output tokens that the caller already has."""
    if ids and sampling.n > 1:
        raise InvalidRequestError("resume_token_ids", "can only be given with sampling.n = 1")
    limits = {
        "sampling.max_tokens": sampling.max_tokens,
        "the context": model.max_context_tokens,
    }
    name = min(limits, key=lambda key: limits[key])
    if len(ids) > limits[name]:
        raise InvalidRequestError(
            "resume_token_ids", f"has {len(ids)} tokens; {name} allows {limits[name]}"
        )
    return token_ids("resume_token_ids", ids, model)


def messages(chat: common_pb2.Chat) -> list[dict[str, str]]:
    """A conversation for the template."""
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        raise InvalidRequestError(
            "chat.messages", f"has {len(chat.messages)} messages; 1 to {MAX_MESSAGES} are allowed"
        )
    for i, message in enumerate(chat.messages):
        if not ROLE.fullmatch(message.role):
            raise InvalidRequestError(
                f"chat.messages[{i}].role",
                f"is {message.role[:40]!r}; 1 to {MAX_ROLE_CHARACTERS} ASCII letters, digits, "
                '"_" and "-" are allowed',
            )
    return [{"role": m.role, "content": m.content} for m in chat.messages]


def sampling_params(given: inference_pb2.Sampling, model: ModelInfo) -> SamplingParams:
    """How tokens are drawn, every field within its range."""

    def optional(name: str, default: float) -> float:
        return getattr(given, name) if given.HasField(name) else default  # type: ignore[arg-type]

    max_tokens = int(optional("max_tokens", DEFAULT_MAX_TOKENS))
    top_p, repetition = optional("top_p", 1.0), optional("repetition_penalty", 1.0)
    _in_range("sampling.max_tokens", max_tokens, 1, 2**31 - 1)
    _in_range("sampling.min_tokens", given.min_tokens, 0, max_tokens, "max_tokens")
    _in_range("sampling.temperature", given.temperature, 0, 100)
    _in_range("sampling.top_p", top_p, 0, 1, above=True)
    _in_range("sampling.min_p", given.min_p, 0, 1)
    _in_range("sampling.repetition_penalty", repetition, 0, 100, above=True)
    _in_range("sampling.presence_penalty", given.presence_penalty, -2, 2)
    _in_range("sampling.frequency_penalty", given.frequency_penalty, -2, 2)
    _in_range("sampling.n", given.n, 0, MAX_N)
    if given.HasField("logprobs"):
        _in_range("sampling.logprobs", given.logprobs, 0, MAX_LOGPROBS)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=given.min_tokens,
        temperature=given.temperature,
        top_p=top_p,
        top_k=given.top_k,
        min_p=given.min_p,
        seed=given.seed if given.HasField("seed") else secrets.randbits(64),
        repetition_penalty=repetition,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        stop=_stops(given.stop),
        stop_token_ids=_stop_token_ids(given.stop_token_ids, model),
        ignore_eos=given.ignore_eos,
        logprobs=given.logprobs if given.HasField("logprobs") else None,
        n=given.n or 1,
        logit_bias=_logit_bias(given, model),
    )


def _in_range(
    field: str,
    value: float,
    least: float,
    most: float,
    most_name: str = "",
    *,
    above: bool = False,
) -> None:
    """Raise unless least ≤ value ≤ most (least < value, if `above`); NaN is never in a range."""
    if math.isfinite(value) and (least < value if above else least <= value) and value <= most:
        return
    bracket = "(" if above else "["
    limit = f"{most:g} ({most_name})" if most_name else f"{most:g}"
    raise InvalidRequestError(field, f"is {value:g}; it must be in {bracket}{least:g}, {limit}]")


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError(
            "sampling.stop", f"has {len(stops)} strings; at most {MAX_STOPS} are allowed"
        )
    for i, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequestError(
                f"sampling.stop[{i}]",
                f"has {len(stop)} characters; 1 to {MAX_STOP_CHARACTERS} are allowed",
            )
    return tuple(stops)


def _stop_token_ids(ids: Sequence[int], model: ModelInfo) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            "sampling.stop_token_ids",
            f"has {len(ids)} ids; at most {MAX_STOP_TOKEN_IDS} are allowed",
        )
    return token_ids("sampling.stop_token_ids", ids, model)


def _logit_bias(given: inference_pb2.Sampling, model: ModelInfo) -> tuple[tuple[int, float], ...]:
    if len(given.logit_bias) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(
            "sampling.logit_bias",
            f"has {len(given.logit_bias)} entries; at most {MAX_LOGIT_BIASES} are allowed",
        )
    token_ids("sampling.logit_bias", given.logit_bias, model)
    for token_id, value in given.logit_bias.items():
        _in_range(f"sampling.logit_bias[{token_id}]", value, -100, 100)
    return tuple(sorted(given.logit_bias.items()))


# -- answers -----------------------------------------------------------------------------------


def position_logprobs(event: TokenEvent) -> common_pb2.PositionLogprobs:
    """Log-probabilities of one event that has them."""
    return common_pb2.PositionLogprobs(
        token=common_pb2.TokenLogprob(token_id=event.token_id or 0, logprob=event.logprob or 0.0),
        top=[common_pb2.TokenLogprob(token_id=i, logprob=p) for i, p in event.top_logprobs],
    )


def model_response(model: ModelInfo, *, has_chat_template: bool) -> inference_pb2.GetModelResponse:
    """What is served."""
    return inference_pb2.GetModelResponse(
        name=model.name,
        family=model.family,
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        max_context_tokens=model.max_context_tokens,
        weight_format=model.weight_format,
        num_stages=model.num_stages,
        eos_token_ids=sorted(model.eos_token_ids),
        has_chat_template=has_chat_template,
    )


def _stage(status: StageStatus) -> cluster_pb2.Stage:
    return cluster_pb2.Stage(
        index=status.stage_index,
        first_layer=status.first_layer,
        end_layer=status.end_layer,
        format=status.format,
        kv_format=status.kv_format,
        device=status.device,
        planned_device=status.planned_device,
        node_id=status.node_id,
        pid=status.pid,
        epoch=status.epoch,
        steps=status.steps,
        busy_share=min(1.0, status.busy_s / status.uptime_s) if status.uptime_s > 0 else 0.0,
        memory=_memory(status.memory),
    )


def _memory(memory: StageMemory) -> cluster_pb2.StageMemory:
    return cluster_pb2.StageMemory(
        predicted_weight_bytes=memory.predicted_weight_bytes,
        weight_bytes=memory.weight_bytes,
        kv_cache_bytes=memory.kv_cache_bytes,
        workspace_bytes=memory.workspace_bytes,
        rss_anon_bytes=memory.rss_anon_bytes,
        budget_bytes=memory.budget_bytes or 0,
        gpu_bytes=memory.gpu_bytes,
        predicted_embedding_bytes=memory.predicted_embedding_bytes,
        embedding_bytes=memory.embedding_bytes,
        predicted_head_bytes=memory.predicted_head_bytes,
        head_bytes=memory.head_bytes,
        predicted_kv_cache_bytes=memory.predicted_kv_cache_bytes,
        predicted_host_bytes=memory.predicted_host_bytes,
        host_bytes=memory.host_bytes,
        measured_workspace_bytes=memory.measured_workspace_bytes,
        predicted_held_bytes=memory.predicted_held_bytes,
        held_bytes=memory.held_bytes,
        resident_bytes=memory.resident_bytes,
        baseline_bytes=memory.baseline_bytes,
        context_bytes=memory.context_bytes,
        headroom_bytes=memory.headroom_bytes,
        kv_tokens=memory.kv_tokens,
        differences=memory.differences,
    )


def status_response(status: DeploymentStatus) -> cluster_pb2.GetStatusResponse:
    """The deployment now."""
    counts = status.counts
    return cluster_pb2.GetStatusResponse(
        model=status.model.name,
        health=HEALTH[status.health],
        reason=status.reason,
        epoch=status.epoch,
        stages=[_stage(stage) for stage in status.stages],
        load=cluster_pb2.Load(
            running_sequences=counts.num_running,
            waiting_sequences=counts.num_waiting,
            queued_tokens=counts.num_queued_tokens,
            kv_blocks=counts.num_blocks,
            kv_blocks_used=counts.num_blocks_used,
            preemptions=counts.num_preemptions,
            micro_batches_in_flight=status.num_in_flight,
        ),
        better_plan=status.better_plan,
        num_recoveries=status.num_recoveries,
    )


def plan_response(status: DeploymentStatus) -> cluster_pb2.GetPlanResponse:
    """The placement that is served."""
    return cluster_pb2.GetPlanResponse(
        stages=[
            cluster_pb2.PlannedStage(
                index=stage.stage_index,
                device=stage.device,
                planned_device=stage.planned_device,
                first_layer=stage.first_layer,
                end_layer=stage.end_layer,
                format=stage.format,
                weight_bytes=stage.memory.predicted_weight_bytes,
            )
            for stage in status.stages
        ]
    )
