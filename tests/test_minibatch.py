"""Indices of subsampled plates are uniform without replacement, and the same for all particles."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import models
from implicitvi import AVBSVI, ImplicitGuide, diagnose
from implicitvi.errors import ModelError
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.subsampling import PinnedSubsample, draw_subsample, seeded


@pytest.mark.parametrize(("size", "count"), [(5, 2), (6, 3), (5, 3), (3, 3)])
def test_every_set_is_equally_likely(size: int, count: int) -> None:
    """Check each frequency in 20 000 draws, over all sets, to 5 standard errors.

    Fails by chance less than once in 100 000 runs. Planted: keeping the lowest of a larger set of distinct draws,
    or filling up with the first numbers that are missing, is 10 and more standard errors off.
    """
    draws = 20_000
    seen = Counter(tuple(draw_subsample(size, count).tolist()) for _ in range(draws))
    sets = list(torch.combinations(torch.arange(size), count).tolist())
    assert set(seen) == {tuple(each) for each in sets}
    share = 1 / len(sets)
    error = (draws * share * (1 - share)) ** 0.5
    assert max(abs(times - draws * share) for times in seen.values()) <= 5 * error


def test_numbers_are_distinct_and_in_range() -> None:
    for size, count in ((1, 1), (10**6, 1000), (1000, 500), (1000, 501), (7, 0)):
        drawn = draw_subsample(size, count)
        assert drawn.shape == drawn.unique().shape == (count,)
        assert drawn.dtype == torch.int64
        assert count == 0 or (drawn.min() >= 0 and drawn.max() < size)


def test_a_plate_keeps_its_indices_within_and_not_beyond() -> None:
    minibatch = PinnedSubsample()
    seen = []

    def model() -> None:
        with pyro.plate("rows", 1000, subsample_size=5) as index:
            seen.append(index.tolist())
        with pyro.plate("all", 3) as index:
            assert index.tolist() == [0, 1, 2]
        with pyro.plate("given", 10, subsample=torch.tensor([4, 2])) as index:
            assert index.tolist() == [4, 2]

    for _ in range(2):
        with minibatch.pinned():
            minibatch(model)()
            minibatch(model)()
    with minibatch.pinned({"rows": torch.arange(5)}):
        minibatch(model)()
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert seen[4] == [0, 1, 2, 3, 4]
    assert list(minibatch.plates) == ["rows"]
    minibatch(models.global_latents_in_minibatches)(torch.zeros(3))
    assert len(minibatch.draw("data")) == 2


DRAWN: dict[str, Callable[[], Tensor]] = {
    "torch": lambda: torch.randperm(100)[:10],
    "numpy": lambda: torch.as_tensor(np.random.permutation(100)[:10]),
    "python": lambda: torch.tensor(random.sample(range(100), 10)),
    "given": lambda: torch.arange(10),
}
Y = torch.linspace(-1, 3, 100).double()


def draws_itself(draw: Callable[[], Tensor]) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
        index = draw()
        with pyro.plate("rows", len(y), subsample=index):
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=y[index])

    return model


@pytest.mark.parametrize("how", DRAWN)
def test_a_minibatch_that_the_model_draws_is_shared_by_all_particles_and_known(how: str) -> None:
    """The mean over many calls is the density of all data; a fixed index is no minibatch, and scaled."""
    model = draws_itself(DRAWN[how])
    u = torch.tensor([[0.0], [0.5]]).double()
    with seeded():
        log_joint = LogJoint(model, ImplicitGuide(model).setup(Y).layout)
        scores = torch.stack([log_joint(u, Y) for _ in range(400)])
    assert log_joint.mode != "loop", log_joint.reason
    rows = Y[:10] if how == "given" else Y
    exact = dist.Normal(u, 1.0).log_prob(rows).sum(1) * (100 / len(rows)) + dist.Normal(0.0, 1.0).log_prob(u[:, 0])
    if how == "given":
        assert log_joint.minibatches == {}
        torch.testing.assert_close(scores, exact.expand(400, 2))
    else:
        assert log_joint.minibatches == {"rows": (100, 10)}
        error = scores.std(0) / 20
        assert ((scores.mean(0) - exact).abs() < 5 * error).all() and (error > 0).all()


@pytest.mark.parametrize("where", ["rows", "obs", "lik"])
def test_draws_are_not_diagnosed_with_a_minibatch_that_the_model_draws(where: str) -> None:
    def unplated(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
        part = y[torch.randint(100, (10,))]
        if where == "lik":
            pyro.factor("lik", 10 * dist.Normal(mu, 1.0).log_prob(part).sum())
        else:
            with pyro.plate("ten", 10), pyro.poutine.scale(scale=10.0):
                pyro.sample("obs", dist.Normal(mu, 1.0), obs=part)

    model = draws_itself(DRAWN["torch"]) if where == "rows" else unplated
    with pytest.raises(ModelError, match=f"the data of '{where}' must be whole(?s:.*)model-draws-its-own-minibatch"):
        diagnose({"mu": torch.randn(200).double()}, model, Y, num_samples=200)


@pytest.mark.parametrize("features", [lambda y: y[:, None], None])
def test_features_of_one_minibatch_do_not_meet_the_density_of_another(features: Callable[..., Tensor] | None) -> None:
    def model(y: Tensor) -> None:
        index = torch.randperm(100)[:10]
        with pyro.plate("rows", len(y), subsample=index):
            z = pyro.sample("z", dist.Normal(0 * y[index], 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y[index])

    guide = ImplicitGuide(model, amortize="rows" if features is None else {"rows": features})
    with pytest.raises(ModelError, match="data of 'rows' must be those whose features.*subsample_size=10"):
        AVBSVI(model, guide, progress=False, seed=0).run(Y)
