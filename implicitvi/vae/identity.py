"""Recognise data, functions and models, so that a checkpoint is not resumed with others."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str, type(None))


def digest_of(*tensors: Tensor) -> str:
    """Return a short text that identifies tensors of any shape by their values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def name_of(function: Any) -> str:
    """Return a text that identifies a function by its name, its code and its constants, not by what it calls."""
    if function is None:
        return "none"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name}, {hashlib.sha256(repr(_parts(function)).encode()).hexdigest()[:16]}"


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Return the kinds of all modules of a model by name, and the plain values of those that are implicitvi's own."""
    settings: dict[str, Any] = {}
    for name, module in model.named_modules():
        settings[name] = type(module).__name__
        if type(module).__module__.startswith("implicitvi."):
            values = {key: value for key, value in vars(module).items() if key[0] != "_" and isinstance(value, PLAIN)}
            settings |= {f"{name}.{key}".lstrip("."): value for key, value in values.items() if key != "training"}
    return settings


def _parts(value: Any, depth: int = 5) -> Any:
    """Return nested lists of texts, the same in every process, of all that makes up a function."""
    inside: tuple[Any, ...] = ()
    if isinstance(value, Tensor):
        return digest_of(value)
    if isinstance(value, (*PLAIN, bytes)):
        return repr(value)
    if isinstance(value, tuple):
        inside = value
    elif isinstance(value, CodeType):
        inside = (value.co_code, value.co_names, value.co_consts)
    elif isinstance(value, FunctionType):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        inside = (value.__code__, value.__defaults__, tuple((value.__kwdefaults__ or {}).items()), cells)
    elif isinstance(value, partial):
        inside = (value.func, value.args, tuple(value.keywords.items()))
    elif isinstance(value, MethodType):
        inside = (value.__func__, value.__self__)
    elif callable(value):
        return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))
    return [type(value).__name__, *(_parts(part, depth - 1) for part in inside)] if depth else type(value).__name__
