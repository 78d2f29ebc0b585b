"""The schema of the Gateway API's routes, out of a package on npm: no other index is needed.

`python tools/gateway_api.py` fetches the package into the environment and prints where it is; the
tests of the chart do so by themselves. It holds TypeScript's types and compiled validators of
Gateway API 1.x, generated from the same Go types as the CRDs (@kubernetes-models/gateway-api, MIT).
Fields, what is required and choices are read from the types, patterns and ranges of texts and
numbers from the validators; nothing of it is run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "@kubernetes-models/gateway-api@2.0.0"
SHA512 = "e7SY7EkCGRHy5wHkaGhP32v7V1L+gBalfoqZDFDWn5k9Q7+IW6uz9jNWgOZ9R/Hv5NWyAFYaA01ET2qsysVt5A=="
PLACE = Path(sys.prefix) / "gateway-api" / PACKAGE.rpartition("@")[2]
"""Where the package stays, beside what else the environment has."""
TYPES, VALIDATORS = "gateway.networking.k8s.io/v1", "_schemas"
PREFIX = "IoK8sSigsGatewayApiApisV1"
FIELD = re.compile(r'^    "(\w+)"(\?)?: ([^;]+);$', re.MULTILINE)
LIMIT = re.compile(
    r'keyword:"(minLength|maxLength|minimum|maximum|pattern)",'
    r'params:\{(?:comparison:"[<>]=",)?(?:limit|pattern):("(?:[^"\\]|\\.)*"|-?\d+)\}'
)


class NoGatewayApiError(Exception):
    """The package cannot be had here; says why."""


def package() -> Path:
    """Directory of the package, fetched if need be.

    Raises:
        NoGatewayApiError: there is no npm, or its registry cannot be reached.
    """
    if not PLACE.exists():
        PLACE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=PLACE.parent) as directory:
            with tarfile.open(_download(Path(directory))) as archive:
                archive.extractall(directory, filter="data")
            try:
                (Path(directory) / "package").rename(PLACE)
            except OSError:  # another process was faster
                if not PLACE.exists():
                    raise
    return PLACE


def _download(directory: Path) -> Path:
    command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise NoGatewayApiError("npm is not installed (Debian: npm)") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "no reason given").splitlines()[-1]
        raise NoGatewayApiError(f"{PACKAGE} cannot be downloaded: {last}") from error
    archive = directory / done.stdout.split()[-1]
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != SHA512:
        raise NoGatewayApiError(f"{PACKAGE} has another content, sha512-{found}, than it had")
    return archive


def schema(name: str) -> dict[str, Any]:
    """JSON Schema of a type of gateway.networking.k8s.io/v1, such as GRPCRouteSpec; unknown fields
    are errors.

    Raises:
        NoGatewayApiError: see `package`.
    """
    definitions: dict[str, Any] = {}
    wanted = [name]
    while wanted:
        current = wanted.pop()
        if current not in definitions:
            definitions[current] = _definition(current, wanted)
    return {"definitions": definitions, "$ref": f"#/definitions/{name}"}


def _definition(name: str, wanted: list[str]) -> dict[str, Any]:
    """Of one type; those that it refers to are added to `wanted`."""
    text = (package() / TYPES / f"{name}.d.ts").read_text()
    if alias := re.search(rf"^export type I{name} = (.+);$", text, re.MULTILINE):
        code = (package() / VALIDATORS / f"{PREFIX}{name}.js").read_text()
        limits = {keyword: json.loads(value) for keyword, value in LIMIT.findall(code)}
        return {**_of_type(alias[1], wanted), **limits}
    fields = FIELD.findall(text.partition("export declare class ")[2])
    return {
        "type": "object",
        "properties": {key: _of_type(kind, wanted) for key, _, kind in fields},
        "required": [key for key, is_optional, _ in fields if not is_optional],
        "additionalProperties": False,
    }


def _of_type(text: str, wanted: list[str]) -> dict[str, Any]:
    """JSON Schema of a type as TypeScript writes it."""
    if text in ("string", "number", "boolean"):
        return {"type": text}
    if text.startswith('"'):
        return {"enum": [json.loads(choice) for choice in text.split(" | ")]}
    if text.startswith("Array<"):
        return {"type": "array", "items": _of_type(text[len("Array<") : -1], wanted)}
    name = text.removeprefix(f"I{PREFIX}")
    wanted.append(name)
    return {"$ref": f"#/definitions/{name}"}


if __name__ == "__main__":
    try:
        print(package())
    except NoGatewayApiError as error:
        print(f"no Gateway API: {error}; its routes will not be checked", file=sys.stderr)
