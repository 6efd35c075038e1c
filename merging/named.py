"""Networks by name: torchvision's, timm's, or what somebody's own function returns."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

KINDS = "torchvision:NAME, timm:NAME, FILE.py:FUNCTION or package.module:FUNCTION"
_loaded: dict[Path, ModuleType] = {}


def maker(name: str) -> Callable[..., nn.Module]:
    """The function that a name of KINDS stands for. Raises ValueError where there is none."""
    place, _, function = name.rpartition(":")
    if not (place and function):
        raise ValueError(f"{name!r}: give {KINDS}")
    try:
        if place == "timm":
            return partial(_of_timm(), function)
        module = (_from_file(Path(place)) if place.endswith(".py") else
                  importlib.import_module("torchvision.models" if place == "torchvision" else place))
    except Exception as error:  # whatever somebody's module raises
        raise ValueError(f"{name}: {place} can't be imported: {' '.join(str(error).split())}") from error
    if not callable(found := getattr(module, function, None)):
        raise ValueError(f"{name}: {module.__name__} has no function {function!r}")
    return found


def build(name: str, **arguments: Any) -> nn.Module:
    """The model that `maker(name)` makes from these arguments. Raises ValueError where that fails, or is no model."""
    make = maker(name)
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    try:
        model = make(**arguments)
    except Exception as error:
        how = f"with {given}" if arguments else "without arguments"
        raise ValueError(f"{name}: calling it {how} fails: {' '.join(str(error).split())}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: it returns a {type(model).__name__}, not an nn.Module")
    return model


def _of_timm() -> Callable[..., nn.Module]:
    try:
        return importlib.import_module("timm").create_model
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ValueError("it is not installed: pip install timm") from None


def _from_file(file: Path) -> ModuleType:
    """The module in a file, run once; what lies beside it can be imported by it."""
    file = file.resolve()
    if file not in _loaded:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(file.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.parent))
        _loaded[file] = module
    return _loaded[file]
