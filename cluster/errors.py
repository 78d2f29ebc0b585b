"""Every error of the control plane, each with the gRPC status that it becomes.

TightfitError
├── InvalidRequestError     INVALID_ARGUMENT
├── UnauthenticatedError    UNAUTHENTICATED
├── ForbiddenError          PERMISSION_DENIED
├── ModelNotFoundError      NOT_FOUND
├── OverloadedError         RESOURCE_EXHAUSTED
├── DeadlineError           DEADLINE_EXCEEDED
├── CancelledError          CANCELLED
├── UnavailableError        UNAVAILABLE
├── ConfigError             FAILED_PRECONDITION
└── PlacementError          FAILED_PRECONDITION
"""

from __future__ import annotations

from typing import ClassVar


class TightfitError(Exception):
    """Base of all errors raised on purpose."""

    status: ClassVar[str] = "INTERNAL"
    """Name of a grpc.StatusCode."""


class InvalidRequestError(TightfitError):
    """A field of a request is out of its range."""

    status = "INVALID_ARGUMENT"

    def __init__(self, field: str, problem: str) -> None:
        """`field` as the proto spells it, dotted; `problem`: the value seen and the remedy."""
        super().__init__(f"{field}: {problem}")
        self.field = field


class UnauthenticatedError(TightfitError):
    """The call carries no token, or none that is in force."""

    status = "UNAUTHENTICATED"


class ForbiddenError(TightfitError):
    """The token is in force, but its role is not enough."""

    status = "PERMISSION_DENIED"


class ModelNotFoundError(TightfitError):
    """The request names a model that is not served here."""

    status = "NOT_FOUND"


class OverloadedError(TightfitError):
    """A queue or a limit is full; trying again later can help."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        """`retry_after_s`: when another try makes sense, in seconds."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(TightfitError):
    """The caller's deadline passed."""

    status = "DEADLINE_EXCEEDED"


class CancelledError(TightfitError):
    """The caller went away."""

    status = "CANCELLED"


class UnavailableError(TightfitError):
    """The service cannot compute now (a stage is lost, or it is draining)."""

    status = "UNAVAILABLE"


class ConfigError(TightfitError):
    """A configuration file, flag or checkpoint cannot be used."""

    status = "FAILED_PRECONDITION"


class PlacementError(TightfitError):
    """The model does not fit on the devices as asked."""

    status = "FAILED_PRECONDITION"


def statuses() -> tuple[str, ...]:
    """Name of every gRPC status that an error raised on purpose becomes."""
    return tuple(sorted({kind.status for kind in TightfitError.__subclasses__()}))
