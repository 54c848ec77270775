"""A state in a folder: written whole or not at all, read without running anything in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from implicitvi.errors import CheckpointError

FORMAT = 1
STATE, CONFIG = "state.pt", "config.json"


def save_state(folder: Path, state: Any, *, config: dict[str, Any]) -> None:
    """Write nested containers of tensors and numbers, and a description of what they belong to.

    Each file is written under another name, brought to the disk and then renamed, so that a folder that held a
    checkpoint always holds one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, "config": config, "state": state}
    _replace(folder / STATE, lambda file: torch.save(document, file))
    text = json.dumps({"format": FORMAT, **config}, indent=1).encode()
    _replace(folder / CONFIG, lambda file: file.write(text))


def load_state(folder: Path, *, like: dict[str, Any]) -> Any:
    """What `save_state` wrote, on the CPU.

    Raises:
        CheckpointError: The file is damaged, of a newer format, or belongs to something other than ``like``.
    """
    path = folder / STATE
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
        version, config = int(document["format"]), dict(document["config"])
        state = document["state"]
    except Exception as error:  # a file may be damaged in more ways than torch.load has names for
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
    for name, expected in like.items():
        if config.get(name) != expected:
            got, wanted = _difference(config.get(name), expected)
            raise CheckpointError(
                f"the checkpoint belongs to another fit, which differs in its {name}",
                got=got,
                expected=wanted,
                do="Use the same model, data and options, or another folder.",
            )
    return state


def _replace(path: Path, write: Any) -> None:
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _difference(got: Any, expected: Any) -> tuple[Any, Any]:
    """The first entry that differs, where both are dictionaries."""
    if not (isinstance(got, dict) and isinstance(expected, dict)):
        return got, expected
    for name in [*expected, *got]:
        if got.get(name) != expected.get(name):
            return f"{name}: {got.get(name)}", f"{name}: {expected.get(name)}"
    return got, expected
