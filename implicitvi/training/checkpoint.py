"""Keep a state in a folder: written whole or not at all, read without running code from the file.

``state.safetensors`` holds everything, because a file system replaces only one file at a time: tensors by name, and the
rest (nesting, numbers, description of the fit) as JSON in its header. ``config.json`` shows the description to people.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicitvi.errors import CheckpointError, OptionError

FORMAT = 2
STATE, CONFIG = "state.safetensors", "config.json"
TENSOR, DICT, TUPLE = "tensor", "dict", "tuple"  # the kinds of JSON objects in the header


def save_state(folder: Path, state: Any, *, config: dict[str, Any]) -> None:
    """Write nested containers of tensors and numbers, and a description of the fit that they belong to, atomically."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    document = _flatten({"config": config, "state": state}, tensors)
    header = {"format": str(FORMAT), "document": json.dumps(document), "digest": _digest(tensors)}
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / STATE, save(tensors, metadata=header))
    _replace(folder / CONFIG, json.dumps({"format": FORMAT, **config}, indent=1).encode())


def load_state(folder: Path, *, like: Mapping[str, Any]) -> Any:
    """Read a state that `save_state` wrote, on the CPU; raise `CheckpointError` if its description is not ``like``."""
    config, state = read_state(folder)
    check_same(config, like)
    return state


def read_state(folder: Path) -> tuple[dict[str, Any], Any]:
    """Read the description and the state that `save_state` wrote, on the CPU; older formats are migrated.

    Raises:
        CheckpointError: The file is missing, damaged, or of a newer format.
    """
    from safetensors.torch import load

    path = folder / STATE
    if not path.exists():
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        found = ", ".join(there) or ("an empty folder" if folder.is_dir() else "no such folder")
        do = "Give the folder that was saved to, with its files under their original names."
        raise CheckpointError(f"{folder} must hold the checkpoint {STATE}, got {found}. {do}")
    try:
        content = path.read_bytes()  # at once: a running fit may rename a newer file into its place
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])["__metadata__"]
        version = int(header["format"])
        if version <= FORMAT:
            tensors = load(content)
            if header["digest"] != _digest(tensors):
                raise ValueError("its tensors are not those that were saved")
            document = _unflatten(json.loads(header["document"]), tensors)
            config, state = dict(document["config"]), document["state"]
    except Exception as error:  # a file may be damaged in more ways than there are names for
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        do = "Use an older copy, or start again in an empty folder."
        raise CheckpointError(f"The checkpoint {path} cannot be read: {reason}. {do}") from error
    if version > FORMAT:
        got = f"{version}, of a newer version"
        raise CheckpointError.must_be("The checkpoint's format", f"at most {FORMAT}", got, "Upgrade implicitvi.")
    return (migrate(config), migrate(state)) if version == 1 else (config, state)


def migrate(value: Any) -> Any:
    """Rename the entries of a checkpoint of format 1 (version 0.1.0): of its state, or of its description.

    >>> migrate({"followers.0.loc": 1, "module.placed": 2})
    {'averaged_modules.0.loc': 1, 'module.initialised': 2}
    """
    if isinstance(value, dict):
        return {_new_name(key): migrate(item) for key, item in value.items()}
    return type(value)(map(migrate, value)) if isinstance(value, list | tuple) else value


def _new_name(name: Any) -> Any:
    if not isinstance(name, str):  # the optimisers' states are numbered
        return name
    name = re.sub(r"^((?:.*: )?)followers\.", r"\1averaged_modules.", name)
    return re.sub(r"(^|[. ])placed$", r"\1initialised", name)


def holds_checkpoint(folder: Path) -> bool:
    """Return whether ``folder`` holds a state; raise `CheckpointError` for a description without its state."""
    if (folder / CONFIG).exists() and not (folder / STATE).exists():
        read_state(folder)
    return (folder / STATE).exists()


def as_folder(folder: object) -> Path:
    """Return the path of an option ``folder``; raise `OptionError` unless it can be a folder."""
    if not isinstance(folder, str | os.PathLike):
        raise OptionError.must_be("folder", "a str or Path", repr(folder))
    path = Path(folder)
    file = next((each for each in (path, *path.parents) if each.is_file()), None)
    if file is not None:
        raise OptionError.must_be("folder", "a folder", f"the file {file}", "Give another path, or move the file away.")
    return path


def check_same(config: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless a description has every entry of ``like``."""
    for name, expected in like.items():
        if config.get(name) != expected:
            got, wanted = _difference(config.get(name), expected)
            wrong = f"The checkpoint belongs to another fit: its {name}"
            do = "Use the same model, data and options, or another folder."
            raise CheckpointError.must_be(wrong, wanted, str(got), do)


def _flatten(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return a JSON document of nested containers, each tensor moved to ``tensors`` and replaced by its name there."""
    if isinstance(value, Tensor):
        name = path.removeprefix("/state/") or "tensor"
        while name in tensors:
            name += "'"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        return {DICT: [[k, _flatten(v, tensors, f"{path}/{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_flatten(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {TUPLE: items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold the {type(value).__name__} at {path}")


def _unflatten(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert `_flatten`."""
    if isinstance(document, list):
        return [_unflatten(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    ((kind, content),) = document.items()
    if kind == TENSOR:
        return tensors[content]
    if kind == TUPLE:
        return tuple(_unflatten(item, tensors) for item in content)
    return {key: _unflatten(value, tensors) for key, value in content}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors and their names: safetensors itself does not detect a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Replace a file's content atomically."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    if os.name == "posix":  # the renaming is on the disk only once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _difference(got: Any, expected: Any) -> tuple[Any, Any]:
    """Return the first entry that differs, or the values themselves unless both are dictionaries."""
    if isinstance(got, dict) and isinstance(expected, dict):
        for name in [*expected, *got]:
            if got.get(name) != expected.get(name):
                return f"{name}: {got.get(name)}", f"{name}: {expected.get(name)}"
    return got, expected
