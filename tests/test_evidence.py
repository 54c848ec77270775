"""Estimates of the evidence agree with closed forms and quadrature, and bounds lie on their side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log, pi

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal

from implicitvi.errors import ModelError, OptionError, ShapeError
from implicitvi.metrics import ais as module
from implicitvi.metrics.ais import SCHEDULES, Annealed, Annealing, ais, bidirectional
from implicitvi.metrics.evidence import importance_sampling, quadrature
from implicitvi.nn import mlp
from implicitvi.numerics import hmc
from implicitvi.vae import VAE
from implicitvi.vae.decoders import BernoulliLikelihood, Decoder, ImplicitDecoder
from implicitvi.vae.encoders import DeterministicEncoder, GaussianEncoder, moments_of
from implicitvi.vae.priors import SampledPrior

SIGMA = 0.5
DTYPES = [torch.float32, torch.float64]


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """``x = W z + σ ε`` with ``z ~ N(0, I)``: data drawn from it, and its posterior and evidence in closed form."""

    weight: Tensor
    z: Tensor
    x: Tensor

    @classmethod
    def draw(cls, x_dim: int, latent_dim: int, rows: int, size: float, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        weight, z = size * normal(x_dim, latent_dim), normal(rows, latent_dim)
        return cls(weight, z, z @ weight.mT + SIGMA * normal(rows, x_dim))

    def to(self, dtype: torch.dtype) -> LinearGaussian:
        return LinearGaussian(self.weight.to(dtype), self.z.to(dtype), self.x.to(dtype))

    def log_joint(self, z: Tensor) -> Tensor:
        error = (self.x - z @ self.weight.mT) / SIGMA
        return -0.5 * (
            error.square().sum(-1)
            + z.square().sum(-1)
            + (self.x.shape[-1] + z.shape[-1]) * log(2 * pi)
            + 2 * self.x.shape[-1] * log(SIGMA)
        )

    def precision(self) -> Tensor:
        eye = torch.eye(self.weight.shape[1], dtype=self.weight.dtype)
        return eye + self.weight.mT @ self.weight / SIGMA**2

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Means and standard deviations ``[B, D]``."""
        cov = self.precision().inverse()
        return self.x @ self.weight @ cov / SIGMA**2, cov.diagonal().sqrt().expand_as(self.z)

    def log_evidence(self) -> Tensor:
        """``log N(x; 0, W Wᵀ + σ² I)`` by the identities of Woodbury and Sylvester."""
        mean, _ = self.posterior()
        square = (self.x.square().sum(-1) - ((self.x @ self.weight) * mean).sum(-1)) / SIGMA**2
        log_det = self.precision().logdet() + 2 * self.x.shape[-1] * log(SIGMA)
        return -0.5 * (square + log_det + self.x.shape[-1] * log(2 * pi))


IMAGES = LinearGaussian.draw(784, 10, 2, 0.03)  # posterior standard deviations of about a half
SMALL = LinearGaussian.draw(3, 2, 3, 0.5)


def wrong_starts(given: LinearGaussian) -> dict[str, tuple[Tensor, Tensor]]:
    loc, scale = given.posterior()
    return {
        "the prior": (torch.zeros_like(loc), torch.ones_like(scale)),
        "too narrow and beside": (loc + scale / 2, 0.7 * scale),
        "too wide and beside": (loc - scale, 2 * scale),
    }


def mean_weight_error(run: Annealed, log_truth: Tensor) -> Tensor:
    """Return the error of the mean weight ``[B]``, in its standard errors."""
    weights = (run.log_weights - log_truth).exp()
    return (weights.mean(0) - 1) / (weights.std(0) / len(weights) ** 0.5)


# laws


def test_the_closed_form_is_the_multivariate_normal() -> None:
    cov = SMALL.weight @ SMALL.weight.mT + SIGMA**2 * torch.eye(3)
    dense_form = MultivariateNormal(torch.zeros(3).double(), cov).log_prob(SMALL.x)
    assert torch.allclose(SMALL.log_evidence(), dense_form, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_from_the_posterior_itself_every_weight_is_the_evidence(schedule: str) -> None:
    """With orthogonal columns the posterior is a diagonal Gaussian: no variance, in either direction."""
    given = LinearGaussian(torch.linalg.qr(SMALL.weight).Q, SMALL.z, SMALL.x)
    annealing = Annealing(num_steps=20, num_chains=7, schedule=schedule)
    loc, scale = given.posterior()
    there = annealing.forward(given.log_joint, loc, scale)
    back = annealing.backward(given.log_joint, loc, scale, given.z, there.step_sizes)
    exact = given.log_evidence().expand(7, -1)
    assert torch.allclose(there.log_weights, exact, rtol=0, atol=1e-10)
    assert torch.allclose(back.log_weights, -exact, rtol=0, atol=1e-10)
    assert not torch.allclose(there.step_sizes[0], there.step_sizes[-1])  # they have moved


def test_one_step_is_importance_sampling() -> None:
    loc, scale = wrong_starts(SMALL)["too wide and beside"]
    torch.manual_seed(1)
    run = Annealing(num_steps=1, num_chains=50, adapt=False).forward(SMALL.log_joint, loc, scale)
    torch.manual_seed(1)
    z = loc + scale * torch.randn(50, *loc.shape, dtype=loc.dtype)
    weights = SMALL.log_joint(z) - Normal(loc, scale).log_prob(z).sum(-1)
    assert torch.allclose(run.log_weights, weights, rtol=0, atol=1e-10)


def test_a_constant_factor_goes_through_and_coordinates_do_not_matter() -> None:
    loc, scale = wrong_starts(SMALL)["too narrow and beside"]
    options = {"num_steps": 30, "num_chains": 3}
    torch.manual_seed(1)
    once = ais(SMALL.log_joint, loc, scale, **options)
    torch.manual_seed(1)
    larger = ais(lambda z: SMALL.log_joint(z) + 7, loc, scale, **options)
    torch.manual_seed(1)
    stretched = ais(  # y = 4 z + 1 has the density p(x, z) / 4^D
        lambda y: SMALL.log_joint((y - 1) / 4) - 2 * log(4), 4 * loc + 1, 4 * scale, **options
    )
    assert torch.allclose(larger, once + 7, rtol=0, atol=1e-9)
    assert torch.allclose(stretched, once, rtol=0, atol=1e-9)


def test_paths_go_from_zero_to_one() -> None:
    for schedule in SCHEDULES:
        betas = torch.tensor(Annealing(num_steps=40, schedule=schedule).betas())
        assert len(betas) == 41 and betas[0] == 0 and betas[-1] == 1
        assert (betas.diff() > 0).all()
        assert torch.allclose(betas + betas.flip(0), torch.ones(41))
    steps = betas.diff()
    assert steps[0] < 0.2 * steps[20] and steps[-1] < 0.2 * steps[20]  # sigmoidal is the last


# weights are unbiased


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapt", [True, False])
def test_mean_weights_are_the_evidence_and_its_inverse(adapt: bool, dtype: torch.dtype) -> None:
    """Few steps, long ones, and many chains; of 600 such figures at other seeds the largest was 3.7."""
    there, back = short_runs(SMALL.to(dtype), adapt)
    exact = SMALL.log_evidence()
    assert (mean_weight_error(there, exact).abs() < 5).all()
    assert (mean_weight_error(back, -exact).abs() < 5).all()
    assert 0.8 < there.acceptance.min() and there.acceptance.max() < 0.95


def always(accepted: Tensor, there: hmc.Point, here: hmc.Point) -> hmc.Point:
    return there


def unnormalised(u: Tensor) -> Tensor:
    return -u.square().sum(-1) / 2


def without_its_end(self: Annealing) -> list[float]:
    return [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95]


@pytest.mark.parametrize(
    ("where", "name", "bug"),
    [(hmc, "_choose", always), (module, "_gaussian", unnormalised), (Annealing, "betas", without_its_end)],
    ids=["nothing is rejected", "the start is not normalised", "the last term is missing"],
)
def test_a_planted_bug_is_found(
    where: object, name: str, bug: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, bug)
    there, back = short_runs(SMALL, adapt=False)
    exact = SMALL.log_evidence()
    assert (mean_weight_error(there, exact).abs() > 8).all()
    assert (mean_weight_error(back, -exact).abs() > 8).all()


def short_runs(given: LinearGaussian, adapt: bool, chains: int = 4000) -> tuple[Annealed, Annealed]:
    """Chains forward; and as many backward, each from its own draw of the posterior."""
    options = {"num_steps": 6, "num_leapfrog": 3, "step_size": 1.1, "adapt": adapt}
    mean, sd = given.posterior()
    loc, scale = mean + 0.7 * sd, 0.8 * sd
    there = Annealing(num_chains=chains, **options).forward(given.log_joint, loc, scale)
    z = MultivariateNormal(mean, precision_matrix=given.precision()).sample([chains])
    rows = LinearGaussian(given.weight, z.flatten(0, 1), given.x.repeat(chains, 1))
    start = loc.repeat(chains, 1), scale.repeat(chains, 1)
    sizes = there.step_sizes.repeat(1, chains)
    back = Annealing(num_chains=1, **options).backward(rows.log_joint, *start, rows.z, sizes)
    return there, Annealed(back.log_weights.reshape(chains, -1), back.acceptance, sizes)


# within 0.2 nat


@pytest.mark.parametrize(
    ("start", "dtype"),
    [
        ("the prior", torch.float64),
        ("the prior", torch.float32),
        ("too narrow and beside", torch.float64),
        ("too wide and beside", torch.float32),
    ],
)
def test_ais_finds_the_evidence_of_images_from_a_wrong_start(start: str, dtype: torch.dtype) -> None:
    given = IMAGES.to(dtype)
    loc, scale = wrong_starts(given)[start]
    annealing = Annealing(num_chains=20, num_leapfrog=5)
    run = annealing.forward(given.log_joint, loc, scale)
    exact = IMAGES.log_evidence()
    assert ((run.log_mean - exact).abs() < 0.2).all()
    assert (mean_weight_error(run, exact) < 5).all()  # overstates nothing
    assert ((run.acceptance > 0.8) & (run.acceptance < 0.9)).all()
    assert run.log_mean.dtype == dtype


def test_the_gate_of_images_would_see_chains_that_do_not_move() -> None:
    loc, scale = wrong_starts(IMAGES)["the prior"]
    annealing = Annealing(num_steps=10, num_leapfrog=1, step_size=1e-3, adapt=False)
    run = annealing.forward(IMAGES.log_joint, loc, scale)
    assert (run.log_mean - IMAGES.log_evidence() < -0.2).any()


def test_forward_and_backward_have_the_truth_between_them() -> None:
    """Means over 200 data, each with its standard error: both bounds on their side, and closer with more steps."""
    given = LinearGaussian.draw(20, 10, 200, 0.3)
    loc, scale = wrong_starts(given)["the prior"]
    exact, gaps = given.log_evidence(), {}
    for num_steps in (20, 200):
        bounds = bidirectional(given.log_joint, loc, scale, given.z, num_steps=num_steps, num_leapfrog=5)
        for side, bound in zip((1, -1), bounds, strict=True):
            gap = side * (exact - bound)
            error = float(gap.std() / len(gap) ** 0.5)
            gaps[num_steps, side] = float(gap.mean())
            assert gap.mean() > (5 if num_steps == 20 else -5) * error
    assert all(gaps[200, side] < gaps[20, side] / 4 for side in (1, -1)), gaps


@pytest.fixture(scope="module")
def nonlinear() -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]:
    """Log joint, prior moments and quadrature of binary data under a network of two latent dimensions."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = mlp([2, 32, 16]).requires_grad_(False)
        net[-1].weight.mul_(4)
        x = Bernoulli(logits=net(torch.randn(6, 2))).sample()

    def log_joint(z: Tensor) -> Tensor:
        p = Independent(Bernoulli(logits=net(z)), 1)
        return p.log_prob(x) + Normal(0.0, 1.0).log_prob(z).sum(-1)

    loc, scale = torch.zeros(6, 2), torch.ones(6, 2)
    return log_joint, loc, scale, quadrature(log_joint, loc, scale)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ais_agrees_with_quadrature_on_a_nonlinear_decoder(nonlinear, schedule: str) -> None:
    log_joint, loc, scale, exact = nonlinear
    estimate = ais(log_joint, loc + 0.5, scale, num_steps=300, num_chains=16, schedule=schedule)
    assert ((estimate - exact).abs() < 0.2).all()


def test_importance_sampling_agrees_with_quadrature(nonlinear) -> None:
    log_joint, loc, scale, exact = nonlinear
    estimate = importance_sampling(log_joint, loc, scale)
    assert ((estimate - exact).abs() < 0.2).all()


# what a run tells, and what it survives


def test_steps_follow_the_pilot_and_its_weight_does_not_count() -> None:
    loc, scale = SMALL.posterior()
    for first in (0.01, 10.0):  # the paper's first step, and one where nothing is accepted
        run = Annealing(num_steps=300, step_size=first).forward(SMALL.log_joint, loc, scale)
        assert run.log_weights.shape == (5, 3) and run.step_sizes.shape == (299, 3)
        last = run.step_sizes[-1]  # 1.12, and its logarithm varies by 0.11 between runs
        assert ((last > 0.63) & (last < 2.0)).all()
    fixed = Annealing(num_steps=10, adapt=False).forward(SMALL.log_joint, loc, scale)
    assert (fixed.step_sizes == 0.5).all()


def test_a_trajectory_that_diverges_is_rejected_and_no_distribution_sees_it() -> None:
    """Normal refuses locations that are not finite; with steps this large every trajectory would give them."""

    def log_joint(z: Tensor) -> Tensor:
        likelihood = Normal(z.exp(), 0.1, validate_args=True).log_prob(torch.tensor(1.0))
        return (likelihood + Normal(0.0, 1.0, validate_args=True).log_prob(z)).sum(-1)

    loc, scale = torch.zeros(2, 1), torch.ones(2, 1)
    run = Annealing(num_steps=5, step_size=1e6, adapt=False).forward(log_joint, loc, scale)
    assert run.acceptance.max() == 0 and run.log_weights.isfinite().all()


def test_it_works_where_gradients_are_off_and_leaves_none() -> None:
    loc, scale = SMALL.posterior()
    with torch.no_grad():
        estimate = ais(SMALL.log_joint, loc, scale, num_steps=2)
    assert not estimate.requires_grad


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_steps", 0),
        ("num_chains", 0),
        ("num_leapfrog", -1),
        ("step_size", 0.0),
        ("schedule", "linaer"),
        ("acceptance", 1.0),
    ],
)
def test_a_bad_option_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(OptionError, match=option):
        Annealing(**{option: value})


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(TypeError, match="num_step'"):
        ais(SMALL.log_joint, *SMALL.posterior(), num_step=3)


@pytest.mark.parametrize("method", [ais, importance_sampling])
def test_moments_that_are_none_are_refused(method: Callable[..., Tensor]) -> None:
    loc, scale = SMALL.posterior()
    for bad in (0 * scale, -scale, scale / 0):
        with pytest.raises(OptionError, match="must be finite, and scale above 0"):
            method(SMALL.log_joint, loc, bad)
    with pytest.raises(ShapeError, match=r"shapes \(3, 2\) and \(2,\)"):
        method(SMALL.log_joint, loc, scale[0])


def test_a_log_joint_that_cannot_be_annealed_is_refused() -> None:
    loc, scale = SMALL.posterior()
    with pytest.raises(ModelError, match="no gradient"):
        ais(lambda z: SMALL.log_joint(z.detach()), loc, scale)
    with pytest.raises(ShapeError, match=r"must be of shape .* got \(6, 3, 1\)"):
        ais(lambda z: SMALL.log_joint(z)[..., None], loc, scale)
    with pytest.raises(ModelError, match="not a number .* 3 of 3 data"):
        ais(lambda z: SMALL.log_joint(z) * torch.nan, loc, scale)
    with pytest.raises(ShapeError, match="one posterior draw of each datum"):
        bidirectional(SMALL.log_joint, loc, scale, SMALL.z[:2])
    with pytest.raises(ShapeError, match=r"step size for every transition .* got \(4, 3\)"):
        Annealing(num_steps=9).backward(SMALL.log_joint, loc, scale, SMALL.z, torch.ones(4, 3))


# quadrature


@pytest.mark.parametrize("dim", [1, 2])
def test_quadrature_is_exact(dim: int) -> None:
    given = LinearGaussian.draw(5, dim, 4, 0.5)
    estimate = quadrature(given.log_joint, *given.posterior())
    assert torch.allclose(estimate, given.log_evidence(), rtol=0, atol=1e-7)
    in_parts = quadrature(given.log_joint, *given.posterior(), chunk=1000)
    assert torch.allclose(in_parts, estimate, rtol=0, atol=1e-10)


def test_quadrature_refuses_a_grid_that_does_not_hold_the_posterior() -> None:
    given = LinearGaussian.draw(50, 2, 4, 1.0)
    loc, scale = given.posterior()
    assert quadrature(given.log_joint, loc, scale).isfinite().all()
    with pytest.raises(OptionError, match="too coarse"):
        quadrature(given.log_joint, loc, scale, points=60)
    with pytest.raises(OptionError, match="smaller than the posterior"):
        quadrature(given.log_joint, loc, scale, low=-6.0, high=loc.max().item())
    with pytest.raises(OptionError, match="one or two latent dimensions, got 10"):
        quadrature(IMAGES.log_joint, *IMAGES.posterior())
    with pytest.raises(OptionError, match="low below high"):
        quadrature(given.log_joint, loc, scale, low=1.0, high=-1.0)


# the method of a model

POINTS = torch.eye(4)


def networks() -> tuple[GaussianEncoder, Decoder]:
    torch.manual_seed(0)
    encoder = GaussianEncoder(mlp([4, 64, 64, 4]))
    return encoder, Decoder(mlp([2, 64, 64, 4]), BernoulliLikelihood([4]))


@pytest.fixture(scope="module")
def fitted() -> VAE:
    """A VAE of four points, trained for a second."""
    with torch.random.fork_rng():
        model = VAE(*networks(), 2)
        data = POINTS.repeat(64, 1)
        model.fit(data, epochs=300, batch_size=256, lr=(5e-3, 1e-4), seed=0, progress=False, device="cpu")
    return model


def test_three_ways_agree_on_a_model_of_four_points(fitted: VAE) -> None:
    exact = fitted.log_evidence(POINTS, "quadrature")
    assert exact.mean() > -2.0  # it has learned something: -2.77 are fair coins
    for method, options in (
        ("ais", {"num_steps": 300, "num_leapfrog": 5}),
        ("ais", {"num_steps": 300, "num_leapfrog": 5, "start": "prior"}),
        ("iwae", {}),
        ("iwae", {"start": "prior"}),
    ):
        estimate = fitted.log_evidence(POINTS, method, **options)
        assert estimate.shape == (4,) and not estimate.requires_grad
        assert ((estimate - exact).abs() < 0.2).all(), (method, options, estimate, exact)


def test_bounds_hold_what_quadrature_finds_on_data_that_the_model_has_made(fitted: VAE) -> None:
    z = fitted.prior().sample([100])
    x = fitted.decoder(z).sample()
    exact = fitted.log_evidence(x, "quadrature", points=100)
    start = moments_of(fitted.encoder(x), 256)
    lower, upper = bidirectional(partial(fitted.log_joint, x=x), *start, z, num_steps=100, num_leapfrog=5)
    for gap in (exact - lower, upper - exact):
        assert -5 * gap.std() / 10 < gap.mean() < 0.2


def test_rows_at_a_time_and_seeds(fitted: VAE) -> None:
    evidence = partial(fitted.log_evidence, POINTS, num_steps=5)
    assert torch.equal(evidence(), evidence())
    assert not torch.equal(evidence(), evidence(seed=1))
    whole = fitted.log_evidence(POINTS, "quadrature")
    split = fitted.log_evidence(POINTS, "quadrature", batch_size=3)
    assert torch.allclose(whole, split, atol=1e-5)
    largest = []
    plain = fitted.log_joint
    fitted.log_joint = lambda z, x: largest.append(len(x)) or plain(z, x)  # type: ignore[method-assign]
    evidence(batch_size=3)
    del fitted.log_joint
    assert set(largest) == {3, 1}


def test_it_leaves_the_model_and_the_random_state_alone(fitted: VAE) -> None:
    fitted.train()
    fitted.decoder.network[0].weight.requires_grad_(False)
    wanted = [p.requires_grad for p in fitted.parameters()]
    state = torch.get_rng_state()
    fitted.log_evidence(POINTS, num_steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in fitted.parameters()] == wanted
    assert all(p.grad is None for p in fitted.parameters()) and fitted.decoder.training


class Coins(nn.Module):
    """A prior of two fair coins."""

    def forward(self) -> Independent:
        return Independent(Bernoulli(torch.full((2,), 0.5)), 1)


def test_a_model_without_an_integral_is_refused(fitted: VAE) -> None:
    encoder, decoder = networks()
    model = VAE(encoder, decoder, 2)
    model.prior = SampledPrior(lambda count: torch.randn(count, 2))
    with pytest.raises(ModelError, match="density of the prior"):
        model.log_evidence(POINTS)
    model.prior = Coins()
    with pytest.raises(ModelError, match="discrete"):
        model.log_evidence(POINTS)
    model = VAE(encoder, decoder, 2)
    model.decoder = ImplicitDecoder(nn.Linear(2, 4), [4])
    with pytest.raises(ModelError, match="density of the decoder"):
        model.log_evidence(POINTS)


def test_an_encoder_without_noise_starts_at_the_prior() -> None:
    encoder, decoder = networks()
    model = VAE(encoder, decoder, 2)
    model.encoder = DeterministicEncoder(mlp([4, 2]))
    with pytest.raises(OptionError, match="start='prior'"):
        model.log_evidence(POINTS)
    estimate = model.log_evidence(POINTS, num_steps=200, num_leapfrog=5, start="prior")
    assert ((estimate - model.log_evidence(POINTS, "quadrature")).abs() < 0.2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "bis"}, "Did you mean 'ais'"),
        ({"start": "posterior"}, "start must be one of"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_chains": 0}, "num_chains"),
    ],
)
def test_the_door_refuses_bad_options(fitted: VAE, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fitted.log_evidence(POINTS, **options)
