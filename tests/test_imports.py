"""Imports go one way, cost little and change nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "implicitvi"

# From low to high. A module imports from lower layers and from its own room (a package, such as
# training) only; docs/architecture.md shows the same order.
LAYERS = (
    {"errors"},
    {"networks", "processes", "html"},
    {"samplers", "contrasts", "adversaries", "ratios", "datasets", "evaluation"},
    {"objectives", "framed"},
    {"training"},
    {"vae"},
    {"layout", "parameters", "warm_start", "scoring", "minibatch"},
    {"enumeration", "compiled", "modes"},
    {"local", "latents"},
    {"log_joint", "amortized"},
    {"model_prior", "guide", "sources"},
    {"restarts", "model_density"},
    {"diagnosis", "refine"},
    {"problem", "fit"},
    {"amortized_problem"},
    {"options"},
    {"engine", "saved"},
    {"svi"},
    {"export", "plots"},
)
# These stand beside the rest, so that they can judge it: they import errors and each other.
ERRORS_ONLY = {
    "datasets",
    "evaluation.ais",
    "evaluation.audit",
    "evaluation.divergences",
    "evaluation.evidence",
    "evaluation.frechet",
    "evaluation.latent",
    "evaluation.moves",
    "evaluation.report",
    "evaluation.sbc",
    "evaluation.stein",
}

LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def modules(package: Path) -> dict[str, Path]:
    """Every module below the package's own ``__init__``, by dotted name without the package's."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts != ("__init__",):
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """Modules that a module imports from its package, wherever in the file; ``""`` is the package itself."""
    inside = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "implicitvi":
                    yield alias.name.removeprefix("implicitvi").removeprefix(".")
        elif isinstance(node, ast.ImportFrom):
            source = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*inside[: len(inside) - node.level + 1], *source]
            elif source[0] == "implicitvi":
                base = source[1:]
            else:
                continue
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in known else ".".join(base)


def violations(package: Path) -> list[str]:
    """What is wrong with the imports of a package, one sentence each."""
    found = modules(package)
    wrong = []
    for name, path in found.items():
        room = name.split(".")[0]
        if room not in LEVEL:
            wrong.append(
                f"{room} has no layer: add it to LAYERS in tests/test_imports.py, as low as its imports "
                "allow, and to docs/architecture.md"
            )
            continue
        for target in sorted(set(imports(name, path, set(found)))):
            other = target.split(".")[0]
            if name in ERRORS_ONLY or room in ERRORS_ONLY:
                allowed = other == "errors" or target in ERRORS_ONLY or room == other in ERRORS_ONLY
            else:
                allowed = other == room or LEVEL.get(other, len(LAYERS)) < LEVEL[room]
            if not allowed:
                wrong.append(f"{name} imports {target or 'the package itself'}, which is not below it")
    return wrong


def test_imports_go_one_way() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("errors", "from implicitvi.avb.ratios import Logistic", "errors imports ratios,"),
        ("ratios", "import implicitvi.avb.objective", "ratios imports objectives,"),
        ("ratios", "from implicitvi import samplers", "ratios imports samplers,"),
        ("ratios", "from implicitvi import ImplicitGuide", "ratios imports the package itself,"),
        ("training/player", "from ..svi import AVBSVI", "training.player imports svi,"),
        ("training/player", "from .. import svi", "training.player imports svi,"),
        ("training/player", "def f():\n    from ..svi import AVBSVI", "training.player imports svi,"),
        ("evaluation/divergences", "from .. import ratios", "evaluation.divergences imports ratios,"),
        ("gadgets", "", "gadgets has no layer: add it"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path: Path, module: str, line: str, complaint: str) -> None:
    """The check fails where it should: on a skeleton of the package with one line planted."""
    skeleton(tmp_path)
    assert violations(tmp_path) == []
    (tmp_path / f"{module}.py").write_text(line)
    (only,) = violations(tmp_path)
    assert only.startswith(complaint)


def test_imports_from_below_and_from_the_same_room_are_allowed(tmp_path: Path) -> None:
    skeleton(tmp_path)
    lines = ["from ..errors import ShapeError", "from . import rng", "from implicitvi.avb.objective import AVB"]
    (tmp_path / "training/player.py").write_text("\n".join([*lines, "import torch, os.path"]))
    (tmp_path / "training/__init__.py").write_text("from .player import Player")
    assert violations(tmp_path) == []


def skeleton(package: Path) -> None:
    """Empty modules with the names that the planted lines use."""
    for folder in ("training", "evaluation"):
        (package / folder).mkdir()
    for name in ("errors", "ratios", "samplers", "objectives", "svi", "training/rng", "evaluation/__init__"):
        (package / f"{name}.py").touch()


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
