import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import save_model

TESTS = Path(__file__).parent.parent


@pytest.mark.slow
def test_stages_on_several_ray_nodes_talk_over_encrypted_tcp_that_strangers_cannot_enter(tmp_path):
    """Every port of the service is sent noise, every link the next steps by a stranger: the same
    prompt then has the same answer, and no stage has computed anything else."""
    model = save_model("llama", tmp_path / "tiny")
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [
            sys.executable, str(TESTS.parent / "tools" / "loopback.py"), sys.executable,
            str(TESTS / "integration" / "nodes_script.py"), str(model.path), "20",
        ],
        capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["num_nodes"] == 2
    assert all(link.startswith("tcp://") for link in answer["links"])
    assert answer["tokens"] == answer["tokens_after"] == model.greedy(list(range(20)), 16)
    assert len(set(answer["steps"])) == 1
    assert 32 <= answer["steps"][0] <= 34  # two answers of 16 tokens
    assert {int(link.rpartition(":")[2]) for link in answer["links"]} < set(answer["ports"])
    assert answer["connections_taken"] == 4 * len(answer["ports"])
    assert answer["open_cluster"] is False
    assert answer["shown"] is False
