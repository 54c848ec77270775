"""Simulation-based calibration passes what is exact and names what is not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import models
from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.diagnostics.sbc import LOG_LIKELIHOOD, Calibration, sbc, simulate, uniformity
from implicitvi.errors import ModelError, OptionError
from models import half_line, no_latent, normal_normal

BLANK = torch.zeros(5)


def conjugate(scale: float = 1.0, shift: float = 0.0) -> Callable[[Any, dict[str, Tensor]], Any]:
    """The posterior of `normal_normal`, N(Σy / 6, 1 / 6), its scale and place spoiled."""

    def draws(_: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
        sd = 6**-0.5
        return {"mu": data["obs"].sum() / 6 + sd * (shift + scale * torch.randn(99))}

    return draws


def checked(make_guide: Any, seed: int = 1) -> Calibration:
    return sbc(normal_normal, make_guide, BLANK, num_datasets=200, seed=seed)


def test_an_exact_posterior_passes() -> None:
    """Fails for 3 of 100 seeds."""
    result = checked(conjugate())
    assert result.ok
    assert set(result.ranks) == {"mu", LOG_LIKELIHOOD}
    lower, upper = result.band()
    inside = (result.difference("mu") >= lower) & (result.difference("mu") <= upper)
    assert inside.all() and "calibrated: 200 datasets" in str(result)


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (conjugate(scale=0.7), "too narrow"),
        (conjugate(scale=1.5), "too wide"),
        (conjugate(shift=0.5), "too high"),
        (conjugate(shift=-0.5), "too low"),
    ],
)
def test_a_spoiled_posterior_fails_and_is_described(spoiled: Any, words: str) -> None:
    """A scale of 0.7 is caught with each of 20 seeds."""
    result = checked(spoiled)
    assert not result.ok
    assert "NOT calibrated" in str(result) and words in str(result)


def test_only_the_log_likelihood_catches_the_prior() -> None:
    result = checked(lambda _, data: {"mu": torch.randn(99)})
    assert result.p_values["mu"] > 0.025 > result.p_values[LOG_LIKELIHOOD]


def test_quantities_of_ones_own_are_ranked() -> None:
    result = sbc(
        normal_normal,
        conjugate(),
        BLANK,
        num_datasets=20,
        quantities=lambda latents, data: {"square": (latents["mu"] - data["obs"].mean()).square()},
        log_likelihood=False,
    )
    assert set(result.ranks) == {"mu", "square"}


def test_p_values_of_uniform_ranks_are_uniform() -> None:
    """1,000 sets: the shares below 0.05 and 0.5 within five standard errors; ranks of 0.7 of the scale are not."""
    generator = torch.Generator().manual_seed(1)
    sets = torch.randint(100, (1000, 100), generator=generator)
    p = torch.tensor([uniformity(ranks, 99) for ranks in sets])
    for level in (0.05, 0.5):
        share = (p <= level).double().mean().item()
        assert abs(share - level) < 5 * (level * (1 - level) / 1000) ** 0.5


def test_a_fitted_guide_can_be_checked() -> None:
    """A guide that has not been trained beyond its Gaussian start, which is exact here."""

    def fitted(model: Any, data: dict[str, Tensor]) -> ImplicitGuide:
        guide = ImplicitGuide(model)
        svi = AVBSVI(model, guide, num_steps=1, warm_start=300, max_modes=1, progress=False)
        svi.setup(BLANK)
        return guide

    result = sbc(normal_normal, fitted, BLANK, num_datasets=10)
    assert result.ok and result.num_datasets == 10


def test_the_fit_of_a_guide_and_arrays_are_taken_too() -> None:
    """A fit stands for its guide, draws of a chain may be numpy's: the ranks are those of the tensors."""

    def fitted(_: Any, data: dict[str, Tensor]) -> Any:
        draws = conjugate()(None, data)
        return SimpleNamespace(guide=SimpleNamespace(sample=lambda count: draws))

    def arrays(_: Any, data: dict[str, Tensor]) -> dict[str, Any]:
        return {name: value.numpy() for name, value in conjugate()(None, data).items()}

    ranks = [sbc(normal_normal, make, BLANK, num_datasets=10).ranks["mu"] for make in (conjugate(), fitted, arrays)]
    assert torch.equal(ranks[0], ranks[1]) and torch.equal(ranks[0], ranks[2])
    assert len(set(ranks[0].tolist())) > 3


@pytest.mark.parametrize(
    ("model", "by_hand", "shape"),
    [
        (models.mixture, models.mixture_by_hand, (6,)),
        (models.hidden_markov, models.hidden_markov_by_hand, (4,)),
        (models.nested_discrete, models.nested_discrete_by_hand, (4, 3)),
    ],
)
def test_discrete_sites_are_simulated_and_summed_out(
    model: Callable[..., Any], by_hand: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    """Nobody is asked for draws of them, and the log likelihood ranks as the one that is summed by hand."""

    def prior(*_: Any) -> dict[str, Tensor]:
        pairs = [simulate(model, torch.zeros(shape))[0] for _ in range(9)]
        return {name: torch.stack([pair[name] for pair in pairs]) for name in pairs[0]}

    def summed(latents: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
        y = torch.stack(list(data.values())).reshape(shape)
        scores = []
        for i in range(10):
            at = pyro.condition(by_hand, {name: value[i] for name, value in latents.items()})
            trace = poutine.trace(at).get_trace(y)
            scores.append(trace.log_prob_sum(lambda name, _: name in ("obs", "evidence")))
        return {"by hand": torch.stack(scores)}

    ranks = sbc(model, prior, torch.zeros(shape), num_datasets=10, num_draws=9, quantities=summed).ranks
    assert not {"k", "x_0", "g", "h", "i"} & {name.split("[")[0] for name in ranks}
    assert torch.equal(ranks[LOG_LIKELIHOOD], ranks["by hand"])
    assert len(set(ranks["by hand"].tolist())) > 1


def test_the_same_seed_gives_the_same_ranks_and_leaves_the_callers_alone() -> None:
    before = torch.get_rng_state()
    first, second = (sbc(normal_normal, conjugate(), BLANK, num_datasets=10, seed=4) for _ in range(2))
    assert torch.equal(first.ranks["mu"], second.ranks["mu"])
    assert torch.equal(before, torch.get_rng_state())


def test_data_are_drawn_anew_and_latents_with_them() -> None:
    torch.manual_seed(0)
    pairs = [simulate(normal_normal, BLANK) for _ in range(500)]
    mu = torch.stack([latents["mu"] for latents, _ in pairs])
    y = torch.stack([data["obs"] for _, data in pairs])
    assert abs(mu.std().item() - 1) < 5 / 1000**0.5
    assert abs((y.mean(1) - mu).std().item() - 5**-0.5) < 5 * 5**-0.5 / 1000**0.5


def improper(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("obs", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sbc(improper, conjugate(), BLANK), ModelError, "proper prior"),
        (lambda: sbc(half_line, conjugate(), BLANK), ModelError, "'positive' is a factor"),
        (lambda: sbc(no_latent, conjugate(), BLANK), ModelError, "no latent"),
        (lambda: checked(lambda m, d: {"nu": torch.zeros(99)}), ModelError, "site 'mu'"),
        (lambda: checked(lambda m, d: {"mu": torch.zeros(50)}), ModelError, "num_draws of each"),
        (lambda: sbc(normal_normal, conjugate(), BLANK, num_datasets=1), OptionError, "num_data"),
        (lambda: checked(lambda m, d: None), OptionError, "a function that returns .* got NoneType. .*return guide"),
    ],
)
def test_misuse_is_named(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
