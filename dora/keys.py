"""The shared secret of a job: who knows it may join.

It reads the environment, so that a secret need not appear in a script or on a command line.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from dora.errors import SpecError

MIN_KEY_BYTES = 16
HOW_TO_SET = "set DORA_KEY or DORA_KEY_FILE to the same secret on all ranks (dora key makes one)"


def load_key(key: bytes | str | None = None, key_file: str | Path | None = None) -> bytes | None:
    """Returns the secret that was given, else that of the environment, else None.

    Args:
        key: The secret itself.
        key_file: A file that holds it; white space around it does not count.

    Raises:
        SpecError: It is too short, its file can not be read, or there are two of them.
    """
    if key is not None and key_file is not None:
        raise SpecError("key, key_file: given both, allowed: one of them")
    if key is not None:
        return _checked("key", key.encode() if isinstance(key, str) else key)
    if key_file is not None:
        return _from_file("key_file", key_file)
    if "DORA_KEY" in os.environ:
        return _checked("DORA_KEY", os.environ["DORA_KEY"].encode())
    if "DORA_KEY_FILE" in os.environ:
        return _from_file("DORA_KEY_FILE", os.environ["DORA_KEY_FILE"])
    return None


def new_key() -> str:
    """Returns a fresh secret of 256 bits, in hexadecimal."""
    return secrets.token_hex(32)


def _from_file(source: str, path: str | Path) -> bytes:
    try:
        return _checked(f"{source} {path}", Path(path).read_bytes().strip())
    except OSError as error:
        raise SpecError(
            f"{source}: given {path}, which can not be read ({error.strerror}), allowed: a file "
            "that holds the secret"
        ) from None


def _checked(source: str, key: bytes) -> bytes:
    if len(key) < MIN_KEY_BYTES:
        raise SpecError(
            f"{source}: given a secret of {len(key)} bytes, allowed: {MIN_KEY_BYTES} or more; "
            "dora key makes one"
        )
    return key
