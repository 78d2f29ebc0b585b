"""The file of sensitivities: written, read, refused."""

import json

import pytest

from tightfit.kernels.formats import Format, linear_bytes
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.errors import SensitivityError
from tightfit.workers.model_formats import Role
from tightfit.workers.sensitivity import (
    MIX_FORMATS,
    FormatSensitivity,
    Sensitivities,
    UnitSensitivity,
    load_sensitivities,
    model_units,
    save_sensitivities,
)

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 100, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}  # fmt: skip
BLOOM = {
    "model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 3, "vocab_size": 100,
}  # fmt: skip


def measured(config=LLAMA):
    units = model_units(decoder_config(config))
    return Sensitivities(
        model="m", text="t", num_tokens=8, method="hqq", group_size=32, base_loss=3.25,
        units=tuple(
            UnitSensitivity(
                layer=unit.layer,
                role=unit.role,
                num_weights=unit.num_weights,
                formats={
                    fmt: FormatSensitivity(
                        bytes=unit.nbytes(fmt, 32), loss_increase=-0.125 * n, divergence=0.5 * n
                    )
                    for n, fmt in enumerate(MIX_FORMATS)
                },
            )
            for unit in units
        ),
    )  # fmt: skip


@pytest.mark.parametrize("config", [LLAMA, BLOOM], ids=["llama", "bloom"])
def test_what_was_written_is_read_again(tmp_path, config):
    save_sensitivities(tmp_path / "file", measured(config))
    assert load_sensitivities(tmp_path / "file") == measured(config)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_unit_is_all_layers_of_one_role_with_their_scales_and_zero_points():
    qkv, attn_out, mlp_up, mlp_down, *others = model_units(decoder_config(LLAMA))
    assert len(others) == 2 * 4
    assert [unit.role for unit in (qkv, attn_out, mlp_up, mlp_down)] == list(Role)[:4]
    assert (qkv.n_out, qkv.n_in) == (64 + 2 * 32, 64)
    assert [name.rpartition(".")[2] for name in qkv.names] == ["q_proj", "k_proj", "v_proj"]
    assert (mlp_up.n_out, mlp_up.n_in) == (2 * 96, 64)
    assert (mlp_down.n_out, mlp_down.n_in) == (64, 96)
    assert qkv.nbytes(Format.INT4, 32) == 128 * (64 // 2 + 2 * 4)
    assert qkv.nbytes(Format.INT4, None) == linear_bytes(Format.INT4, 128, 64, group_size=64)
    assert qkv.nbytes(Format.INT8, 32) == 128 * 64 + 2 * 128


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tree: tree.update(version=9), "is of version 9; this reads 1"),
        (lambda tree: tree.pop("base_loss"), "missing required field `base_loss`"),
        (lambda tree: tree.update(base_loss=None), r"`float`, got `null` - at `\$\.base_loss`"),
        (lambda tree: tree["units"].pop(5), "does not hold the units of whole blocks"),
        (lambda tree: tree.update(units=[]), "does not hold the units of whole blocks"),
        (lambda tree: tree["units"][6]["formats"].pop("int4"), "layer 1, mlp_up: .* of int4"),
        (lambda tree: tree["units"][0].update(role="head2"), "Invalid enum value 'head2'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path, change, problem):
    path = tmp_path / "file"
    save_sensitivities(path, measured())
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(SensitivityError, match=problem):
        load_sensitivities(path)


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path):
    with pytest.raises(SensitivityError, match=r"file: cannot be read: .*No such file"):
        load_sensitivities(tmp_path / "file")
    (tmp_path / "file").write_text("{torn")
    with pytest.raises(SensitivityError, match="cannot be read: JSON is malformed"):
        load_sensitivities(tmp_path / "file")
