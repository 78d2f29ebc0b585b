"""Every error of the data plane.

WorkerError
├── CheckpointError         a file of the checkpoint, or a tensor in it, cannot be used
├── SensitivityError        a file of sensitivities cannot be used
├── UnsupportedModelError   a family or setting that the decoder does not do
├── BudgetError             the shard does not fit its memory budget
├── ProbeError              a device is not there, or cannot be measured
├── LinkError               a neighbour sent nonsense, or takes nothing
└── StageError              a step that must not be computed (stale epoch, bad block table)
"""

from __future__ import annotations

from pathlib import Path


class WorkerError(Exception):
    """Base of all errors raised on purpose in the data plane."""


class CheckpointError(WorkerError):
    """A file of the checkpoint is missing, truncated or does not hold what it should."""

    def __init__(self, path: Path | str, tensor: str | None, problem: str) -> None:
        """`path`: the file; `tensor`: its name, if one is concerned; `problem`: and the remedy."""
        where = f"{path}: tensor {tensor}" if tensor else str(path)
        super().__init__(f"{where}: {problem}")
        self.path = str(path)
        self.tensor = tensor
        self.problem = problem

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str, str | None, str]]:
        """Cross process boundaries with all three arguments."""
        return CheckpointError, (self.path, self.tensor, self.problem)


class SensitivityError(WorkerError):
    """A file of sensitivities cannot be read, or belongs to something else."""

    def __init__(self, path: Path | str, problem: str) -> None:
        """`path`: the file; `problem`: and the remedy, if there is another than to measure anew."""
        super().__init__(f"{path}: {problem}")


class UnsupportedModelError(WorkerError):
    """The checkpoint's config asks for something that the decoder does not do."""


class BudgetError(WorkerError):
    """A shard needs more memory than its device's budget."""


class ProbeError(WorkerError):
    """A device that was asked for is not there, or cannot be measured."""


class LinkError(WorkerError):
    """A message between neighbours is malformed, or cannot be delivered."""


class StageError(WorkerError):
    """A micro-batch that this stage must not compute."""
