"""A state in a folder: written whole or not at all, read without running anything in it.

``state.safetensors`` holds everything: tensors by name, and the rest (nesting, numbers, what it belongs to) as JSON in
the file's header. ``config.json`` repeats for people what it belongs to. One file, because one renaming is all that a
file system does at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from implicitvi.errors import CheckpointError, OptionError

FORMAT = 1
STATE, CONFIG = "state.safetensors", "config.json"
TENSOR, DICT, TUPLE = "tensor", "dict", "tuple"  # what a JSON object stands for


def save_state(folder: Path, state: Any, *, config: dict[str, Any]) -> None:
    """Write nested containers of tensors and numbers, and a description of what they belong to.

    Each file is written under another name, brought to the disk and then renamed, so that a folder that held a
    checkpoint always holds one.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    document = _flatten({"config": config, "state": state}, tensors)
    header = {"format": str(FORMAT), "document": json.dumps(document), "digest": _digest(tensors)}
    folder.mkdir(parents=True, exist_ok=True)
    content = save(tensors, metadata=header)
    _replace(folder / STATE, lambda file: file.write(content))
    text = json.dumps({"format": FORMAT, **config}, indent=1).encode()
    _replace(folder / CONFIG, lambda file: file.write(text))


def load_state(folder: Path, *, like: Mapping[str, Any]) -> Any:
    """What `save_state` wrote, on the CPU.

    Raises:
        CheckpointError: The file is damaged, of a newer format, or belongs to something other than ``like``.
    """
    config, state = read_state(folder)
    check_same(config, like)
    return state


def read_state(folder: Path) -> tuple[dict[str, Any], Any]:
    """What `save_state` wrote, on the CPU: the description, and the state.

    Raises:
        CheckpointError: There is none, it is damaged, or of a newer format.
    """
    from safetensors.torch import load

    path = folder / STATE
    if not path.exists():
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise CheckpointError(
            f"{folder} holds no checkpoint",
            got=", ".join(there) or ("an empty folder" if folder.is_dir() else "no such folder"),
            expected=STATE,
            do="Give the folder that was saved to, its files under the names that they were saved with.",
        )
    try:
        content = path.read_bytes()  # at once: whoever trains may rename a newer one into its place
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
        raise CheckpointError(
            "the checkpoint cannot be read",
            got=f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            do="Take an older copy, or start again in an empty folder.",
        ) from error
    if version > FORMAT:
        raise CheckpointError(
            "the checkpoint was written by a newer version",
            got=f"format {version}",
            expected=f"up to {FORMAT}",
            do="Upgrade implicitvi.",
        )
    return config, state


def holds_checkpoint(folder: Path) -> bool:
    """Whether there is something to take up; a folder that has lost its state is refused.

    Raises:
        CheckpointError: There is a description without the state that it describes.
    """
    if (folder / CONFIG).exists() and not (folder / STATE).exists():
        read_state(folder)
    return (folder / STATE).exists()


def as_folder(folder: object) -> Path:
    """The path of an option ``folder``; raise `OptionError` where it is none."""
    if not isinstance(folder, str | os.PathLike):
        raise OptionError("folder is not a path", got=repr(folder), expected="a str or Path")
    path = Path(folder)
    file = next((each for each in (path, *path.parents) if each.is_file()), None)
    if file is not None:
        raise OptionError(
            "folder is a file, or stands in one", got=str(file), do="Give another path, or move the file away."
        )
    return path


def check_same(config: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless a description has every entry of ``like``."""
    for name, expected in like.items():
        if config.get(name) != expected:
            got, wanted = _difference(config.get(name), expected)
            raise CheckpointError(
                f"the checkpoint belongs to another fit, which differs in its {name}",
                got=got,
                expected=wanted,
                do="Use the same model, data and options, or another folder.",
            )


def _flatten(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A JSON document of nested containers, each tensor replaced by its name among ``tensors``."""
    if isinstance(value, Tensor):
        name = path.removeprefix("/state/") or "tensor"
        while name in tensors:
            name += "'"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        pairs = ((k, _flatten(v, tensors, f"{path}/{k}")) for k, v in value.items())
        return {DICT: [list(pair) for pair in pairs]}
    if isinstance(value, list | tuple):
        items = [_flatten(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {TUPLE: items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold the {type(value).__name__} at {path}")


def _unflatten(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_flatten`."""
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
    """A fingerprint of tensors and their names; the format itself would not notice a flipped bit."""
    seen = hashlib.sha256()
    for name in sorted(tensors):
        seen.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        seen.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    if os.name == "posix":  # the renaming itself is on the disk once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _difference(got: Any, expected: Any) -> tuple[Any, Any]:
    """The first entry that differs, where both are dictionaries."""
    if not (isinstance(got, dict) and isinstance(expected, dict)):
        return got, expected
    for name in [*expected, *got]:
        if got.get(name) != expected.get(name):
            return f"{name}: {got.get(name)}", f"{name}: {expected.get(name)}"
    return got, expected
