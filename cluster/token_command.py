"""`tightfit token`: makes, lists and revokes bearer tokens of a file."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from tightfit.cluster.config import TokenConfig
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.security.tokens import NAME_PATTERN, Token, digest, editing, new_secret, read

WIDTH = 110


def create(config: TokenConfig, name: str) -> int:
    """Add a token and print it, alone, on standard output; nobody can print it again. Returns the
    exit code.

    Raises:
        ConfigError: the name is taken or cannot be one, or the file cannot be used.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    secret = new_secret()
    try:
        expires = now + timedelta(days=config.days) if config.days is not None else None
        token = msgspec.convert(
            {
                "name": name,
                "sha256": digest(secret),
                "role": config.role,
                "created": now,
                "expires": expires,
                "max_concurrent": config.max_concurrent,
                "max_tokens_per_minute": config.max_tokens_per_minute,
            },
            Token,
        )
    except (msgspec.ValidationError, OverflowError) as error:
        raise ConfigError(f"{name!r} cannot be a token's name: {NAME_PATTERN} ({error})") from error
    with editing(_path(config)) as tokens:
        if any(other.name == name for other in tokens):
            raise ConfigError(f"there is a token {name!r} already; revoke it, or take another name")
        tokens.append(token)
    print(secret)
    print(f"{name}: shown this once; {config.tokens_file} has only its hash", file=sys.stderr)
    return 0


def revoke(config: TokenConfig, name: str) -> int:
    """Remove a token; returns the exit code.

    Raises:
        ConfigError: there is none of this name, or the file cannot be used.
    """
    path = _path(config)
    before = read(path)
    if all(token.name != name for token in before):
        known = ", ".join(token.name for token in before) or "none"
        raise ConfigError(f"there is no token {name!r} in {path}; there are: {known}")
    with editing(path) as tokens:
        tokens[:] = [token for token in tokens if token.name != name]
    print(f"{name}: revoked; services that read {path} refuse it within seconds", file=sys.stderr)
    return 0


def show(config: TokenConfig, *, as_json: bool) -> int:
    """Print every token but its secret and hash; returns the exit code.

    Raises:
        ConfigError: the file cannot be used.
    """
    tokens = read(_path(config))
    if as_json:
        entries = [
            {key: value for key, value in msgspec.to_builtins(token).items() if key != "sha256"}
            for token in tokens
        ]
        print(json.dumps(entries, indent=2))
        return 0
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("name", "role", "created", "expires", "calls at once", "tokens/minute"):
        table.add_column(column)
    now = datetime.now(UTC)
    for token in tokens:
        table.add_row(*_row(token, now))
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    return 0


def _row(token: Token, now: datetime) -> tuple[str, ...]:
    expires = "never"
    if token.expires is not None:
        expires = f"{token.expires:%Y-%m-%d}" + (" (over)" if token.expires <= now else "")
    return (
        token.name,
        token.role,
        f"{token.created:%Y-%m-%d}",
        expires,
        "any" if token.max_concurrent is None else str(token.max_concurrent),
        "any" if token.max_tokens_per_minute is None else str(token.max_tokens_per_minute),
    )


def _path(config: TokenConfig) -> Path:
    if config.tokens_file is None:
        raise ConfigError(
            "which file? Give --tokens-file, or --config with serve.tokens_file or "
            "token.tokens_file"
        )
    return Path(config.tokens_file)
