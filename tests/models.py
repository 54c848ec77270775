"""Define small Pyro models that the tests share."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

SIGMA = torch.tensor([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4])
Y = torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2])


def eight_schools(sigma: Tensor, y: Tensor | None = None) -> None:
    """The AVB paper's model, with τ on the whole line."""
    mu = pyro.sample("mu", dist.Normal(sigma.new_tensor(0.0), 1.0))
    tau = pyro.sample("tau", dist.Normal(sigma.new_tensor(0.0), 1.0))
    with pyro.plate("schools", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(sigma.new_tensor(0.0), 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


def normal_normal(y: Tensor) -> None:
    """Posterior of ``mu``: N(Σy / (n + 1), 1 / (n + 1))."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


def every_support(y: Tensor) -> None:
    """Scalars, vectors, a simplex, a Cholesky factor, bounded and positive supports, nested plates."""
    one = y.new_tensor(1.0)
    scale = pyro.sample("scale", dist.HalfCauchy(one))
    share = pyro.sample("share", dist.Beta(2 * one, 2 * one))
    weights = pyro.sample("weights", dist.Dirichlet(y.new_ones(3)))
    root = pyro.sample("root", dist.LKJCholesky(3, one))
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
        effect = pyro.sample("effect", dist.Normal(0 * one, scale))
    with pyro.plate("vectors", 2):
        vector = pyro.sample("vector", dist.MultivariateNormal(y.new_zeros(3), scale_tril=root))
    mean = (weights * vector.sum(-2)).sum() + effect.sum() * share
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mean, one), obs=y)


def no_latent(y: Tensor) -> None:
    pyro.sample("obs", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1), obs=y)


def all_discrete(y: Tensor) -> None:
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.sample("obs", dist.Normal(k.double(), 1.0).expand([len(y)]).to_event(1), obs=y)


def local_latents(y: Tensor) -> None:
    with pyro.plate("data", len(y), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=y[index])


def global_latents_in_minibatches(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y[index])


def branches_on_a_latent(y: Tensor) -> None:
    """Python control flow on a latent, which only the loop can score."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 1.0 if mu > 0 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, scale), obs=y)


def fragile_cholesky(y: Tensor) -> None:
    """A Cholesky factorisation that fails if ``rho`` is above 1 in absolute value."""
    rho = pyro.sample("rho", dist.Normal(y.new_tensor(0.0), 1.0))
    cov = torch.stack([torch.stack([rho**0, rho]), torch.stack([rho, rho**0])])
    root = torch.linalg.cholesky(cov)
    pyro.sample("obs", dist.MultivariateNormal(y.new_zeros(2), scale_tril=root), obs=y)


def half_line(y: Tensor) -> None:
    """A hard constraint on an unconstrained site: the density is zero if ``mu`` is negative."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.5), 1.0))
    pyro.factor("positive", torch.where(mu > 0, 0.0 * mu, torch.full_like(mu, -torch.inf)))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


def impossible(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("never", -torch.inf * torch.ones_like(mu))
    pyro.sample("obs", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


SUMMED_OUT = {"enumerate": "parallel"}


def mixture(y: Tensor) -> None:
    """A mixture of two Gaussians; the component of each datum is discrete and summed out."""
    share = pyro.sample("share", dist.Beta(y.new_tensor(2.0), 2.0))
    loc = pyro.sample("loc", dist.Normal(y.new_tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(share), infer=SUMMED_OUT)
        pyro.sample("obs", dist.Normal(loc[k.long()], 1.0), obs=y)


def mixture_by_hand(y: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(y.new_tensor(2.0), 2.0))
    loc = pyro.sample("loc", dist.Normal(y.new_tensor([-1.0, 1.0]), 1.0).to_event(1))
    component = dist.Categorical(torch.stack([1 - share, share], -1))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.MixtureSameFamily(component, dist.Normal(loc, 1.0)), obs=y)


def hidden_markov(y: Tensor) -> None:
    """A chain of discrete states that starts in state 0."""
    stay = y.new_ones(2, 2) + 2 * torch.eye(2).to(y)
    transition = pyro.sample("transition", dist.Dirichlet(stay).to_event(1))
    loc = pyro.sample("loc", dist.Normal(y.new_tensor([-1.0, 1.0]), 1.0).to_event(1))
    x = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Categorical(transition[x]), infer=SUMMED_OUT)
        pyro.sample(f"y_{t}", dist.Normal(loc[x], 1.0), obs=y[t])


def hidden_markov_by_hand(y: Tensor) -> None:
    stay = y.new_ones(2, 2) + 2 * torch.eye(2).to(y)
    transition = pyro.sample("transition", dist.Dirichlet(stay).to_event(1))
    loc = pyro.sample("loc", dist.Normal(y.new_tensor([-1.0, 1.0]), 1.0).to_event(1))
    forward = transition[0].log()
    for t in range(len(y)):
        if t:
            forward = (forward[:, None] + transition.log()).logsumexp(0)
        forward = forward + dist.Normal(loc, 1.0).log_prob(y[t])
    pyro.factor("evidence", forward.logsumexp(0))


def nested_discrete(y: Tensor) -> None:
    """One switch for all, one for each column, one for each entry of ``y [4, 3]``, each depending on the last."""
    p = pyro.sample("p", dist.Beta(y.new_tensor(2.0), 2.0))
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
    g = pyro.sample("g", dist.Bernoulli(p), infer=SUMMED_OUT)
    with pyro.plate("columns", 3, dim=-1):
        h = pyro.sample("h", dist.Bernoulli(0.25 + 0.5 * g), infer=SUMMED_OUT)
        with pyro.plate("rows", 4, dim=-2):
            i = pyro.sample("i", dist.Bernoulli(0.75 - 0.25 * h), infer=SUMMED_OUT)
            pyro.sample("obs", dist.Normal(loc[i.long()] + g, 1.0), obs=y)


def nested_discrete_by_hand(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(y.new_tensor(2.0), 2.0))
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
    bit = y.new_tensor([0.0, 1.0])

    def bernoulli(prob: Tensor) -> Tensor:
        return torch.stack([1 - prob, prob], -1).log()

    entry = dist.Normal(loc + bit[:, None, None, None], 1.0).log_prob(y[..., None])  # g r c i
    entry = (bernoulli(0.75 - 0.25 * bit)[:, None, None, None] + entry).logsumexp(-1)  # h g r c
    column = entry.sum(-2) + bernoulli(0.25 + 0.5 * bit).mT[..., None]  # h g c
    total = column.logsumexp(0).sum(-1) + bernoulli(p)
    pyro.factor("evidence", total.logsumexp(0))
