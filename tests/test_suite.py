"""The targets of the accuracy suite are the posteriors that their reference draws come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from suite.synthetic import WEIGHTS
from suite.target import Missing, Target
from suite.targets import TARGETS

NUM = 10_000


def target(name: str) -> Target:
    try:
        # the draws of the regression take longest: ten seconds for 10 000
        return replace(TARGETS[name](), num_reference=2000 if name == "logistic_22" else NUM)
    except Missing as missing:
        pytest.skip(str(missing))


def stein_errors(target: Target) -> tuple[Tensor, Tensor]:
    """``E[score]`` ``[D]`` and ``E[u score^T] + I`` ``[D, D]`` over the reference, in their standard errors.

    Both are 0 for any density that vanishes at infinity, if the draws are its own: integrate by parts.
    """
    u = target.unconstrain(target.reference.float())
    _, score = target.score(u)
    u, score = (u - u.mean(0)).double(), score.double()
    products = u[:, :, None] * score[:, None, :] + torch.eye(u.shape[1]).double()
    return in_errors(score), in_errors(products)


def in_errors(values: Tensor) -> Tensor:
    return values.mean(0) * len(values) ** 0.5 / values.std(0)


@pytest.mark.parametrize("name", TARGETS)
def test_the_reference_is_of_the_model(name: str) -> None:
    """Stein's identities hold."""
    first, second = stein_errors(target(name))
    assert first.abs().max() < 5
    assert second.abs().max() < 5


@pytest.mark.parametrize("name", TARGETS)
def test_coordinates_lead_back(name: str) -> None:
    """From the coordinates of judgement to the sites and back; and as many of them as the model has latents."""
    made = target(name)
    x = made.reference[:200]
    values, _ = made.layout.unpack(made.unconstrain(x))
    torch.testing.assert_close(made.compare(values), x, rtol=1e-5, atol=1e-4)
    assert x.shape[1] == made.layout.dim


def log_evidence(target: Target) -> float:
    """The log of the model's integral by bridge sampling between the reference and a Gaussian mixture fitted to it.

    References:
        Simulating ratios of normalizing constants via a simple identity: a theoretical exploration, Xiao-Li Meng, Wing
        Hung Wong, 1996; the optimal bridge, by iteration.
    """
    from sklearn.mixture import GaussianMixture

    u = target.unconstrain(target.reference)
    half = len(u) // 2
    proposal = GaussianMixture(8, random_state=0).fit(u[:half].numpy())
    theirs, _ = proposal.sample(half)
    theirs = theirs[torch.randperm(half).numpy()]  # they come sorted by component

    def log_ratio(points: Tensor) -> Tensor:
        density, _ = target.score(points)
        return density.double() - torch.tensor(proposal.score_samples(points.double().numpy()))

    at_p, at_q = log_ratio(u[half:].float()), log_ratio(torch.tensor(theirs).float())
    log_z = at_q.median()
    for _ in range(200):
        upper = (at_q - (at_q - log_z).exp().add(1).log()).logsumexp(0)
        lower = -(at_p - log_z).exp().add(1).log()
        log_z = upper - lower.logsumexp(0)
    return float(log_z)


@pytest.mark.parametrize("name", TARGETS)
def test_the_evidence_is_the_known_one(name: str) -> None:
    """The reference's own parametrisation has the same integral: no constant of a prior is forgotten."""
    made = target(name)
    if made.log_evidence is None:
        pytest.skip("the evidence is not known")
    assert log_evidence(made) == pytest.approx(made.log_evidence, abs=0.06)


def spoilt(name: str, model: Callable[..., Any]) -> Target:
    return replace(TARGETS[name](), model=model, num_reference=NUM)


def wide_funnel() -> None:
    """The funnel with what should be a variance for a standard deviation."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    scale = v.exp()[..., None].expand(*v.shape, 9)
    pyro.sample("x", dist.Normal(torch.zeros(9), scale).to_event(1))


def shifted_regression(x: Tensor, y: Tensor) -> None:
    """The regression with a tenth of the prior's scale."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(22), 1.0).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=beta @ x.mT).to_event(1), obs=y)


@pytest.mark.parametrize(("name", "model"), [("funnel_10", wide_funnel), ("logistic_22", shifted_regression)])
def test_a_wrong_model_is_caught(name: str, model: Callable[..., Any]) -> None:
    made = spoilt(name, model)
    assert max(each.abs().max() for each in stein_errors(made)) > 8


@pytest.mark.parametrize("name", ["mixture_2_modes_10d", "mixture_4_modes_10d"])
def test_modes_are_told_apart(name: str) -> None:
    """The share of each mode is its weight, within 5 standard errors and the overlap of neighbours (1.7 %)."""
    made = target(name)
    assert made.modes is not None
    shares = made.modes(made.reference).bincount() / NUM
    weights = torch.tensor(WEIGHTS[len(shares)])
    assert (shares - weights).abs().max() < 5 * 0.5 / NUM**0.5


def test_missing_data_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMPLICITVI_DATA", raising=False)
    with pytest.raises(Missing, match="IMPLICITVI_DATA"):
        TARGETS["kidiq"]()
