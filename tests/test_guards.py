"""The guards in conftest.py catch what they are for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PLANTED = """
import logging, random, warnings
import numpy, pyro, pytest, torch

def test_changes_dtype(): torch.set_default_dtype(torch.float64)
def test_changes_grad_mode(): torch.set_grad_enabled(False)
def test_changes_validation(): pyro.enable_validation(False)
def test_imports_zuko(): import zuko
def test_changes_store(): pyro.param("a", torch.ones(1))
def test_changes_logging(): logging.getLogger().setLevel(logging.DEBUG)
def test_reseeds_numpy(): numpy.random.seed(0)
def test_draws_from_numpy(): numpy.random.rand()
def test_reseeds_python(): random.seed(0)
def test_warns(): warnings.warn("careless")

def test_finds_all_as_it_was(seed):
    assert torch.initial_seed() == seed
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert not pyro.get_param_store().keys()
    with pytest.raises(ValueError):
        torch.distributions.Normal(0.0, -1.0)

@pytest.mark.uses_param_store
def test_may_use_the_store(): pyro.param("a", torch.ones(1))
"""


def test_a_test_that_changes_the_process_or_warns_fails(tmp_path: Path) -> None:
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "test_planted.py").write_text(PLANTED)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:xdist", "test_planted.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    caught = {
        line.split("::")[1].split(" ")[0]
        for line in result.stdout.splitlines()
        if line.startswith(("ERROR test_planted", "FAILED test_planted"))
    }
    assert caught == {
        "test_changes_dtype",
        "test_changes_grad_mode",
        "test_changes_validation",
        "test_imports_zuko",
        "test_changes_store",
        "test_changes_logging",
        "test_reseeds_numpy",
        "test_draws_from_numpy",
        "test_reseeds_python",
        "test_warns",
    }, result.stdout
