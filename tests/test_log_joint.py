"""`SiteLayout` and `LogJoint`: batched equals looped, and a bad particle harms no other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import models
import zoo
from implicitvi import AVBSVI, ImplicitGuide, diagnose
from implicitvi.errors import ModelError
from implicitvi.pyro_model.arguments import Arguments
from implicitvi.pyro_model.log_joint import LogJoint, _agree
from implicitvi.pyro_model.prior import ModelPrior
from implicitvi.pyro_model.target import Target
from implicitvi.pyro_model.tracing import unvalidated

Model = Callable[..., Any]
BATCHED: dict[str, tuple[Model, tuple[Tensor, ...]]] = {
    "eight_schools": (models.eight_schools, (models.SIGMA, models.Y)),
    "normal_normal": (models.normal_normal, (torch.arange(3.0),)),
    "every_support": (models.every_support, (torch.arange(3.0),)),
}


def made(model: Model, args: tuple[Tensor, ...], **kwargs: Any) -> LogJoint:
    return LogJoint(model, ImplicitGuide(model).setup(*args).layout, **kwargs)


def doubles(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a.double() for a in args)


@pytest.mark.parametrize("name", BATCHED)
def test_batched_equals_looped(name: str) -> None:
    """Values and gradients, float64, to rounding."""
    model, args = BATCHED[name]
    args = doubles(args)
    log_joint = made(model, args)
    u = torch.randn(5, log_joint.layout.dim, dtype=torch.float64, requires_grad=True)
    batched = log_joint(u, *args)
    assert log_joint.mode != "loop", log_joint.reason
    looped = log_joint.loop(u, *args)
    torch.testing.assert_close(batched, looped, rtol=1e-10, atol=1e-10)
    (fast,) = torch.autograd.grad(batched.sum(), u)
    (slow,) = torch.autograd.grad(looped.sum(), u)
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)


def test_eight_schools_density_is_the_formula() -> None:
    """Against the density written out by hand."""
    sigma, y = doubles((models.SIGMA, models.Y))
    log_joint = made(models.eight_schools, (sigma, y))
    u = torch.randn(4, 10, dtype=torch.float64)
    mean = u[:, :1] + u[:, 1:2] * u[:, 2:]
    normal = torch.distributions.Normal
    by_hand = normal(0.0, 1.0).log_prob(u).sum(-1) + normal(mean, sigma).log_prob(y).sum(-1)
    torch.testing.assert_close(log_joint(u, sigma, y), by_hand)


def test_log_joint_integrates_to_one_over_the_prior() -> None:
    """With log|J|: the density of the unconstrained vector of a Beta and a HalfCauchy sums to 1 on a grid."""

    def prior() -> None:
        pyro.sample("share", dist.Beta(torch.tensor(2.0).double(), 3.0))

    guide = ImplicitGuide(prior).setup()
    log_joint = LogJoint(prior, guide.layout)
    grid = torch.linspace(-15, 15, 3001, dtype=torch.float64)
    total = log_joint(grid[:, None]).exp().sum() * (grid[1] - grid[0])
    assert abs(total.item() - 1) < 1e-6


def test_layout_packs_what_it_unpacks() -> None:
    layout = ImplicitGuide(models.every_support).setup(torch.zeros(3)).layout
    u = torch.randn(2, 5, layout.dim).double()
    values, log_det = layout.unpack(u)
    assert {name: tuple(v.shape) for name, v in values.items()} == {
        "scale": (2, 5),
        "share": (2, 5),
        "weights": (2, 5, 3),
        "root": (2, 5, 3, 3),
        "effect": (2, 5, 2, 3),
        "vector": (2, 5, 2, 3),
    }
    assert log_det.shape == (2, 5)
    torch.testing.assert_close(layout.pack(values), u, rtol=1e-6, atol=1e-6)
    assert len(layout.coordinates()) == layout.dim == len(set(layout.coordinates()))
    assert "effect[1,2]" in layout.coordinates() and "scale" in layout.coordinates()


def test_a_model_that_cannot_be_batched_is_looped_with_a_warning() -> None:
    y = torch.arange(3.0)
    log_joint = made(models.branches_on_a_latent, (y,))
    u = torch.tensor([[-1.0], [1.0]])
    with pytest.warns(UserWarning, match="one particle at a time"):
        scores = log_joint(u, y)
    assert log_joint.mode == "loop" and "vmap raised" in log_joint.reason
    torch.testing.assert_close(scores, log_joint.loop(u, y))


@pytest.mark.parametrize("mode", ["vmap", "plate"])
def test_a_batch_that_disagrees_with_the_loop_is_refused(mode: str) -> None:
    """The planted bug: scores that depend on the other particles must not be taken for the model's."""
    y = torch.arange(3.0)
    log_joint = made(models.normal_normal, (y,))
    honest = getattr(log_joint, f"_{mode}")
    setattr(log_joint, f"_{mode}", lambda u, call: honest(u, call) + u.mean())
    log_joint.choose(torch.randn(3, 1), y)
    assert log_joint.mode == {"vmap": "plate", "plate": "vmap"}[mode]
    asked = made(models.normal_normal, (y,), mode=mode)
    setattr(asked, f"_{mode}", getattr(log_joint, f"_{mode}"))
    with pytest.raises(ModelError, match="disagree. Use mode='auto'"):
        asked(torch.randn(3, 1), y)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_a_particle_at_which_the_model_raises_scores_minus_infinity(mode: str) -> None:
    y = torch.zeros(2).double()
    log_joint = made(models.fragile_cholesky, (y,), mode=mode)
    u = torch.tensor([0.1, 3.0, -0.2, 0.3, -2.0, 0.9], dtype=torch.float64)[:, None]
    scores = log_joint(u, y)
    assert scores.isneginf().tolist() == [False, True, False, False, True, False]
    good = scores.isfinite()
    torch.testing.assert_close(scores[good], log_joint(u[good], y))


def test_prior_draws_and_prior_density_are_one_distribution() -> None:
    """Draws through the model against the closed-form prior; each particle has noise of its own.

    Gate of 5 standard errors on the mean and the mean square of 4 000 draws: 0 failures over 200 seeds of exact draws;
    one noise shared by all particles (what vmap does by default) gives variance 0 and fails.
    """
    sigma, y = models.SIGMA, models.Y
    guide = ImplicitGuide(models.eight_schools).setup(sigma, y)
    log_prior = LogJoint(models.eight_schools, guide.layout, only=guide.layout.names)
    prior = ModelPrior(log_prior, (sigma, y), {}, torch.zeros(10))
    u = prior.sample((4000,))
    assert u.shape == (4000, 10)
    assert (u.mean(0).abs() < 5 / 4000**0.5).all()
    assert ((u**2).mean(0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5
    standard = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(prior.log_prob(u[:9]), standard.log_prob(u[:9]).sum(-1))


def test_prior_of_every_support_can_be_drawn() -> None:
    y = torch.zeros(3)
    guide = ImplicitGuide(models.every_support).setup(y)
    log_prior = LogJoint(models.every_support, guide.layout, only=guide.layout.names)
    prior = ModelPrior(log_prior, (y,), {}, torch.zeros(guide.layout.dim))
    with pytest.warns(UserWarning, match="drawn one particle at a time"):
        u = prior.sample((6,))
    assert u.isfinite().all() and u.unique(dim=0).shape == u.shape
    assert prior.log_prob(u).isfinite().all()


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_all_particles_share_the_minibatch(mode: str) -> None:
    """Equal particles get equal scores, and the scores of minibatches average to the full one."""
    y = torch.arange(6.0).double()
    log_joint = made(models.global_latents_in_minibatches, (y,), mode=mode)
    u = torch.full((3, 1), 0.3, dtype=torch.float64)
    scores = torch.stack([log_joint(u, y) for _ in range(400)])
    assert (scores == scores[:, :1]).all()
    assert scores[:, 0].unique().numel() > 2
    full = made(models.normal_normal, (y,))(u[:1], y)
    error = scores[:, 0].std() / 400**0.5
    assert (scores[:, 0].mean() - full).abs() < 5 * error


def test_masked_entries_of_a_latent_keep_their_prior() -> None:
    """By any of three ways to mask; observed sites keep their mask, and ``mask(False)`` stays flat."""
    keep = torch.tensor([True, False, True])
    y = torch.tensor([0.5, torch.nan, -1.0], dtype=torch.float64)
    standard = torch.distributions.Normal(torch.zeros(()).double(), 1.0)

    def model(kind: str) -> None:
        prior = dist.Normal(torch.zeros(3).double(), 1.0)
        with pyro.plate("data", 3):
            if kind == "obs_mask":
                pyro.sample("z", prior, obs=torch.where(keep, y, 0.0), obs_mask=keep)
            elif kind == "poutine.mask":
                with pyro.poutine.mask(mask=keep):
                    pyro.sample("z", prior)
            else:
                pyro.sample("z", prior.mask(keep if kind == "fn.mask" else False))

    u = torch.randn(4, 3).double()
    for kind in ("obs_mask", "poutine.mask", "fn.mask"):
        log_joint = LogJoint(model, ImplicitGuide(model).setup(kind).layout)
        seen = standard.log_prob(y[keep]).sum() if kind == "obs_mask" else 0.0
        torch.testing.assert_close(log_joint(u, kind), standard.log_prob(u).sum(-1) + seen)
    flat = LogJoint(model, ImplicitGuide(model).setup("flat").layout)
    torch.testing.assert_close(flat(u, "flat"), torch.zeros(4).double())


@pytest.mark.parametrize("mode", ["vmap", "plate", "loop"])
def test_an_excluded_site_is_left_out_and_its_density_not_asked_for(mode: str) -> None:
    y = torch.arange(3.0).double()
    log_joint = made(zoo.implicit_prior, (y,), mode=mode, exclude=("z",))
    z = torch.randn(4, 1).double()
    likelihood = torch.distributions.Normal(z, 1.0).log_prob(y).sum(-1)
    torch.testing.assert_close(log_joint(z, y), likelihood)
    target = Target(zoo.implicit_prior, Arguments.of(y), mode=mode).near({"z": z[0]})
    assert target.log_joint.exclude == ("z",) and target.describe(z[0]) == ""


def test_the_plate_of_particles_is_taken_where_vmap_cannot_be() -> None:
    def writes_in_place(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(4).double(), 1.0).to_event(1))
        mean = torch.zeros(*theta.shape[:-1], 2).double()
        mean[..., 0] = theta[..., :2].sum(-1)
        mean[..., 1] = theta[..., 2:].sum(-1)
        pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=y[:2])

    (y,) = zoo.five(torch.float64)
    log_joint = made(writes_in_place, (y,))
    log_joint.choose(torch.zeros(1, 4).double(), y)
    assert (log_joint.mode, log_joint.reason) == ("plate", "the particle plate agrees with the loop")


def test_the_plate_of_particles_is_taken_where_vmap_agrees_far_out_too() -> None:
    """The planted bug: an ``all()`` over the particles, the same for each of them near the start."""

    def honest(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
        zoo.observe(mu, y)

    def mixes(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
        zoo.observe(torch.where((mu > -4).all(), mu, 0.0), y)

    (y,) = zoo.five(torch.float64)
    u = torch.zeros(3, 1).double()
    for model, mode in ((honest, "plate"), (mixes, "vmap")):
        log_joint = made(model, (y,))
        log_joint.choose(u, y)
        assert log_joint.mode == mode and log_joint.reason.startswith("vmap ")
    far = torch.tensor([[-5.0], [0.0]]).double()
    torch.testing.assert_close(made(mixes, (y,))(far, y), made(mixes, (y,)).loop(far, y))


def test_a_plate_that_mixes_its_particles_is_refused() -> None:
    """The planted bug: ``theta.sum()`` runs over the particles too, and no error says so."""
    (y,) = zoo.five(torch.float64)
    log_joint = made(zoo.sums_over_all, (y,), mode="plate")
    with pytest.raises(ModelError, match="the particle plate and the loop disagree"):
        log_joint(torch.randn(6, 5).double(), y)


@pytest.mark.parametrize("mode", ["vmap", "plate"])
def test_points_without_a_density_cannot_make_a_wrong_mode_look_right(mode: str) -> None:
    """The planted bug shows only where the density is finite, and the points given are where it is not."""
    y = torch.arange(3.0).double()
    log_joint = made(models.half_line, (y,), mode=mode)
    honest = getattr(log_joint, f"_{mode}")
    setattr(log_joint, f"_{mode}", lambda u, call: honest(u, call) + u.mean())
    with pytest.raises(ModelError, match="disagree|too few points"):
        log_joint(torch.full((3, 1), -0.1).double(), y)
    assert made(models.half_line, (y,), mode=mode)(torch.full((3, 1), -0.1).double(), y).isneginf().all()


def test_an_error_of_one_particle_does_not_hide_behind_the_score_of_another() -> None:
    """In single precision a particle with a huge score must not widen the tolerance of the rest."""
    exact = torch.tensor([-1.0, -1e7]), torch.ones(2, 3)
    fast = torch.tensor([-1.5, -1e7]), torch.ones(2, 3)
    assert _agree(exact, exact) and not _agree(fast, exact)


def test_a_model_that_changes_after_the_choice_is_refused() -> None:
    """Sites are counted in every call: none is silently drawn from its prior inside the log joint."""
    extra = False

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
        shift = pyro.sample("shift", dist.Normal(0 * y[0], 1.0)) if extra else 0.0
        zoo.observe(mu + shift, y)

    (y,) = zoo.five(torch.float64)
    log_joint = made(model, (y,))
    u = torch.zeros(3, 1).double()
    log_joint(u, y)
    extra = True
    with pytest.raises(ModelError, match="did not have before: 'shift'"):
        log_joint(u, y)


def test_choosing_draws_nothing_from_the_callers_stream() -> None:
    y = torch.arange(6.0).double()
    log_joint = made(models.global_latents_in_minibatches, (y,))
    before = torch.get_rng_state()
    log_joint.choose(torch.zeros(2, 1).double(), y)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_may_name_its_arguments_as_it_likes() -> None:
    def model(u: Tensor, model: float, values: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(model * u, 1.0))
        zoo.observe(mu, values)

    (y,) = zoo.five(torch.float64)
    named = {"u": y[0], "model": 1.0, "values": y}
    log_joint = LogJoint(model, ImplicitGuide(model).setup(**named).layout)
    assert log_joint(torch.zeros(2, 1).double(), **named).isfinite().all()


def test_an_error_that_no_value_causes_is_the_models() -> None:
    """Not a step that is skipped, again and again."""

    def local(y: Tensor, known: bool = True) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
        if not known:
            raise ValueError("unknown option")

    options: dict[str, Any] = {"num_steps": 2, "num_particles": 8, "warm_start": 2}
    svi = AVBSVI(local, ImplicitGuide(local), progress=False, seed=0, **options)
    svi.run(torch.zeros(3))
    with pytest.raises(
        ModelError, match=r"latent sites of the model must be the guide's, \{'z': \(3,\)\}, got \{'z': \(5,\)\}"
    ):
        svi.step(torch.zeros(5))
    with pytest.raises(ModelError, match="unknown option"):
        svi.run(torch.zeros(3), known=False)


LOSING: dict[str, Callable[[Tensor], Any]] = {
    "detach": torch.Tensor.detach,
    "item": torch.Tensor.item,
    "float": float,
    "numpy": lambda mu: torch.as_tensor(np.exp(mu.detach().numpy())),
    "no_grad": torch.no_grad()(torch.exp),
    "round": torch.round,
    "compare": lambda mu: torch.where(torch.linspace(-2, 2, 20) < mu, 0.0, 1.0),
}


def loses(lose: Callable[[Tensor], Any]) -> Model:
    """Return a model of two latents of which the first loses its gradient on the way to the data."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(lose(mu), sigma), obs=y)

    return model


@pytest.mark.filterwarnings("ignore:the model is scored one particle at a time", "ignore:Converting a tensor")
@pytest.mark.parametrize("how", LOSING)
def test_a_latent_whose_gradient_is_lost_is_refused_by_name(how: str) -> None:
    model = loses(LOSING[how])
    log_joint = made(model, (torch.full((20,), 3.0),))
    with pytest.raises(ModelError, match=r"gradient of 'mu' in the model must be that of its log density.*\.item\(\)"):
        log_joint.choose(0.1 * torch.randn(3, 2), torch.full((20,), 3.0))


@pytest.mark.filterwarnings("ignore:the model is scored one particle at a time", "ignore:Converting a tensor")
@pytest.mark.parametrize("lose", [float, torch.Tensor.detach])
def test_neither_a_fit_nor_a_diagnosis_of_a_lost_gradient_begins(lose: Callable[[Tensor], Any]) -> None:
    model, y = loses(lose), torch.full((20,), 3.0)
    with pytest.raises(ModelError, match="gradient of 'mu'"):
        AVBSVI(model, ImplicitGuide(model), progress=False).run(y)
    draws = {"mu": torch.randn(200), "sigma": torch.randn(200).exp()}
    with pytest.raises(ModelError, match="gradient of 'mu'"):
        diagnose(draws, model, y, num_samples=200)


def bends(y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Laplace(torch.zeros(5), 0.01).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample(
            "obs",
            dist.Laplace(torch.relu(torch.linspace(-1, 1, len(y))[:, None] ** torch.arange(5) @ beta), 0.1),
            obs=y,
        )


def kernel(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    x = torch.linspace(0, 1, len(y))
    covariance = torch.exp(-((x[:, None] - x) ** 2) / (2 * scale**2)) + 1e-4 * torch.eye(len(y))
    pyro.sample("obs", dist.MultivariateNormal(torch.zeros(len(y)), covariance), obs=y)


HONEST: dict[str, tuple[Model, Tensor]] = {
    "kinks": (bends, torch.linspace(-1, 1, 50).sin()),
    "ill-conditioned": (kernel, torch.linspace(0, 6, 60).sin()),
    "many rows": (loses(torch.sin), torch.linspace(-5, 9, 300_000)),
    "oscillating": (loses(lambda mu: torch.sin(50 * mu)), torch.linspace(-1, 1, 50)),
    "units of 1e-3": (loses(lambda mu: 1000 * mu), torch.linspace(300, 301, 50)),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_gradient_is_believed_in_single_precision(name: str) -> None:
    """Kinks, rounding and bends that the lines do not resolve are no evidence. 150 further seeds pass too."""
    model, y = HONEST[name]
    log_joint = made(model, (y,))
    for seed in range(2 if len(y) > 1000 else 5):
        torch.manual_seed(seed)
        log_joint._is_chosen, log_joint.mode = False, "auto"
        log_joint.choose(0.3 * torch.randn(3, log_joint.layout.dim), y)
        assert log_joint.mode != "loop"


WRITES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "OrderedLogistic": (
        lambda w: dist.OrderedLogistic(w[:3] @ torch.ones(3, 5).double(), torch.stack([w[3], w[3] + w[4].exp()])),
        torch.tensor([0, 1, 2, 0, 1]),
    ),
    "Multinomial": (
        lambda w: dist.Multinomial(5, logits=torch.linspace(-1, 1, 5).double()[:, None] * w[:3]),
        torch.tensor([[5, 0, 0], [1, 2, 2], [0, 5, 0], [4, 0, 1], [1, 1, 3]]).double(),
    ),
    "NanMaskedNormal": (
        lambda w: dist.NanMaskedNormal(w, w.exp()),
        torch.tensor([0.3, torch.nan, 1.2, torch.nan, 0.1]).double(),
    ),
    "NanMaskedMultivariateNormal": (
        lambda w: dist.NanMaskedMultivariateNormal(w[:2], torch.outer(w[2:4], w[2:4]) + w[4].exp() * torch.eye(2)),
        torch.tensor([[0.3, 1.0], [torch.nan, 2.0], [1.0, torch.nan], [torch.nan] * 2, [0.5, 0.7]]).double(),
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_densities_that_write_in_place_are_batched(name: str) -> None:
    """Values and gradients are those of Pyro's own code, which the loop runs, and which is back afterwards."""
    likelihood, y = WRITES[name]

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(5).double(), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", likelihood(w), obs=y)

    log_joint = made(model, (y,))
    u = torch.randn(6, 5).double().requires_grad_()
    fast, slow = log_joint(u, y), log_joint.loop(u, y)
    assert log_joint.mode != "loop", log_joint.reason
    torch.testing.assert_close(fast, slow)
    exact = likelihood(u[0]).log_prob(y).sum() + torch.distributions.Normal(0, 1).log_prob(u[0]).sum()
    torch.testing.assert_close(fast[0], exact)
    torch.testing.assert_close(*(torch.autograd.grad(score.sum(), u)[0] for score in (fast, slow)))
    assert dist.NanMaskedNormal.log_prob.__module__ == "pyro.distributions.nanmasked"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
@pytest.mark.parametrize("family", [dist.Bernoulli, lambda logits: dist.Normal(logits, 1.0)])
def test_truth_values_and_whole_numbers_are_numbers(dtype: torch.dtype, family: Callable[..., Any]) -> None:
    def model(y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", family(torch.sigmoid(b)), obs=y)

    y = torch.tensor([1, 0, 1, 1])
    u = torch.randn(3, 1)
    expected = made(model, (y.float(),))(u, y.float())
    for mode in ("vmap", "plate", "loop"):
        torch.testing.assert_close(made(model, (y.to(dtype),), mode=mode)(u, y.to(dtype)), expected)


@pytest.mark.parametrize("how", ["obs_mask", "mask", "site"])
def test_missing_data_under_a_mask_may_be_nan(how: str) -> None:
    """The posterior is ``N(0.565, 0.485²)``: read its mean and variance off the gradient at two points."""
    y = torch.tensor([0.3, torch.nan, 1.2, 0.8, torch.nan, 0.1])

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        seen = ~y.isnan()
        with pyro.plate("d", len(y)), poutine.mask(mask=seen if how == "mask" else torch.tensor(True)):
            fn = dist.Normal(mu, 1.0).expand([6]).mask(seen) if how == "site" else dist.Normal(mu, 1.0)
            pyro.sample("y", fn, obs=y, obs_mask=seen if how == "obs_mask" else None)

    log_joint = made(model, (y,))
    u = torch.zeros(2, log_joint.layout.dim)
    u[1, 0] = 1.0
    u.requires_grad_()
    (slope,) = torch.autograd.grad(log_joint(u, y).sum(), u)
    at_0, at_1 = slope[:, 0].tolist()
    # with obs_mask all six values are latents too, 0 here
    assert (at_0, at_0 - at_1) == pytest.approx((2.4, 4.25 + (6 if how == "obs_mask" else 0)))


def whole(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), y.new_tensor(1.0)))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, y.new_tensor(1.0)), obs=y)


def complex_data(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y + 0j)


@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (whole, torch.ones(3).half(), "latent site 'mu' must be of float32 or float64, got torch.float16"),
        (whole, torch.ones(3).bfloat16(), "got torch.bfloat16"),
        (complex_data, torch.ones(3), "data of site 'obs' must be real numbers, got torch.complex64"),
        (whole, torch.ones(0), "every plate of the model must be of size 1 or more, got 0"),
        (poutine.mask(whole, mask=False), torch.ones(3), "got all of them masked by False"),
    ],
)
def test_data_that_cannot_be_scored_are_refused_by_type(model: Model, y: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ImplicitGuide(model).setup(y)


@pytest.mark.parametrize("switch", [True, False])
def test_the_switch_of_argument_checks_is_left_as_it_was(switch: bool) -> None:
    """Torch's own differs from Pyro's here; and the threads leave in the order in which they came."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(switch)
    entered = Barrier(2)

    def enter() -> None:
        with unvalidated():
            entered.wait()
            assert not torch.distributions.Distribution._validate_args

    try:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(enter) for _ in range(2)]:
                future.result()
        assert torch.distributions.Distribution._validate_args == switch
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def test_coordinates_have_names_of_their_own() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x[0]", dist.Normal(0.0, 1.0))
        pyro.sample("x[2]", dist.Normal(0.0, 1.0))

    assert ImplicitGuide(model).setup().layout.coordinates() == ["x[0]", "x[1]", "'x[0]'", "x[2]"]
