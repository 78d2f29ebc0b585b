"""`tightfit token`, and the flags with which clients show one."""

import json
import re
import stat

import pytest

from tightfit.cluster.cli import FAILED, OK, USAGE, main
from tightfit.cluster.security.tokens import digest, read


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tokens.json"


def run(file, *arguments):
    return main(["token", *arguments, "--tokens-file", str(file)])


def test_a_token_is_printed_once_and_only_its_hash_is_kept(file, capsys):
    assert run(file, "create", "ann", "--role", "admin", "--max-concurrent", "3") == OK
    out, err = capsys.readouterr()
    secret = out.strip()
    assert re.fullmatch(r"tft_[A-Za-z0-9_-]{43}", secret)
    assert secret not in err
    assert secret not in file.read_text()
    (entry,) = read(file)
    assert (entry.name, entry.role, entry.max_concurrent) == ("ann", "admin", 3)
    assert entry.sha256 == digest(secret)
    assert entry.expires is entry.max_tokens_per_minute is None
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_list_shows_everything_but_secrets_and_hashes(file, capsys):
    run(file, "create", "ann", "--days", "30", "--max-tokens-per-minute", "5000")
    run(file, "create", "old", "--days", "0", "--role", "admin")
    secrets = capsys.readouterr().out.split()
    hashes = [entry.sha256 for entry in read(file)]
    assert run(file, "list") == OK
    table = capsys.readouterr().out
    assert re.search(r"ann +user .* any +5000", table)
    assert re.search(r"old +admin .*\(over\)", table)
    assert run(file, "list", "--json") == OK
    text = capsys.readouterr().out
    assert [entry["name"] for entry in json.loads(text)] == ["ann", "old"]
    assert not any(word in table + text for word in secrets + hashes)


def test_a_revoked_token_is_gone_and_its_name_free(file, capsys):
    for name in ("ann", "bob"):
        run(file, "create", name)
    assert run(file, "revoke", "ann") == OK
    assert [entry.name for entry in read(file)] == ["bob"]
    assert run(file, "create", "ann") == OK
    capsys.readouterr()
    assert run(file, "revoke", "eve") == FAILED
    assert "there is no token 'eve'" in capsys.readouterr().err
    assert len(read(file)) == 2


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "a/b", "ä"])
def test_a_name_that_cannot_be_one_is_refused(file, name, capsys):
    with_end = ["create", "--tokens-file", str(file), "--", name]
    assert main(["token", *with_end]) == FAILED
    assert "cannot be a token's name" in capsys.readouterr().err
    assert not file.exists()


def test_a_name_that_is_taken_is_refused(file, capsys):
    run(file, "create", "ann")
    before = file.read_bytes()
    assert run(file, "create", "ann") == FAILED
    assert "there is a token 'ann' already" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_damaged_file_is_left_as_it_is(file, capsys):
    file.write_text("{")
    for action in (["create", "ann"], ["list"], ["revoke", "ann"]):
        assert run(file, *action) == FAILED
        assert "is no file of tokens" in capsys.readouterr().err
    assert file.read_text() == "{"


def test_without_a_file_the_command_says_how_to_name_one(capsys):
    assert main(["token", "list"]) == FAILED
    assert "Give --tokens-file" in capsys.readouterr().err


def test_a_value_out_of_its_range_is_wrong_usage(file):
    assert run(file, "create", "ann", "--max-concurrent", "0") == USAGE
    assert not file.exists()
