"""configs/ray/aws.yaml, launched by Ray's own code against a simulated EC2."""

import os
from pathlib import Path

import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

FILE = Path(__file__).resolve().parent.parent.parent / "configs" / "ray" / "aws.yaml"

# botocore's own, under newer Pythons than it was written for.
pytestmark = pytest.mark.filterwarnings("ignore:datetime:DeprecationWarning")


@pytest.fixture
def cloud(monkeypatch, tmp_path):
    """A simulated AWS account; keys that Ray makes go below `tmp_path`."""
    import ray.autoscaler._private.aws.config as bootstrap

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "simulated")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("HOME", str(tmp_path))
    os.makedirs(tmp_path / ".ssh", mode=0o700)
    # It sleeps for 15 s after it has made a role, until that is known everywhere.
    monkeypatch.setattr(bootstrap.time, "sleep", lambda _seconds: None)
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        yield


def config_as_launched():
    """The file, with an image that the simulation has."""
    import boto3

    image = boto3.client("ec2").register_image(
        Name="ubuntu", Architecture="x86_64", RootDeviceName="/dev/sda1"
    )
    text = FILE.read_text().replace("ami-0123456789abcdef0", image["ImageId"])
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


def test_ray_launches_the_head_and_a_node_of_every_pool_and_ends_them(cloud):
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws

    config = bootstrap_aws(config_as_launched())
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    types = config["available_node_types"]
    for name, node in types.items():
        kind = "head" if name == "head" else "worker"
        tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: name}
        provider.create_node(node["node_config"], tags, 1)
    running = provider.non_terminated_nodes({})
    assert {provider.node_tags(n)[TAG_RAY_USER_NODE_TYPE] for n in running} == set(types)
    ec2 = boto3.client("ec2")
    instances = [
        instance
        for reservation in ec2.describe_instances(InstanceIds=running)["Reservations"]
        for instance in reservation["Instances"]
    ]
    assert {i["InstanceType"] for i in instances} == {
        "m7i.2xlarge", "p5.48xlarge", "p4d.24xlarge", "g5.12xlarge", "g6.12xlarge",
    }  # fmt: skip
    assert {i["Placement"]["AvailabilityZone"] for i in instances} == {"us-west-2b"}
    for volume in ec2.describe_volumes()["Volumes"]:
        assert (volume["Size"], volume["Encrypted"]) == (1000, True)
    provider.terminate_nodes(running)
    assert provider.non_terminated_nodes({}) == []


def test_the_pools_have_the_cores_and_gpus_that_ec2_lists_for_their_instances(cloud):
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = config_as_launched()
    written = {name: node.pop("resources") for name, node in config["available_node_types"].items()}
    for node in config["available_node_types"].values():
        node["resources"] = {}
    listed = AWSNodeProvider.fillout_available_node_types_resources(config)["available_node_types"]
    del written["head"]
    assert len(written) == 4
    for name, resources in written.items():
        found = listed[name]["resources"]
        assert resources == {"CPU": found["CPU"], "GPU": found["GPU"]}, name
        chip = config["available_node_types"][name]["labels"]["tightfit/device"].partition("-")[0]
        assert f"accelerator_type:{chip.upper()}" in found
