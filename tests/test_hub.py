"""Models by hub name, from a hub on the loopback interface."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.cluster.config import ServeConfig
from tightfit.cluster.hub import HubName, choose_files, parse_hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja"]
RESOLVE = """
import sys
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.hub import resolve_model
try:
    print(resolve_model(sys.argv[1]))
except ConfigError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName(repo="org/name")),
        ("big-science/bloom-560m@v1.0", HubName(repo="big-science/bloom-560m", revision="v1.0")),
        ("org/name@refs/pr/2", HubName(repo="org/name", revision="refs/pr/2")),
        ("o/n/q4/m.gguf", HubName(repo="o/n", file="q4/m.gguf")),
        ("o/n/m.gguf@main", HubName(repo="o/n", file="m.gguf", revision="main")),
    ],
)
def test_hub_names_are_read(text, name):
    assert parse_hub_name(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text", ["name", "/abs/path", "../org/name", "org/..", "a/b/c", "org/name@", "~/m", "a b/c", ""]
)
def test_what_cannot_be_a_hub_name_is_not_one(text):
    assert parse_hub_name(text) is None


@given(st.text(max_size=40))
def test_any_text_is_a_hub_name_that_prints_as_itself_or_none(text):
    name = parse_hub_name(text)
    assert name is None or str(name) == text


def test_one_kind_of_weights_is_downloaded_and_nothing_else():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    other = [
        "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "README.md",
        "onnx/model.safetensors", "consolidated.00.pth", "m.gguf", "global_step/x.json",
    ]  # fmt: skip
    chosen = choose_files([*SMALL, *shards, index, *other])
    assert sorted(chosen) == sorted([*SMALL, *shards, index])


def test_bin_shards_are_second_and_a_single_gguf_third():
    shard, index = "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"
    assert choose_files(["config.json", shard, index, "m.gguf"]) == ["config.json", shard, index]
    assert choose_files(["config.json", "m.gguf"]) == ["config.json", "m.gguf"]


def test_several_ggufs_are_listed_and_one_can_be_named():
    names = ["a.gguf", "b.gguf"]
    with pytest.raises(ValueError, match=r"to be named, .*: a\.gguf, b\.gguf"):
        choose_files(names)
    assert choose_files(names, "b.gguf") == ["b.gguf"]
    with pytest.raises(ValueError, match=r"no file c\.gguf; it has: a\.gguf, b\.gguf"):
        choose_files(names, "c.gguf")


def test_a_gguf_in_a_folder_has_to_be_named():
    names = ["config.json", "q4/m.gguf"]
    with pytest.raises(ValueError, match=r"to be named, as in org/name/q4/m\.gguf"):
        choose_files(names)
    assert choose_files(names, "q4/m.gguf") == names


@pytest.mark.parametrize(
    ("model", "served"),
    [
        ("org/name@refs/pr/2", "name"),
        ("org/name-1.5", "name-1.5"),
        ("org/name/q4/m.Q4_1.gguf@main", "m.Q4_1"),
    ],
)
def test_a_model_is_served_under_the_last_part_of_its_hub_name(model, served):
    assert ServeConfig(model=model).model_name == served


def test_a_repository_without_weights_is_refused():
    with pytest.raises(ValueError, match="no weights"):
        choose_files([*SMALL, "tf_model.h5"])


class Hub(http.server.ThreadingHTTPServer):
    """A model hub with some repositories: files by name."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories = repositories
        self.fetched = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, *, with_body):
        parts = self.path.partition("?")[0].strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if listing else parts[:2])
        files = self.server.repositories.get(repo)
        if files is None:
            return self.refuse(401, "RepoNotFound")
        if repo == "org/gated" and not listing:
            return self.refuse(403, "GatedRepo")
        names = list(files)
        if listing:
            revision = parts[5] if len(parts) > 5 else "main"
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            body = json.dumps(
                {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            ).encode()
            if "tree" in parts:
                body = json.dumps(
                    [
                        {
                            "type": "file", "path": n, "size": len(files[n]),
                            "oid": hashlib.sha1(files[n]).hexdigest(),
                        }
                        for n in names
                    ]
                ).encode()  # fmt: skip
            return self.send(body, "application/json", with_body=with_body)
        name = "/".join(parts[4:])
        if repo == "org/broken" and with_body and name == "model.safetensors":
            return self.refuse(503, "Overloaded")
        if with_body:
            self.server.fetched.append(name)
        return self.send(files[name], "application/octet-stream", with_body=with_body)

    def send(self, body, kind, *, with_body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    files = {
        "config.json": b"{}",
        "tokenizer.json": b'{"a": 1}',
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"the same again",
        "README.md": b"# Words",
    }
    server = Hub(
        {
            "org/small": files,
            "org/empty": {"config.json": b"{}"},
            "org/gated": files,
            "org/broken": files,
        }
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def resolve(model, home, url, code=RESOLVE):
    """`resolve_model` in a process of its own: the hub library reads its settings once."""
    environment = os.environ | {
        "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-c", code, model],
        env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_model_is_downloaded_once_and_then_served_from_the_cache_without_a_hub(hub, tmp_path):
    first = resolve("org/small", tmp_path, hub.url)
    assert first.returncode == 0, first.stderr
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    directory = first.stdout.strip()
    with open(os.path.join(directory, "model.safetensors"), "rb") as file:
        assert file.read() == b"weights"
    again = resolve("org/small", tmp_path, hub.url)
    assert again.stdout == first.stdout
    assert len(hub.fetched) == 3
    away = resolve("org/small", tmp_path, "http://127.0.0.1:1")
    assert away.returncode == 0, away.stderr
    assert away.stdout == first.stdout


def test_fetch_brings_a_model_into_the_cache_and_says_where_it_lies(hub, tmp_path):
    cli = (
        "import sys; from tightfit.cluster.cli import main; sys.exit(main(['fetch', sys.argv[1]]))"
    )
    done = resolve("org/small", tmp_path, hub.url, code=cli)
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    assert directory.is_relative_to(tmp_path)
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    missing = resolve("org/none", tmp_path, hub.url, code=cli)
    assert missing.returncode == 1
    assert "no such model on the hub" in missing.stderr


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("org/none", "no such file or directory here, and no such model on the hub"),
        ("org/gated", "HF_TOKEN"),
        ("org/small@v9", "org/small has no revision v9"),
        ("org/empty", "holds no weights"),
        ("org/broken", "the download broke off (Server error '503"),
        ("org/small/x.gguf", "has no file x.gguf"),
    ],
)
def test_what_the_hub_does_not_give_is_explained(hub, tmp_path, model, says):
    done = resolve(model, tmp_path, hub.url)
    assert done.returncode == 1
    assert says in done.stderr
    assert model in done.stderr
    assert "Traceback" not in done.stderr


CONFIG = (
    RESOLVE.replace("resolve_model(sys.argv[1])", "download_config(parse_hub_name(sys.argv[1]))")
).replace("import resolve_model", "import download_config, parse_hub_name")


def test_of_a_model_that_is_only_planned_no_weights_are_downloaded(hub, tmp_path):
    hub.fetched.clear()
    first = resolve("org/small", tmp_path, hub.url, CONFIG)
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("/config.json\n")
    assert hub.fetched == ["config.json"]
    away = resolve("org/small", tmp_path, "http://127.0.0.1:1", CONFIG)
    assert away.stdout == first.stdout


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("org/none", "no such file or directory here, and no such model on the hub"),
        ("org/gated", "HF_TOKEN"),
    ],
)
def test_a_config_that_the_hub_does_not_give_is_explained(hub, tmp_path, model, says):
    done = resolve(model, tmp_path, hub.url, CONFIG)
    assert done.returncode == 1
    assert says in done.stderr
    away = resolve(model, tmp_path, "http://127.0.0.1:1", CONFIG)
    assert "no earlier download is in its cache" in away.stderr
    assert "Traceback" not in done.stderr + away.stderr


def test_a_gguf_file_that_is_a_link_into_a_cache_keeps_its_name(tmp_path):
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "m.gguf").symlink_to("blob")
    done = resolve("m.gguf", tmp_path, "http://127.0.0.1:1")
    assert done.stdout.strip() == str(tmp_path / "m.gguf")


def test_without_hub_and_cache_both_are_named(tmp_path):
    done = resolve("org/small", tmp_path, "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "the hub cannot be asked" in done.stderr
    assert "no earlier download is in its cache" in done.stderr
    assert "Traceback" not in done.stderr
