"""A stage in a process of its own, as its memory is what the process has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tightfit.workers.api import StageMemory

LOAD = """
import dataclasses, json, sys
from tightfit.workers.api import StageSpec
from tightfit.workers.stage import Stage
stage = Stage(StageSpec(**json.loads(sys.argv[1])))
print(json.dumps(dataclasses.asdict(stage.memory())))
"""


def load_stage(timeout_s: float = 240, **spec: Any) -> StageMemory:
    """What a stage reports when it has loaded.

    Raises:
        RuntimeError: it did not load; what it said.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps({"num_threads": 2, **spec})],
        capture_output=True, text=True, check=False, timeout=timeout_s,
        # Threads that spin while they wait take ten times as long beside other tests.
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return StageMemory(**json.loads(done.stdout))
