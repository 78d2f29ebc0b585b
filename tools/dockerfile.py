"""Reads a Dockerfile: stages of instructions, with variables filled in.

Only what ours use: FROM, ARG, ENV, SHELL, RUN, COPY, USER, WORKDIR, EXPOSE, ENTRYPOINT and CMD.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

KNOWN = ("ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "EXPOSE", "ENTRYPOINT", "CMD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One instruction, and the state in which it runs."""

    instruction: str
    """Such as RUN."""
    text: str
    """What follows it; variables of COPY, USER and WORKDIR are filled in."""
    environment: Mapping[str, str]
    """ENV and ARG so far."""
    user: str
    """USER so far; root when there was none."""
    directory: str
    """WORKDIR so far."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """What one FROM begins."""

    name: str
    """After AS, else the stage's number."""
    base: str
    """The image that it starts from."""
    steps: list[Step] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    directory: str = "/"


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, rest) pairs, with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if line.strip():
            instruction, _, rest = line.strip().partition(" ")
            yield instruction.upper(), rest.strip()


def fill_in(text: str, variables: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` with what they stand for; an unknown one stands for nothing."""
    return re.sub(r"\$(\w+|\{\w+\})", lambda m: variables.get(m[1].strip("{}"), ""), text)


def read_dockerfile(text: str, arguments: Mapping[str, str] | None = None) -> list[Stage]:
    """The stages of a Dockerfile, the last of which is the image.

    Args:
        text: the file.
        arguments: values of ARGs, over their defaults.

    Raises:
        ValueError: an instruction that is not known here, or one before the first FROM.
    """
    given = dict(arguments or {})
    path = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    stages: list[Stage] = []
    for instruction, rest in instructions(text):
        if instruction == "FROM":
            base, *name = rest.split()
            name = name[1:] if name else [str(len(stages))]
            stages.append(Stage(name=name[0], base=base, environment=dict(path)))
            continue
        if instruction not in KNOWN or not stages:
            raise ValueError(f"{instruction} {rest}: not read here")
        _take(stages[-1], instruction, rest, given)
    return stages


def _take(stage: Stage, instruction: str, rest: str, given: Mapping[str, str]) -> None:
    """Note one instruction, in the state that those before it left."""
    if instruction in ("COPY", "USER", "WORKDIR"):
        rest = fill_in(rest, stage.environment)
    if instruction == "ARG":
        name, _, default = rest.partition("=")
        stage.environment[name] = given.get(name, default)
    elif instruction == "ENV":
        pairs = [word.partition("=")[::2] for word in shlex.split(rest)]
        stage.environment |= {name: fill_in(value, stage.environment) for name, value in pairs}
    elif instruction == "USER":
        stage.user = rest
    elif instruction == "WORKDIR":
        stage.directory = rest
    stage.steps.append(
        Step(
            instruction=instruction,
            text=rest,
            environment=dict(stage.environment),
            user=stage.user,
            directory=stage.directory,
        )
    )


def command(stage: Stage) -> list[str]:
    """What the image runs when it is told nothing: ENTRYPOINT and CMD, in their JSON form."""
    said = {step.instruction: json.loads(step.text) for step in stage.steps if step.text[:1] == "["}
    return [*said.get("ENTRYPOINT", []), *said.get("CMD", [])]
