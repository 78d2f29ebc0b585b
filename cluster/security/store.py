"""The tokens that are in force now: read again when their file changes."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.security.files import signature, warn_if_exposed
from tightfit.cluster.security.tokens import Token, digest, read

log = logging.getLogger(__name__)

CHECK_S = 1.0
"""The file is looked at no more often: a revoked token is refused after at most this long."""
MAX_SECRET_CHARACTERS = 256
BUCKET = 16
"""Hexadecimal digits of a hash by which entries are found before the whole is compared."""


def utc_now() -> datetime:
    """The time of day."""
    return datetime.now(UTC)


class TokenStore:
    """Finds the entry of a token. Not thread-safe: for one event loop.

    Args:
        path: file of tokens.
        clock_s, now: monotonic seconds, and the time of day; tests put theirs.
    Raises:
        ConfigError: the file cannot be read now. Later on the tokens read last stay in force, and
            the log says so.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._path, self._clock_s, self._now = path, clock_s, now
        self._signature = signature([path])
        self._take(read(path))
        self._checked_s = clock_s()
        warn_if_exposed(path, secret=False)
        if not self._by_name:
            log.warning("%s has no tokens: nobody can call", path)

    def _take(self, tokens: tuple[Token, ...]) -> None:
        self._by_name = {token.name: token for token in tokens}
        self._by_hash: dict[str, list[Token]] = {}
        for token in tokens:
            self._by_hash.setdefault(token.sha256[:BUCKET], []).append(token)

    def find(self, secret: str) -> Token | None:
        """The entry of a token, also of one that has expired; None: there is none."""
        self._refresh()
        if len(secret) > MAX_SECRET_CHARACTERS:
            return None
        hashed = digest(secret)
        found = None
        # How long this takes says nothing of a token: it depends on hashes, which a caller cannot
        # steer towards one that it does not know.
        for token in self._by_hash.get(hashed[:BUCKET], ()):
            if hmac.compare_digest(token.sha256, hashed):
                found = token
        return found

    def current(self, token: Token) -> Token | None:
        """The entry as the file has it now, with its new limits; None: it was revoked."""
        self._refresh()
        entry = self._by_name.get(token.name)
        return entry if entry is not None and entry.sha256 == token.sha256 else None

    def has_name(self, name: str) -> bool:
        """A token of this name is in force."""
        return name in self._by_name

    def has_expired(self, token: Token) -> bool:
        """Its time is over."""
        return token.expires is not None and self._now() >= token.expires

    def _refresh(self) -> None:
        now_s = self._clock_s()
        if now_s - self._checked_s < CHECK_S:
            return
        self._checked_s = now_s
        found = signature([self._path])
        if found == self._signature:
            return
        self._signature = found
        try:
            self._take(read(self._path))
        except ConfigError as error:
            log.error("the tokens read last stay in force: %s", error)
            return
        log.warning("%s: read again, %d token(s)", self._path, len(self._by_name))
