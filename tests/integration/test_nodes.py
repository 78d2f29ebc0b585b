import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import save_model

TESTS = Path(__file__).parent.parent


@pytest.mark.slow
def test_stages_on_several_ray_nodes_talk_over_encrypted_tcp(tmp_path):
    model = save_model("llama", tmp_path / "tiny")
    done = subprocess.run(
        [
            sys.executable, str(TESTS.parent / "tools" / "loopback.py"), sys.executable,
            str(TESTS / "integration" / "nodes_script.py"), str(model.path), "20",
        ],
        capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["num_nodes"] == 2
    assert all(link.startswith("tcp://") for link in answer["links"])
    assert answer["tokens"] == model.greedy(list(range(20)), 16)
