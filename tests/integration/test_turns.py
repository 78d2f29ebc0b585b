"""Several services that plan in one Ray cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import save_model

TESTS = Path(__file__).parent.parent


@pytest.mark.slow
def test_services_that_plan_in_one_cluster_take_turns_and_leave_each_other_what_they_hold(tmp_path):
    model = save_model("llama", tmp_path / "tiny")
    done = subprocess.run(
        [
            sys.executable, str(TESTS.parent / "tools" / "loopback.py"), sys.executable,
            str(TESTS / "integration" / "turns_script.py"), str(model.path),
        ],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == ["a:0", "b:0"]
    code, errors = found["refused"]
    assert code == 1
    assert "every node of the Ray cluster that has a CPU is held by other services" in errors
    assert "free are a: 0 of 1 CPUs; b: 0 of 1 CPUs" in errors
    assert "Traceback" not in errors
    assert found["late_has_the_freed"]
