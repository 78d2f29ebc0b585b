"""The file of tokens, the store that follows it, and limits."""

import os
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.cluster.errors import ConfigError, OverloadedError
from tightfit.cluster.security.limits import Usage
from tightfit.cluster.security.store import CHECK_S, TokenStore
from tightfit.cluster.security.tokens import (
    MAX_FILE_BYTES,
    Token,
    decode,
    digest,
    editing,
    encode,
    new_secret,
    read,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
INSTANTS = st.datetimes(timezones=st.just(UTC))
TOKENS = st.builds(
    Token,
    name=NAMES,
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    role=st.sampled_from(["user", "admin"]),
    created=INSTANTS,
    expires=st.none() | INSTANTS,
    max_concurrent=st.none() | st.integers(1, 2**31),
    max_tokens_per_minute=st.none() | st.integers(1, 2**53),
)


def token(name="ann", secret="tft_a", **fields):
    return Token(name=name, sha256=digest(secret), created=NOW, **fields)


# -- the file --------------------------------------------------------------------------------


@given(st.lists(TOKENS, max_size=5, unique_by=(lambda t: t.name, lambda t: t.sha256)))
def test_what_is_written_is_read_back(tokens):
    assert decode(encode(tokens)) == tuple(tokens)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_other_bytes_are_refused_as_such(data):
    with pytest.raises(ValueError):  # noqa: PT011
        decode(data)


@given(st.data())
def test_a_damaged_file_is_refused_or_still_has_only_sound_entries(data):
    whole = bytearray(encode([token(), token("bob", "tft_b", role="admin", max_concurrent=3)]))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        tokens = decode(bytes(whole))
    except ValueError:
        return
    assert decode(encode(tokens)) == tokens


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{}", "missing required field `version`"),
        ('{"version": 2, "tokens": []}', "Invalid"),
        ('{"version": 1, "tokens": [], "more": 1}', "unknown field `more`"),
        ("[" * 100_000, "nested too deeply|Expected `object`"),
        ('{"version": 1, "tokens": ' + "[" * 100_000, "nested too deeply|Expected"),
        ('{"version": 1, "tokens": [], "x": ' + "[" * 100_000, "nested too deeply|unknown field"),
        (" " * (MAX_FILE_BYTES + 1), "at most 4,194,304 are read"),
    ],
)
def test_a_file_that_is_none_says_why(text, complaint, tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a b"}, {"name": ""}, {"name": "a\n"}, {"name": "x" * 65}, {"sha256": "AB" * 32},
        {"sha256": "ab"}, {"role": "root"}, {"created": "yesterday"},
        {"created": "2026-01-02T03:04:05"}, {"max_concurrent": 0}, {"max_tokens_per_minute": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_with_a_wrong_field_is_refused(changes):
    import json

    file = json.loads(encode([token()]))
    file["tokens"][0].update(changes)
    with pytest.raises(ValueError):  # noqa: PT011
        decode(json.dumps(file).encode())


def test_two_entries_cannot_share_a_name_or_a_secret():
    with pytest.raises(ValueError, match="name 'ann' is there twice"):
        decode(encode([token(), token(secret="tft_b")]))
    with pytest.raises(ValueError, match=r"sha256 .* is there twice"):
        decode(encode([token(), token("bob")]))


def test_a_new_file_is_for_its_owner_only_and_an_edit_keeps_the_mode_that_it_was_given(tmp_path):
    path = tmp_path / "tokens.json"
    with editing(path) as tokens:
        tokens.append(token())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with editing(path) as tokens:
        tokens.append(token("bob", "tft_b"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [t.name for t in read(path)] == ["ann", "bob"]


def test_an_edit_that_fails_changes_nothing_and_leaves_nothing(tmp_path):
    path = tmp_path / "tokens.json"
    with editing(path) as tokens:
        tokens.append(token())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="twice"), editing(path) as tokens:
        tokens.append(token())
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [".tokens.json.lock", "tokens.json"]


def test_edits_at_once_wait_for_each_other(tmp_path):
    path = tmp_path / "tokens.json"

    def add(number):
        with editing(path) as tokens:
            tokens.append(token(f"n{number}", f"tft_{number}"))

    threads = [threading.Thread(target=add, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {t.name for t in read(path)} == {f"n{n}" for n in range(20)}


def test_secrets_are_long_and_never_the_same():
    secrets = {new_secret() for _ in range(1000)}
    assert len(secrets) == 1000
    assert all(secret.startswith("tft_") and len(secret) == 47 for secret in secrets)


# -- the store -------------------------------------------------------------------------------


class Clock:
    s = 100.0
    at = NOW

    def store(self, path):
        return TokenStore(path, clock_s=lambda: self.s, now=lambda: self.at)

    def advance(self, seconds):
        self.s += seconds
        self.at += timedelta(seconds=seconds)


@pytest.fixture
def clock():
    return Clock()


def write(path, *tokens):
    path.write_bytes(encode(tokens))


def test_a_token_is_found_by_its_secret_alone(tmp_path, clock):
    path = tmp_path / "t"
    write(path, token(), token("bob", "tft_b"))
    store = clock.store(path)
    assert store.find("tft_b").name == "bob"
    for wrong in ("", "tft_", "tft_c", "bob", digest("tft_b"), "tft_b ", "tft_\ud800", "x" * 10**6):
        assert store.find(wrong) is None


def test_changes_of_the_file_are_followed(tmp_path, clock):
    path = tmp_path / "t"
    write(path, token())
    store = clock.store(path)
    ann = store.find("tft_a")
    write(path, token(max_concurrent=7), token("bob", "tft_b"))
    clock.advance(CHECK_S)
    assert store.find("tft_b").name == "bob"
    assert store.current(ann).max_concurrent == 7
    write(path, token(secret="tft_new"))
    clock.advance(CHECK_S)
    assert store.current(ann) is None
    assert store.find("tft_a") is None
    assert store.find("tft_new").name == "ann"


@pytest.mark.parametrize("damage", [b"{", None])
def test_a_file_that_is_damaged_later_leaves_the_tokens_in_force(tmp_path, clock, caplog, damage):
    path = tmp_path / "t"
    write(path, token())
    store = clock.store(path)
    path.unlink() if damage is None else path.write_bytes(damage)
    clock.advance(CHECK_S)
    assert store.find("tft_a").name == "ann"
    assert "the tokens read last stay in force" in caplog.text
    write(path, token("bob", "tft_b"))
    clock.advance(CHECK_S)
    assert store.find("tft_a") is None
    assert store.find("tft_b").name == "bob"


def test_a_file_that_is_missing_or_damaged_at_first_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="`tightfit token create` makes one"):
        TokenStore(tmp_path / "none")


def test_a_token_expires(tmp_path, clock):
    path = tmp_path / "t"
    write(path, token(expires=NOW + timedelta(seconds=10)))
    store = clock.store(path)
    ann = store.find("tft_a")
    assert not store.has_expired(ann)
    clock.advance(10)
    assert store.has_expired(ann)


def test_a_file_that_anybody_can_change_is_complained_about(tmp_path, clock, caplog):
    path = tmp_path / "t"
    write(path, token())
    path.chmod(0o602)
    clock.store(path)
    assert "can be changed by every user" in caplog.text


# -- limits ----------------------------------------------------------------------------------


def test_no_more_calls_at_once_than_allowed():
    usage = Usage(token(max_concurrent=2), 0.0)
    usage.begin(0.0, takes_tokens=True)
    usage.begin(0.0, takes_tokens=False)
    with pytest.raises(OverloadedError, match="'ann' has 2 calls under way; 2 are allowed"):
        usage.begin(0.0, takes_tokens=False)
    usage.end()
    usage.begin(0.0, takes_tokens=True)


def test_what_was_taken_beyond_the_allowance_is_waited_for():
    usage = Usage(token(max_tokens_per_minute=60), 0.0)
    usage.begin(0.0, takes_tokens=True)
    usage.charge(89, 0.0)
    with pytest.raises(OverloadedError) as caught:
        usage.begin(0.0, takes_tokens=True)
    assert caught.value.retry_after_s == 30.0
    usage.begin(0.0, takes_tokens=False)  # what takes no tokens does not wait for any
    with pytest.raises(OverloadedError):
        usage.begin(29.9, takes_tokens=True)
    usage.begin(30.0, takes_tokens=True)


def test_a_limit_that_changes_holds_from_then_on_and_debts_stay():
    usage = Usage(token(max_tokens_per_minute=60), 0.0)
    usage.charge(119, 0.0)
    usage.follow(token(max_tokens_per_minute=600), 0.0)
    with pytest.raises(OverloadedError) as caught:
        usage.begin(0.0, takes_tokens=True)
    assert caught.value.retry_after_s == pytest.approx(6.0)
    usage.follow(token(), 0.0)
    usage.begin(0.0, takes_tokens=True)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 300)), max_size=50))
def test_over_time_nobody_gets_more_than_the_rate(calls):
    """Whatever a caller does: all but its last call fit into the rate and one allowance."""
    usage, now_s, taken, last = Usage(token(max_tokens_per_minute=120), 0.0), 0.0, 0, 0
    for pause_s, amount in calls:
        now_s += pause_s
        try:
            usage.begin(now_s, takes_tokens=True)
        except OverloadedError:
            continue
        usage.charge(amount, now_s)
        usage.end()
        taken, last = taken + amount, amount
        assert taken - last <= 120 + 2 * now_s + 1e-6
