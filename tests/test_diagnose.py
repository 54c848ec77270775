"""`diagnose`: planted failures are flagged, exact draws are not, misuse is refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import models
from implicitvi import AVBSVI, ImplicitGuide, diagnose
from implicitvi.diagnostics.report import Check, Report
from implicitvi.errors import FitWarning, ModelError, OptionError, SetupError, ShapeError
from implicitvi.rng import RandomStream
from planted import PLANTED, TARGETS, bare, draw_several, dressed, exact, planted, several_sites, short_fit

# the check that must flag each; others may too
SEEN_BY = {
    "one mode missing": "other modes",
    "variance halved": "spread",
    "mean shifted by 0.3 sd": "Stein discrepancy",
    "collapsed sampler": "spread",
    "under-trained adversary": "learned density",
    "adversary switched off half-way": "learned density",
    "heavy tails cut": "tails",
    "wrong Jacobian": "sites",
    "swapped sites": "sites",
    "NaN-skipping run": "run",
    "stale contrast": "learned density",
    "wrong sign of T": "learned density",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_failure_is_flagged(name: str) -> None:
    """Rates over seeds are in docs/results/diagnose.md."""
    source, model = planted(name, seed=0)
    report = diagnose(source, model)
    assert not report.ok
    assert report[SEEN_BY[name]].state == "failed"
    assert report[SEEN_BY[name]].advice
    if "learned density" in [check.name for check in report.failed]:
        assert report["Pareto k"].state == "left out"


def test_a_sampler_that_draws_a_single_point_gets_a_report_and_no_error() -> None:
    target = TARGETS["several sites"]
    point = dressed(target, lambda count: torch.ones(count, 5), target.log_prob)
    report = diagnose(point, several_sites)
    assert report["Stein discrepancy"].state == "failed"
    assert "constant" in str(report)


@pytest.mark.parametrize("name", TARGETS)
def test_exact_draws_pass(name: str) -> None:
    """Dressed as a fit, with the true density as the learned one, so that all checks are made."""
    with RandomStream(1):
        report = diagnose(exact(name), TARGETS[name].model)
    assert report.ok, str(report)
    assert report["learned density"].state == "ok"


def test_a_fit_diagnoses_itself_with_the_arguments_of_its_run() -> None:
    guide = ImplicitGuide(models.normal_normal, sampler="semi_implicit")
    svi = AVBSVI(models.normal_normal, guide, num_steps=200, progress=False, seed=0)
    y = torch.tensor([0.5, 1.0, -0.2, 2.0])
    report = svi.run(y).diagnose()
    assert report.ok, str(report)
    assert report["run"].state == "ok"
    assert report["predictive"].state == "noted"
    evidence = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1).log_prob(y).item()
    bound = report["evidence"].value
    assert "certified" in report["evidence"].found
    assert bound is not None and evidence - 1 < bound < evidence + 0.05


def test_the_report_is_a_function_of_draws_and_seed_and_leaves_the_random_state_alone() -> None:
    draws = bare(TARGETS["several sites"], draw_several(400))
    state = torch.get_rng_state()
    first, second = diagnose(draws, several_sites), diagnose(draws, several_sites)
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert diagnose(draws, several_sites, seed=1) != first


def test_bare_draws_may_be_arrays_and_say_what_is_left_out() -> None:
    draws = {k: v.numpy() for k, v in bare(TARGETS["several sites"], draw_several(1000)).items()}
    report = diagnose(draws, several_sites)
    assert report.ok
    left = [check.name for check in report if check.state == "left out"]
    learned = ["learned density", "fresh adversary", "divergence", "Pareto k", "evidence"]
    assert left[:6] == ["restarts", *learned]
    assert all(check.advice for check in report if check.state == "left out")


def test_a_predictive_figure_judges_the_model_and_not_the_fit() -> None:
    """Data that the model cannot have made: the draws are exact, the report is ok and says so."""
    y = 5 * torch.arange(-2.0, 3.0)
    mean, sd = y.sum() / 6, 6**-0.5
    report = diagnose({"mu": mean + sd * torch.randn(1000)}, models.normal_normal, y)
    assert report.ok
    assert report["predictive"].state == "noted"
    assert "matter of the model" in report["predictive"].advice


def test_a_model_that_is_scored_in_a_loop_gets_the_checks_that_are_cheap() -> None:
    y = torch.ones(3)
    with pytest.warns(UserWarning, match="one particle at a time"):
        report = diagnose({"mu": torch.randn(200)}, models.branches_on_a_latent, y, num_samples=200)
    assert report["mean"].state == "left out"
    assert report["Stein discrepancy"].state == "failed"


def half(value: Tensor) -> Tensor:
    return value[: len(value) // 2]


MISUSES: list[tuple[Any, type[Exception], str]] = [
    (lambda d: {k: v for k, v in d.items() if k != "a"}, ShapeError, "missing 'a'"),
    (lambda d: d | {"c": d["a"]}, ShapeError, "unknown 'c'"),
    (lambda d: d | {"z": d["z"].T}, ShapeError, r"site 'z' must be of shape \[S, 2\]"),
    (lambda d: d | {"a": half(d["a"])}, ShapeError, "number of draws must be the same for all sites"),
    (lambda d: {k: v[:50] for k, v in d.items()}, ShapeError, "at least 200 draws, got 50"),
    (lambda d: d | {"s": -d["s"]}, ModelError, "site 's' must be in its support, .* got 400 of 400 outside"),
    (lambda d: d | {"a": d["a"] * np.inf}, ModelError, "must be in its support, .* outside"),
    (lambda d: torch.zeros(3), SetupError, "must be a fit, an ImplicitGuide, or draws .* got Tensor"),
    (lambda d: ImplicitGuide(several_sites), SetupError, "has not been trained"),
    (lambda d: exact("banana"), ModelError, "does not have the guide's latent sites"),
]


@pytest.mark.parametrize(("change", "error", "words"), MISUSES)
def test_misuse_is_refused(change: Any, error: type[Exception], words: str) -> None:
    draws = bare(TARGETS["several sites"], draw_several(400))
    with pytest.raises(error, match=words):
        diagnose(change(draws), several_sites)


def test_other_misuse_is_refused() -> None:
    y = torch.ones(4)
    with pytest.raises(OptionError, match="num_samples must be"):
        diagnose({"mu": torch.randn(400)}, models.normal_normal, y, num_samples=10)
    with pytest.raises(ModelError, match="the data of 'data' must be whole.* got 2 of 4"):
        diagnose({"mu": torch.randn(400)}, models.global_latents_in_minibatches, y)

    def local(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)

    guide = ImplicitGuide(local, amortize={"data": lambda y: y[:, None]}).setup(y)
    with pytest.raises(SetupError, match="amortized.*guide.sample"):
        diagnose(guide, local, y)
    report = diagnose({"z": guide.sample(400, y)["z"]}, local, y)
    assert not report.ok  # it has not been trained


def test_an_interrupted_run_without_a_bad_step_is_not_a_failure() -> None:
    fit = short_fit(several_sites, num_steps=2, warm_start=0)
    assert fit.diagnose(num_samples=200)["run"].state == "ok"


def test_a_report_prints_and_goes_through_json() -> None:
    report = Report(
        (
            Check.of("one", float("nan"), 1.0, "nan", failed=False, advice="Do this."),
            Check.left_out("two", "No sampler."),
            Check.left_out("three", "No sampler."),
        )
    )
    assert not report.ok  # a figure that is not a number fails
    assert "two, three: No sampler." in str(report)
    assert [check["name"] for check in json.loads(json.dumps(report.to_dict()))["checks"]] == ["one", "two", "three"]
    with pytest.raises(KeyError, match="no check 'four', only one, two, three"):
        report["four"]


def test_a_single_observation_is_predicted() -> None:
    def single(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    exact_draws = 0.5 + 0.5**0.5 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    report = diagnose({"mu": exact_draws}, single, torch.tensor(1.0))
    assert report.ok
    assert 0.2 < report["predictive"].value < 0.5


def wide(dim: int) -> Any:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.full((dim,), 100.0), 1e-3).to_event(1))

    return model


def test_a_guide_of_many_dimensions_is_not_passed_unseen() -> None:
    """The diagnosis takes more draws than requested if these are too few."""
    guide = ImplicitGuide(wide(150)).setup()
    report = diagnose(guide, wide(150), num_samples=200)
    assert not report.ok and report["sites"].state == "failed"


def test_chains_behind_each_other_are_all_looked_at() -> None:
    """The first half exact, the second too narrow by far."""
    draws = draw_several(4000)
    draws[2000:] = draws.mean(0) + 0.4 * (draws[2000:] - draws.mean(0))
    report = diagnose(bare(TARGETS["several sites"], draws), several_sites, num_samples=4000)
    assert report["Stein discrepancy"].state == "failed"


def test_chains_that_cannot_move_are_no_praise() -> None:
    def needle() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1e-7).to_event(1))

    z = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    report = diagnose({"z": z}, needle)
    assert report["spread"].state == "failed" and "cannot move" in report["spread"].advice
    assert report["mean"].state == report["tails"].state == "left out"


def test_what_rests_on_a_density_that_cannot_be_trusted_is_withheld() -> None:
    source, model = planted("wrong sign of T", seed=0)
    report = diagnose(source, model)
    held = [report[name] for name in ("divergence", "Pareto k", "evidence")]
    assert [check.state for check in held] == ["left out"] * 3
    assert "none can be trusted" in held[-1].advice


def test_arguments_of_the_model_may_be_called_as_options_are() -> None:
    """The model is looked at with the arguments of the run, and not with those of the diagnosis."""

    def steps(y: Tensor, num_samples: int = 1, seed: int = 0) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mu * num_samples + seed, 1.0), obs=y)

    options: dict[str, Any] = {"num_steps": 150, "progress": False, "seed": 0}
    svi = AVBSVI(steps, ImplicitGuide(steps), **options)
    fit = svi.run(torch.full((20,), 110.0), num_samples=5, seed=100)
    assert abs(fit.guide.sample(500)["mu"].mean().item() - 2) < 0.1
    assert fit.diagnose()["mean"].state == "ok"
    assert abs(fit.polish(num_samples=500).draws["mu"].mean().item() - 2) < 0.1


def test_double_precision_by_default_is_no_obstacle() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        options: dict[str, Any] = {"num_steps": 100, "num_particles": 64, "progress": False}
        svi = AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), seed=0, **options)
        report = svi.run(torch.tensor([0.5, 1.0])).diagnose()
    finally:
        torch.set_default_dtype(torch.float32)
    assert report["fresh adversary"].state == "ok"


def squares(y: Tensor) -> None:
    """The posterior of each latent has two mirrored modes where its datum is above about 0.8."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.5))
        pyro.sample("obs", dist.Normal(z**2, 0.3), obs=y)


def square_of_dataset(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.5))
    pyro.sample("obs", dist.Normal(mu**2, 0.3).expand([2]).to_event(1), obs=y)


def shifts(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("obs", dist.Poisson(z.exp()), obs=y)


def lines(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("obs", dist.Normal(z, 0.5), obs=y)


def amortized(model: Any, amortize: Any, y: Tensor, seed: int = 0, num_steps: int = 20) -> Any:
    guide = ImplicitGuide(model, amortize=amortize)
    options: dict[str, Any] = {"num_steps": num_steps, "warm_start": 100, "num_particles": 64, "progress": False}
    return AVBSVI(model, guide, **options, seed=seed).run(y)


@pytest.mark.parametrize("case", ["plate", "datasets"])
def test_an_amortized_fit_that_loses_modes_says_so(case: str) -> None:
    """Of 40 data well above 0.8, all have two modes, of which the Gaussian start keeps one."""
    y = torch.linspace(1.5, 4.0, 40)
    model, amortize, y = (
        (squares, "data", y) if case == "plate" else (square_of_dataset, lambda y: y, y.expand(2, -1).T)
    )
    with pytest.warns(
        FitWarning, match=r"must have all modes of its posterior, got \d+ of 40 data that lose one. .*sign"
    ):
        fit = amortized(model, amortize, y)
    assert fit.lost_modes is not None and fit.lost_modes[0] > 20
    report = fit.diagnose()
    assert report["modes of data"].state == "failed" and "of 40 data lose a mode" in str(report)
    assert report["draws of one posterior"].state == "left out"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model", [shifts, lines])
def test_amortized_fits_of_one_mode_raise_no_alarm(model: Any, seed: int) -> None:
    """Warnings are errors here."""
    y = torch.poisson(torch.linspace(0.0, 5.0, 20), generator=torch.Generator().manual_seed(seed))
    fit = amortized(model, "data", y, seed)
    assert fit.lost_modes == (0, 20)
    assert fit.diagnose()["modes of data"].state == "ok"


def test_looking_for_lost_modes_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    amortized(lines, "data", torch.ones(5), num_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_kinds_of_draws_and_arguments() -> None:
    y = torch.ones(3)
    assert diagnose({"mu": torch.arange(300)}, models.normal_normal, y)["spread"].state == "failed"  # whole numbers
    draws = {"mu": torch.randn(300)}
    for options in ({"seed": None}, {"seed": 1.5}, {"num_samples": 200.5}):
        with pytest.raises(OptionError, match="must be an int >= "):
            diagnose(draws, models.normal_normal, y, **options)
    for value in (None, "a", torch.ones(0), torch.tensor(1.0), torch.ones(300, dtype=torch.complex64)):
        with pytest.raises(ShapeError, match="draws of site 'mu' must be"):
            diagnose({"mu": value}, models.normal_normal, y)
    with pytest.raises(OptionError, match="model must be a Pyro model"):
        diagnose(draws, None, y)  # type: ignore[arg-type]
