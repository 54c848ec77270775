"""Refinement: resampled and moved draws have the posterior's moments; fits beyond repair are refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.diagnostics.chains import transitions
from implicitvi.diagnostics.refine import polish, resample
from implicitvi.diagnostics.stein import kernel_stein
from implicitvi.errors import ModelError, OptionError, SetupError
from implicitvi.rng import RandomStream
from planted import TARGETS, Drawn, draw_several, draw_two_modes, dressed, exact, log_several
from refinement import change, judged
from suite.targets import TARGETS as SUITE

SDS = torch.tensor([0.5, 2.0, 0.8, 1.0, 1.0])
Y = torch.tensor([0.5, -0.3, 1.0])


def normal(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


def shifted() -> ImplicitGuide:
    """Half a standard deviation off in the first coordinate."""
    off = torch.tensor([0.25, 0.0, 0.0, 0.0, 0.0])
    several = TARGETS["several sites"]
    return dressed(several, lambda count: draw_several(count) + off, log_several)


def score_error(u: Tensor) -> float:
    """Root of the kernel Stein discrepancy of draws of the several sites, unconstrained."""
    v = u.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_several(v).sum(), v)
    return kernel_stein(u, score, num_bootstrap=1).score_error


def off(draws: dict[str, Tensor]) -> float:
    """Return the error of the mean of ``a``, in standard deviations."""
    return (draws["a"].mean().item() - 1) / 0.5


def test_resampling_takes_a_shift_back() -> None:
    """Effective share ``exp(-δ²) = 0.78`` for a shift of ``δ = 0.5`` sd; standard error of the mean about 0.02 sd."""
    with RandomStream(0):
        found = resample(shifted(), TARGETS["several sites"].model, num_samples=3000)
    assert abs(off(found.draws)) < 0.08
    assert abs(found.draws["b"].std() / 2 - 1) < 0.05
    assert {name: value.shape for name, value in found.draws.items()}["z"] == (3000, 2)
    assert found.num_pool == 12_000
    assert abs(found.num_effective / found.num_pool - 0.78) < 0.08
    assert found.k_hat < 0.5
    assert "3000 draws of 12000" in str(found)


def test_the_weights_are_those_of_the_posterior_over_the_draws() -> None:
    """The planted bug: weights of the wrong sign would double the shift."""
    with RandomStream(0):
        untouched = off(shifted().sample(4000))
        assert abs(untouched - 0.5) < 0.1
        assert abs(off(resample(shifted(), TARGETS["several sites"].model).draws)) < 0.2 * untouched


def test_exact_draws_weigh_the_same() -> None:
    with RandomStream(0):
        found = resample(exact("several sites"), TARGETS["several sites"].model, num_samples=2000)
    assert found.num_effective > 0.95 * found.num_pool


def test_modes_get_their_shares_back() -> None:
    """Three quarters of the draws in a mode of one half."""
    target = TARGETS["two modes"]

    def uneven(count: int) -> Tensor:
        z = draw_two_modes(count)
        side = torch.where(torch.rand(count) < 0.75, 1.0, -1.0)
        return torch.cat([z[:, :1].abs() * side[:, None], z[:, 1:]], 1)

    with RandomStream(0):
        found = resample(dressed(target, uneven, target.log_prob), target.model, num_samples=3000)
    assert abs((found.draws["z"][:, 0] > 0).double().mean().item() - 0.5) < 0.05


def test_polishing_brings_draws_nearer_and_leaves_exact_ones() -> None:
    model = TARGETS["several sites"].model
    with RandomStream(0):
        polished = polish(shifted(), model, num_samples=2000)
        kept = polish(exact("several sites"), model, num_samples=2000)
    assert abs(off(polished.draws)) < 0.1 and abs(off(kept.draws)) < 0.1
    assert abs(kept.draws["z"].std(0) - 1).max() < 0.08
    assert 0.5 < polished.acceptance <= 1
    assert polished.num_steps == 15 and "after 15 transitions" in str(polished)


def test_polishing_lowers_the_stein_discrepancy() -> None:
    target = TARGETS["several sites"]
    with RandomStream(0):
        u = shifted().sampler(1000)
        moved, _ = transitions(target.log_prob, u, num_steps=10)
    before, after = score_error(u), score_error(moved)
    assert before > 0.3 and after < before / 3


def test_resampling_lowers_the_stein_discrepancy() -> None:
    guide = shifted()
    with RandomStream(0):
        before = score_error(guide.sample_unconstrained(1000))
        found = resample(guide, TARGETS["several sites"].model, num_samples=1000)
    after = score_error(guide.layout.pack(found.draws))
    assert before > 0.3 and after < before / 3


def test_weights_that_a_few_draws_have_are_refused() -> None:
    target = TARGETS["heavy tails"]
    narrow = dressed(target, lambda count: 0.4 * torch.randn(count, 3), target.log_prob)
    with RandomStream(0), pytest.raises(ModelError, match="few draws have most of the weight"):
        resample(narrow, target.model, num_samples=2000)


def test_a_fit_refines_itself_and_its_draws_depend_on_the_seed_alone() -> None:
    guide = ImplicitGuide(normal)
    fit = AVBSVI(normal, guide, num_steps=100, num_particles=128, seed=0, progress=False).run(Y)
    state = torch.get_rng_state()
    for method in (fit.resample, fit.polish):
        first, second, other = (method(num_samples=500, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.draws["mu"], second.draws["mu"])
        assert not torch.equal(first.draws["mu"], other.draws["mu"])
        assert abs(first.draws["mu"].mean().item() - 0.3) < 0.1
    for function in (resample, polish):
        of_fit, of_guide = (function(each, normal, Y, num_samples=500) for each in (fit, guide))
        assert torch.equal(of_fit.draws["mu"], of_guide.draws["mu"])
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_refined_is_refused() -> None:
    model = TARGETS["several sites"].model
    with pytest.raises(SetupError, match="not been trained"):
        resample(ImplicitGuide(model), model)
    with pytest.raises(SetupError, match="must be a fit or an ImplicitGuide, got dict"):
        polish({"z": Y}, model)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="num_samples"):
        polish(exact("several sites"), model, num_samples=0)
    with pytest.raises(OptionError, match="num_steps"):
        polish(exact("several sites"), model, num_steps=0)
    with pytest.raises(ModelError, match="latent sites"):
        polish(exact("several sites"), TARGETS["two modes"].model)
    spiky = dressed(
        TARGETS["funnel"],
        lambda count: TARGETS["funnel"].draw(count).sign() * torch.rand(count, 5).pow(8),
        TARGETS["funnel"].log_prob,
    )
    with warnings.catch_warnings(), pytest.raises(ModelError, match=r"Use fit\.polish"):
        warnings.simplefilter("ignore")
        resample(spiky, TARGETS["funnel"].model, num_samples=500)
    assert isinstance(spiky.sampler, Drawn)


def test_fewer_draws_than_dimensions_may_be_polished() -> None:
    """The chains take their coordinates from more draws of the guide."""
    moved = polish(exact("several sites"), TARGETS["several sites"].model, num_samples=2)
    assert moved.draws["z"].shape == (2, 2) and moved.acceptance > 0.5


# the benchmark


def test_a_change_is_one_beyond_two_standard_errors() -> None:
    before = {"discrepancy": 0.10, "error": 0.01}
    after = {
        "lowered": 0.05,
        "within noise": 0.08,  # two standard errors of the difference are 0.028
        "raised": 0.15,
    }
    for verdict, value in after.items():
        assert change(before, {"discrepancy": value, "error": 0.01}) == verdict
    assert change(before, {"refused": "ModelError"}) == "refused"


def test_draws_that_are_off_have_a_discrepancy_and_exact_ones_have_none() -> None:
    """Exact draws give the coordinates: those of draws too narrow by half would hide it in part."""
    target = replace(SUITE["mixture_4_modes_2d"](), num_draws=1000, num_reference=4000)
    exact_ones = judged(target, target.reference[:1000])
    assert abs(exact_ones["discrepancy"]) < 4 * exact_ones["error"]
    off = judged(target, target.reference[:1000] * 0.5)
    assert off["discrepancy"] > 4 * off["error"] and off["sd_high"] < 0.6
    assert change(off, exact_ones) == "lowered" and change(exact_ones, off) == "raised"
