"""Random values: what is rendered is valid, what is not is refused by path and reason."""

import tempfile
from pathlib import Path

import chart_schemas
import pytest
import yaml
from chart import BASE, CHART, EVERYTHING, containers, find, over, parse, run_helm
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
COMMON = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # to shrink is to render hundreds of times
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""The same examples in every run: a finding is everybody's, not the next one's."""
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


def outcome(values):
    """Objects of a rendering, or None and why there is none."""
    with tempfile.TemporaryDirectory() as directory:
        done = run_helm(4, "template", values, Path(directory))
    if done.returncode == 0:
        return parse(done.stdout), ""
    return None, done.stderr


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


@COMMON
@given(
    pools=st.dictionaries(NAME, POOL, min_size=1, max_size=3),
    annotations=st.dictionaries(LABEL_KEY, TEXT, max_size=3),
    variables=st.dictionaries(NAME, TEXT, max_size=3),
    prompt=TEXT.filter(bool),
    name=TEXT,
    drain=st.integers(0, 86400),
)
def test_texts_arrive_as_they_were_given(pools, annotations, variables, prompt, name, drain):
    gateway = {
        "podAnnotations": annotations,
        "extraEnv": [{"name": key, "value": value} for key, value in variables.items()],
        "drainSeconds": drain,
    }
    serve = {"stages": 1, "served_model_name": name}
    base = {key: value for key, value in BASE.items() if key != "pools"}
    test = {"prompt": prompt}
    objects, why = outcome(
        over(base, {"pools": pools, "gateway": gateway, "serve": serve, "test": test})
    )
    assert objects is not None, why
    check_objects(objects)
    template = find(objects, "Deployment")["spec"]["template"]
    assert template["metadata"]["annotations"].items() >= annotations.items()
    env = {v["name"]: v.get("value") for v in template["spec"]["containers"][0]["env"]}
    assert env.items() >= variables.items()
    config = yaml.safe_load(find(objects, "ConfigMap", "tightfit")["data"]["tightfit.yaml"])
    assert config["serve"]["served_model_name"] == name
    assert config["serve"]["drain_grace_s"] == drain
    assert find(objects, "Pod")["spec"]["containers"][0]["args"][-1] == prompt
    groups = find(objects, "RayCluster")["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == sorted(pools)
    for group in groups:
        pool = pools[group["groupName"]]
        assert group["replicas"] == pool.get("nodes", 1)
        given_annotations = group["template"]["metadata"].get("annotations", {})
        assert given_annotations == pool.get("podAnnotations", {})


@COMMON
@example(path=("pools", "big", "runtimeClassName"), junk="9", base=BASE)  # once a number
@example(path=("deviceTypes",), junk=None, base=BASE)
@given(path=st.sampled_from(PATHS), junk=JUNK, base=st.sampled_from([BASE, EVERYTHING]))
def test_junk_anywhere_is_rendered_validly_or_refused_by_its_path(path, junk, base):
    for key in reversed(path):
        junk = {key: junk}
    objects, why = outcome(over(base, junk))
    if objects is not None:
        if PASSED_ON.isdisjoint(path):
            check_objects(objects)
        return
    assert "schema" in why or "these values cannot be installed:" in why, why
    assert any(part in why for part in path), why
