"""`to_arviz`: groups, shapes, numbers, and the call shapes of both ArviZ generations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import models
from implicitvi import AVBSVI, ImplicitGuide, to_arviz
from implicitvi.errors import ModelError
from implicitvi.export import _container

ARGS = (models.SIGMA, models.Y)


@pytest.fixture(scope="module")
def guide() -> ImplicitGuide:
    guide = ImplicitGuide(models.eight_schools)
    options: dict[str, Any] = {"num_steps": 3, "num_particles": 16, "warm_start": 5}
    AVBSVI(models.eight_schools, guide, **options, seed=0, progress=False).run(*ARGS)
    return guide


def test_groups_shapes_and_dims(guide: ImplicitGuide) -> None:
    idata = to_arviz(guide, models.eight_schools, *ARGS, num_samples=40)
    assert set(idata.groups()) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "observed_data",
        "sample_stats",
    }
    assert idata.posterior["eta"].dims == ("chain", "draw", "schools")
    assert idata.posterior["mu"].shape == (1, 40)
    assert set(idata.posterior) == {"mu", "tau", "eta"}
    assert idata.posterior_predictive["obs"].shape == (1, 40, 8)
    assert np.array_equal(idata.observed_data["obs"], models.Y.numpy())
    assert idata.attrs["inference_library"] == "implicitvi"
    given = to_arviz(
        guide,
        models.eight_schools,
        *ARGS,
        num_samples=5,
        coords={"school": list("ABCDEFGH")},
        dims={"eta": ["school"]},
    )
    assert list(given.posterior["eta"].coords["school"].values) == list("ABCDEFGH")


def test_numbers_are_those_of_the_model(guide: ImplicitGuide) -> None:
    """Log likelihood and log joint by hand at the exported draws; the learned density and weight add up."""
    idata = to_arviz(guide, models.eight_schools, *ARGS, num_samples=40)
    mu, tau, eta = (torch.tensor(idata.posterior[name].values[0]) for name in ("mu", "tau", "eta"))
    mean = mu[:, None] + tau[:, None] * eta
    likelihood = dist.Normal(mean, models.SIGMA).log_prob(models.Y)
    np.testing.assert_allclose(idata.log_likelihood["obs"].values[0], likelihood, rtol=1e-4)
    standard = dist.Normal(0.0, 1.0)
    prior = standard.log_prob(mu) + standard.log_prob(tau) + standard.log_prob(eta).sum(-1)
    stats = idata.sample_stats
    np.testing.assert_allclose(stats["lp"].values[0], prior + likelihood.sum(-1), rtol=1e-4)
    np.testing.assert_allclose(  # every site is unconstrained here, so log|J| is 0
        stats["log_weight"], stats["lp"] - stats["log_q_learned"], rtol=1e-4, atol=1e-4
    )


def test_arviz_reads_it(guide: ImplicitGuide) -> None:
    idata = to_arviz(guide, models.eight_schools, *ARGS, num_samples=200)
    assert set(az.summary(idata, kind="stats").index) >= {"mu", "tau", "eta[0]"}
    assert np.isfinite(az.loo(idata, reff=1.0).elpd_loo)


def test_the_log_likelihood_is_not_scaled() -> None:
    scaled = pyro.poutine.scale(models.normal_normal, 25.0)
    y = torch.randn(5)
    idata = to_arviz(ImplicitGuide(scaled).setup(y), scaled, y, num_samples=6)
    assert idata.log_likelihood["obs"].min() > -20  # a factor of 25 would show


def test_a_minibatch_is_refused() -> None:
    """Each group would look at other rows."""
    y = torch.randn(50)
    guide = ImplicitGuide(models.global_latents_in_minibatches).setup(y)
    with pytest.raises(ModelError, match="minibatch of plate 'data'; got 2 of 50"):
        to_arviz(guide, models.global_latents_in_minibatches, y, num_samples=6)


def test_without_observations_or_adversary_there_are_fewer_groups() -> None:
    def prior(y: Tensor | None = None) -> None:
        pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))

    idata = to_arviz(ImplicitGuide(prior).setup(), prior, num_samples=4)
    assert set(idata.groups()) == {"posterior", "sample_stats"}
    assert set(idata.sample_stats) == {"lp"}


@pytest.mark.parametrize("release", ["0.23.4", "1.0.0", "1.3.0"])
def test_each_generation_of_arviz_gets_its_call(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nested groups since 1.0, one keyword a group before; the other shape raises nothing there and is wrong."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def from_dict(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    fake = SimpleNamespace(__version__=release, from_dict=from_dict)
    monkeypatch.setitem(__import__("sys").modules, "arviz", fake)
    groups = {"posterior": {"mu": np.zeros((1, 3))}}
    _container(groups, {"a": [1]}, {"mu": ["a"]})
    (args, kwargs), *rest = calls
    assert not rest
    assert kwargs["coords"] == {"a": [1]} and kwargs["dims"] == {"mu": ["a"]}
    if release < "1":
        assert args == () and "mu" in kwargs["posterior"]
    else:
        assert args == (groups,) and "posterior" not in kwargs
