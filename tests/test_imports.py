"""Imports go one way, cost little and change nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shape import FLOORS, PACKAGE, Package, upward


def test_imports_go_one_way() -> None:
    assert upward(Package(PACKAGE)) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("errors", "from implicitvi.avb.ratios import Logistic", "errors imports avb.ratios,"),
        ("avb/ratios", "import implicitvi.inference.svi", "avb.ratios imports inference.svi,"),
        ("avb/ratios", "from implicitvi import pyro_model", "avb.ratios imports pyro_model,"),  # of the same floor
        ("avb/ratios", "from implicitvi import ImplicitGuide", "avb.ratios imports __init__,"),
        ("training/player", "from ..inference.svi import AVBSVI", "training.player imports inference.svi,"),
        ("training/player", "from ..inference import svi", "training.player imports inference.svi,"),
        ("training/player", "def f():\n    from .. import inference", "training.player imports inference,"),
        ("metrics/two_sample", "from .. import avb", "metrics.two_sample imports avb,"),
        ("inference/svi", "from implicitvi.vae import model", "inference.svi imports vae.model,"),
        ("gadgets", "", "gadgets has no floor: add it"),
    ],
)
def test_a_wrong_import_is_caught(skeleton: Path, module: str, line: str, complaint: str) -> None:
    """The check fails where it should: on a skeleton of the package with one line planted."""
    (skeleton / f"{module}.py").write_text(line)
    (only,) = upward(Package(skeleton))
    assert only.startswith(complaint)


def test_imports_from_below_and_from_the_same_room_are_allowed(skeleton: Path) -> None:
    lines = ["from ..errors import ShapeError", "from . import schedule", "from implicitvi.rng import RandomStream"]
    (skeleton / "training/player.py").write_text("\n".join([*lines, "import torch, os.path"]))
    (skeleton / "training/__init__.py").write_text("from .player import Player")
    (skeleton / "__init__.py").write_text("from implicitvi.inference.svi import AVBSVI")
    assert upward(Package(skeleton)) == []


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """A package with every room, and the modules that the planted lines name; all files are empty."""
    package = tmp_path / "implicitvi"
    rooms = [name for floor in FLOORS for name in floor]
    named = ["avb/ratios", "inference/svi", "training/player", "training/schedule", "metrics/two_sample", "vae/model"]
    folders = {name.partition("/")[0] for name in named}
    for name in [*(f"{room}/__init__" if room in folders else room for room in rooms), *named]:
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert upward(Package(package)) == []
    return package


IMPORT_AND_LOOK = """
import json, logging, random, sys
import numpy, pyro, torch
from torch.distributions import Distribution

def state():
    root = logging.getLogger()
    return {
        "argument checks": Distribution._validate_args,
        "arguments checked": str(Distribution.__dict__["arg_constraints"]),
        "Pyro's settings": str(pyro.settings.get()),
        "Pyro's parameters": sorted(pyro.get_param_store().keys()),
        "default dtype": str(torch.get_default_dtype()),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "initial seed": torch.initial_seed(),
        "torch's generator": torch.get_rng_state().tolist(),
        "numpy's generator": str(numpy.random.get_state()),
        "Python's generator": str(random.getstate()),
        "root logger": [root.level, len(root.handlers)],
    }

before = state()
import implicitvi
print(json.dumps([before, state(), sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def fresh_import() -> tuple[dict[str, object], dict[str, object], set[str]]:
    """State before and after ``import implicitvi`` in a new process with warnings as errors, and its modules."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_AND_LOOK],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    before, after, loaded = json.loads(result.stdout)
    return before, after, set(loaded)


def test_importing_the_package_changes_no_global_state(
    fresh_import: tuple[dict[str, object], dict[str, object], set[str]],
) -> None:
    before, after, _ = fresh_import
    assert [name for name in before if before[name] != after[name]] == []


@pytest.mark.parametrize("library", ["arviz", "matplotlib", "sklearn", "zuko"])
def test_libraries_that_one_function_needs_are_imported_there(
    library: str, fresh_import: tuple[dict[str, object], dict[str, object], set[str]]
) -> None:
    assert library not in fresh_import[2]
