"""Random values: what is rendered is valid, what is not is refused by path and reason.

Hypothesis only draws the values, and what is done with them follows. Were it done inside a test of
Hypothesis, this would try a failure again: a Helm that was ended for lack of time or memory would
be reported as a test with unreliable results.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import chart_schemas
import pytest
import yaml
from chart import BASE, CHART, EVERYTHING, containers, find, over, parse, run_helm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
DRAW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # a finding is everybody's, not the next one's
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
NASTY = st.sampled_from(
    [*"~#%|>\t\\é'\"", "", " a ", "a\nb", "日本", "yes", "null", "1e6", "0x1f", "- a", "a: b", "&a"]
) | st.sampled_from(["*a", "!!x", "{{ .Values }}", "{{", "}}", "${A}", "$(A)"])
TEXT = NASTY | st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)
NAME = st.from_regex(r"[a-z][a-z0-9-]{0,10}[a-z0-9]", fullmatch=True)
LABEL_KEY = st.from_regex(r"([a-z]{1,8}\.example/)?[A-Za-z]{1,10}", fullmatch=True)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(NAME | LABEL_KEY, inner, max_size=2)
    ),
    max_leaves=4,
)


def leaves(tree, path=()):
    """Path of everything in the values, mappings themselves too."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


PASSED_ON = {
    "affinity",
    "extraEnv",
    "modelVolume",
    "networkPolicy",
    "rollingUpdate",
    "topologySpreadConstraints",
}
"""Objects of Kubernetes' own: the chart checks their outline, the API server what is in them."""
PATHS = sorted(set(leaves(over(DEFAULTS, EVERYTHING))))


def drawn(strategy):
    """Values of a strategy, the same in every run."""
    found = []

    @DRAW
    @given(strategy)
    def note(value):
        found.append(value)

    note()
    return found


def at(path, value):
    """{"a": {"b": value}} of ("a", "b"): keys may have dots."""
    for key in reversed(path):
        value = {key: value}
    return value


def outcome(values):
    """Objects of a rendering, or None and why there is none."""
    with tempfile.TemporaryDirectory() as directory:
        done = run_helm(4, "template", values, Path(directory))
    if done.returncode == 0:
        return parse(done.stdout), ""
    return None, done.stderr


def outcomes(all_values):
    """`outcome` of each, on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(outcome, all_values))


@contextmanager
def told(values):
    """A failure says by which values."""
    try:
        yield
    except Exception as error:
        error.add_note(f"values: {values!r}")
        raise


def check_objects(objects):
    for tree in objects:
        chart_schemas.validate(tree)
    for where, container in containers(objects).items():
        assert container["securityContext"]["runAsUser"] >= 1, where


POOL = st.fixed_dictionaries(
    {"devices": st.fixed_dictionaries({"type": NAME, "count": st.integers(1, 64)})},
    optional={
        "nodes": st.integers(1, 1000),
        "podLabels": st.dictionaries(LABEL_KEY, NAME, max_size=2),
        "podAnnotations": st.dictionaries(LABEL_KEY, TEXT, max_size=3),
        "nodeSelector": st.dictionaries(LABEL_KEY, NAME, max_size=2),
        "tolerations": st.lists(
            st.fixed_dictionaries(
                {"operator": st.sampled_from(["Exists", "Equal"])},
                optional={"key": LABEL_KEY, "value": TEXT},
            ),
            max_size=2,
        ),
        "extraEnv": st.lists(st.fixed_dictionaries({"name": NAME, "value": TEXT}), max_size=3),
    },
)


GIVEN = st.fixed_dictionaries(
    {
        "pools": st.dictionaries(NAME, POOL, min_size=1, max_size=3),
        "annotations": st.dictionaries(LABEL_KEY, TEXT, max_size=3),
        "variables": st.dictionaries(NAME, TEXT, max_size=3),
        "prompt": TEXT.filter(bool),
        "name": TEXT,
        "drain": st.integers(0, 86400),
    }
)


def values_with(texts):
    """Values of the chart with what was drawn in its places."""
    variables = [{"name": key, "value": value} for key, value in texts["variables"].items()]
    base = {key: value for key, value in BASE.items() if key != "pools"}
    drawn = {
        "pools": texts["pools"],
        "gateway": {
            "podAnnotations": texts["annotations"],
            "extraEnv": variables,
            "drainSeconds": texts["drain"],
        },
        "serve": {"stages": 1, "served_model_name": texts["name"]},
        "test": {"prompt": texts["prompt"]},
    }
    return over(base, drawn)


def check_that_they_arrive(texts, objects):
    template = find(objects, "Deployment")["spec"]["template"]
    assert template["metadata"]["annotations"].items() >= texts["annotations"].items()
    env = {v["name"]: v.get("value") for v in template["spec"]["containers"][0]["env"]}
    assert env.items() >= texts["variables"].items()
    config = yaml.safe_load(find(objects, "ConfigMap", "tightfit")["data"]["tightfit.yaml"])
    assert config["serve"]["served_model_name"] == texts["name"]
    assert config["serve"]["drain_grace_s"] == texts["drain"]
    assert find(objects, "Pod")["spec"]["containers"][0]["args"][-1] == texts["prompt"]
    groups = find(objects, "RayCluster")["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == sorted(texts["pools"])
    for group in groups:
        pool = texts["pools"][group["groupName"]]
        assert group["replicas"] == pool.get("nodes", 1)
        given_annotations = group["template"]["metadata"].get("annotations", {})
        assert given_annotations == pool.get("podAnnotations", {})


def test_texts_arrive_as_they_were_given():
    all_texts = drawn(GIVEN)
    assert len(all_texts) >= 50
    for texts, (objects, why) in zip(all_texts, outcomes(map(values_with, all_texts)), strict=True):
        with told(texts):
            assert objects is not None, why
            check_objects(objects)
            check_that_they_arrive(texts, objects)


def test_junk_anywhere_is_rendered_validly_or_refused_by_its_path():
    found = drawn(st.tuples(st.sampled_from(PATHS), JUNK, st.sampled_from([BASE, EVERYTHING])))
    assert len(found) >= 50
    found += [
        (("pools", "big", "runtimeClassName"), "9", BASE),  # once a number
        (("deviceTypes",), None, BASE),
    ]
    all_values = [over(base, at(path, junk)) for path, junk, base in found]
    all_outcomes = outcomes(all_values)
    num_refused = sum(objects is None for objects, _ in all_outcomes)
    assert 5 < num_refused < len(found) - 5
    for (path, junk, _), (objects, why) in zip(found, all_outcomes, strict=True):
        with told((path, junk)):
            if objects is None:
                assert "schema" in why or "these values cannot be installed:" in why, why
                assert any(part in why for part in path), why
            elif PASSED_ON.isdisjoint(path):
                check_objects(objects)
