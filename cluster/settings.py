"""Settings as fields, `name: Annotated[type, Option(help, range)] = default`.

The check of a YAML file and the command-line flag follow from the field. A key that is not known is
an error that names the nearest one that is; a key given twice is an error too.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.units import parse_bytes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Values = Mapping[str, object]
"""Settings by key, as a file or flags give them."""
MAX_YAML_BYTES = 16 * 2**20
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of one setting besides its name, type and default."""

    help: str
    """One sentence: meaning, unit, and what leaving it out does."""
    key: str | None = None
    """Name in the file and of the flag, where it is not the field's."""
    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    check: Callable[[str], object] | None = None
    """Raises ValueError on text that cannot be used."""
    is_size: bool = False
    """Takes "4GiB" as well as a number of bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field of a section, read."""

    name: str
    """Of the field."""
    key: str
    """In the file; with dashes, of the flag."""
    kind: type[Any]
    """str, int, float or bool."""
    is_optional: bool
    """The value may be null, which means the default."""
    is_required: bool
    option: Option


def settings(section: type[DataclassInstance]) -> list[Setting]:
    """Every setting of a section, in order."""
    hints = get_type_hints(section, include_extras=True)
    found = []
    for entry in dataclasses.fields(section):
        hint, option = get_args(hints[entry.name])
        optional = False
        if get_origin(hint) in (Union, types.UnionType):
            (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
            optional = True
        found.append(
            Setting(
                name=entry.name,
                key=option.key or entry.name,
                kind=hint,
                is_optional=optional,
                is_required=entry.default is dataclasses.MISSING,
                option=option,
            )
        )
    return found


def read_file(
    path: Path, sections: Mapping[str, type[DataclassInstance]]
) -> dict[str, dict[str, object]]:
    """Sections of a YAML file, every key known, no value checked yet.

    Raises:
        ConfigError: it cannot be read, is not YAML, or has an unknown or repeated key.
    """
    found = {}
    for name, values in as_mapping(read_yaml(path), str(path)).items():
        if name not in sections:
            raise ConfigError(f"{path}: {_unknown(name, list(sections))}")
        found[name] = as_mapping(values, f"{path}: {name}")
        known = [setting.key for setting in settings(sections[name])]
        try:
            refuse_unknown(found[name], known, name)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return found


def read_yaml(path: Path) -> object:
    """What a YAML file holds; no mapping of it has the same key twice.

    Raises:
        ConfigError: it cannot be read, is not YAML, or is larger or deeper than any that is meant.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: has more than {MAX_YAML_BYTES:,} bytes")
        return yaml.load(data.decode(), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None


def shown(value: object) -> str:
    """A value as an error shows it: not more than some of it, as a few aliases in a file can stand
    for any amount."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 200


def refuse_unknown(values: Values, known: Sequence[str], section: str) -> None:
    """Raises ConfigError on a key that is not among the known, with the nearest one that is."""
    for key in values:
        if key not in known:
            raise ConfigError(_unknown(key, list(known), prefix=f"{section}."))


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a mapping with the same key twice, where PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused by the parent class
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def as_mapping(value: object, where: str) -> dict[str, object]:
    """Keys and values of a YAML mapping; nothing at all is an empty one.

    Raises:
        ConfigError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected `key: value` lines, found {shown(value)}")
    return {str(key): entry for key, entry in value.items()}


def _unknown(key: str, known: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return f"{prefix}{key} is not a setting; {hint}"


def build(kind: type[T], section: str, values: Values) -> T:
    """A section's dataclass from values by key, each checked against its type and range.

    Raises:
        ConfigError: a value that cannot be used, named as section.key, or a required one missing.
    """
    arguments = {}
    for setting in settings(kind):
        where = f"{section}.{setting.key}"
        value = values.get(setting.key)
        if setting.key not in values:
            if setting.is_required:
                raise ConfigError(f"{where} is missing. It is: {setting.option.help}")
            continue
        if value is None and setting.is_optional:
            continue
        value = _convert(value, setting, where)
        _check_range(value, setting.option, where)
        arguments[setting.name] = value
    return kind(**arguments)


def _convert(value: object, setting: Setting, where: str) -> Any:
    if setting.option.is_size and isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
    if setting.kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if not isinstance(value, setting.kind) or (
        setting.kind is not bool and isinstance(value, bool)
    ):
        raise ConfigError(f"{where}: {shown(value)} is not {TYPE_NAMES[setting.kind]}")
    return value


def _check_range(
    value: Any,
    option: Option,
    where: str,
) -> None:
    if option.choices and value not in option.choices:
        raise ConfigError(f"{where}: {shown(value)} is not one of {', '.join(option.choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is not finite")
    if option.at_least is not None and value < option.at_least:
        raise ConfigError(f"{where}: {value} is less than {option.at_least:g}")
    if option.at_most is not None and value > option.at_most:
        raise ConfigError(f"{where}: {value} is more than {option.at_most:g}")
    if option.check is not None:
        try:
            option.check(value)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
