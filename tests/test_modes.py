"""Far modes: they are found, weighed and kept, and a posterior without them is fitted as if nobody had looked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from contracts import ExplicitSampler, gaussian
from implicitvi import AVB_ELBO, AVBSVI, ImplicitGuide
from implicitvi.avb.contrasts import GaussianContrast, MixtureContrast
from implicitvi.avb.multimodal import MixtureSampler, PerModeContrast
from implicitvi.avb.samplers import DenseSampler, Sampler
from implicitvi.inference.modes import (
    BARRIER,
    TAIL,
    _log_densities,
    barriers,
    bent_barriers,
    evenly,
    find_modes,
    wide_starts,
)
from implicitvi.numerics.gaussian import Mixture
from implicitvi.rng import RandomStream
from models import SIGMA, Y, eight_schools

LogDensity = Callable[[Tensor], Tensor]


def two_modes(dim: int, distance: float = 12.0, weight: float = 0.3) -> LogDensity:
    """Log density of two Gaussians of scale 1, the first of this weight, so far apart."""
    step = torch.ones(dim) * distance / dim**0.5

    def log_prob(z: Tensor) -> Tensor:
        near = torch.tensor(weight).log() - 0.5 * z.square().sum(-1)
        far = torch.tensor(1 - weight).log() - 0.5 * (z - step).square().sum(-1)
        return torch.logaddexp(near, far)

    return log_prob


def found(log_prob: LogDensity, dim: int, seed: int = 0) -> list[float]:
    """Weights of the modes that are found from a Gaussian at the origin."""
    loc, scale = torch.zeros(dim), torch.eye(dim)
    with RandomStream(seed):
        starts = wide_starts(loc, scale, 32)
        return [mode.weight for mode in find_modes(log_prob, loc, scale, starts)]


@pytest.mark.parametrize("dim", [2, 10])
def test_two_far_modes_are_found_and_weighed(dim: int) -> None:
    weights = found(two_modes(dim), dim)
    assert len(weights) == 2
    assert abs(weights[0] - 0.3) < 0.05  # standard error about 0.015


def test_proposals_are_scored_as_what_they_are() -> None:
    loc, scale = torch.tensor([0.5, -1.0]).double(), torch.tensor([[1.0, 0.0], [0.7, 0.3]]).double()
    z = torch.randn(20, 2).double()
    normal, tail = _log_densities(z, loc, scale)
    exact = MultivariateNormal(loc, scale_tril=scale)
    heavy = dist.MultivariateStudentT(torch.tensor(TAIL).double(), loc, scale)
    assert torch.allclose(normal, exact.log_prob(z), rtol=0, atol=1e-12)
    assert torch.allclose(tail, heavy.log_prob(z), rtol=0, atol=1e-12)


def test_near_modes_are_not_split() -> None:
    """At 4 standard deviations the density between is a seventh of that at the modes."""
    assert found(two_modes(2, distance=4.0), 2) == [1.0]


def test_a_mode_without_mass_is_left_out() -> None:
    assert found(two_modes(2, weight=0.999), 2) == [1.0]


def banana(z: Tensor) -> Tensor:
    return -0.5 * (z[..., 0].square() / 9 + (z[..., 1] - z[..., 0].square()).square() * 4)


def funnel(z: Tensor) -> Tensor:
    v = z[..., 0]
    return -0.5 * (v.square() / 9 + z[..., 1:].square().sum(-1) * (-v).exp() + 4 * v)


@pytest.mark.parametrize(("log_prob", "dim"), [(banana, 2), (funnel, 5)])
def test_a_curved_posterior_has_one_mode(log_prob: LogDensity, dim: int) -> None:
    assert [found(log_prob, dim, seed) for seed in range(3)] == [[1.0]] * 3


def test_a_path_bends_around_what_is_in_its_way() -> None:
    """Between the arms of a banana the straight way crosses a barrier that the bent one avoids; others stay."""
    a, b = torch.tensor([-3.0, 9.0]), torch.tensor([[3.0, 9.0]])
    assert barriers(banana, a, b).item() > 100
    assert bent_barriers(banana, a, b).item() < BARRIER
    far = two_modes(2, weight=0.5)
    step = torch.full((1, 2), 12 / 2**0.5)
    expected = 12**2 / 8 - torch.tensor(2.0).log().item()  # half-way both Gaussians count
    for kind in (barriers, bent_barriers):
        assert abs(kind(far, torch.zeros(2), step).item() - expected) < 0.01


def test_points_of_a_path_are_spread_evenly() -> None:
    path = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 3.0]]])
    torch.testing.assert_close(evenly(path)[0, 1], torch.tensor([1.0, 1.0]))


def test_a_fit_with_one_mode_is_the_fit_without_a_search() -> None:
    """Bit for bit: the search draws nothing from the fit's stream and moves nothing."""
    fits = []
    for max_modes in (1, 8):
        guide = ImplicitGuide(eight_schools)
        svi = AVBSVI(eight_schools, guide, num_steps=5, seed=3, max_modes=max_modes, progress=False)
        fits.append((svi.run(SIGMA, Y).losses, guide.sampler.state_dict()))
    (losses, state), (others, other) = fits
    assert (losses == others).all()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


def mixture_sampler(rate: float = 0.02) -> MixtureSampler:
    samplers: list[Sampler] = [ExplicitSampler(gaussian(1)), ExplicitSampler(gaussian(2))]
    samplers[1].loc.add_(20.0)
    return MixtureSampler(samplers, torch.tensor([0.25, 0.75]).double(), rate=rate).double()


def test_every_sampler_makes_its_share_of_a_batch() -> None:
    torch.manual_seed(0)
    sampler = mixture_sampler()
    for count in (4, 64, 640):
        z = sampler(count)
        second = (z.mean(-1) > 10).sum().item()
        assert abs(second - 0.75 * count) <= 1
        assert len(z.unique(dim=0)) == count
    single = torch.stack([sampler(1)[0] for _ in range(1000)])
    share = (single.mean(-1) > 10).double().mean().item()
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / 1000) ** 0.5


@pytest.mark.parametrize("truth", [0.1, 0.6])
def test_weights_go_where_the_bound_is_highest(truth: float) -> None:
    """With the exact objective of two Gaussians they reach the posterior's; with the other sign they leave it."""
    torch.manual_seed(0)
    first, second = gaussian(1), gaussian(2)
    second = MultivariateNormal(second.loc + 20.0, scale_tril=second.scale_tril)
    shares = torch.tensor([truth, 1 - truth]).double()

    def density(z: Tensor, weights: Tensor) -> Tensor:
        each = torch.stack([first.log_prob(z), second.log_prob(z)], -1)
        return (each + weights.log()).logsumexp(-1)

    def fitted(rate: float) -> float:
        sampler = mixture_sampler(rate)
        for _ in range(400):
            z = sampler(64).detach()
            sampler.observe(density(z, shares) - density(z, sampler.weights))
        return sampler.weights[0].item()

    assert abs(fitted(0.02) - truth) < 1e-3
    assert abs(fitted(-0.02) - truth) > 0.09


def modal() -> tuple[PerModeContrast, Tensor]:
    """A contrast of two modes a hundred standard deviations apart, and draws of both."""
    torch.manual_seed(0)
    locs = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    z = torch.cat([torch.randn(300, 2), locs[1] + 2 * torch.randn(700, 2)])
    parts = [GaussianContrast(), MixtureContrast(2, components=2)]
    scales = torch.stack([torch.eye(2), 2 * torch.eye(2)])
    return PerModeContrast(parts, torch.tensor([0.3, 0.7]), locs, scales), z


def test_each_mode_has_coordinates_of_its_own() -> None:
    contrast, z = modal()
    standard = contrast.standardise(z, contrast(z))
    assert standard.shape == (1000, 2 + contrast.extra_dim)
    for k, part in enumerate(standard.split([300, 700])):
        assert (part[:, -2:].argmax(-1) == k).all() and (part[:, -2:].sum(-1) == 1).all()
        assert part[:, :2].mean(0).abs().max() < 0.1
        assert (part[:, :2].std(0) - 1).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_a_mode_that_is_hardly_there_need_not_be_drawn(kind: str) -> None:
    z = torch.randn(100, 2)
    contrast = GaussianContrast() if kind == "gaussian" else MixtureContrast(2, components=2)
    r = contrast(z)
    draws = Mixture(torch.tensor([1 - 1e-7, 1e-7]), [r, r]).sample(torch.Size([50]))
    assert draws.shape == (50, 2) and draws.isfinite().all()


def test_the_contrast_of_far_modes_is_a_density_that_follows_the_draws() -> None:
    contrast, z = modal()
    r = contrast(z)
    assert isinstance(r, Mixture)
    each = torch.stack([part.log_prob(z) for part in r.parts], -1)
    torch.testing.assert_close(r.log_prob(z), (each + torch.tensor([0.3, 0.7]).log()).logsumexp(-1))
    draws = r.sample((4000,))
    assert abs((draws[:, 0] > 50).double().mean().item() - 0.7) < 5 * (0.21 / 4000) ** 0.5
    for _ in range(20):
        contrast.observe(z[:600], contrast(z[:600]))  # half of these are of each mode
    assert (contrast.weights - 0.5).abs().max() < 0.01


def test_a_mode_with_few_draws_stays_scorable() -> None:
    contrast, z = modal()
    few = torch.cat([z[:1], z[300:400]])
    contrast.observe(few, contrast(few))
    assert contrast(few).log_prob(z).isfinite().all()
    none = z[300:400]
    assert contrast(none).log_prob(z).isfinite().all()


def mirrored(y: Tensor) -> None:
    """The square of ``x`` is seen: two mirror modes at ±6, 120 of their standard deviations apart; ``s`` tips them."""
    x = pyro.sample("x", dist.Normal(y.new_zeros(2), 5.0).to_event(1))
    pyro.sample("tip", dist.Normal(0.02 * x[0], 0.3), obs=y.new_tensor(0.1))
    pyro.sample("obs", dist.Normal(x.square(), 0.6).to_event(1), obs=y.new_tensor([36.0, 0.0]))


def test_a_fit_keeps_both_modes() -> None:
    """The share of the positive mode is 0.565: the tip's log odds are 2 · 0.12 · 0.1 / 0.09."""
    guide = ImplicitGuide(mirrored)
    svi = AVBSVI(mirrored, guide, num_steps=150, seed=0, progress=False)
    svi.run(torch.zeros(()))
    assert guide.num_modes == 2
    x = guide.sample(4000)["x"]
    assert abs((x[:, 0] > 0).double().mean().item() - 0.565) < 0.05
    assert ((x[:, 0].abs() - 6).abs() < 0.4).double().mean() > 0.99
    assert guide.has_log_density and guide.get_posterior().log_prob(x).isfinite().all()


def test_a_tempered_fit_sets_out_from_wide_gaussians() -> None:
    """``β log p + (1 - β) log g``, with ``g`` three times as wide as the frame, of every mode."""
    for modes, max_modes in ((2, 8), (1, 1)):
        guide = ImplicitGuide(mirrored)
        svi = AVBSVI(mirrored, guide, num_steps=20, tempering=0.25, max_modes=max_modes, seed=0, progress=False)
        assert svi.run(torch.zeros(())).history["beta"][0] == 0.25
        locs, scales = guide.sampler.frames()
        assert len(locs) == modes
        each = [MultivariateNormal(loc, scale_tril=3 * scale) for loc, scale in zip(locs, scales, strict=True)]
        u = 5 * torch.randn(50, guide.layout.dim)
        g = torch.stack([part.log_prob(u) for part in each]).logsumexp(0) - math.log(modes)
        plain, tempered = (svi.objective.scorer(svi.target, beta)(u) for beta in (1, 0.25))
        torch.testing.assert_close(tempered, 0.25 * plain + 0.75 * g)


def test_a_split_guide_is_kept_and_restored() -> None:
    guide = ImplicitGuide(mirrored).setup(torch.zeros(()))
    AVBSVI(mirrored, guide, num_steps=2, seed=0, progress=False).run(torch.zeros(()))
    other = ImplicitGuide(mirrored).setup(torch.zeros(()))
    assert (guide.num_modes, other.num_modes) == (2, 1)
    other.load_state_dict(guide.state_dict())
    draws = []
    for each in (guide, other):
        with RandomStream(0):
            draws.append(each.sample(10)["x"])
    assert torch.equal(*draws)


def test_samplers_of_a_mixture_may_be_of_any_kind() -> None:
    sampler = MixtureSampler([DenseSampler(3), DenseSampler(3, noise_dim=5)], torch.ones(2))
    assert sampler(7).shape == (7, 3)
    gradients = torch.autograd.grad(sampler(50).square().sum(), list(sampler.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


@pytest.mark.uses_param_store
def test_pyros_own_loop_trains_a_split_guide() -> None:
    """The weights move too, and a loss that trains nothing leaves them alone."""
    guide = ImplicitGuide(mirrored)
    loss = AVB_ELBO(num_steps=3, warm_start=200, seed=0)
    svi = pyro.infer.SVI(mirrored, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    svi.step(torch.zeros(()))
    before = guide.sampler.weights.clone()
    svi.evaluate_loss(torch.zeros(()))
    assert torch.equal(guide.sampler.weights, before)
    svi.step(torch.zeros(()))
    assert guide.num_modes == 2 and not torch.equal(guide.sampler.weights, before)


def test_a_split_fit_is_saved_and_resumed(tmp_path: Path) -> None:
    """The guide that takes it up has one sampler until it reads how many there are."""
    y = torch.tensor([10.0])
    options: dict[str, Any] = {"num_steps": 12, "progress": False, "seed": 0}
    guide, again = ImplicitGuide(mirrored), ImplicitGuide(mirrored)
    AVBSVI(mirrored, guide, **options).run(y, checkpoint=tmp_path)
    assert guide.num_modes == 2
    AVBSVI(mirrored, again, **options).run(y, checkpoint=tmp_path)
    for mine, theirs in zip(guide.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_has_no_density_is_no_mode() -> None:
    """The planted bug took a density of 0 for a finite number, and points without one for ends."""

    def hole(z: Tensor) -> Tensor:
        return (-0.5 * (z - 1).square().sum(-1)).where(z[..., 0] > 0, torch.nan)

    found = find_modes(hole, torch.ones(2), torch.eye(2), 5 * torch.randn(20, 2), max_modes=4)
    assert len(found) == 1


class Turned(DenseSampler):
    """Turns each draw around with probability one half."""

    def forward(self, num_samples: int, x: Tensor | None = None) -> Tensor:
        sign = 2.0 * torch.randint(2, (num_samples, 1)) - 1
        return sign * super().forward(num_samples, x)


@pytest.mark.parametrize(("sampler", "modes"), [(DenseSampler, 2), (Turned, 1)])
def test_a_sampler_that_draws_in_its_own_way_is_left_whole(sampler: Any, modes: int) -> None:
    """A mixture asks its parts for their transformed noise, not for their draws."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 5.0))
        pyro.sample("y", dist.Normal(a.square(), 1.0), obs=torch.tensor(25.0))

    guide = ImplicitGuide(model, sampler=sampler)
    AVBSVI(model, guide, num_steps=1, num_particles=64, progress=False, seed=0).run()
    assert guide.num_modes == modes
    assert 0.3 < (guide.sample(1000)["a"] > 0).float().mean() < 0.7


def test_where_no_start_has_a_density_there_is_one_mode() -> None:
    def nowhere(z: Tensor) -> Tensor:
        """One value a row, and no row is an error, as under `torch.func.vmap`."""
        assert len(z)
        return torch.where(z.square().sum(1) < 1, 0.0, torch.nan)

    starts = 5 + torch.rand(4, 2)
    found = find_modes(nowhere, torch.zeros(2), torch.eye(2), starts, max_modes=3)
    assert [mode.weight for mode in found] == [1.0]
