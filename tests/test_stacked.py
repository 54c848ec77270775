"""Restarts that are computed at once are, to rounding, what each would be alone; where that cannot be, they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import implicitvi.inference.svi
from implicitvi import AVBSVI, Fit, ImplicitGuide
from implicitvi.avb.samplers import DenseSampler, GatedSampler, MixtureSampler
from implicitvi.inference.modes import Mode
from implicitvi.inference.objective import Arguments
from implicitvi.inference.stacked import Stack, on_accelerator, stacked
from implicitvi.nn import dense
from implicitvi.rng import derived_seed
from models import normal_normal

pytestmark = pytest.mark.filterwarnings("ignore:. fits DISAGREE:UserWarning")  # so short ones do

DATA = torch.tensor([1.0, 2.0, 0.5])
SMALL: dict[str, Any] = {
    "num_particles": 32,
    "warm_start": 50,
    "max_modes": 1,
    "progress": False,
}


def uniform(y: Tensor) -> None:
    """Has no density where ``mu`` is below 0, without a constraint that says so."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("above", torch.where(mu < 0.0, -torch.inf, 0.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, 5.0), obs=y)


def fitted(
    restarts: int,
    *,
    model: Callable[..., Any] = normal_normal,
    sampler: Any = "gated",
    seed: int = 0,
    num_steps: int = 4,
    **options: Any,
) -> Fit:
    guide = ImplicitGuide(model, sampler=sampler)
    options = SMALL | {"num_steps": num_steps} | options
    return AVBSVI(model, guide, restarts=restarts, seed=seed, **options).run(DATA)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Restarts are stacked on the CPU too; the loops that were made, ``None`` where one was refused."""
    made: list[Any] = []

    def keep(*args: Any) -> Any:
        made.append(stacked(*args))
        return made[-1]

    monkeypatch.setattr(implicitvi.inference.svi, "on_accelerator", lambda arguments: True)
    monkeypatch.setattr(implicitvi.inference.svi, "stacked", keep)
    return made


TOGETHER: dict[str, dict[str, Any]] = {
    "defaults": {},
    "informed": {"informed": True},
    "flow": {"contrast": "flow"},
    "prior": {"contrast": "prior"},
    "Gaussian": {"contrast": "gaussian", "averaging": 0.0},
    "tempered": {"tempering": 0.1},
    "importance-weighted": {"num_importance": 4},
    "f-GAN": {"ratio": "fgan_kl", "adversary_steps": 1},
    "semi-implicit": {"sampler": "semi_implicit"},
    "noise basis": {"sampler": "noise_basis"},
    "dropped draws": {"model": uniform, "warm_start": 0},
}


@pytest.mark.parametrize("case", TOGETHER)
def test_each_restart_is_the_fit_that_it_would_be_alone(case: str, at_once: list[Any]) -> None:
    options = TOGETHER[case]
    together = fitted(3, **options)
    assert len(at_once) == 1 and at_once[0] is not None and len(together.fits) == 3
    alone = [
        fitted(1, seed=seed, **options) for seed in (0, derived_seed(0, 1), derived_seed(0, 2))
    ]
    for one, other in zip(together.fits, alone, strict=True):
        assert one.history.names() == other.history.names()
        for name in one.history.names():
            assert one.history[name] == pytest.approx(other.history[name], rel=1e-4, abs=1e-4)
        assert one.num_steps == other.num_steps == 4 and one.stop_reason == "finished"
        assert one.seconds > one.setup_seconds > 0
    if "model" in options:
        assert min(fit.history["dropped"].max() for fit in together.fits) > 0  # the draws left out
    assert len({fit.losses[0] for fit in together.fits}) == 3


def test_a_second_run_goes_on_at_once(at_once: list[Any]) -> None:
    guide = ImplicitGuide(normal_normal)
    svi = AVBSVI(normal_normal, guide, restarts=2, seed=0, num_steps=3, **SMALL)
    svi.run(DATA)
    fit = svi.run(DATA)
    assert [one.num_steps for one in fit.fits] == [6, 6]
    assert all(at_once) and len(at_once) == 2


def test_an_interrupt_keeps_what_all_have_learned(
    at_once: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from implicitvi.training.lockstep import Lockstep

    step, taken = Lockstep.step, []

    def interrupted(self: Lockstep) -> None:
        step(self)
        taken.append(self)
        if len(taken) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Lockstep, "step", interrupted)
    fit = fitted(2)
    assert [one.stop_reason for one in fit.fits] == ["interrupted"] * 2
    assert [one.num_steps for one in fit.fits] == [2, 2]


class OwnWay(GatedSampler):
    """Draws in a way that a stack does not know."""

    def forward(self, num_samples: int, x: Tensor | None = None) -> Tensor:
        return super().forward(num_samples, x).clamp(-100.0, 100.0)


class Shifted(DenseSampler):
    """Has a number of its own that is in no tensor."""

    made = 0

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        Shifted.made += 1
        self.shift = float(Shifted.made)

    def transform(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        return super().transform(eps, x) + self.shift


class Choosy(nn.Module):
    """Asks for the value of what it sees, which vmap refuses."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.net = dense([latent_dim, 1])

    def forward(self, z: Tensor) -> Tensor:
        scores: Tensor = self.net(z).squeeze(-1)
        return scores if scores.mean() > 0 else 1.0 * scores


class Running(nn.Module):
    """Keeps a running mean of what it sees."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(latent_dim)
        self.net = dense([latent_dim, 1])

    def forward(self, z: Tensor) -> Tensor:
        scores: Tensor = self.net(self.norm(z.flatten(0, -2)).view_as(z)).squeeze(-1)
        return scores


def minibatches(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y[rows])


ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "a sampler's own way": {"sampler": OwnWay},
    "a number of its own": {"sampler": Shifted},
    "a choice by value": {"adversary": Choosy},
    "a running mean": {"adversary": Running},
    "minibatches": {"model": minibatches},
}


@pytest.mark.parametrize("case", ONE_BY_ONE)
def test_what_cannot_be_stacked_is_fitted_one_by_one(case: str, at_once: list[Any]) -> None:
    fit = fitted(2, num_steps=2, **ONE_BY_ONE[case])
    assert at_once == [None]
    assert [one.num_steps for one in fit.fits] == [2, 2]


def test_samplers_that_are_split_or_at_different_steps_are_not_stacked() -> None:
    fits = [AVBSVI(normal_normal, ImplicitGuide(normal_normal), seed=s, **SMALL) for s in (0, 1)]
    for svi in fits:
        svi.setup(DATA)
    arguments = Arguments((DATA,), {})

    def together() -> Any:
        return stacked([svi.problem for svi in fits], [svi.trainer for svi in fits], arguments)

    assert together() is not None
    fits[0].step(DATA)
    assert together() is None
    fits[1].step(DATA)
    assert together() is not None
    scale = torch.full((1, 1), 0.1)
    places = [Mode(1.0, torch.tensor([x]), scale) for x in (-5.0, 5.0)]
    fits[1].problem.avb.sampler = fits[1].guide.split(places)  # type: ignore[union-attr]
    assert isinstance(fits[1].guide.sampler, MixtureSampler) and together() is None


def test_amortized_guides_are_fitted_one_by_one(at_once: list[Any]) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)

    guide = ImplicitGuide(model, amortize="data")
    fit = AVBSVI(model, guide, restarts=2, num_steps=2, seed=0, **SMALL).run(DATA)
    assert at_once == [None] and len(fit.fits) == 2


def test_the_cpu_and_who_watches_take_turns(
    at_once: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted(2, callbacks=[lambda trainer: None])
    assert at_once == []
    monkeypatch.setattr(implicitvi.inference.svi, "on_accelerator", on_accelerator)
    fitted(2)
    assert at_once == []
    assert not on_accelerator(Arguments((DATA, 3), {"x": DATA}))
    assert on_accelerator(Arguments((DATA,), {"x": DATA.to("meta")}))


def test_one_fit_that_is_not_finite_skips_its_turn_alone() -> None:
    """The gradients of the others are those without it."""
    fits = [AVBSVI(normal_normal, ImplicitGuide(normal_normal), seed=s, **SMALL) for s in (0, 1)]
    for svi in fits:
        svi.setup(DATA)
    problems, trainers = [svi.problem for svi in fits], [svi.trainer for svi in fits]
    lockstep = stacked(problems, trainers, Arguments((DATA,), {}))
    assert lockstep is not None
    lockstep.step()
    with torch.no_grad():
        next(iter(fits[0].problem.avb.adversary.parameters())).fill_(torch.nan)  # type: ignore[union-attr]
    before = [p.detach().clone() for p in trainers[1].players[-1].parameters()]
    lockstep.step()
    assert trainers[0].skipped > 0 and trainers[1].skipped == 0
    after = trainers[1].players[-1].parameters()
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
    assert all(p.isfinite().all() for p in after)


def test_a_stack_is_its_networks_with_their_gradients() -> None:
    torch.manual_seed(0)
    networks = [dense([3, 8, 2]).double() for _ in range(4)]
    x = torch.randn(4, 5, 3, dtype=torch.double)
    stack = Stack(networks)
    assert stack.agrees(x)
    found = stack(x)
    for i, network in enumerate(networks):
        assert torch.allclose(found[i], network(x[i]))
        parameters = list(network.parameters())
        ours = torch.autograd.grad(found[i].square().sum(), parameters, retain_graph=True)
        theirs = torch.autograd.grad(network(x[i]).square().sum(), parameters)
        assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad():
        networks[2][0].weight.add_(1.0)  # type: ignore[operator, union-attr]
    assert torch.allclose(stack(x)[2], networks[2](x[2]))  # it follows its networks
