"""As much of a Kubernetes API server as Helm asks for: objects that nothing acts on.

Discovery, create, read, list, watch, update, patch and delete of the kinds that the chart has.
There is no scheduler and no controller: a Job has ended as soon as it is there; how, and what a
pod's log says, is the test's to choose. It shows the order in which Helm creates and removes
objects, and what it does when a hook fails. It shows nothing of admission, scheduling or operators.
"""

from __future__ import annotations

import base64
import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Tree = dict[str, Any]
KINDS = {
    "v1": "ConfigMap Namespace PersistentVolumeClaim Pod Secret Service ServiceAccount",
    "apps/v1": "Deployment",
    "batch/v1": "Job",
    "policy/v1": "PodDisruptionBudget",
    "networking.k8s.io/v1": "NetworkPolicy Ingress",
    "ray.io/v1": "RayCluster",
}
PLURALS = {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"}
WATCH_S = 1.0
"""How often a watch looks whether its client is still there."""


def plural(kind: str) -> str:
    """Of a kind, as paths have it."""
    return PLURALS.get(kind, f"{kind.lower()}s")


BY_PLURAL = {
    (version, plural(kind)): kind for version, kinds in KINDS.items() for kind in kinds.split()
}


class KubeApi:
    """The server, on a port of loopback, until closed.

    Args:
        directory: for the file that tells clients of it.
        job_ends: whether a Job's pod ends well.
        log_of: what a pod's log says.
    """

    def __init__(
        self,
        directory: Path,
        *,
        job_ends: Callable[[Tree], bool] = lambda job: True,
        log_of: Callable[[Tree], str] = lambda pod: "",
    ) -> None:
        self.objects: dict[tuple[str, str], Tree] = {}
        """By plural and name; there is one namespace."""
        self.events: list[tuple[str, Tree]] = []
        """ADDED, MODIFIED or DELETED, and the object then."""
        self.changed = threading.Condition()
        self.job_ends, self.log_of = job_ends, log_of
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.kubeconfig = directory / "kubeconfig"
        address = f"http://127.0.0.1:{self._server.server_port}"
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "a", "cluster": {"server": address}}],
                    "users": [{"name": "a", "user": {}}],
                    "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
                    "current-context": "a",
                }
            )
        )

    def note(self, what: str, tree: Tree) -> None:
        """Keep an event, for watches and for the test."""
        with self.changed:
            tree["metadata"]["resourceVersion"] = str(len(self.events) + 1)
            self.events.append((what, copy.deepcopy(tree)))
            self.changed.notify_all()

    def created(self) -> list[str]:
        """Kind and name of everything that was created, in that order, but for Helm's records."""
        return [
            f"{tree['kind']} {tree['metadata']['name']}"
            for what, tree in self.events
            if what == "ADDED" and not tree["metadata"]["name"].startswith("sh.helm.")
        ]

    def there(self) -> set[str]:
        """Kind and name of what is there now."""
        return {
            f"{tree['kind']} {tree['metadata']['name']}"
            for tree in self.objects.values()
            if not tree["metadata"]["name"].startswith("sh.helm.")
        }

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> KubeApi:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _with_status(api: KubeApi, tree: Tree) -> Tree:
    """What controllers would make of an object at once."""
    kind = tree["kind"]
    if kind == "Job":
        ends = "Complete" if api.job_ends(tree) else "Failed"
        done = {"type": ends, "status": "True", "reason": "Stub", "message": ends}
        tree["status"] = {"conditions": [done], "succeeded": int(ends == "Complete")}
        tree["status"]["failed"] = int(ends == "Failed")
        tree["status"]["startTime"] = "2026-01-01T00:00:00Z"
    elif kind == "Pod":
        tree["status"] = {"phase": "Succeeded", "conditions": [{"type": "Ready", "status": "True"}]}
    return tree


class _Handler(BaseHTTPRequestHandler):
    api: KubeApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silent."""

    # -- answers -----------------------------------------------------------------------------

    def _send(self, content: object, status: int = 200, kind: str = "application/json") -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _fail(self, status: int, reason: str) -> None:
        self._send(
            {
                "apiVersion": "v1",
                "kind": "Status",
                "status": "Failure",
                "reason": reason,
                "code": status,
                "message": reason,
            },
            status,
        )

    # -- requests ----------------------------------------------------------------------------

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if (answer := discovery(url.path)) is not None:
            self._send(answer)
            return
        version, resource, name, sub = _place(url.path)
        if (version, resource) not in BY_PLURAL:
            self._fail(404, "NotFound")
        elif name is None and query.get("watch") in ("1", "true"):
            self._watch(resource, query)
        elif name is None:
            found = [tree for tree in self._of(resource) if _selected(tree, query)]
            kind = BY_PLURAL[version, resource]
            metadata = {"resourceVersion": str(len(self.api.events))}
            listed = {"apiVersion": version, "kind": f"{kind}List", "metadata": metadata}
            self._send({**listed, "items": found})
        elif (tree := self.api.objects.get((resource, name))) is None:
            self._fail(404, "NotFound")
        elif sub == "log":
            self._send(self.api.log_of(tree), kind="text/plain")
        else:
            self._send(tree)

    def do_POST(self) -> None:
        version, resource, _, _ = _place(urlsplit(self.path).path)
        tree = self._body()
        tree |= {"apiVersion": version, "kind": BY_PLURAL[version, resource]}
        key = resource, tree["metadata"]["name"]
        if key in self.api.objects:
            self._fail(409, "AlreadyExists")
            return
        self._store(key, tree, "ADDED", 201)

    def do_PUT(self) -> None:
        version, resource, name, _ = _place(urlsplit(self.path).path)
        tree = self._body() | {"apiVersion": version, "kind": BY_PLURAL[version, resource]}
        self._store((resource, name), tree, "MODIFIED", 200)

    def do_PATCH(self) -> None:
        version, resource, name, _ = _place(urlsplit(self.path).path)
        key = resource, name
        patch = self._body()
        is_apply = "apply-patch" in self.headers.get("Content-Type", "")
        before = self.api.objects.get(key)
        if before is None and not is_apply:
            self._fail(404, "NotFound")
            return
        tree = patch if is_apply else _patched(before, patch)
        tree |= {"apiVersion": version, "kind": BY_PLURAL[version, resource]}
        if before is None:
            self._store(key, tree, "ADDED", 201)
        else:
            self._store(key, tree, "MODIFIED", 200)

    def do_DELETE(self) -> None:
        _, resource, name, _ = _place(urlsplit(self.path).path)
        self._body()
        tree = self.api.objects.pop((resource, name), None)
        if tree is None:
            self._fail(404, "NotFound")
            return
        self.api.note("DELETED", tree)
        self._send({"apiVersion": "v1", "kind": "Status", "status": "Success"})

    # -- objects -----------------------------------------------------------------------------

    def _of(self, resource: str) -> list[Tree]:
        return [tree for (found, _), tree in self.api.objects.items() if found == resource]

    def _store(self, key: tuple[str, str], tree: Tree, what: str, status: int) -> None:
        tree["metadata"] |= {"namespace": "llm", "uid": f"uid-{key[0]}-{key[1]}", "generation": 1}
        tree["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
        self.api.objects[key] = _with_status(self.api, tree)
        self.api.note(what, tree)
        self._send(tree, status)

    def _body(self) -> Tree:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if data.startswith(b"k8s\0"):
            return decode_record(data)
        return yaml.safe_load(data) or {} if data else {}

    def _watch(self, resource: str, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with self.api.changed:
            seen = int(query.get("resourceVersion") or 0)
            if query.get("sendInitialEvents") == "true" or seen == 0:
                seen = len(self.api.events)
                first = [("ADDED", tree) for tree in self._of(resource)]
            else:
                first = []
        try:
            for what, tree in first:
                self._event(what, tree, query)
            if query.get("sendInitialEvents") == "true":
                ended = {"k8s.io/initial-events-end": "true"}
                metadata = {"resourceVersion": str(seen), "annotations": ended}
                (version,) = {v for v, r in BY_PLURAL if r == resource}
                kind = BY_PLURAL[version, resource]
                mark = {"apiVersion": version, "kind": kind, "metadata": metadata}
                self._event("BOOKMARK", mark, {})
            while True:
                with self.api.changed:
                    if len(self.api.events) == seen:
                        self.api.changed.wait(WATCH_S)
                    fresh, seen = self.api.events[seen:], len(self.api.events)
                for what, tree in fresh:
                    if plural(tree["kind"]) == resource:
                        self._event(what, tree, query)
                self.wfile.flush()
        except OSError:
            self.close_connection = True

    def _event(self, what: str, tree: Tree, query: dict[str, str]) -> None:
        if not _selected(tree, query):
            return
        body = json.dumps({"type": what, "object": tree}).encode() + b"\n"
        self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")
        self.wfile.flush()


def _place(path: str) -> tuple[str, str, str | None, str | None]:
    """API version, resource, name and subresource that a path names."""
    match = re.fullmatch(
        r"/(?:api/(v1)|apis/([^/]+/[^/]+))(?:/namespaces/[^/]+(?=/))?"
        r"/([^/]+)(?:/([^/]+))?(?:/([^/]+))?",
        path,
    )
    if match is None:
        return "", path, None, None
    return match[1] or match[2], match[3], match[4], match[5]


def _selected(tree: Tree, query: dict[str, str]) -> bool:
    labels = tree["metadata"].get("labels", {})
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = part.replace("==", "=").partition("=")
        if key.endswith("!"):
            if labels.get(key[:-1]) == value:
                return False
        elif labels.get(key) != value:
            return False
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = part.partition("=")
        if key == "metadata.name" and tree["metadata"]["name"] != value:
            return False
    return True


def _patched(before: Any, patch: Any) -> Any:
    """A JSON merge patch; a strategic one is taken as that."""
    if not isinstance(patch, dict):
        return patch
    merged = copy.deepcopy(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif not key.startswith("$"):
            merged[key] = _patched(merged.get(key), value)
    return merged


def discovery(path: str) -> Tree | None:
    """What a path of discovery says; None: it is another path."""
    groups = sorted({version.partition("/")[0] for version in KINDS if "/" in version})
    if path == "/version":
        return {"major": "1", "minor": "31", "gitVersion": "v1.31.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        found = []
        for group in groups:
            (version,) = (v for v in KINDS if v.startswith(f"{group}/"))
            known = {"groupVersion": version, "version": version.partition("/")[2]}
            found.append({"name": group, "versions": [known], "preferredVersion": known})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version in KINDS:
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        resources = [
            {"name": plural(k), "kind": k, "namespaced": k != "Namespace", "verbs": verbs}
            for k in KINDS[version].split()
        ]
        return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
    if path == "/openapi/v3":
        places = {v: f"{'api' if v == 'v1' else 'apis'}/{v}" for v in KINDS}
        return {"paths": {p: {"serverRelativeURL": f"/openapi/v3/{p}"} for p in places.values()}}
    version = path.removeprefix("/openapi/v3/apis/").removeprefix("/openapi/v3/api/")
    if version in KINDS:
        return openapi(version)
    return None


def openapi(version: str) -> Tree:
    """Says that this server looks for unknown fields itself, so that its clients need not."""
    group, _, number = version.rpartition("/")
    paths = {}
    for kind in KINDS[version].split():
        paths[f"/{plural(kind)}/{{name}}"] = {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "x-kubernetes-group-version-kind": {
                    "group": group,
                    "version": number,
                    "kind": kind,
                },
                "responses": {},
            }
        }
    return {"openapi": "3.0.0", "paths": paths}


# -- Helm's records, which come as protobuf ----------------------------------------------------


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each length-delimited field of a protobuf message."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = number()
        if tag & 7 == 0:
            number()
        else:
            length = number()
            yield tag >> 3, data[at : at + length]
            at += length


def decode_record(data: bytes) -> Tree:
    """A Secret: its metadata's name and labels, type and data."""
    (raw,) = (content for key, content in _fields(data[4:]) if key == 2)
    tree: Tree = {"metadata": {"labels": {}}, "data": {}}
    for key, content in _fields(raw):
        if key == 1:
            for inner, value in _fields(content):
                if inner == 1:
                    tree["metadata"]["name"] = value.decode()
                elif inner == 11:
                    pair = dict(_fields(value))
                    tree["metadata"]["labels"][pair[1].decode()] = pair.get(2, b"").decode()
        elif key == 2:
            pair = dict(_fields(content))
            tree["data"][pair[1].decode()] = base64.b64encode(pair[2]).decode()
        elif key == 3:
            tree["type"] = content.decode()
    return tree
