"""How much worse a model becomes when one of its units is stored in fewer bits.

A held-out text goes through the model, block by block. At every block it also goes on with each of
the block's units rounded to each format, all else as it was; these variants then take the same way
through the blocks that follow, and at the head the tokens that each predicts are compared with the
model's own. Nothing is estimated: it is what running the model once for every unit and format
would give, but each block is read once and is the only one in memory. The hidden states lie in a
file of (1 + units · formats) · tokens · hidden_size · 4 bytes: 0.9 GB for 1,024 tokens of
SmolLM2-135M, 49 GB for BLOOM-176B. The text goes through 2 · formats · blocks² blocks in all: the
time grows with the square of the depth.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tightfit.kernels.groups import Quantized
from tightfit.workers.api import LoadProgress
from tightfit.workers.blocks import ModelParts, OpenBlock, mapped_states
from tightfit.workers.calibration import CalibratedRounding, Calibration, samples_digest
from tightfit.workers.checkpoint import Checkpoint, open_checkpoint, unquantized_config
from tightfit.workers.errors import CheckpointError, SensitivityError
from tightfit.workers.model_identity import model_digest
from tightfit.workers.quantized_config import check_group_size, written_group_size, written_scheme
from tightfit.workers.rounding import held_weight, round_weight
from tightfit.workers.sensitivity import (
    BLOCK_ROLES,
    FILE_NAME,
    MIX_FORMATS,
    FormatSensitivity,
    Sensitivities,
    Unit,
    UnitSensitivity,
    load_sensitivities,
    model_units,
    save_sensitivities,
)
from tightfit.workers.shard import ShardModel
from tightfit.workers.workspace import MAX_LOGIT_ROWS

VARIANTS_PER_BLOCK: Final = len(BLOCK_ROLES) * len(MIX_FORMATS)
STATES_DIRECTORY: Final = "measuring.states"

Progress = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureJob:
    """What is to be measured, and how."""

    source: str
    """Checkpoint directory or GGUF file, not quantised."""
    target: str
    """Directory for `sensitivity.json`, and meanwhile for hidden states; made if it is missing."""
    windows: Sequence[Sequence[int]]
    """Token ids of the held-out text, all of one length; each is a text by itself."""
    method: str = "rtn"
    """How `int4` and `int3` are rounded: "rtn" (to nearest), "hqq" or "gptq"."""
    group_size: int | None = None
    """As in `QuantizeJob`."""
    calibration: Calibration | None = None
    """What gptq rounds for."""


def measure_sensitivities(job: MeasureJob, progress: Progress | None = None) -> Sensitivities:
    """Measure every unit in every format and write the file; one of the same job is read instead.

    Raises:
        CheckpointError: the source cannot be read or is quantised already, what it computes is not
            finite, or there is no room for the hidden states.
        SensitivityError: the target has a file of another job.
    """
    checkpoint = open_checkpoint(job.source)
    try:
        run = _Measuring(job, checkpoint, progress)
        path = Path(job.target) / FILE_NAME
        if path.exists():
            found = load_sensitivities(path)
            if not run.has_measured(found):
                problem = "is of another model, text, method, group size or calibration; remove it,"
                raise SensitivityError(path, f"{problem} or choose another directory")
            return found
        measured = run.run()
        save_sensitivities(path, measured)
        return measured
    finally:
        checkpoint.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loss:
    """Of one variant, summed over tokens, in nats."""

    likelihood: float
    """Negative log-likelihood of the text."""
    divergence: float
    """From the model as it is."""


class _Measuring:
    """One job on one open checkpoint. V variants, W windows, T tokens of each."""

    def __init__(self, job: MeasureJob, checkpoint: Checkpoint, progress: Progress | None) -> None:
        self._job, self._checkpoint, self._report = job, checkpoint, progress
        self._config = unquantized_config(checkpoint, job.source)
        check_group_size(self._config, job.group_size, job.source)
        self._units = model_units(self._config)
        num_tokens = len(job.windows[0])
        longest = max(num_tokens, job.calibration.num_tokens if job.calibration else 0)
        self._parts = ModelParts(checkpoint, self._config, job.source, longest)
        self._num_variants = 1 + VARIANTS_PER_BLOCK * self._config.num_layers
        self._shape = (self._num_variants, len(job.windows), num_tokens, self._config.hidden_size)
        """V, W, T, hidden size; variant 0 is the model as it is."""
        self._directory = Path(job.target) / STATES_DIRECTORY
        self._calibrated: CalibratedRounding | None = None
        self._done = 0
        self._started_s = time.monotonic()

    def has_measured(self, found: Sensitivities) -> bool:
        """The numbers are those of this job."""
        return all(getattr(found, key) == value for key, value in self._identity().items())

    def _identity(self) -> dict[str, Any]:
        """Fields of `Sensitivities` that tell one job from another."""
        job = self._job
        return {
            "model": model_digest(self._checkpoint, self._config, job.source),
            "text": samples_digest(job.windows),
            "method": job.method,
            "group_size": job.group_size,
            "calibration": None if job.calibration is None else job.calibration.identity,
        }

    @property
    def _total(self) -> int:
        """Bytes of hidden states through blocks, and through the head in proportion to its size."""
        one = 4 * torch.Size(self._shape[1:]).numel()
        blocks = sum(1 + VARIANTS_PER_BLOCK * (i + 1) for i in range(self._config.num_layers))
        return one * blocks + self._head_work(one * self._num_variants)

    def _head_work(self, num_bytes: int) -> int:
        config = self._config
        head = config.vocab_size * config.embedding_size
        return num_bytes * head // config.largest_layer_elements

    def run(self) -> Sensitivities:
        """All of it; the hidden states are removed afterwards."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        try:
            with torch.inference_mode():
                return self._measured()
        finally:
            shutil.rmtree(self._directory)

    def _measured(self) -> Sensitivities:
        job = self._job
        if job.calibration is not None:
            self._calibrated = CalibratedRounding(
                self._checkpoint, self._config, job.source, job.calibration, self._directory
            )
            self._note("calibration text through the embedding")
            self._calibrated.start()
        states = self._states()
        for window, state in zip(states[0], self._parts.embed(job.windows), strict=True):
            window.copy_(state)
        for layer in range(self._config.num_layers):
            self._through(layer, states)
        self._note("head")
        losses = self._losses(states)
        return self._result(losses)

    def _states(self) -> Tensor:
        """Room for the hidden states of all variants, [V, W, T, hidden size] fp32."""
        needed, free = 4 * torch.Size(self._shape).numel(), shutil.disk_usage(self._directory).free
        if needed > free:  # writing to a map of a full disk would end the process
            problem = f"has {free:,} bytes free, and hidden states take {needed:,}"
            remedy = "choose another directory, or measure on fewer tokens"
            raise CheckpointError(self._job.target, None, f"{problem}; {remedy}")
        return mapped_states(self._directory / "variants", self._shape)

    # -- blocks ------------------------------------------------------------------------------

    def _through(self, layer: int, states: Tensor) -> None:
        """Take the model and all variants of earlier blocks through a block, and begin its own."""
        block = self._parts.block(layer)
        begun = 1 + VARIANTS_PER_BLOCK * layer
        inputs = states[0].clone()
        for variant in states[:begun]:
            self._note(f"layer {layer}")
            self._forward(block, variant, variant)
        units = self._units[layer * len(BLOCK_ROLES) :][: len(BLOCK_ROLES)]
        own = iter(states[begun : begun + VARIANTS_PER_BLOCK])
        for unit in units:
            weight = block.linears[unit.role].dense
            before = weight.clone()
            self._note(f"layer {layer}: {unit.role}")
            for rounded in self._rounded(block, unit):
                weight.copy_(held_weight(rounded))
                self._forward(block, inputs, next(own))
                weight.copy_(before)
        if self._calibrated is not None:
            self._calibrated.pass_on(block, layer)
            self._calibrated.drop_states(before=layer + 1)

    def _forward(self, block: OpenBlock, inputs: Tensor, outputs: Tensor) -> None:
        """[W, T, hidden size] each; they may be the same."""
        for window, state, output in zip(self._job.windows, inputs, outputs, strict=True):
            output.copy_(block(window, state.clone()))
        self._done += inputs.nbytes

    def _rounded(self, block: OpenBlock, unit: Unit) -> Sequence[Quantized]:
        """A unit in every format."""
        job = self._job
        size = written_group_size(self._config, job.group_size, unit.n_in)
        schemes = [written_scheme(f, group_size=size, method=job.method) for f in MIX_FORMATS]
        if self._calibrated is not None:
            return self._calibrated.round_role(block, unit.layer, unit.role, schemes)
        weight = block.linears[unit.role].dense
        try:
            is_fitted = job.method == "hqq"
            return [round_weight(weight, scheme, is_fitted=is_fitted) for scheme in schemes]
        except ValueError as error:
            raise CheckpointError(job.source, unit.names[0], str(error)) from error

    # -- head --------------------------------------------------------------------------------

    def _losses(self, states: Tensor) -> list[_Loss]:
        """Of every variant."""
        head = self._parts.head()
        sums = torch.zeros(self._num_variants, 2, dtype=torch.float64)
        for number, window in enumerate(self._job.windows):
            targets = torch.tensor(window[1:])
            for first in range(0, len(targets), MAX_LOGIT_ROWS):
                rows = targets[first : first + MAX_LOGIT_ROWS]
                chunk = states[:, number, first : first + len(rows)]
                self._note("head")
                sums += _compared(head, chunk, rows)
                self._done += self._head_work(chunk.nbytes)
        if not bool(sums.isfinite().all()):
            variant = int((~sums.isfinite().all(1)).nonzero()[0])
            problem = f"{self._name(variant)}: the text's loss is not finite"
            raise CheckpointError(self._job.source, None, problem)
        return [_Loss(likelihood=row[0], divergence=row[1]) for row in sums.tolist()]

    def _name(self, variant: int) -> str:
        if variant == 0:
            return "as it is"
        number, fmt = divmod(variant - 1, len(MIX_FORMATS))
        unit = self._units[number]
        return f"with layer {unit.layer}'s {unit.role} in {MIX_FORMATS[fmt]}"

    def _result(self, losses: Sequence[_Loss]) -> Sensitivities:
        windows = self._job.windows
        num_tokens = len(windows) * (len(windows[0]) - 1)
        base, variants = losses[0], iter(losses[1:])
        units = []
        for unit in self._units:
            size = written_group_size(self._config, self._job.group_size, unit.n_in)
            formats = {
                fmt: FormatSensitivity(
                    bytes=unit.nbytes(fmt, size),
                    loss_increase=(loss.likelihood - base.likelihood) / num_tokens,
                    divergence=loss.divergence / num_tokens,
                )
                for fmt, loss in zip(MIX_FORMATS, variants, strict=False)
            }
            units.append(
                UnitSensitivity(
                    layer=unit.layer,
                    role=unit.role,
                    num_weights=unit.num_weights,
                    formats=formats,
                )
            )
        return Sensitivities(
            **self._identity(),
            num_tokens=num_tokens,
            base_loss=base.likelihood / num_tokens,
            units=tuple(units),
        )

    def _note(self, message: str) -> None:
        if self._report is None:
            return
        self._report(
            LoadProgress(
                phase="measuring",
                bytes_done=self._done,
                bytes_total=self._total,
                elapsed_s=time.monotonic() - self._started_s,
                message=message,
            )
        )


def _compared(head: ShardModel, states: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood and divergence of some tokens, summed: [V, 2] fp64.

    Args:
        head: the model's.
        states: [V, tokens, hidden size], of the model as it is first.
        targets: [tokens], what follows each.
    """
    own = torch.log_softmax(head.logits(states[0]), -1)
    probability = own.exp()
    sums = []
    for state in states:
        predicted = torch.log_softmax(head.logits(state), -1)
        likelihood = predicted.gather(1, targets[:, None]).double().sum()
        divergence = predicted.sub_(own).mul_(probability).sum(-1).double().sum()
        sums.append(torch.stack((-likelihood, -divergence)))
    return torch.stack(sums)
