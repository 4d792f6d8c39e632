"""Where the shared secret comes from."""

from __future__ import annotations

import pytest

from dora.errors import SpecError
from dora.keys import load_key, new_key

SECRET = "a secret of many bytes"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("DORA_KEY", raising=False)
    monkeypatch.delenv("DORA_KEY_FILE", raising=False)


def test_key_from_nowhere_is_none():
    assert load_key() is None


def test_key_argument_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("DORA_KEY", "another secret of many bytes")
    assert load_key(SECRET) == load_key(SECRET.encode()) == SECRET.encode()


def test_key_file_goes_before_the_environment(monkeypatch, tmp_path):
    (tmp_path / "key").write_text(f"{SECRET}\n")
    monkeypatch.setenv("DORA_KEY", "another secret of many bytes")
    assert load_key(key_file=tmp_path / "key") == SECRET.encode()


def test_key_from_the_environment(monkeypatch, tmp_path):
    (tmp_path / "key").write_text(f"  {SECRET}\n")
    monkeypatch.setenv("DORA_KEY_FILE", str(tmp_path / "key"))
    assert load_key() == SECRET.encode()
    monkeypatch.setenv("DORA_KEY", "another secret of many bytes")
    assert load_key() == b"another secret of many bytes"


@pytest.mark.parametrize("key", ["", "fifteen bytes.."])
def test_short_key_is_refused_in_one_line_without_it(key, monkeypatch):
    monkeypatch.setenv("DORA_KEY", key)
    with pytest.raises(SpecError) as caught:
        load_key()
    text = str(caught.value)
    assert text.startswith(f"DORA_KEY: given a secret of {len(key)} bytes, allowed: 16 or more")
    assert "\n" not in text
    assert not key or key not in text


def test_missing_key_file_is_refused(tmp_path):
    with pytest.raises(SpecError, match="can not be read"):
        load_key(key_file=tmp_path / "none")


def test_two_keys_are_refused(tmp_path):
    with pytest.raises(SpecError, match="given both"):
        load_key(SECRET, tmp_path / "key")


def test_new_keys_differ_and_are_allowed():
    first, second = new_key(), new_key()
    assert first != second
    assert load_key(first) == first.encode()
