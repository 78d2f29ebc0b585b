"""Ray's environment. Must be set before Ray is imported, for Ray reads it then; imports no Ray."""

from __future__ import annotations

import os
import secrets


def prepare(*, is_private: bool) -> None:
    """Set what this process and its children tell Ray.

    A private cluster gets a token that only this process's children know. What is already in the
    environment stays as it is.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs its workers at nice 15: any other process on the host would slow every stage.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if is_private:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
