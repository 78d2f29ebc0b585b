"""The cluster files of `ray up`: by Ray's schema, the clouds' descriptions and our versions."""

import json
import re
import shlex
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from ray._private.label_utils import validate_node_labels
from ray.autoscaler._private.util import prepare_config, validate_config

import tightfit
from tightfit.cluster.planning.inventory import read_device_types

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = ROOT / "configs" / "ray"
FILES = sorted(CONFIGS.glob("*.yaml"))
CLOUDS = [path for path in FILES if path.name != "on-prem.yaml"]
WHEEL = f"tightfit_serve-{tightfit.__version__}-py3-none-any.whl"
GPUS = {  # by the vendors' lists of machine types; AWS's are asked of moto's copy in test_aws
    "a3-highgpu-8g": (208, 8, "h100-80"),
    "a2-ultragpu-8g": (96, 8, "a100-80"),
    "a2-highgpu-8g": (96, 8, "a100-40"),
    "Standard_ND96isr_H100_v5": (96, 8, "h100-80"),
    "Standard_ND96amsr_A100_v4": (96, 8, "a100-80"),
    "Standard_ND96asr_v4": (96, 8, "a100-40"),
    "Standard_NC96ads_A100_v4": (96, 4, "a100-80"),
}


def read(path):
    return yaml.safe_load(path.read_text())


def commands(config):
    """Every shell command of a cluster file."""
    kinds = [key for key in config if key.endswith("_commands")]
    assert "setup_commands" in kinds
    return [command for kind in kinds for command in config[kind]]


def workers(config):
    return {
        name: node
        for name, node in config["available_node_types"].items()
        if name != config["head_node_type"]
    }


def test_there_is_a_file_for_every_provider_that_the_documents_name():
    assert [path.stem for path in FILES] == ["aws", "azure", "gcp", "on-prem"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_takes_every_cluster_file(path):
    prepared = prepare_config(read(path))
    validate_config(prepared)
    nightly = [c for c in prepared["setup_commands"] if "ray-wheels" in c or "dev0" in c]
    assert nightly == []


def test_the_wheel_has_every_cluster_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = ROOT / "src" / "tightfit"
    patterns = project["tool"]["setuptools"]["package-data"]["tightfit"]
    packed = {path.resolve() for pattern in patterns for path in package.glob(pattern)}
    assert set(FILES) <= packed


def test_ray_refuses_a_misspelt_key():
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(read(CONFIGS / "aws.yaml") | {"idle_timeout": 5}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_installed_is_this_version_with_the_ray_and_torch_it_is_tested_with(path):
    text = path.read_text()
    pins = dict(
        line.split("==")
        for line in (ROOT / "ci" / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert set(re.findall(r"tightfit_serve-[\w.-]+?\.whl", text)) == {WHEEL}
    assert re.findall(r"'ray\[default\]==([\d.]+)'", text) == [pins["ray"]] == [version("ray")]
    assert re.findall(r"torch==([\d.]+)", text) == [pins["torch"]]
    extra = re.findall(r"(?<!torch)(?<!\[default\])\b([a-z][\w-]+)==([\d.]+)", text)
    wrong = {name: pin for name, pin in extra if pins.get(name, pin) != pin}
    assert wrong == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_cluster_asks_for_a_token_that_no_command_line_shows(path):
    config = read(path)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    assert not any("RAY_AUTH_TOKEN" in command for command in commands(config))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_dashboard_listens_on_the_heads_loopback_only(path):
    [start] = [c for c in read(path)["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert "--disable-usage-stats" in start


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_node_has_the_checkpoints_at_the_same_path(path):
    homes = {home for c in commands(read(path)) for home in re.findall(r"HF_HOME=(\S+)", c)}
    assert len(homes) == 1


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_no_stage_is_put_on_the_head_and_every_pool_says_what_its_gpus_are(path):
    config = read(path)
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    pools = workers(config)
    assert len(pools) >= 3
    for name, pool in pools.items():
        validate_node_labels(pool["labels"])
        device = pool["labels"]["tightfit/device"]
        assert device in read_device_types()
        assert name.endswith(f"{pool['resources']['GPU']}x{device}"), name
        assert pool["min_workers"] <= pool["max_workers"] <= config["max_workers"]


@pytest.mark.parametrize(
    "path", [CONFIGS / "azure.yaml", CONFIGS / "gcp.yaml"], ids=["azure", "gcp"]
)
def test_pools_have_the_cores_and_gpus_of_their_machine_types(path):
    for pool in workers(read(path)).values():
        node = pool["node_config"]
        machine = node.get("machineType") or node["azure_arm_parameters"]["vmSize"]
        cores, gpus, device = GPUS[machine]
        assert pool["resources"] == {"CPU": cores, "GPU": gpus}
        assert pool["labels"]["tightfit/device"] == device


def test_every_ray_command_in_the_documents_can_be_typed():
    from ray.scripts.scripts import cli

    typed = [
        shlex.split(line.removeprefix("$ ray ").removesuffix("&"))
        for document in (ROOT / "README.md", ROOT / "docs" / "deploy-ray-up.md")
        for line in document.read_text().splitlines()
        if line.startswith("$ ray ")
    ]
    assert len(typed) >= 10
    for name, *words in typed:
        context = cli.commands[name].make_context(name, list(words))
        named = context.params["cluster_config_file"]
        assert (ROOT / named).exists(), words


# -- Google Cloud ----------------------------------------------------------------------------

JSON_TYPES = {"string": str, "boolean": bool, "integer": int, "object": dict, "array": list}


def unknown_to_compute_engine(value, schema, schemas, where="node_config"):
    """What the Compute Engine API does not know in `value`, by the API's own description."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kind = JSON_TYPES[schema["type"]]
    # The API writes 64-bit integers as strings, and takes either.
    kinds = (str, int) if schema.get("format") in ("int64", "uint64") else (kind,)
    if not isinstance(value, kinds):
        return [f"{where}: not a {schema['type']}"]
    if kind is list:
        return [
            fault
            for index, item in enumerate(value)
            for fault in unknown_to_compute_engine(
                item, schema["items"], schemas, f"{where}[{index}]"
            )
        ]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value} is none of {schema['enum']}"]
    if kind is not dict or "properties" not in schema:
        return []
    faults = [f"{where}.{key}: unknown" for key in value if key not in schema["properties"]]
    return faults + [
        fault
        for key in value.keys() & schema["properties"].keys()
        for fault in unknown_to_compute_engine(
            value[key], schema["properties"][key], schemas, f"{where}.{key}"
        )
    ]


@pytest.fixture(scope="module")
def compute_engine():
    import googleapiclient

    documents = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    return json.loads((documents / "compute.v1.json").read_text())["schemas"]


def test_google_clouds_nodes_are_what_its_api_describes(compute_engine):
    config = read(CONFIGS / "gcp.yaml")
    zone = config["provider"]["availability_zone"]
    for name, node in config["available_node_types"].items():
        faults = unknown_to_compute_engine(
            node["node_config"], compute_engine["Instance"], compute_engine, name
        )
        assert faults == []
        [disk] = node["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"].startswith(f"zones/{zone}/")


@pytest.mark.parametrize(
    ("node", "fault"),
    [
        ({"machinetype": "n2-standard-8"}, "node_config.machinetype: unknown"),
        ({"scheduling": [{"preemptible": True}]}, "node_config.scheduling: not a object"),
        ({"disks": [{"boot": "yes"}]}, "node_config.disks[0].boot: not a boolean"),
    ],
)
def test_a_wrong_field_of_a_google_cloud_node_is_found(compute_engine, node, fault):
    found = unknown_to_compute_engine(node, compute_engine["Instance"], compute_engine)
    assert found == [fault]


# -- Azure -----------------------------------------------------------------------------------


def test_azures_nodes_set_parameters_of_the_template_that_ray_deploys():
    import ray.autoscaler._private as private

    template = Path(private.__file__).parent / "_azure" / "azure-vm-template.json"
    parameters = json.loads(template.read_text())["parameters"]
    types = {"string": str, "int": int, "bool": bool, "object": dict, "array": list}
    for node in read(CONFIGS / "azure.yaml")["available_node_types"].values():
        given = node["node_config"]["azure_arm_parameters"]
        assert {"vmSize", "imagePublisher", "imageOffer", "imageSku", "imageVersion"} <= set(given)
        for key, value in given.items():
            assert isinstance(value, types[parameters[key]["type"]]), key
