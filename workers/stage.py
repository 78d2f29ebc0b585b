"""One running shard: computes the micro-batches that arrive, in order, and passes them on."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

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
from tightfit.workers.checkpoint import Checkpoint, open_checkpoint
from tightfit.workers.decoder_config import DecoderConfig, decoder_config
from tightfit.workers.embedding import widened_bytes
from tightfit.workers.errors import BudgetError, LinkError, StageError
from tightfit.workers.link import StepMessage
from tightfit.workers.sampler import sample, score
from tightfit.workers.shard import ShardModel, spec_formats
from tightfit.workers.shard_bytes import (
    MAX_LOGIT_ROWS,
    format_label,
    gpu_reserve_bytes,
    kv_block_bytes,
    shard_bytes,
    workspace_bytes,
)
from tightfit.workers.shared_weights import shared_linears

log = logging.getLogger(__name__)

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _raw(rows: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, shared with it."""
    return memoryview(rows.view(torch.uint8).numpy().data).cast("B")


def rss_anon_bytes() -> int:
    """Anonymous resident memory of this process, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise StageError("/proc/self/status has no RssAnon line; Linux 4.5 or later is needed")


def free_gpu_bytes(device: str) -> int:
    """What a stage may take of a GPU: what is free now, less the reserve."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - gpu_reserve_bytes(total))


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
        self._budget = spec.memory_budget_bytes
        if spec.device != "cpu" and self._budget is None:
            self._budget = free_gpu_bytes(spec.device)
        base_rss = rss_anon_bytes()
        self._base_gpu_bytes = self._gpu_bytes()
        checkpoint = open_checkpoint(spec.model_path)
        try:
            self.config = decoder_config(checkpoint.config)
            self._formats = spec_formats(self.config, spec)
            self._predicted = self._predict_weights(checkpoint)
            self._host_bytes = widened_bytes(checkpoint, self.config, self._formats, spec)
            self._workspace = workspace_bytes(self.config, self._formats, spec.max_batch_tokens)
            num_blocks = self._plan_kv_blocks()
            self._limit_memory(num_blocks)
            self.model = ShardModel.load(checkpoint, self.config, spec, progress=progress)
        finally:
            checkpoint.close()
        self.model.allocate_kv(num_blocks)
        self.num_kv_blocks = num_blocks
        self._base_rss = base_rss
        self._dtype = self._formats.activations
        self._epoch = 0
        self._next_step = 0
        self._busy_s = 0.0
        self._started_s = time.monotonic()

    # -- memory ------------------------------------------------------------------------------

    def _predict_weights(self, checkpoint: Checkpoint) -> int:
        spec = self.spec
        return shard_bytes(
            self.config,
            self._formats,
            spec.first_layer,
            spec.end_layer,
            has_embedding=spec.is_first,
            has_head=spec.is_last,
            shared=shared_linears(checkpoint, self.config, self._formats, spec),
        )

    def _kv_block_bytes(self) -> int:
        spec = self.spec
        return kv_block_bytes(
            self.config, self._formats, spec.end_layer - spec.first_layer, spec.block_size
        )

    def _plan_kv_blocks(self) -> int:
        """KV blocks that the budget leaves room for, or that were asked for."""
        spec, per_block = self.spec, self._kv_block_bytes()
        wanted = spec.num_kv_blocks or spec.max_kv_blocks
        if self._budget is None:
            return wanted
        weights = self._predicted + (self._host_bytes if spec.device == "cpu" else 0)
        left = self._budget - weights - self._workspace
        possible = left // per_block
        needed = wanted if spec.num_kv_blocks else 1
        if possible < needed:
            total = weights + self._workspace + needed * per_block
            raise BudgetError(
                f"stage {spec.stage_index} (layers {spec.first_layer}-{spec.end_layer - 1}, "
                f"{self._format_label}) needs {total:,} bytes: {weights:,} for weights, "
                f"{self._workspace:,} for workspace, {needed * per_block:,} for {needed} KV "
                f"block(s); its budget is {self._budget:,}. Give it more memory, "
                f"add a stage, or choose a smaller format or kv_format"
            )
        return min(wanted, possible)

    def _limit_memory(self, num_blocks: int) -> None:
        """Have allocations far beyond the budget refused: by torch on a GPU, else by the kernel.

        The kernel's limit counts private writable mappings (RLIMIT_DATA), so that a leak fails
        here, in the process that leaks, rather than by the host's OOM killer in another. One
        full-precision layer and 300 MB for the allocator and threads are allowed on top while
        loading.
        """
        budget = self._budget
        if budget is None:
            return
        if self.spec.device != "cpu":
            device = torch.device(self.spec.device)
            index = torch.cuda.current_device() if device.index is None else device.index
            allowed = torch.cuda.memory_reserved(index) + budget
            allowed += self.config.largest_layer_elements * 4
            _, total = torch.cuda.mem_get_info(index)
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), index)
            return
        mapped = next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmData:")
        )
        slack = 300 * 2**20 + self.config.largest_layer_elements * 4 * 2
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (mapped + budget + slack, hard))

    @property
    def _format_label(self) -> str:
        spec = self.spec
        return format_label(self.config, self._formats, spec.first_layer, spec.end_layer)

    def memory(self) -> StageMemory:
        """Predicted and measured bytes of this stage."""
        return StageMemory(
            predicted_weight_bytes=self._predicted,
            weight_bytes=self.model.weight_bytes,
            kv_cache_bytes=self.model.kv_cache_bytes,
            workspace_bytes=self._workspace,
            rss_anon_bytes=max(0, rss_anon_bytes() - self._base_rss),
            budget_bytes=self._budget,
            num_kv_blocks=self.num_kv_blocks,
            gpu_bytes=self._gpu_bytes() - self._base_gpu_bytes,
            host_bytes=self._host_bytes,
        )

    def _gpu_bytes(self) -> int:
        return 0 if self.spec.device == "cpu" else torch.cuda.memory_allocated(self.spec.device)

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


__all__ = ["DecoderConfig", "Stage", "finish_step", "rss_anon_bytes"]
