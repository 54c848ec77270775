"""The guards in conftest.py catch what they are for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from implicitvi import AVBSVI, Fit, ImplicitGuide
from implicitvi.diagnostics.sbc import sbc
from implicitvi.vae import VAE
from implicitvi.vae.decoders import BernoulliLikelihood, Decoder
from implicitvi.vae.encoders import GaussianEncoder

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


def test_no_gpu_is_started_that_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of four: `torch.random.fork_rng`, left to itself, reads the state of each."""

    def started(*_: object) -> Tensor:
        raise AssertionError("a GPU was started")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_rng_state", started)
    with pytest.raises(AssertionError, match="GPU was started"), torch.random.fork_rng(range(4)):
        pass
    options: dict[str, Any] = {"num_steps": 2, "num_particles": 16, "warm_start": 5, "progress": False}

    def fit(y: Tensor) -> Fit:
        return AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), **options).run(y)

    fit(models.Y)
    x = torch.rand(40, 4)
    vae = VAE(GaussianEncoder(nn.Linear(4, 4)), Decoder(nn.Linear(2, 4), BernoulliLikelihood([4])), 2)
    vae.log_evidence(x, "iwae")
    sbc(models.normal_normal, lambda model, data: fit(data["obs"]), models.Y, num_datasets=10, num_draws=9)
