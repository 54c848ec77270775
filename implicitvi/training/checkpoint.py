"""Keep a state in a folder: written whole or not at all, read without running code from the file.

``state.safetensors`` holds everything, because a file system replaces only one file at a time: tensors by name, and the
rest (nesting, numbers, description of the fit) as JSON in its header. ``config.json`` shows the description to people.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicitvi.errors import CheckpointError, ImplicitVIError, OptionError, reason_of

FORMAT = 3
STATE, CONFIG = "state.safetensors", "config.json"
TENSOR, DICT, TUPLE = "tensor", "dict", "tuple"  # the kinds of JSON objects in the header
ABANDONED = 3600.0  # seconds after which a temporary file is one that a killed process has left


def save_state(folder: Path, state: Any, *, config: dict[str, Any]) -> None:
    """Write nested containers of tensors and numbers, and a description of the fit that they belong to, atomically.

    Raises:
        CheckpointError: The folder cannot be written; a state that is there already is left as it is.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    document = json.dumps(_flatten({"config": config, "state": state}, tensors))
    header = {"format": str(FORMAT), "document": document, "digest": _digest(tensors, document, FORMAT)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / STATE, save(tensors, metadata=header))
        _replace(folder / CONFIG, json.dumps({"format": FORMAT, **config}, indent=1).encode())
    except (OSError, ValueError) as error:
        do = "Nothing that was learned is lost: make room and call run again, or save the fit in another folder."
        raise CheckpointError.must_be(f"The folder {folder}", "writable", error, do) from error


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
            tensors, text = load(content), header["document"]
            if header["digest"] != _digest(tensors, text, version):
                raise ValueError("its content is not what was saved")
            document = _unflatten(json.loads(text), tensors)
            config, state = dict(document["config"]), document["state"]
    except Exception as error:  # a file may be damaged in more ways than there are names for
        reason = reason_of(error)
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


def as_folder(folder: object, *, writable: bool = False) -> Path:
    """Return the path of an option ``folder``, absolute, so that it stays the same where the working folder changes.

    Args:
        folder: The option.
        writable: Whether to make the folder and to write a file there, which is removed again.

    Raises:
        OptionError: It cannot be a folder, or not one that can be written.
    """
    if not isinstance(folder, str | os.PathLike):
        raise OptionError.must_be("folder", "a str or Path", repr(folder))
    if folder == "":
        raise OptionError.must_be("folder", "a path", repr(folder), "Write '.' for the working folder.")
    try:
        path = Path(folder).absolute()
        obstacle = next(filter(None, map(_obstacle, (path, *path.parents))), None)
        if obstacle is None and writable:
            path.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            _temporary(path / STATE, b"a trial").unlink()
    except (OSError, ValueError, TypeError) as error:
        do = "Give another path, or the right to write there."
        raise OptionError.must_be(f"folder {os.fspath(folder)!r}", "a folder that can be written", error, do) from error
    if obstacle is not None:
        raise OptionError.must_be("folder", "a folder", obstacle, "Give another path, or move it away.")
    return path


def _obstacle(path: Path) -> str | None:
    """Return a description of a path that stands in the way of a folder."""
    if path.is_file():
        return f"the file {path}"
    return f"the link {path} to a place that does not exist" if path.is_symlink() and not path.exists() else None


@contextmanager
def well_formed(what: str) -> Iterator[None]:
    """Raise `CheckpointError` in place of the errors of reading a state whose entries are not those of ``what``."""
    try:
        yield
    except ImplicitVIError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
        reason = f"no {reason}" if isinstance(error, LookupError) else reason
        do = "Upgrade implicitvi if the state is of a later version, or use one of the same model and options."
        raise CheckpointError.must_be("The state", what, reason, do) from error


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


def _digest(tensors: Mapping[str, Tensor], document: str, version: int) -> str:
    """Return a hash of tensors, their names and, from format 3 on, the document: safetensors detects no flipped bit."""
    digest = hashlib.sha256(document.encode() if version >= 3 else b"")
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Replace a file's content atomically."""
    new = _temporary(path, content)
    try:
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the renaming is on the disk only once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _temporary(path: Path, content: bytes) -> Path:
    """Write a new file beside ``path``, of a name that no other writer uses; remove it if it cannot be written."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        with open(new, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return new


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote."""
    for path in folder.glob(f".{STATE}.*.new"):
        try:
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
        except FileNotFoundError:  # its writer, or another process, was quicker
            continue


def _difference(got: Any, expected: Any) -> tuple[Any, Any]:
    """Return the first entry that differs, or the values themselves unless both are dictionaries."""
    if isinstance(got, dict) and isinstance(expected, dict):
        for name in [*expected, *got]:
            if got.get(name) != expected.get(name):
                return f"{name}: {got.get(name)}", f"{name}: {expected.get(name)}"
    return got, expected
