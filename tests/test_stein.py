"""Kernel Stein discrepancy, Stein identities, chains and fresh adversaries: laws, rates and planted errors."""

from __future__ import annotations

import sys
from math import log, pi
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from implicitvi import ImplicitGuide
from implicitvi.avb.samplers import SemiImplicitSampler
from implicitvi.diagnostics.chains import find_missed_modes, moment_drift
from implicitvi.diagnostics.relearned_density import psis, relearn_density
from implicitvi.diagnostics.stein import _stein_kernel, kernel_stein, stein_identities
from implicitvi.errors import OptionError, ShapeError
from implicitvi.metrics.evidence import semi_implicit_bound
from implicitvi.pyro_model.log_joint import LogJoint
from planted import draw_banana, draw_two_modes, gaussian_of, log_banana, log_two_modes


def standard(z: Tensor) -> Tensor:
    return -(z.square().sum(1) + z.shape[1] * log(2 * pi)) / 2


def draws(seed: int, count: int, dim: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_the_stein_kernel_is_its_definition() -> None:
    """Against automatic differentiation of the inverse multiquadric."""
    a, b, s_a, s_b = torch.randn(4, 3, 2, dtype=torch.float64)
    _, u = _stein_kernel(a, s_a, b, s_b, 1.7)
    for i in range(3):
        for j in range(3):
            x, y = a[i].clone().requires_grad_(), b[j].clone().requires_grad_()
            k = (1.7 + (x - y).square().sum()).rsqrt()
            slope_x, slope_y = torch.autograd.grad(k, (x, y), create_graph=True)
            trace = sum(torch.autograd.grad(slope_x[d], y, retain_graph=True)[0][d] for d in (0, 1))
            expected = s_a[i] @ s_b[j] * k + s_a[i] @ slope_y + s_b[j] @ slope_x + trace
            assert u[i, j].item() == pytest.approx(expected.item(), abs=1e-12)


def test_the_discrepancy_does_not_depend_on_units_or_on_the_evidence() -> None:
    z = draws(0, 300, 3)
    scale = torch.tensor([1e-3, 1.0, 1e4])
    plain, moved_units = kernel_stein(z, -z), kernel_stein(5 + z.double() * scale, -z / scale)
    assert moved_units.discrepancy == pytest.approx(plain.discrepancy, rel=1e-4, abs=1e-9)
    assert moved_units.p_value == plain.p_value


def test_exact_draws_are_rejected_at_the_null_rate() -> None:
    """Of 100 seeds at level 0.1: within the central 99.9 % of a binomial, and not one p-value is constant."""
    values = [
        kernel_stein(z, -z, num_bootstrap=100, seed=seed).p_value for seed in range(100) for z in [draws(seed, 200, 2)]
    ]
    low, high = binom.interval(0.999, 100, 0.1)
    assert low <= sum(p <= 0.1 for p in values) <= high
    assert len(set(values)) > 50


@pytest.mark.parametrize("wrong", [lambda z: z, lambda z: -(z - 0.3), lambda z: -z / 2, lambda z: -z.flip(1) + 0.3])
def test_a_wrong_score_is_significant(wrong) -> None:  # type: ignore[no-untyped-def]
    z = draws(0, 500, 2)
    assert kernel_stein(z, wrong(z)).p_value <= 0.01


def test_the_score_error_is_a_shift_of_the_mean_in_standard_deviations() -> None:
    z = draws(0, 4000, 3)
    error = kernel_stein(z, -(z - torch.tensor([0.5, 0.0, 0.0])), num_bootstrap=1).score_error
    assert error == pytest.approx(0.5, abs=0.05)


def test_identities_say_which_coordinate_is_off_and_how() -> None:
    z = draws(0, 4000, 3)
    z[:, 1] = 2.0 * z[:, 1]
    z[:, 2] += 0.5
    found = stein_identities(z, -z)
    assert abs(found.mean[0]) < 5 * found.mean_error[0] and abs(found.spread[0]) < 5 * found.spread_error[0]
    assert found.spread[1].item() == pytest.approx(3.0, abs=5 * found.spread_error[1].item())
    assert found.mean[2].item() == pytest.approx(0.5, abs=5 * found.mean_error[2].item())


@pytest.mark.parametrize(
    ("z", "score", "error", "words"),
    [
        (torch.zeros(50), torch.zeros(50), ShapeError, "matrices of one shape"),
        (torch.randn(50, 2), torch.zeros(50, 3), ShapeError, "matrices of one shape"),
        (torch.randn(5, 2), torch.zeros(5, 2), ShapeError, "at least 20 draws, got 5"),
        (torch.randn(50, 2), torch.full((50, 2), torch.nan), OptionError, "50 bad rows"),
        (torch.ones(50, 2), torch.zeros(50, 2), OptionError, "constant"),
        (torch.randn(50, 1).expand(-1, 2), torch.zeros(50, 2), OptionError, "lie on a plane"),
    ],
)
def test_draws_that_cannot_be_judged_are_refused(z: Tensor, score: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        kernel_stein(z, score)


def test_chains_leave_exact_draws_where_they_are() -> None:
    """Every figure within five standard errors."""
    change = moment_drift(standard, draws(0, 2000, 4))
    assert (change.mean.abs() < 5 * change.mean_error).all()
    assert (change.sd.log().abs() < 5 * change.sd_error).all()
    assert abs(change.tail - 0.01) < 5 * change.tail_error


def test_chains_carry_wrong_draws_to_the_right_place() -> None:
    change = moment_drift(standard, 0.5 * draws(0, 2000, 2) + 0.5)
    assert change.mean.mean().item() == pytest.approx(-1.0, abs=0.15)  # in units of the draws' sd
    assert change.sd.mean().item() == pytest.approx(2.0, abs=0.2)
    assert change.tail > 0.1


@pytest.mark.parametrize("dim", [2, 20])
def test_a_lost_mode_is_found_and_a_kept_one_is_not_lost(dim: int) -> None:
    def target(z: Tensor) -> Tensor:
        return log_two_modes(z[:, :2]) - z[:, 2:].square().sum(1) / 2

    z = torch.cat([draw_two_modes(2000), torch.randn(2000, dim - 2)], 1)
    assert find_missed_modes(target, z).share == 0
    lost = find_missed_modes(target, z[z[:, 0] > 0])
    assert lost.share > 0.1
    assert (lost.ends[lost.is_far][:, 0] < 0).all()


def test_the_discrepancy_is_blind_to_a_far_mode() -> None:
    """Chains are needed: half of the posterior is missing, and its gradient does not show it."""
    z = draw_two_modes(2000)
    kept = z[z[:, 0] > 0][:800].requires_grad_()
    (score,) = torch.autograd.grad(log_two_modes(kept).sum(), kept)
    assert kernel_stein(kept, score).p_value > 0.01


def test_a_fresh_adversary_learns_the_density_of_the_draws() -> None:
    z = draw_banana(6000)
    found = relearn_density(z, log_banana)
    assert abs(found.log_weights.mean().item()) < 0.05
    assert found.log_weights.std() < 0.5
    assert abs(found.auc_corrected - 0.5) < 0.1


def test_a_fresh_adversary_agrees_with_the_truth_and_with_nothing_else() -> None:
    z = draw_banana(6000)
    found, r = relearn_density(z, log_banana), gaussian_of(z)
    true = found.compare(log_banana, z)
    assert abs(true.auc - 0.5) < 0.05 and abs(true.kl_gap) < 0.1 and abs(true.log_mass) < 0.05
    assert found.compare(lambda z: log_banana(z) - 0.5, z).log_mass < -0.4
    assert found.compare(r.log_prob, z).auc > 0.65
    assert found.compare(lambda z: 2 * r.log_prob(z) - log_banana(z), z).kl_gap > 1


def test_a_fresh_adversary_is_not_flattered_by_the_log_joint_it_is_shown() -> None:
    """Draws with half of the variance: the divergence is found although ``log p`` hints at another density."""
    found = relearn_density(0.5**0.5 * draws(0, 6000, 3), standard)
    kl = 1.5 * (log(2) - 0.5)
    assert found.log_weights.mean().item() == pytest.approx(-kl, abs=0.1)


@pytest.mark.parametrize("shape", [0.2, 0.6, 1.0])
def test_smoothed_weights_keep_their_order_and_k_is_that_of_their_tail(shape: float) -> None:
    """Of Pareto weights whose log is exponential, whatever ArviZ is installed; the least weights have no heavy tail."""
    log_weights = -shape * torch.rand(20_000, generator=torch.Generator().manual_seed(0)).log()
    smoothed, k = psis(log_weights)
    assert k == pytest.approx(shape, abs=0.15)
    assert smoothed.exp().sum().item() == pytest.approx(1.0)
    order = log_weights.argsort()
    assert (smoothed[order].diff() >= -1e-9).all()


def test_the_newer_arviz_is_given_what_it_weighs_by_the_negative_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """`arviz_stats` names its argument a log likelihood, of what is left out."""
    stats = SimpleNamespace(psislw=lambda log_likelihood: (-log_likelihood, 0.3))
    monkeypatch.setitem(sys.modules, "arviz", SimpleNamespace(__version__="1.3.0"))
    monkeypatch.setitem(sys.modules, "arviz_stats", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "arviz_stats.base", SimpleNamespace(array_stats=stats))
    weights = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    smoothed, k = psis(weights.log())
    torch.testing.assert_close(smoothed.exp(), weights)
    assert k == 0.3


def test_relearning_a_density_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    relearn_density(draws(0, 400, 2), standard)
    assert torch.equal(state, torch.get_rng_state())


def conjugate(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


def test_the_certified_bound_is_below_the_exact_evidence_for_every_sampler() -> None:
    """50 seeds of untrained samplers, frames right and wrong; and it is tight for one that is right."""
    y = torch.tensor([0.5, 1.0, -0.2, 2.0])
    cov = torch.eye(4) + 1
    exact = dist.MultivariateNormal(torch.zeros(4), covariance_matrix=cov).log_prob(y).item()
    layout = ImplicitGuide(conjugate).setup(y).layout
    log_joint = LogJoint(conjugate, layout)
    bounds = []
    for seed in range(50):
        torch.manual_seed(seed)
        sampler = SemiImplicitSampler(1, init_scale=0.2 + 0.8 * torch.rand(()).item())
        sampler.set_affine(y.sum()[None] / 5 + 0.3 * torch.randn(1), 0.45 * (0.3 * torch.randn(1, 1)).exp())
        bound, _ = semi_implicit_bound(lambda u: log_joint(u, y), sampler, num_samples=500, num_mixture=100, seed=seed)
        bounds.append(bound)
    assert max(bounds) <= exact
    assert max(bounds) > exact - 0.2


@pytest.mark.parametrize("reference", [None, 8000])
def test_many_dimensions_do_not_hide_a_spread(reference: int | None) -> None:
    """1,000 draws in 200 dimensions, 1.3 times too wide: a covariance of so few would explain it away, to 0.02."""
    z = 1.3 * draws(0, 1000, 200)
    others = None if reference is None else 1.3 * draws(1, reference, 200)
    found = kernel_stein(z, -z, reference=others, num_bootstrap=1)
    assert 0.2 < found.score_error < 0.4


def test_the_sign_of_an_identity_is_that_of_the_error() -> None:
    z = draws(0, 4000, 2) + 0.5
    assert stein_identities(z, -z).mean.min() > 0.4
