"""Every public name rejects its likeliest misuses with a message that says how to correct them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sized
from functools import partial
from math import inf, nan
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
    diagnose,
    metrics,
    plots,
    to_arviz,
)
from implicitvi.diagnostics.sbc import sbc
from implicitvi.errors import ImplicitVIError
from implicitvi.metrics import c2st, knn_kl, mean_error, mmd, sd_ratio, sliced_wasserstein, whiten
from implicitvi.metrics.ais import ais
from implicitvi.vae import VAE
from implicitvi.vae.decoders import likelihood_of

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
        "a dict of draws": (lambda: function({"mu": DRAWS}, DRAWS), r"matrix \[N, D\], got a dict of 'mu'. Pass guide"),
        "words": (lambda: function("a", DRAWS), r"must be a matrix \[N, D\] of real numbers, got str"),
        "nothing": (lambda: function(DRAWS, None), r"must be a matrix \[N, D\], got shape \(\)"),
        "complex numbers": (lambda: function(DRAWS * 1j, DRAWS), r"matrix \[N, D\] of real numbers, got Tensor"),
    }


def wrong(call: Callable[..., Any], **options: tuple[Any, ...]) -> dict[str, tuple[Call, str]]:
    """Return the misuses of a call's options: each option by itself with each of its wrong values."""
    plain = (int, float, tuple, list, type(None))
    return {
        f"{option}={value if isinstance(value, str) else repr(value) if isinstance(value, plain) else f'{i}. value'}": (
            partial(call, **{option: value}),
            rf"{option}\b.* must be .*[.,]",
        )
        for option, values in options.items()
        for i, value in enumerate(values)
    }


def export(**options: Any) -> Any:
    return to_arviz(guide().setup(Y), options.pop("model", models.normal_normal), Y, **{"num_samples": 3} | options)


def judge(**options: Any) -> Any:
    return diagnose({"mu": DRAWS[:, 0]}, options.pop("model", models.normal_normal), Y, **options)


def calibrate(**options: Any) -> Any:
    given: dict[str, Any] = {
        "make_guide": lambda model, data: {"mu": DRAWS[:9, 0]},
        "num_datasets": 10,
        "num_draws": 9,
    } | options
    return sbc(given.pop("model", models.normal_normal), given.pop("make_guide"), Y, **given)


def anneal(**options: Any) -> Any:
    given: dict[str, Any] = {
        "log_joint": lambda z: -z.square().sum(-1),
        "loc": torch.zeros(2, 1),
        "scale": torch.ones(2, 1),
    } | options
    return ais(given.pop("log_joint"), given.pop("loc"), given.pop("scale"), **given)


def drawn(**options: Any) -> Any:
    return plots.draws_on_density(DRAWS, **{"log_density": lambda z: -z.square().sum(-1)} | options)


WHOLE = (0, -1, 1.5, nan, True, None, "a", [1])
SEED = (-1, 1.5, None, "a", 2**64)
HUGE = 10**30
NO_SIZES: tuple[Any, ...] = (0, -1, 1.5, nan, True, None, "a", [], [0], (3, "a"), HUGE)

CASES: dict[str, dict[str, tuple[Call, str]]] = {
    "AVB_ELBO": {
        "unknown contrast": (lambda: AVB_ELBO(contrast="flwo"), "Did you mean 'flow'"),
        "no particles": (lambda: AVB_ELBO(num_particles=0), "num_particles"),
        "a rate below zero": (lambda: AVB_ELBO(adversary_lr=-1.0), "adversary_lr must be"),
        "unknown tempering": (lambda: AVB_ELBO(tempering="auto"), "a share of the log joint above 0, or None"),
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
    }
    | wrong(
        export,
        num_samples=WHOLE,
        model=(None, 3, "a"),
        prior=(None, 1, "a"),
        coords=([1], 3, {"data": 3}, {"data": "abc"}, {3: [1]}),
        dims=([1], 3, {"obs": "data"}, {"obs": 3}, {"obs": [3]}),
        attrs=(3, [1], {3: 1}),
    ),
    "diagnose": wrong(judge, num_samples=(*WHOLE, 199), seed=SEED, model=(None, 3)),
    "sbc": wrong(
        calibrate,
        num_datasets=(*WHOLE, 9),
        num_draws=(*WHOLE, 8),
        seed=SEED,
        model=(None, 3),
        make_guide=(None, 3, lambda model, data: None),
        log_likelihood=(None, 1),
        quantities=(3, lambda latents, data: None),
    ),
    "c2st": of_draws(c2st) | wrong(partial(c2st, DRAWS, DRAWS + 1), folds=(*WHOLE, 1), seed=SEED),
    "knn_kl": of_draws(knn_kl) | wrong(partial(knn_kl, DRAWS, DRAWS + 1), k=WHOLE),
    "mean_error": of_draws(mean_error),
    "mmd": of_draws(mmd) | wrong(partial(mmd, DRAWS, DRAWS + 1), bandwidth=(0, -1.0, nan, inf, True, "a")),
    "sd_ratio": of_draws(sd_ratio),
    "sliced_wasserstein": of_draws(sliced_wasserstein)
    | wrong(partial(sliced_wasserstein, DRAWS, DRAWS + 1), num_projections=WHOLE, seed=SEED),
    "whiten": of_draws(whiten),
    "ais": wrong(
        anneal,
        num_steps=WHOLE,
        num_chains=WHOLE,
        num_leapfrog=(*WHOLE, 2.5),
        step_size=(0, -1.0, nan, inf, "a", None),
        schedule=("lin", 3, None),
        acceptance=(0, 1, nan, "a"),
        adapt=(None, 1, "a"),
        log_joint=(None, 3),
        loc=(None, 0.0, torch.zeros(2), torch.zeros(2, 1, dtype=torch.long)),
        scale=(None, torch.zeros(2, 1), -torch.ones(2, 1)),
    ),
    "plots.loss": wrong(partial(plots.loss), fit=(None, 3, "a")),
    "plots.draws_on_density": wrong(
        drawn,
        log_density=(None, 3),
        extent=(3, (0, 1), (1, 0, 0, 1), "abcd", (0, inf, 0, 1)),
        masses=(3, (), (0.5, 2), "a"),
        grid=(1, 2.5, None),
        num_draws=WHOLE,
        color=(3, "reed"),
        legend=(None, 1),
        ax=(3,),
    ),
    "plots.images": wrong(
        partial(plots.images, torch.ones(4, 2, 2)), columns=(0, 1.5, "a"), rows=(None, "abc"), ax=(3,)
    ),
    "plots.diagnosis": wrong(plots.diagnosis, checks=((), 3, [3], None)),
    "Settings of wrong kinds": wrong(
        Settings,
        num_steps=tuple(value for value in WHOLE if value is not None),
        max_steps=WHOLE,
        num_particles=(1, 1.5, None, "a", (4, "a")),
        adversary_steps=(0, 1.5, None, "a"),
        lr=(0, -1.0, nan, inf, None, "a"),
        adversary_lr=(0, -1.0, nan, inf, None, "a"),
        tempering=(0, 2, nan, "a", [0.1]),
        contrast=("flwo", None, 3),
        adversary=(None, 3, "a"),
        informed=(None, 1, "a"),
        ratio=("logstic", None, 3),
        averaging=(-0.1, 1, nan, None, "a"),
        num_importance=WHOLE,
        mode=("vmpa", None, 3),
        compile=("grahp", 3, True),
        warm_start=(-1, 1.5, None, "a"),
        max_modes=WHOLE,
        clip_norm=(0, -1.0, nan, inf, "a"),
        max_skips=WHOLE,
        seed=(-1, 1.5, "a", True, 2**64),
        restarts=(*WHOLE, HUGE),
    ),
    "ImplicitGuide of wrong kinds": wrong(
        lambda model=models.normal_normal, **options: ImplicitGuide(model, **options),
        model=(None, 3, "a"),
        sampler=("dens", None, 3),
        init_loc_fn=(None, "median"),
        amortize=(3, {}, {"data": 3}),
        name=(3, Y),
    ),
    "AVBSVI of wrong kinds": wrong(
        lambda **options: AVBSVI(models.normal_normal, guide(), **options),
        callbacks=(3, torch.tensor(1.0), [3], [EarlyStop]),
        progress=("no", None, 1),
    ),
    "VAE.dense": wrong(
        lambda x_dim=4, z_dim=2, **options: VAE.dense(x_dim, z_dim, **options),
        z_dim=(*WHOLE, HUGE),
        hidden=(3, (), (0,), (HUGE,)),
        likelihood=(3, [], Y, "bernuolli"),
        posterior=(3, ""),
        prior=(True, "a", Y),
    )
    | {f"x_dim={value!r}": (partial(VAE.dense, x_dim=value, z_dim=2), r"x_shape must be .*\.") for value in NO_SIZES}
    | {"a prior of many dimensions": (lambda: VAE.dense(4, 2, prior=HUGE), "latent_dim must be an int >= 1 and <= ")},
    "likelihood_of": wrong(partial(likelihood_of, "bernoulli"), x_shape=(None, 3, "a", (3, "a"), (0,), (HUGE,))),
    "guide.quantiles": wrong(
        lambda quantiles=(0.5,), **options: guide().setup(Y).quantiles(quantiles, **options),
        quantiles=(None, 2, (0.5, 2), "a", ("a",), nan, Y * 1j, Y.abs().to_sparse()),
        num_samples=WHOLE,
    ),
    "log_prob": wrong(
        lambda points: fit().guide.get_posterior().log_prob(points),
        points=("a", [], {}, object(), HUGE, Y[:, None] * 1j, Y[:, None].to_sparse()),
    ),
    "fit.best": wrong(lambda criterion: fit().best(criterion), criterion=(3, "elbo", lambda fit: None)),
    "Checkpoint of wrong kinds": wrong(
        lambda folder="a", **options: Checkpoint(folder, **options),
        folder=(None, 3, b"a", ""),
        every=(0, 1.5, None),
        best=(3, "elbo"),
    ),
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
