"""One running shard: computes the micro-batches that arrive, in order, and passes them on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tightfit.workers.api import (
    LoadProgress,
    MicroBatch,
    SampledToken,
    SequenceScores,
    StageMemory,
    StageSpec,
    StageStatus,
    StepResult,
)
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import DecoderConfig, decoder_config
from tightfit.workers.errors import LinkError, StageError
from tightfit.workers.link import StepMessage
from tightfit.workers.rehearsal import largest_batches
from tightfit.workers.sampler import sample, score
from tightfit.workers.shard import ShardModel, spec_formats
from tightfit.workers.shard_bytes import format_label
from tightfit.workers.stage_memory import (
    MemoryAccount,
    Predicted,
    allocated_gpu_bytes,
    free_gpu_bytes,
    rss_anon_bytes,
)
from tightfit.workers.workspace import MAX_LOGIT_ROWS

log = logging.getLogger(__name__)

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _raw(rows: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, shared with it."""
    return memoryview(rows.view(torch.uint8).numpy().data).cast("B")


class Stage:
    """A shard with its KV cache, its place in the pipeline and its epoch.

    Raises:
        CheckpointError, UnsupportedModelError: the model cannot be loaded.
        BudgetError: the shard and at least one KV block do not fit `memory_budget_bytes`.
    """

    def __init__(
        self, spec: StageSpec, *, progress: Callable[[LoadProgress], None] | None = None
    ) -> None:
        self.spec = spec
        if spec.num_threads is not None:
            torch.set_num_threads(spec.num_threads)
        budget = spec.memory_budget_bytes
        if spec.device != "cpu" and budget is None:
            budget = free_gpu_bytes(spec.device)
        base_rss, base_gpu_bytes = rss_anon_bytes(), allocated_gpu_bytes(spec.device)
        checkpoint = open_checkpoint(spec.model_path)
        try:
            self.config = decoder_config(checkpoint.config)
            self._formats = spec_formats(self.config, spec)
            self._account = MemoryAccount(
                spec=spec,
                config=self.config,
                formats=self._formats,
                predicted=Predicted.of(checkpoint, self.config, self._formats, spec),
                base_rss=base_rss,
                base_gpu_bytes=base_gpu_bytes,
                budget=budget,
            )
            self._account.plan_kv_blocks()
            self._account.limit()
            self.model = ShardModel.load(checkpoint, self.config, spec, progress=progress)
        finally:
            checkpoint.close()
        del checkpoint  # its header may list a vocabulary
        self.num_kv_blocks = self._account.num_kv_blocks
        self.model.allocate_kv(self.num_kv_blocks)
        self._account.settle(self._rehearse)
        self._dtype = self._formats.activations
        self._epoch = 0
        self._next_step = 0
        self._busy_s = 0.0
        self._started_s = time.monotonic()

    def _rehearse(self) -> None:
        """Compute the largest micro-batches with one layer of each kind: others take no more at a
        time. What they leave in the KV cache is wiped."""
        model, spec = self.model, self.spec
        dtype = TORCH_DTYPES[self._formats.activations]
        kinds = model.layer_kinds
        with torch.inference_mode():
            for batch in largest_batches(self.config, spec, self.num_kv_blocks):
                hidden = None
                if not spec.is_first:
                    shape = (batch.num_tokens, self.config.hidden_size)
                    hidden = torch.zeros(shape, dtype=dtype, device=spec.device)
                rows = model.forward(batch, hidden, only=kinds)
                if spec.is_last:
                    finish_step(model, batch, rows)
            model.clear_kv(kinds)

    @property
    def _format_label(self) -> str:
        spec = self.spec
        return format_label(self.config, self._formats, spec.first_layer, spec.end_layer)

    def memory(self) -> StageMemory:
        """Predicted and measured bytes of this stage."""
        return self._account.report(self.model)

    def status(self, *, node_id: str) -> StageStatus:
        """What this stage is, holds and has done."""
        return StageStatus(
            stage_index=self.spec.stage_index,
            first_layer=self.spec.first_layer,
            end_layer=self.spec.end_layer,
            format=self._format_label,
            kv_format=str(self._formats.kv),
            device=self.spec.device,
            planned_device=self.spec.planned_device,
            node_id=node_id,
            pid=os.getpid(),
            epoch=self._epoch,
            steps=self._next_step,
            busy_s=self._busy_s,
            uptime_s=time.monotonic() - self._started_s,
            memory=self.memory(),
            crossover_tokens=dict(self.model.crossover_tokens),
        )

    # -- steps -------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int) -> None:
        """Accept only this epoch from now on, its steps counted from 0."""
        self._epoch, self._next_step = epoch, 0

    def accepts(self, batch: MicroBatch) -> bool:
        """Whether to compute this micro-batch; a stale one is to be dropped.

        Raises:
            StageError: it is of this epoch but not the next step: one was lost, and the KV cache
                would no longer hold what the control plane believes.
        """
        if batch.epoch != self._epoch:
            log.warning(
                "stage %d dropped step %d of epoch %d: its epoch is %d",
                self.spec.stage_index, batch.step, batch.epoch, self._epoch,
            )  # fmt: skip
            return False
        if batch.step != self._next_step:
            raise StageError(
                f"stage {self.spec.stage_index} expected step {self._next_step} of epoch "
                f"{self._epoch} and received {batch.step}"
            )
        return True

    def compute(
        self, message: StepMessage, payload: memoryview
    ) -> tuple[StepMessage | StepResult, memoryview | bytes]:
        """Run this shard's layers; what to send on, and its raw rows."""
        started_unix_s = [*message.started_unix_s, time.time()]
        started = time.perf_counter()
        batch = message.batch
        with torch.inference_mode():
            hidden = self._rows(message, payload) if not self.spec.is_first else None
            rows = self.model.forward(batch, hidden)
            tokens, scores = self._finish(batch, rows) if self.spec.is_last else ([], [])
            raw = b"" if self.spec.is_last else _raw(rows.cpu().contiguous())
        self._next_step += 1
        elapsed = time.perf_counter() - started
        self._busy_s += elapsed
        forward_s = [*message.forward_s, elapsed]
        if self.spec.is_last:
            return StepResult(
                epoch=batch.epoch, step=batch.step, tokens=tokens, scores=scores,
                forward_s=forward_s, started_unix_s=started_unix_s,
            ), b""  # fmt: skip
        onward = StepMessage(
            batch=batch, hidden_size=rows.shape[1], dtype=self._dtype, forward_s=forward_s,
            started_unix_s=started_unix_s,
        )  # fmt: skip
        return onward, raw

    def _rows(self, message: StepMessage, payload: memoryview) -> Tensor:
        """Hidden states [T, hidden_size] out of a message's second frame."""
        if (
            len(payload) != message.payload_bytes
            or message.hidden_size != self.config.hidden_size
            or message.dtype != self._dtype
        ):
            raise LinkError(
                f"stage {self.spec.stage_index} received {len(payload)} bytes as "
                f"[{message.batch.num_tokens}, {message.hidden_size}] {message.dtype}; it works on "
                f"rows of {self.config.hidden_size} {self._dtype}"
            )
        rows = torch.empty(
            (message.batch.num_tokens, message.hidden_size), dtype=TORCH_DTYPES[message.dtype]
        )
        _raw(rows)[:] = payload
        return rows.to(self.spec.device)

    def _finish(
        self, batch: MicroBatch, rows: Tensor
    ) -> tuple[list[SampledToken], list[SequenceScores]]:
        """Sample and score; only the rows that are asked for meet the LM head."""
        return finish_step(self.model, batch, rows)


def finish_step(
    model: ShardModel, batch: MicroBatch, rows: Tensor
) -> tuple[list[SampledToken], list[SequenceScores]]:
    """Tokens drawn and log-probabilities asked for in a micro-batch.

    Args:
        model: the last stage's shard.
        batch: the micro-batch.
        rows: [T, hidden_size], the last layer's output.
    """
    sample_rows, sampled = [], []
    scores: list[SequenceScores] = []
    first_row = 0
    for part in batch.slices:
        if part.score_targets:
            scores.append(
                SequenceScores(
                    sequence_id=part.sequence_id,
                    start_position=part.start_position,
                    logprobs=_scores(model, rows[first_row:], part.score_targets),
                )
            )
        first_row += len(part.token_ids)
        if part.sampling is not None:
            sample_rows.append(first_row - 1)
            sampled.append(part)
    tokens: list[SampledToken] = []
    for first in range(0, len(sampled), MAX_LOGIT_ROWS):
        some = sampled[first : first + MAX_LOGIT_ROWS]
        wanted = sample_rows[first : first + MAX_LOGIT_ROWS]
        tokens += sample(
            model.logits(rows if len(wanted) == rows.shape[0] else rows[wanted]),
            [part.sampling for part in some if part.sampling is not None],
            [part.start_position + len(part.token_ids) for part in some],
            [part.sequence_id for part in some],
        )
    return tokens, scores


def _scores(model: ShardModel, rows: Tensor, targets: list[int]) -> list[float]:
    """Log-probability of each target after its row; some rows of logits at a time."""
    scores: list[float] = []
    for first in range(0, len(targets), MAX_LOGIT_ROWS):
        some = targets[first : first + MAX_LOGIT_ROWS]
        scores += score(model.logits(rows[first : first + len(some)]), some)
    return scores


__all__ = ["DecoderConfig", "Stage", "finish_step"]
