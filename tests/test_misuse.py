"""Every public name rejects its likeliest misuses with a message that says how to correct them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import pytest
import torch

import implicitvi
import models
import test_diagnose
import test_saved
import test_svi
from implicitvi import (
    AVB_ELBO,
    AVBSVI,
    Checkpoint,
    EarlyStop,
    Fit,
    ImplicitGuide,
    Settings,
    TensorBoard,
    Tracker,
    metrics,
    to_arviz,
)
from implicitvi.errors import ImplicitVIError
from implicitvi.metrics import c2st, knn_kl, mean_error, mmd, sd_ratio, sliced_wasserstein, whiten

Y = torch.tensor([0.5, -0.3, 1.0])
DRAWS = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
NAN = DRAWS.clone().index_fill(0, torch.tensor([3]), torch.nan)
Call = Callable[[], Any]


def guide() -> ImplicitGuide:
    return ImplicitGuide(models.normal_normal)


def fit() -> Fit:
    """Return the smallest possible fit."""
    return AVBSVI(models.normal_normal, guide(), num_steps=1, num_particles=4, warm_start=0, progress=False).run(Y)


def of_draws(function: Callable[..., Any]) -> dict[str, tuple[Call, str]]:
    """Return the misuses of a function of two sets of draws."""
    return {
        "of another dimension": (lambda: function(DRAWS, DRAWS[:, :1] + 1), "dimension|columns"),
        "not finite": (lambda: function(NAN, DRAWS), "not finite|finite"),
        "one axis": (lambda: function(DRAWS[:, 0], DRAWS[:, 1]), r"\[N, D\]|\[\.*, D\]|rows"),
    }


CASES: dict[str, dict[str, tuple[Call, str]]] = {
    "AVB_ELBO": {
        "unknown contrast": (lambda: AVB_ELBO(contrast="flwo"), "Did you mean 'flow'"),
        "no particles": (lambda: AVB_ELBO(num_particles=0), "num_particles"),
        "a rate below zero": (lambda: AVB_ELBO(adversary_lr=-1.0), "adversary_lr must be"),
        "unknown tempering": (lambda: AVB_ELBO(tempering="auto"), "a share of the log joint, or None"),
    },
    "ImplicitGuide": {
        "unknown sampler": (lambda: ImplicitGuide(models.normal_normal, sampler="dens"), "Did you mean 'dense'"),
        "drawn from too early": (lambda: guide().sample(3), "guide.setup"),
        "asked for its posterior too early": (lambda: guide().get_posterior(), "guide.setup"),
        "no draws": (lambda: guide().setup(Y).sample(0), "num_samples must be"),
        "half a draw": (lambda: guide().setup(Y).sample(2.5), "num_samples must be an int >= "),  # type: ignore[arg-type]
        "amortized over a number": (
            lambda: ImplicitGuide(models.normal_normal, amortize=3),  # type: ignore[arg-type]
            "the name of a plate, {plate: features} or features, got 3",
        ),
    },
    "Settings": {
        "no steps": (lambda: Settings(num_steps=0), "num_steps must be an int >= 1, got 0"),
        "unknown mode": (lambda: Settings(mode="vmpa"), "Did you mean 'vmap'"),
        "all of the average": (lambda: Settings(averaging=1.0), "averaging must be at least 0 and below 1, got 1.0"),
        "not settings": (
            lambda: AVBSVI(models.normal_normal, guide(), settings={"num_steps": 5}),  # type: ignore[arg-type]
            "settings must be a Settings",
        ),
    },
    "Fit": {
        "no draws": (lambda: fit().summary(0), "num_samples must be"),
        "made by hand": (
            lambda: Fit(**{k: v for k, v in vars(fit()).items() if k != "write"}).save("a"),
            r"AVBSVI\(...\).run",
        ),
        "saved to no path": (lambda: fit().save(3), "folder must be a str or Path, got 3"),  # type: ignore[arg-type]
    },
    "Tracker": {
        "no function": (lambda: Tracker(3), "function must be a function of the trainer, got 3"),  # type: ignore[arg-type]
        "never": (lambda: Tracker(print, every=0), "every must be .*, got 0"),
        "half a step": (lambda: Tracker(print, every=1.5), "every must be an int >= "),  # type: ignore[arg-type]
    },
    "EarlyStop": {
        "by the loss": (
            lambda: EarlyStop("elbo"),  # type: ignore[arg-type]
            "diagnostic must be a function of the trainer, not a metric of training, got 'elbo'.*not a bound",
        ),
        "no function": (lambda: EarlyStop(3), "diagnostic must be a function of the trainer, got 3"),  # type: ignore[arg-type]
        "one look": (lambda: EarlyStop(len, window=1), "window must be .*, got 1"),
        "negative": (lambda: EarlyStop(len, num_se=-1), "num_se must be .*, got -1"),
        "before the start": (lambda: EarlyStop(len, start=-5), "start must be .*, got -5"),
    },
    "Checkpoint": {
        "no path": (lambda: Checkpoint(None), "folder must be a str or Path, got None"),  # type: ignore[arg-type]
        "never kept": (lambda: Checkpoint("a", every=0), "every must be"),
        "best by a word": (lambda: Checkpoint("a", best="elbo"), "best must be a function of the trainer, got 'elbo'"),  # type: ignore[arg-type]
    },
    "TensorBoard": {
        "not installed": (lambda: TensorBoard("a"), "pip install"),
        "never": (lambda: TensorBoard("a", every=0), "every must be"),
        "no path": (lambda: TensorBoard(None), "folder must be a str or Path"),  # type: ignore[arg-type]
    },
    "to_arviz": {
        "no fit": (lambda: to_arviz(3, models.normal_normal, Y), "to_arviz\\(fit, model"),  # type: ignore[arg-type]
        "no draws": (lambda: to_arviz(guide().setup(Y), models.normal_normal, Y, num_samples=0), "num_samples must be"),
        "minibatches": (
            lambda: to_arviz(
                ImplicitGuide(models.global_latents_in_minibatches).setup(Y), models.global_latents_in_minibatches, Y
            ),
            "must use all of its data, got 2 of 3 in plate 'data'. Pass arguments",
        ),
        "no arguments": (lambda: to_arviz(guide(), models.normal_normal), "guide.setup"),
    },
    "c2st": of_draws(c2st),
    "knn_kl": of_draws(knn_kl) | {"k": (lambda: knn_kl(DRAWS, DRAWS + 1, k=0), "k must be")},
    "mean_error": of_draws(mean_error),
    "mmd": of_draws(mmd) | {"width": (lambda: mmd(DRAWS, DRAWS, bandwidth=0), "bandwidth")},
    "sd_ratio": of_draws(sd_ratio),
    "sliced_wasserstein": of_draws(sliced_wasserstein),
    "whiten": of_draws(whiten),
}
# names whose misuses are listed in other files, and the one name that users do not call
ELSEWHERE: dict[str, Sized] = {"AVBSVI": [*test_svi.MISUSES, *test_saved.REFUSED], "diagnose": test_diagnose.MISUSES}
NO_CALL = {"StopTraining"}  # an exception of a user's own callback; any message will do


@pytest.mark.parametrize("name", [*implicitvi.__all__, *metrics.__all__])
def test_every_public_name_has_three_misuses(name: str) -> None:
    if name not in NO_CALL:
        assert len(ELSEWHERE.get(name, CASES.get(name, {}))) >= 3, f"add misuses of {name}"


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_misuses_are_named(name: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if case == "not installed":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    call, message = CASES[name][case]
    with pytest.raises(ImplicitVIError, match=message):
        call()
    assert not list(tmp_path.iterdir())
