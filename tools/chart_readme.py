"""Writes the table of values into the chart's README, from values.yaml and its comments.

`python tools/chart_readme.py` renews helm/tightfit/README.md, `--check` fails when it is not what
values.yaml says.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parent.parent / "helm" / "tightfit"
README, VALUES = CHART / "README.md", CHART / "values.yaml"
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"


def rows(text: str) -> Iterator[tuple[str, str, str]]:
    """Path, default and meaning of every value, in the file's order."""
    lines = text.splitlines()
    yield from _rows(yaml.compose(text), lines, "")


def _rows(tree: yaml.Node, lines: list[str], path: str) -> Iterator[tuple[str, str, str]]:
    assert isinstance(tree, yaml.MappingNode)
    for key, value in tree.value:
        here = f"{path}{key.value}"
        meaning = _comment(lines[key.start_mark.line])
        # A mapping in braces is one value: limits, labels.
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            if meaning:
                yield f"{here}.*", "", meaning
            yield from _rows(value, lines, f"{here}.")
        else:
            found = yaml.safe_load(yaml.serialize(value))
            yield here, json.dumps(found, ensure_ascii=False), meaning


def _comment(line: str) -> str:
    match = re.search(r"\s#\s(.*)$", line)
    return match[1] if match else ""


def table(text: str) -> str:
    """The values as Markdown."""
    found = ["| value | default | |", "|---|---|---|"]
    for path, default, meaning in rows(text):
        cells = [f"`{path}`", f"`{default}`" if default else "", meaning]
        found.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(found) + "\n"


def renewed(readme: str, values: str) -> str:
    """The README with the table as it is now."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}{table(values)}{END}{rest.partition(END)[2]}"


def main(arguments: list[str]) -> int:
    """Write, or with --check compare."""
    before = README.read_text()
    after = renewed(before, VALUES.read_text())
    if arguments == ["--check"]:
        if before != after:
            print(f"{README} is out of date: run make chart", file=sys.stderr)
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
