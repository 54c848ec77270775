"""Every model of the zoo is scored in a batch as in a loop and then trained, or refused with the documented words."""

from __future__ import annotations

import warnings
from copy import deepcopy

import pyro
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.errors import ModelError
from implicitvi.pyro_model.log_joint import FAST, LogJoint
from zoo import ZOO, Animal

FITTED = [animal for animal in ZOO if animal.refused is None]
REFUSED = [animal for animal in ZOO if animal.refused is not None]


def named(animals: list[Animal]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("animal", animals, ids=[animal.name for animal in animals])


def made(animal: Animal, dtype: torch.dtype = torch.float64) -> LogJoint:
    guide = ImplicitGuide(animal.model).setup(*animal.args(dtype))
    return LogJoint(animal.model, guide.layout)


def gradients(scores: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    used = (scores + 0 * leaves[0].sum(-1)).nan_to_num(0.0, 0.0, 0.0)
    return torch.autograd.grad(used.sum(), leaves)


def test_the_zoo_is_large_and_its_names_are_unique() -> None:
    assert len(FITTED) > 80 and len({animal.name for animal in ZOO}) == len(ZOO)


@pytest.mark.uses_param_store
@named(FITTED)
def test_batched_equals_looped(animal: Animal) -> None:
    """Compare values and gradients, for parameters too, in float64, at points new to the choice of the mode."""
    args = animal.args(torch.float64)
    log_joint = made(animal)
    u = torch.randn(7, log_joint.layout.dim).double().requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model is scored one particle at a time")
        log_joint.choose(0.5 * torch.randn(3, log_joint.layout.dim).double(), *args)
    assert log_joint.mode in (FAST if animal.mode == "fast" else [animal.mode]), log_joint.reason
    leaves = [u, *(value for _, value in pyro.get_param_store().named_parameters())]
    with torch.random.fork_rng():
        batched = log_joint(u, *args)
    with torch.random.fork_rng():
        looped = log_joint.loop(u, *args)
    torch.testing.assert_close(batched, looped, rtol=1e-8, atol=1e-8)
    assert batched.isfinite().sum() > 2
    for fast, slow in zip(gradients(batched, *leaves), gradients(looped, *leaves), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)
        assert fast.isfinite().all()


@named(REFUSED)
def test_a_model_that_cannot_be_fitted_is_refused_by_name(animal: Animal) -> None:
    with pytest.raises(ModelError, match=f"(?s){animal.refused}"):
        log_joint = made(animal)
        log_joint(torch.randn(3, log_joint.layout.dim).double(), *animal.args(torch.float64))


def trained(animal: Animal, dtype: torch.dtype, num_steps: int) -> AVBSVI:
    """Run the first steps of a fit of twenty."""
    svi = AVBSVI(
        animal.model, ImplicitGuide(animal.model), num_steps=20, num_particles=16, warm_start=10, progress=False, seed=0
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model is scored one particle at a time")
        for _ in range(num_steps):
            svi.step(*animal.args(dtype))
    return svi


@pytest.mark.slow
@pytest.mark.uses_param_store
@pytest.mark.filterwarnings("ignore:.*leave the posterior:UserWarning")
@named(FITTED)
@pytest.mark.filterwarnings("ignore:The start of the fit has not arrived")  # of the improper posteriors
def test_it_trains_draws_and_resumes(animal: Animal) -> None:
    """Draws, predictions, a state that goes round, equal losses for equal seeds, and single precision."""
    args = animal.args(torch.float64)
    svi = trained(animal, torch.float64, 20)
    losses = torch.tensor(svi.history["sampler"])
    assert losses.isfinite().all()
    draws = svi.guide.sample(3)
    assert {n: tuple(v.shape) for n, v in draws.items()} == {
        site.name: (3, *site.shape) for site in svi.guide.layout.sites
    }
    assert all(value.isfinite().all() for value in draws.values())
    if animal.name != "ImproperUniform":  # Pyro's Predictive draws from every prior once
        predicted = Predictive(animal.model, guide=svi.guide, num_samples=3)(*args)
        assert all(predicted[name].isfinite().all() for name in draws)
        assert all(len(value) == 3 for value in predicted.values())
    state = deepcopy(svi.state_dict())
    following = svi.step(*args)
    svi.load_state_dict(state)
    assert svi.step(*args) == following

    pyro.clear_param_store()
    second = trained(animal, torch.float64, 4)
    torch.testing.assert_close(torch.tensor(second.history["sampler"]), losses[:4], rtol=0, atol=0)
    second.guide.load_state_dict(svi.guide.state_dict())

    pyro.clear_param_store()
    single = trained(animal, torch.float32, 4)
    assert all(value.isfinite().all() for value in single.guide.sample(3).values())
    assert single.guide.sampler.loc.dtype == torch.float32
