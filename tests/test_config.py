"""Configuration files and the flags over them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.cluster.config import (
    SECTIONS,
    ServeConfig,
    client_config,
    plan_config,
    probe_config,
    quantize_config,
    read_config_file,
    serve_config,
    split_address,
    start_plan_config,
    token_config,
)
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.settings import settings

MAKERS = {
    "serve": serve_config,
    "client": client_config,
    "quantize": quantize_config,
    "plan": plan_config,
    "probe": probe_config,
    "token": token_config,
}

EXAMPLES = sorted((Path(__file__).parent.parent / "configs" / "serve").glob("*.yaml"))


def read(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return read_config_file(path)


def test_a_file_and_flags_over_it_make_the_configuration(tmp_path):
    file = read(
        tmp_path, "serve:\n  model: m\n  stages: 3\n  format: bf16\n  memory_budget: 1.5GiB\n"
    )
    config = serve_config(file, {"stages": 2})
    assert config.model == "m"
    assert config.stages == 2
    assert config.format == "bf16"
    assert config.memory_budget_bytes == 3 * 2**29


def test_an_empty_file_leaves_every_default(tmp_path):
    config = serve_config(read(tmp_path, ""), {"model": "m"})
    assert config == ServeConfig(model="m")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("serve:\n  stagse: 2\n", r"serve\.stagse is not a setting; did you mean serve\.stages\?"),
        ("server:\n  stages: 2\n", r"server is not a setting; did you mean serve\?"),
        ("serve:\n  xyz: 2\n", r"serve\.xyz is not a setting; known: model, "),
        ("serve:\n  stages: 1\n  stages: 2\n", "'stages' is given twice"),
        ("- serve\n", "expected `key: value` lines"),
        ("serve: 3\n", "serve: expected `key: value` lines, found 3"),
        ("serve: {\n", "not valid YAML"),
        ("serve:\n  ? [a]\n  : 1\n", "is not a setting|not valid YAML"),
        ("a: &a [*a]\n", "is not a setting|not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_with_its_name(tmp_path, text, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        read(tmp_path, text)
    assert "config.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("stages", "two", "serve.stages: 'two' is not a whole number"),
        ("stages", True, "serve.stages: True is not a whole number"),
        ("stages", 2.0, "serve.stages: 2.0 is not a whole number"),
        ("max_kv_blocks", None, "serve.max_kv_blocks: None is not a whole number"),
        ("stages", 0, "serve.stages: 0 is less than 1"),
        (
            "format",
            "int9",
            "serve.format: 'int9' is not one of auto, fp32, bf16, int8, llm_int8, int4, int3",
        ),
        ("prefix_cache", 1, "serve.prefix_cache: 1 is not true or false"),
        ("drain_grace_s", float("nan"), "serve.drain_grace_s: nan is not finite"),
        ("memory_budget", "4 parsecs", "serve.memory_budget: '4 parsecs' is not a size"),
        ("memory_budget", -1, "serve.memory_budget: -1 is less than 1"),
        ("listen", "localhost", "serve.listen: 'localhost' is not host:port"),
        ("listen", "host:99999", "serve.listen: 'host:99999' is not host:port"),
        ("listen", "::1:50051", "write an IPv6 host in brackets"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_was_expected(key, value, complaint):
    with pytest.raises(ConfigError) as caught:
        serve_config({"serve": {"model": "m", key: value}})
    assert complaint in str(caught.value)


def test_a_missing_model_says_what_is_wanted():
    with pytest.raises(ConfigError, match=r"serve\.model is missing.*Checkpoint directory"):
        serve_config({})


def test_a_whole_number_will_do_where_a_number_is_wanted():
    grace = serve_config({"serve": {"model": "m", "drain_grace_s": 5}}).drain_grace_s
    assert grace == 5.0
    assert isinstance(grace, float)


def test_a_null_takes_the_default_where_there_is_none():
    assert serve_config({"serve": {"model": "m", "kv_blocks": None}}).kv_blocks is None


def test_a_plan_and_a_number_of_stages_exclude_each_other():
    with pytest.raises(ConfigError, match=r"serve\.plan and serve\.stages exclude each other"):
        serve_config({"serve": {"model": "m", "plan": "p.yaml", "stages": 2}})


def planned(section, **settings):
    file = {"serve": {"model": "m", **settings}, "plan": section}
    return start_plan_config(file, serve_config(file))


def test_a_service_is_one_pipeline_whatever_its_plan_section_says():
    assert planned({"replicas": "1"}).num_replicas == 1
    with pytest.raises(ConfigError, match=r"plan\.replicas: max are planned, and a service is one"):
        planned({"replicas": "max"})


def test_a_service_plans_by_the_plan_section_and_its_own_settings():
    config = planned(
        {"sequences": 8, "context": 512, "exclude": "n1"},
        format="int4", memory_budget="3GiB", device="cpu", max_batch_tokens=64,
    )  # fmt: skip
    assert (config.model, config.live, config.sequences, config.context) == ("m", True, 8, 512)
    assert (config.format_names, config.kv_format_names) == (("int4",), ("auto",))
    assert (config.cpu_budget_bytes, config.device, config.max_batch_tokens) == (
        3 * 2**30,
        "cpu",
        64,
    )
    assert config.excluded == {"n1"}


def test_formats_of_the_plan_section_are_a_choice_and_else_there_is_none():
    assert planned({}).format_names == ("auto",)
    chosen = planned({"formats": "int4,int8", "kv_formats": "auto,int8"})
    assert chosen.format_names == ("int4", "int8")
    assert chosen.kv_format_names == ("auto", "int8")


@pytest.mark.parametrize(
    ("section", "settings", "key"),
    [
        ({"inventory": "8xa100-80"}, {}, "inventory"),
        ({"model": "other"}, {}, "model"),
        ({"formats": "int8"}, {"format": "int4"}, "formats"),
        ({"block_size": 32}, {}, "block_size"),
        ({"ray_address": "auto"}, {}, "ray_address"),
    ],
)
def test_what_the_service_says_itself_is_refused_in_the_plan_section(section, settings, key):
    with pytest.raises(ConfigError, match=rf"plan\.{key}: .* leave it out"):
        planned(section, **settings)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models/bloom-176b", "bloom-176b"),
        ("models/bloom-176b/", "bloom-176b"),
        ("SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
    ],
)
def test_a_model_is_served_under_the_last_part_of_its_path(model, name):
    assert serve_config({}, {"model": model}).model_name == name
    assert serve_config({}, {"model": model, "served_model_name": "n"}).model_name == "n"


@pytest.mark.parametrize(
    ("listen", "target"),
    [("127.0.0.1:7", "127.0.0.1:7"), ("0.0.0.0:7", "127.0.0.1:7"), ("[::]:7", "127.0.0.1:7")],
)
def test_client_commands_find_the_service_of_the_same_file(listen, target):
    file = {"serve": {"listen": listen}}
    assert client_config(file).target == target
    assert client_config(file, {"target": "elsewhere:1"}).target == "elsewhere:1"


CERTIFICATE = {"tls_cert": "c", "tls_key": "k"}


@pytest.mark.parametrize(
    ("listen", "settings"),
    [
        ("127.0.0.1:1", {}),
        ("localhost:1", {}),
        ("[::1]:1", {}),
        ("0.0.0.0:1", {**CERTIFICATE, "tokens_file": "t"}),
        ("[::]:1", {**CERTIFICATE, "tls_client_ca": "a"}),
        ("0.0.0.0:1", {"insecure_listen": True}),
        ("0.0.0.0:1", {"insecure_listen": True, "tokens_file": "t"}),
    ],
)
def test_a_service_listens_beyond_its_machine_only_if_secured_or_told_to(listen, settings):
    assert serve_config({}, {"model": "m", "listen": listen, **settings}).listen == listen


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.0.0.7:1", "gateway.example:1"])
@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({}, r"without TLS \(.*\) and without authentication \("),
        ({"tokens_file": "t"}, r"without TLS \([^)]*\)\. Give"),
        (CERTIFICATE, r"without authentication \([^)]*\)\. Give"),
    ],
)
def test_an_unsecured_service_that_others_reach_is_refused(listen, settings, missing):
    with pytest.raises(ConfigError, match=rf"serve\.listen: .*{missing}.*insecure_listen"):
        serve_config({}, {"model": "m", "listen": listen, **settings})


@pytest.mark.parametrize("section", ["serve", "client"])
@pytest.mark.parametrize("name", ["tls_cert", "tls_key"])
def test_half_a_certificate_is_refused(section, name):
    required = {"serve": {"model": "m"}, "client": {}}[section]
    with pytest.raises(ConfigError, match=rf"{section}\.tls_cert and {section}\.tls_key go"):
        MAKERS[section]({}, {**required, name: "f"})


def test_tokens_are_made_in_the_file_that_the_service_of_the_same_file_reads():
    file = {"serve": {"tokens_file": "a"}}
    assert token_config(file).tokens_file == "a"
    assert token_config(file, {"tokens_file": "b"}).tokens_file == "b"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_file_is_a_configuration(path):
    file = read_config_file(path)
    config = serve_config(file)
    assert config.stages or start_plan_config(file, config).live
    assert client_config(file).target


def test_there_are_example_files():
    assert EXAMPLES


@pytest.mark.parametrize("values", ["", "0", "/nowhere.yaml"])
def test_values_of_the_chart_that_cannot_be_read_are_named_with_the_setting(values):
    with pytest.raises(ConfigError, match=r"plan\.values: .*cannot be read"):
        plan_config({}, {"model": "m", "values": values})


@given(section=st.sampled_from(sorted(SECTIONS)), data=st.data())
def test_no_value_of_any_type_gets_past_the_checks_with_another_error(section, data):
    values = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())
    )
    setting = data.draw(st.sampled_from(settings(SECTIONS[section])))
    required = {"serve": {"model": "m"}, "quantize": {"model": "m", "out": "o"}}
    required["plan"] = {"model": "m", "inventory": "i"}
    given_values = required.get(section, {})
    given_values[setting.key] = data.draw(values)
    make = MAKERS[section]
    complaint, value = "", None
    try:
        value = getattr(make({section: given_values}), setting.name)
    except ConfigError as error:
        complaint = str(error)
    assert value is None or type(value) is setting.kind
    assert not complaint or f"{section}.{setting.key}" in complaint


@given(st.text())
def test_an_address_is_split_or_refused(text):
    try:
        host, port = split_address(text)
    except ValueError:
        return
    assert f"{host}:" in text
    assert 0 <= port <= 65535


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"budget": 4.0, "format": "int4"}, "quantize.budget and quantize.format exclude each"),
        ({"budget": 4.0, "measure": True}, "leave measure out: what is missing is measured first"),
        ({"measure": True, "format": "int4"}, "all formats are measured"),
        ({"measure": True, "sensitivity": "f"}, "it is what is measured"),
        ({"sensitivity": "f"}, "is for quantize.budget, which is missing"),
        ({"measure": True}, "quantize.calibration is missing"),
    ],
)
def test_settings_of_quantize_that_do_not_go_together_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        quantize_config({}, {"model": "m", "out": "o", **settings})


def test_a_budget_wants_no_format_and_without_one_it_is_int4():
    assert quantize_config({}, {"model": "m", "out": "o"}).uniform_format == "int4"
    config = quantize_config({}, {"model": "m", "out": "o", "budget": 4})
    assert (config.budget, config.format) == (4.0, None)
