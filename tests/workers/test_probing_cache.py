"""Rates that were measured before: found, measured anew, and ignored when damaged."""

import json

import pytest

from tightfit.workers.probing.cache import ProbeCache, cache_directory
from tightfit.workers.probing.result import LinkRate

RATE = LinkRate(source="cpu", target="cpu", bytes_per_s=3.5e9, latency_s=4e-5)
OTHER = LinkRate(source="cpu", target="cpu", bytes_per_s=1.0, latency_s=1.0)
NAME = "gpu: GPU-1, driver 570.1, torch 2.13"


def get(cache, measured=RATE, name=NAME):
    return cache.get(name, LinkRate, lambda: measured)


def refuse():
    raise AssertionError("measured again")


@pytest.fixture
def cache(tmp_path):
    cache = ProbeCache(tmp_path / "new" / "probe")
    assert get(cache) == (RATE, False)
    return cache


def again(cache, **options):
    return ProbeCache(cache.path(NAME).parent, **options)


def test_rates_are_measured_once(cache):
    second = again(cache)
    assert second.get(NAME, LinkRate, refuse) == (RATE, True)
    assert second.notes == []


def test_another_driver_is_another_identity(cache):
    assert get(again(cache), OTHER, NAME.replace("570", "580")) == (OTHER, False)
    assert get(again(cache), OTHER) == (RATE, True)


def test_reprobing_measures_anew_and_keeps_that(cache):
    assert get(again(cache, is_fresh=True), OTHER) == (OTHER, False)
    assert get(again(cache)) == (OTHER, True)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b'{"version": 1}',
        lambda text: text.replace(b"3500000000.0", b'"fast"'),
        lambda text: text.replace(b'"version": 1', b'"version": 99'),
        lambda text: text.replace(b"GPU-1", b"GPU-2"),
        lambda text: text[: len(text) // 2],
    ],
)
def test_a_damaged_or_foreign_file_is_noted_and_measured_over(cache, damage):
    path = cache.path(NAME)
    before = path.read_bytes()
    path.write_bytes(damage(before) if callable(damage) else damage)
    assert path.read_bytes() != before
    second = again(cache)
    assert get(second, OTHER) == (OTHER, False)
    (note,) = second.notes
    assert str(path) in note
    assert "ignored" in note
    assert get(again(cache)) == (OTHER, True)


def test_a_directory_in_the_way_of_a_file_is_noted(tmp_path):
    cache = ProbeCache(tmp_path)
    cache.path(NAME).mkdir()
    assert get(cache) == (RATE, False)
    assert len(cache.notes) == 2
    assert "could not be kept" in cache.notes[1]


def test_a_place_that_cannot_be_written_costs_only_a_note(tmp_path):
    (tmp_path / "file").write_text("")
    cache = ProbeCache(tmp_path / "file" / "probe")
    assert get(cache) == (RATE, False)
    assert any("could not be kept" in note for note in cache.notes)


def test_what_is_kept_is_json_that_a_person_can_read(cache):
    tree = json.loads(cache.path(NAME).read_text())
    assert tree["identity"] == NAME
    assert tree["value"]["bytes_per_s"] == 3.5e9


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache_directory() == tmp_path / "c" / "tightfit" / "probe"
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_directory() == tmp_path / ".cache" / "tightfit" / "probe"
