"""Discrete latent sites are summed out exactly, and drawn from their conditional afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate, infer_discrete
from torch import Tensor

import models
from implicitvi import ImplicitGuide
from implicitvi.errors import ModelError
from implicitvi.export import to_arviz
from implicitvi.pyro_model.log_joint import LogJoint

Model = Callable[..., Any]
Y = torch.tensor([-1.2, 0.3, 1.9, 0.1, 2.2], dtype=torch.float64)


def made(model: Model, *args: Any, **kwargs: Any) -> LogJoint:
    return LogJoint(model, ImplicitGuide(model).setup(*args).layout, **kwargs)


def scaled(model: Model) -> Model:
    def half(*args: Any) -> None:
        with poutine.scale(scale=0.5):
            model(*args)

    return half


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize(
    ("model", "by_hand", "y"),
    [
        (models.mixture, models.mixture_by_hand, Y),
        (scaled(models.mixture), scaled(models.mixture_by_hand), Y),
        (models.hidden_markov, models.hidden_markov_by_hand, Y),
        (models.nested_discrete, models.nested_discrete_by_hand, Y[:4, None] - Y[1:4]),
    ],
    ids=["mixture", "scaled", "markov", "nested"],
)
def test_the_sum_equals_one_written_by_hand(model: Model, by_hand: Model, y: Tensor, mode: str) -> None:
    log_joint = made(model, y, mode=mode)
    u = torch.randn(5, log_joint.layout.dim).double().requires_grad_()
    scores, exact = log_joint(u, y), made(by_hand, y, mode="loop")(u, y)
    assert log_joint.mode == ("loop" if mode == "loop" else "vmap"), log_joint.reason
    torch.testing.assert_close(scores, exact, rtol=1e-10, atol=1e-10)
    (fast,) = torch.autograd.grad(scores.sum(), u)
    (slow,) = torch.autograd.grad(exact.sum(), u)
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)


def test_discrete_sites_in_minibatches_sum_to_the_full_data_on_average() -> None:
    """Over all minibatches of two of four data, the mean of their sums is exact."""
    subset = torch.tensor([0, 1])

    def model(y: Tensor) -> None:
        share = pyro.sample("share", dist.Beta(y.new_tensor(2.0), 2.0))
        loc = pyro.sample("loc", dist.Normal(y.new_tensor([-1.0, 1.0]), 1.0).to_event(1))
        with pyro.plate("data", len(y), subsample=subset):
            k = pyro.sample("k", dist.Bernoulli(share), infer=models.SUMMED_OUT)
            pyro.sample("obs", dist.Normal(loc[k.long()], 1.0), obs=y[subset])

    y = Y[:4]
    log_joint = made(model, y)
    u = torch.randn(3, 3).double()
    total = torch.zeros(3).double()
    for pair in torch.combinations(torch.arange(4)):
        subset = pair
        total += log_joint(u, y) / 6
    assert log_joint.mode == "vmap"
    torch.testing.assert_close(total, made(models.mixture, y)(u, y))


def test_a_discrete_site_that_all_minibatches_share_is_refused() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(0.5), infer=models.SUMMED_OUT)
        with pyro.plate("data", len(y), subsample_size=2) as i:
            pyro.sample("obs", dist.Normal(loc[k.long()], 1.0), obs=y[i])

    log_joint = made(model, Y)
    with pytest.raises(ModelError, match=r"scale of sites that .* must be one number, got k: 1.0, obs: 2.5"):
        log_joint(torch.zeros(2, 2).double(), Y)


def test_a_scale_for_each_datum_of_a_discrete_site_is_refused() -> None:
    def model(y: Tensor) -> None:
        with poutine.scale(scale=torch.arange(1.0, 1.0 + len(y))):
            models.mixture(y)

    log_joint = made(model, Y)
    with pytest.raises(ModelError, match="must be one number"):
        log_joint(torch.zeros(2, 3).double(), Y)


def test_the_prior_of_a_mixture_is_summed_too() -> None:
    """With ``only`` the latent sites, a latent whose prior depends on a discrete site has a mixture prior."""

    def model(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(y.new_tensor(0.25)), infer=models.SUMMED_OUT)
        z = pyro.sample("z", dist.Normal(3 * k, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0).expand([len(y)]).to_event(1), obs=y)

    z = torch.linspace(-2, 5, 9).double()
    normal = torch.distributions.Normal
    exact = (0.75 * normal(0.0, 1.0).log_prob(z).exp() + 0.25 * normal(3.0, 1.0).log_prob(z).exp()).log()
    torch.testing.assert_close(made(model, Y, only=("z",))(z[:, None], Y), exact)


def marked(infer: dict[str, Any], fn: Any) -> Model:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", fn, infer=infer)
        pyro.sample("obs", dist.Normal(mu + k.sum(), 1.0).expand([len(y)]).to_event(1), obs=y)

    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            marked({}, dist.Bernoulli(0.5)),
            r"'k' is not marked to be summed out. Write pyro.sample\('k', ..., infer={\"enumerate\": \"parallel\"}\)",
        ),
        (marked({"enumerate": "sequential"}, dist.Bernoulli(0.5)), "not marked to be summed out"),
        (marked({}, dist.Poisson(2.0)), "infinitely many .* got Poisson. Integrate it out .*GammaPoisson"),
        (marked(models.SUMMED_OUT, dist.Poisson(2.0)), "infinitely many"),
        (
            config_enumerate(marked({}, dist.Bernoulli(0.5).expand([3]).to_event(1))),
            "joins several discrete values with to_event",
        ),
    ],
)
def test_discrete_sites_that_cannot_be_summed_out_are_refused(model: Model, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ImplicitGuide(model).setup(Y)


def test_config_enumerate_marks_a_model() -> None:
    model = config_enumerate(marked({}, dist.Categorical(torch.ones(3).double())))
    assert ImplicitGuide(model).setup(Y).layout.names == ("mu",)


@pytest.mark.uses_param_store
def test_infer_discrete_recovers_the_discrete_sites() -> None:
    """Frequencies of 400 draws against the exact conditional, gate 5 standard errors.

    `infer_discrete` wraps the conditioned model: conditioned outside, as `Predictive` does, Pyro's sum does not see the
    draw and takes the continuous latents from their prior.
    """
    guide = ImplicitGuide(models.mixture).setup(Y)
    draws = guide.sample(400)
    found = []
    for i in range(400):
        at = pyro.poutine.condition(models.mixture, data={k: v[i] for k, v in draws.items()})
        model = infer_discrete(at, first_available_dim=-2)
        found.append(pyro.poutine.trace(model).get_trace(Y).nodes["k"]["value"])
    k = torch.stack(found)
    share, loc = draws["share"][:, None], draws["loc"][:, None]
    each = torch.stack([1 - share, share], -1).log() + dist.Normal(loc, 1.0).log_prob(Y[:, None])
    chance = each.softmax(-1)[..., 1]
    error = (chance * (1 - chance)).sum(0).sqrt() / 400
    assert ((k - chance).mean(0).abs() < 5 * error).all()


def test_the_export_has_the_discrete_sites_and_sums_them_out_of_the_likelihood() -> None:
    """Draws of ``k`` against their exact conditional: frequencies over 400 draws, gate 5 standard errors."""
    guide = ImplicitGuide(models.mixture).setup(Y)
    data = to_arviz(guide, models.mixture, Y, num_samples=400)
    share = torch.tensor(data["posterior"]["share"].values[0])[:, None]
    loc = torch.tensor(data["posterior"]["loc"].values[0])[:, None]
    k = torch.tensor(data["posterior"]["k"].values[0])
    each = torch.stack([1 - share, share], -1).log() + dist.Normal(loc, 1.0).log_prob(Y[:, None])
    scores = torch.tensor(data["log_likelihood"]["obs"].values[0])
    torch.testing.assert_close(scores, each.logsumexp(-1))
    chance = each.softmax(-1)[..., 1]
    error = (chance * (1 - chance)).sum(0).sqrt() / 400
    assert ((k - chance).mean(0).abs() < 5 * error).all()
    assert data["posterior"]["k"].dims == ("chain", "draw", "data")
    assert data["posterior_predictive"]["obs"].shape == (1, 400, 5)


def test_an_export_without_a_likelihood_for_each_observation_warns() -> None:
    guide = ImplicitGuide(models.hidden_markov).setup(Y)
    with pytest.warns(UserWarning, match="log_likelihood is left out: 'y_0' and 'y_1' depend"):
        data = to_arviz(guide, models.hidden_markov, Y, num_samples=5)
    assert data["posterior"]["x_4"].shape == (1, 5)
    assert "log_likelihood" not in data


def test_a_partly_observed_discrete_site_is_marked_by_the_decorator() -> None:
    """Pyro drops the mark of a site with ``obs_mask``. The posterior of ``p`` has mean 0.560 and sd 0.203."""
    x, seen = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([True, True, False, False])
    o = torch.tensor([3.0, 0.1, 2.9, 1.2])

    def model(x: Tensor, seen: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("d", len(x)):
            c = pyro.sample("c", dist.Bernoulli(p), obs=x, obs_mask=seen, infer={"enumerate": "parallel"})
            pyro.sample("o", dist.Normal(3.0 * c, 1.0), obs=o)

    with pytest.raises(
        ModelError, match="'c_unobserved' belongs to a site with obs_mask.*@pyro.infer.config_enumerate"
    ):
        ImplicitGuide(model).setup(x, seen)
    marked = config_enumerate(model)
    log_joint = LogJoint(marked, ImplicitGuide(marked).setup(x, seen).layout)
    u = torch.linspace(-8, 8, 801)[:, None]
    weights = log_joint(u, x, seen).softmax(0)
    mean = (weights * u[:, 0].sigmoid()).sum()
    sd = (weights * (u[:, 0].sigmoid() - mean) ** 2).sum().sqrt()
    assert mean.item() == pytest.approx(0.560, abs=1e-3) and sd.item() == pytest.approx(0.203, abs=1e-3)
