"""What each unit loses in each format: against transformers, and as a file."""

import shutil
from contextlib import contextmanager
from statistics import mean

import pytest
import quantized_checkpoints
import safetensors.torch
import tiny_models
import torch
from shard_chain import random_tokens

from tightfit.kernels.groups import pack_groups, round_to_nearest
from tightfit.kernels.hqq import hqq
from tightfit.kernels.weights import quantize_rows
from tightfit.workers.calibration import Calibration
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.errors import CheckpointError, SensitivityError
from tightfit.workers.measuring import MeasureJob, measure_sensitivities
from tightfit.workers.model_identity import check_model
from tightfit.workers.sensitivity import (
    BLOCK_ROLES,
    FILE_NAME,
    MIX_FORMATS,
    load_sensitivities,
    model_units,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = tuple(tuple(random_tokens(70, seed=seed)) for seed in range(100, 103))
CALIBRATION = Calibration(samples=tuple(tuple(random_tokens(90, seed=seed)) for seed in range(12)))
GROUP = 16


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made = {}

    def get(variant="llama"):
        if variant not in made:
            path = tmp_path_factory.mktemp("m") / variant
            made[variant] = tiny_models.build(variant, path)
        return made[variant]

    return get


def _job(model, target, **settings):
    job = {"source": str(model.path), "target": str(target), "windows": WINDOWS}
    return MeasureJob(**{**job, "group_size": GROUP, **settings})


def _rounded(weight, fmt, method):
    """As a stage computes with it."""
    if fmt == "int8":
        rows = quantize_rows(weight)
        return rows.values * rows.scale.float()[:, None]
    bits = int(fmt[3:])
    if method == "hqq":
        fitted = hqq(weight, bits=bits, group_size=GROUP, has_real_zero=bits == 4)
        return pack_groups(fitted).dequantize()
    return pack_groups(round_to_nearest(weight, bits=bits, group_size=GROUP)).dequantize()


@contextmanager
def _changed(modules, change):
    """With other weights for a while."""
    before = [module.weight.data for module in modules]
    for module in modules:
        module.weight.data = change(module.weight.data)
    yield
    for module, weight in zip(modules, before, strict=True):
        module.weight.data = weight


@torch.no_grad()
def _losses(model):
    """(log-probabilities of all windows, mean negative log-likelihood)."""
    log_probs = torch.cat([model.log_probs(list(window))[:-1] for window in WINDOWS])
    targets = torch.cat([torch.tensor(window[1:]) for window in WINDOWS])
    return log_probs, float(-log_probs.gather(1, targets[:, None]).mean())


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("variant", ["llama", "bloom", "opt-350m", "llama-mha-tied"])
def test_it_is_what_transformers_loses_with_that_unit_rounded(sources, tmp_path, variant, method):
    model = sources(variant)
    measured = measure_sensitivities(_job(model, tmp_path, method=method))
    checkpoint = open_checkpoint(model.path)
    config = decoder_config(checkpoint.config)
    checkpoint.close()
    own, base = _losses(model)
    assert measured.base_loss == pytest.approx(base, abs=1e-5)
    assert measured.num_tokens == len(own)
    for i, unit in enumerate(model_units(config)):
        fmt = MIX_FORMATS[i % 3]
        prefix = config.names.prefixes[0]
        modules = [model.hf.get_submodule(prefix + name) for name in unit.names]
        with _changed(modules, lambda weight, fmt=fmt: _rounded(weight, fmt, method)):
            log_probs, loss = _losses(model)
        found = measured.units[i].formats[fmt]
        divergence = float((own.exp() * (own - log_probs)).sum(-1).mean())
        assert found.loss_increase == pytest.approx(loss - base, abs=2e-5 + 0.01 * divergence)
        assert found.divergence == pytest.approx(divergence, rel=0.02, abs=2e-6)
        assert divergence > 0


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize("variant", ["llama", "bloom"])
def test_fewer_bits_lose_more_on_average_and_always_the_same(sources, tmp_path, variant, method):
    calibration = CALIBRATION if method == "gptq" else None
    settings = {"method": method, "calibration": calibration}
    measured = measure_sensitivities(_job(sources(variant), tmp_path / "a", **settings))
    assert [(unit.layer, unit.role) for unit in measured.units] == [
        (i, role) for i in range(tiny_models.LAYERS) for role in BLOCK_ROLES
    ]
    by_format = {
        fmt: [unit.formats[fmt].divergence for unit in measured.units] for fmt in MIX_FORMATS
    }
    int3, int4, int8 = (mean(by_format[fmt]) for fmt in MIX_FORMATS)
    assert int3 > 2 * int4 > 4 * int8 > 0
    again = measure_sensitivities(_job(sources(variant), tmp_path / "b", **settings))
    assert again == measured
    assert load_sensitivities(tmp_path / "a" / FILE_NAME) == measured
    assert [file.name for file in (tmp_path / "a").iterdir()] == [FILE_NAME]


def test_rounded_for_its_inputs_a_unit_loses_less(sources, tmp_path):
    job = _job(sources(), tmp_path / "gptq", method="gptq", calibration=CALIBRATION)
    gptq, nearest = measure_sensitivities(job), measure_sensitivities(_job(sources(), tmp_path))
    for fmt in ("int4", "int3"):
        losses = [
            mean(unit.formats[fmt].divergence for unit in measured.units)
            for measured in (gptq, nearest)
        ]
        assert losses[0] < 0.8 * losses[1]


def test_what_was_measured_is_not_measured_again(sources, tmp_path):
    measured = measure_sensitivities(_job(sources(), tmp_path))
    reports = []
    assert measure_sensitivities(_job(sources(), tmp_path), reports.append) == measured
    assert reports == []


@pytest.mark.parametrize(
    "change",
    [
        {"windows": WINDOWS[1:]},
        {"method": "hqq"},
        {"group_size": 0},
        {"method": "gptq", "calibration": CALIBRATION},
    ],
)
def test_the_file_of_another_job_is_left_alone(sources, tmp_path, change):
    measure_sensitivities(_job(sources(), tmp_path))
    before = (tmp_path / FILE_NAME).read_text()
    with pytest.raises(SensitivityError, match="is of another model, text, method, group size"):
        measure_sensitivities(_job(sources(), tmp_path, **change))
    assert (tmp_path / FILE_NAME).read_text() == before


def test_the_sensitivities_of_another_model_are_refused(sources, tmp_path):
    file = tmp_path / FILE_NAME
    measured = measure_sensitivities(_job(sources(), tmp_path))
    check_model(measured, sources().path, file)
    tiny_models.build("llama", tmp_path / "tuned")  # the same config, other norms
    tuned = safetensors.torch.load_file(tmp_path / "tuned" / "model.safetensors")
    tuned["model.layers.0.input_layernorm.weight"] += 0.01
    safetensors.torch.save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    for other in (sources("bloom").path, tmp_path / "tuned"):
        with pytest.raises(SensitivityError, match="was measured on another model than"):
            check_model(measured, other, file)


def test_progress_ends_at_the_work_that_was_announced(sources, tmp_path):
    reports = []
    measure_sensitivities(_job(sources("llama-mha-tied"), tmp_path), reports.append)
    done = [report.bytes_done for report in reports]
    assert done == sorted(done)
    assert len({report.bytes_total for report in reports}) == 1
    assert 0.9 < done[-1] / reports[-1].bytes_total <= 1
    assert {report.phase for report in reports} == {"measuring"}


def test_what_an_interrupted_run_left_does_not_matter(sources, tmp_path):
    measured = measure_sensitivities(_job(sources(), tmp_path / "a"))
    torn = tmp_path / "b" / "measuring.states"
    torn.mkdir(parents=True)
    (torn / "variants").write_bytes(b"torn")
    assert measure_sensitivities(_job(sources(), tmp_path / "b")) == measured
    assert not torn.exists()


def test_a_disk_without_room_is_refused_before_anything_is_computed(sources, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"1,000 bytes free, and hidden states take 2,\d"):
        measure_sensitivities(_job(sources(), tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_quantised_or_computes_nonsense_is_refused(sources, tmp_path):
    quantized_checkpoints.build("gptq", "llama", tmp_path / "gptq")
    job = MeasureJob(source=str(tmp_path / "gptq"), target=str(tmp_path), windows=WINDOWS)
    with pytest.raises(CheckpointError, match="is quantised already, by gptq"):
        measure_sensitivities(job)
    job = _job(sources(), tmp_path, method="gptq", calibration=CALIBRATION, group_size=36)
    with pytest.raises(CheckpointError, match="48 input features, which groups of 36 do not"):
        measure_sensitivities(job)
    tiny_models.build("llama", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.norm.weight"][0] = float("inf")
    safetensors.torch.save_file(tensors, file)
    job = MeasureJob(source=str(tmp_path / "broken"), target=str(tmp_path), windows=WINDOWS)
    with pytest.raises(CheckpointError, match="as it is: the text's loss is not finite"):
        measure_sensitivities(job)
    assert not (tmp_path / FILE_NAME).exists()
