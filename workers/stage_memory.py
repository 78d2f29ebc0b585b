"""What a stage is predicted to take, what it may take, and what it takes.

Three views of the same bytes. Predicted: from shapes, before anything is read. From tensors: what
the loaded shard's add up to. From outside: on a CPU the process's anonymous memory (what the kernel
cannot take back; files that are mapped are not in it), on a GPU what torch's allocator has given
out. They are compared when the load has ended, and `tightfit status` shows them side by side.

An out-of-memory is to come at load and not in service. So the KV cache is written when it is made,
and the largest step is rehearsed.
"""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tightfit.workers.api import StageMemory, StageSpec
from tightfit.workers.checkpoint import Checkpoint
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.embedding import widened_bytes
from tightfit.workers.errors import BudgetError, StageError
from tightfit.workers.model_formats import ModelFormats
from tightfit.workers.shard import ShardModel
from tightfit.workers.shard_bytes import (
    embedding_bytes,
    format_label,
    gpu_reserve_bytes,
    head_bytes,
    head_is_shared,
    kv_block_bytes,
    shard_bytes,
)
from tightfit.workers.shared_weights import shared_linears
from tightfit.workers.workspace import workspace_bytes

LOADING_SLACK_BYTES = 300 * 2**20
"""For the C library's allocator and threads, while loading."""


def _status_bytes(name: str) -> int:
    """A line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise StageError(f"/proc/self/status has no {name} line; Linux 4.5 or later is needed")


def rss_anon_bytes() -> int:
    """Anonymous resident memory of this process, from the kernel."""
    return _status_bytes("RssAnon")


def give_back_heap() -> None:
    """Have the C library return what is freed. It keeps as much as there is below something that is
    in use: after int3 is packed, as much as the weights (measured: 1.7 GB beside 1.0)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def free_gpu_bytes(device: str) -> int:
    """What a stage may take of a GPU: what is free now, less the reserve."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - gpu_reserve_bytes(total))


def peak_rise(device: str, run: Callable[[], object]) -> int | None:
    """By how many bytes memory rises while something runs; None: this kernel does not say.

    On a CPU it is the process's largest resident memory, which the kernel lets be reset
    (proc_pid_clear_refs(5)); pages of mapped files that are read meanwhile count.
    """
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # a sandbox's
        run()
        return None
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Bytes of each part of a stage, from shapes."""

    weights: int
    """Embedding and head included."""
    embedding: int
    head: int
    host: int
    """Of an embedding that is to be on the host and cannot stay in its file."""
    kv_block: int

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, config: DecoderConfig, formats: ModelFormats, spec: StageSpec
    ) -> Predicted:
        """Of the stage that `spec` describes.

        Raises:
            CheckpointError: there is no embedding in the checkpoint.
        """
        is_shared = spec.is_first and head_is_shared(config, formats)
        return cls(
            weights=shard_bytes(
                config,
                formats,
                spec.first_layer,
                spec.end_layer,
                has_embedding=spec.is_first,
                has_head=spec.is_last,
                shared=shared_linears(checkpoint, config, formats, spec),
            ),
            embedding=embedding_bytes(config, formats) if spec.is_first else 0,
            head=head_bytes(config, formats, shared=is_shared) if spec.is_last else 0,
            host=widened_bytes(checkpoint, config, formats, spec),
            kv_block=kv_block_bytes(
                config, formats, spec.end_layer - spec.first_layer, spec.block_size
            ),
        )


@dataclass(slots=True, kw_only=True)
class MemoryAccount:
    """One stage's bytes. Made before anything is read: what there is then is not the stage's."""

    spec: StageSpec
    config: DecoderConfig
    formats: ModelFormats
    predicted: Predicted
    base_rss: int
    base_gpu_bytes: int
    budget: int | None
    """For weights, KV cache and workspace."""
    num_kv_blocks: int = 0
    """Set by `plan_kv_blocks`."""
    _peak: int | None = field(default=None, init=False)
    _loaded_rss: int = field(default=0, init=False)
    _loaded_gpu_bytes: int = field(default=0, init=False)
    _context_bytes: int = field(default=0, init=False)

    @property
    def is_on_gpu(self) -> bool:
        """Whether the stage computes on a GPU."""
        return self.spec.device != "cpu"

    def workspace(self, num_blocks: int) -> int:
        """Of the largest step, with so many KV blocks: no sequence is longer than all of them."""
        spec = self.spec
        context = min(spec.max_context or self.config.max_position, num_blocks * spec.block_size)
        return workspace_bytes(
            self.config,
            self.formats,
            spec.max_batch_tokens,
            max_context=context,
            max_sequences=spec.max_sequences,
            block_size=spec.block_size,
            has_head=spec.is_last,
        )

    def plan_kv_blocks(self) -> None:
        """Take as many KV blocks as the budget leaves room for, or as were asked for.

        Raises:
            BudgetError: these, or one, do not fit beside the weights.
        """
        spec = self.spec
        wanted = spec.num_kv_blocks or spec.max_kv_blocks
        self.num_kv_blocks = wanted
        if self.budget is None:
            return
        per_block, weights = self.predicted.kv_block, self.predicted.weights
        weights += 0 if self.is_on_gpu else self.predicted.host
        workspace = self.workspace(wanted)
        possible = (self.budget - weights - workspace) // per_block
        needed = wanted if spec.num_kv_blocks else 1
        if possible < needed:
            total = weights + workspace + needed * per_block
            label = format_label(self.config, self.formats, spec.first_layer, spec.end_layer)
            raise BudgetError(
                f"stage {spec.stage_index} (layers {spec.first_layer}-{spec.end_layer - 1}, "
                f"{label}) needs {total:,} bytes: {weights:,} for weights, "
                f"{workspace:,} for workspace, {needed * per_block:,} for {needed} KV "
                f"block(s); its budget is {self.budget:,}. Give it more memory, "
                f"add a stage, or choose a smaller format or kv_format"
            )
        self.num_kv_blocks = min(wanted, possible)

    def limit(self) -> None:
        """Have allocations far beyond the budget refused: by torch on a GPU, else by the kernel.

        The kernel's limit counts private writable mappings (RLIMIT_DATA), so that a leak fails
        here, in the process that leaks, rather than by the host's OOM killer in another. A
        full-precision layer and what the C library takes are allowed on top while loading.
        """
        budget = self.budget
        if budget is None:
            return
        if self.is_on_gpu:
            device = torch.device(self.spec.device)
            index = torch.cuda.current_device() if device.index is None else device.index
            allowed = torch.cuda.memory_reserved(index) + budget
            allowed += self.config.largest_layer_elements * 4
            _, total = torch.cuda.mem_get_info(index)
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), index)
            return
        slack = LOADING_SLACK_BYTES + self.config.largest_layer_elements * 4 * 2
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_status_bytes("VmData") + budget + slack, hard))

    def settle(self, rehearse: Callable[[], object]) -> None:
        """The load has ended but for the rehearsal of the largest step: measure."""
        give_back_heap()
        self._peak = peak_rise(self.spec.device, rehearse)
        give_back_heap()
        self._loaded_rss = self._rss()
        self._loaded_gpu_bytes = self._gpu_bytes()
        if self.is_on_gpu:
            free, total = torch.cuda.mem_get_info(self.spec.device)
            reserved = torch.cuda.memory_reserved(self.spec.device)
            self._context_bytes = max(0, total - free - reserved)

    def report(self, model: ShardModel) -> StageMemory:
        """Now."""
        predicted, blocks = self.predicted, self.num_kv_blocks
        return StageMemory(
            predicted_weight_bytes=predicted.weights,
            weight_bytes=model.weight_bytes,
            predicted_embedding_bytes=predicted.embedding,
            embedding_bytes=model.embedding_bytes,
            predicted_head_bytes=predicted.head,
            head_bytes=model.head_bytes,
            predicted_kv_cache_bytes=blocks * predicted.kv_block,
            kv_cache_bytes=model.kv_cache_bytes,
            workspace_bytes=self.workspace(blocks),
            measured_workspace_bytes=self._peak,
            predicted_host_bytes=predicted.host,
            host_bytes=model.host_bytes,
            rss_anon_bytes=self._rss(),
            loaded_rss_bytes=self._loaded_rss,
            baseline_bytes=self.base_rss,
            gpu_bytes=self._gpu_bytes(),
            loaded_gpu_bytes=self._loaded_gpu_bytes,
            context_bytes=self._context_bytes,
            budget_bytes=self.budget,
            num_kv_blocks=blocks,
            block_size=self.spec.block_size,
        )

    def _rss(self) -> int:
        return max(0, rss_anon_bytes() - self.base_rss)

    def _gpu_bytes(self) -> int:
        return allocated_gpu_bytes(self.spec.device) - self.base_gpu_bytes


def allocated_gpu_bytes(device: str) -> int:
    """What torch's allocator has given out on a GPU; 0 on a CPU."""
    return 0 if device == "cpu" else torch.cuda.memory_allocated(device)
