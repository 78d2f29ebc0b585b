"""Reads a shard's tensors out of a checkpoint, by the names that the model's config gives them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from tightfit.workers.api import LoadProgress, StageSpec
from tightfit.workers.checkpoint import Checkpoint, find_prefix
from tightfit.workers.checkpoints.packed import StoredLinear, read_stored, stacked
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.embedding import stays_in_file
from tightfit.workers.errors import CheckpointError
from tightfit.workers.model_formats import ModelFormats, Role
from tightfit.workers.shard_bytes import head_is_shared
from tightfit.workers.shared_weights import role_tensors
from tightfit.workers.stored import StoredScheme

Progress = Callable[[LoadProgress], None]

DERIVED_TENSORS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".weight_shape",
    ".weight_format",
)
"""Ends of the names of tensors that say what the config says too."""


class ShardReader:
    """A checkpoint seen through a model's names: prefix found, reads counted.

    What the shard needs is checked at once, before anything is read: presence, shapes, dtypes, and
    that its layers have no tensor that nothing would read.

    Args:
        checkpoint: open.
        config: of the model.
        spec: of the stage.
        formats: of the model's parts.
        shared: linear layers that are not read (`shared_weights.shared_linears`).
        progress: is told how far the load has come.

    Raises:
        CheckpointError: the checkpoint does not have what the config calls for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        spec: StageSpec,
        formats: ModelFormats,
        shared: Mapping[tuple[int, Role], int],
        progress: Progress | None,
    ) -> None:
        self._checkpoint, self._config, self._spec = checkpoint, config, spec
        self._formats, self._report = formats, progress
        self._prefix = find_prefix(checkpoint, config, spec.model_path)
        self._shapes = {linear.name: (linear.n_out, linear.n_in) for linear in config.linears()}
        wanted = [(self._full(name), shape) for name, shape in self._wanted()]
        checkpoint.validate(wanted, {self._full(name) for name in config.integer_tensors()})
        self._refuse_unknown({name for name, _ in wanted})
        not_read = {self._full(name) for key in shared for name in role_tensors(config, *key)}
        self._total = sum(checkpoint.nbytes(name) for name, _ in wanted if name not in not_read)
        self._done = 0
        self._started = time.monotonic()

    def _full(self, name: str) -> str:
        return self._config.full_name(name, self._prefix)

    def _wanted(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        config, spec = self._config, self._spec
        if spec.is_first:
            yield from config.embedding_tensors()
        for i in range(spec.first_layer, spec.end_layer):
            yield from config.layer_tensors(i)
        if spec.is_last:
            shared = spec.is_first and head_is_shared(config, self._formats)
            embedding = f"{config.names.embedding}.weight"
            for name, shape in config.head_tensors():
                if not (shared and name == embedding):
                    yield name, shape

    def _refuse_unknown(self, wanted: set[str]) -> None:
        """Refuse a tensor of our layers that nothing would read: the model is not what its config
        says (a bias, a norm of Q and K), and would be computed wrongly without a word."""
        some = self._config.names.attn_norm.partition("{i}")[0]
        layers = range(self._spec.first_layer, self._spec.end_layer)
        ours = tuple(self._full(f"{some}{i}.") for i in layers)
        for name in sorted(self._checkpoint.names() - wanted):
            if name.startswith(ours) and not (
                name.endswith(DERIVED_TENSORS) or self._is_empty_bias(name)
            ):
                raise CheckpointError(
                    self._spec.model_path,
                    name,
                    f"a {self._config.family} layer with this config has no such tensor; the "
                    f"config does not belong to these weights, or the model is not supported",
                )

    def _is_empty_bias(self, name: str) -> bool:
        """As GPTQ's tools write for layers that have none."""
        if self._config.stored is None or not name.endswith(".bias"):
            return False
        return not bool(self._checkpoint.read(name).any())

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        full = self._full(name)
        tensor = self._checkpoint.read(full)
        self._done += self._checkpoint.nbytes(full)
        return tensor

    def stays_in_file(self, name: str) -> bool:
        """Whether `read` gives a view of this tensor's file; see `embedding.stays_in_file`."""
        return stays_in_file(self._checkpoint, self._full(name))

    def stack(self, names: list[str]) -> Tensor:
        """Some tensors one below the other; of those that are copies, one at a time is held."""
        if len(names) == 1:
            return self.read(names[0])
        rows = [self._checkpoint.shape(self._full(name))[0] for name in names]
        stacked: Tensor | None = None
        for first, count, name in zip(accumulate([0, *rows]), rows, names, strict=False):
            part = self.read(name)
            if stacked is None:
                stacked = part.new_empty((sum(rows), *part.shape[1:]))
            stacked[first : first + count] = part
        assert stacked is not None
        return stacked

    def weight(self, names: tuple[str, ...], *, held: bool) -> Tensor | StoredLinear:
        """The weights of some linear layers, one below the other; quantised ones are widened if
        they are not all quantised in one way, or are not to be `held` and can be read widened."""
        schemes = [self._config.stored_scheme(name) for name in names]
        if not held:
            schemes = [None if some and some.is_read_widened else some for some in schemes]
        if not any(schemes):
            return self.stack([f"{name}.weight" for name in names])
        parts = [
            self.read(f"{name}.weight") if scheme is None else self._stored(name, scheme)
            for name, scheme in zip(names, schemes, strict=True)
        ]
        quantized = [part for part in parts if isinstance(part, StoredLinear)]
        whole = stacked(quantized) if len(quantized) == len(parts) else None
        if whole is not None:
            return whole
        return torch.cat(
            [part.dequantize() if isinstance(part, StoredLinear) else part for part in parts]
        )

    def _stored(self, name: str, scheme: StoredScheme) -> StoredLinear:
        n_out, n_in = self._shapes[name]
        if scheme.is_read_widened:
            blocks = {"weight_blocks": self.read(f"{name}.weight_blocks")}
            return read_stored(blocks, scheme, n_out, n_in)
        tensors = {
            full.rpartition(".")[2]: self.read(full)
            for full, _ in scheme.tensors(name, n_out, n_in)
        }
        return read_stored(tensors, scheme, n_out, n_in)

    def note(self, message: str, phase: str = "loading") -> None:
        """Report how far the load has come."""
        if self._report is not None:
            self._report(
                LoadProgress(
                    phase=phase,
                    bytes_done=min(self._done, self._total),
                    bytes_total=self._total,
                    elapsed_s=time.monotonic() - self._started,
                    message=message,
                )
            )
