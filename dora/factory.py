"""Gets the user's model: `FILE.py:FUNCTION` or `package.module:FUNCTION`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from dora.errors import SpecError

_ALLOWED = "allowed: path/to/file.py:function or package.module:function"


def build(name: str) -> tuple[nn.Module, Any]:
    """Calls the named function without arguments.

    Returns:
        The module, and the inputs of one call: a tensor, a tuple of positional inputs, or a
        mapping of keyword inputs.

    Raises:
        SpecError: There is no such function, it raised, or it returned something else.
    """
    source, _, function = name.rpartition(":")
    if not source or not function:
        raise SpecError(f"model: given {name!r}, {_ALLOWED}")
    module = _import(source)
    made = getattr(module, function, None)
    if not callable(made):
        raise SpecError(f"model: given {function!r}, which {source} does not have, {_ALLOWED}")
    try:
        pair = made()
    except Exception as error:
        raise SpecError(f"model: {name} raised {_where(error)}") from error
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if not is_pair or not isinstance(pair[0], nn.Module):
        raise SpecError(
            f"model: {name} returned {type(pair).__name__}, allowed: (nn.Module, inputs of one "
            "call), such as (model, (x,))"
        )
    return pair[0], pair[1]


def _import(source: str) -> ModuleType:
    """Imports a file or a module; what it imports may lie beside it."""
    path = Path(source)
    if source.endswith(".py") and not path.is_file():
        raise SpecError(f"model: given {source}, which is no file, {_ALLOWED}")
    sys.path.insert(0, str(path.resolve().parent if source.endswith(".py") else Path.cwd()))
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        raise SpecError(f"model: importing {source} raised {_where(error)}") from error
    finally:
        sys.path.pop(0)


def _where(error: Exception) -> str:
    """Returns error and place in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"
