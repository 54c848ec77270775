"""Better draws from a fit, at the price of a few hundred looks at the model: weighed, or moved on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from implicitvi.diagnostics.chains import transitions
from implicitvi.diagnostics.posterior import TrainedGuide, is_guide, target_of
from implicitvi.diagnostics.relearned_density import LEAST, psis, relearn_density
from implicitvi.diagnostics.stein import FRAME
from implicitvi.errors import ModelError, SetupError, check_at_least
from implicitvi.rng import RandomStream

_POOL = 4  # draws of the guide for each that is kept
_PARETO_K = 0.7


class Fitted(Protocol):
    """What has a trained guide: a `Fit`."""

    guide: TrainedGuide


@dataclass(frozen=True, eq=False)
class Resampled:
    """Draws of a fit chosen again by importance weights.

    Attributes:
        draws: ``{site: [S, *site shape]}``, constrained; some occur more than once.
        num_pool: Draws of the guide that they were chosen from.
        num_effective: As many independent draws of the posterior would be worth as much as those, ``1 / Σ w²``.
        k_hat: Pareto shape of the weights; above 0.7 only where they hardly differ, and it says nothing.
    """

    draws: dict[str, Tensor]
    num_pool: int
    num_effective: float
    k_hat: float

    def __str__(self) -> str:
        return (
            f"{len(next(iter(self.draws.values())))} draws of {self.num_pool}, worth {self.num_effective:.0f} of the "
            f"posterior; Pareto k {self.k_hat:.2f}"
        )


@dataclass(frozen=True, eq=False)
class Polished:
    """Draws of a fit after some transitions of a Markov chain that leaves the posterior as it is.

    Attributes:
        draws: ``{site: [S, *site shape]}``, constrained.
        num_steps: Transitions of each.
        acceptance: Share of the transitions that were accepted.
    """

    draws: dict[str, Tensor]
    num_steps: int
    acceptance: float

    def __str__(self) -> str:
        return (
            f"{len(next(iter(self.draws.values())))} draws after {self.num_steps} transitions, {self.acceptance:.0%} "
            "accepted"
        )


def resample(
    guide: TrainedGuide | Fitted,
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = 4000,
    seed: int = 0,
    **kwargs: Any,
) -> Resampled:
    """Choose among a guide's draws by their importance weights, Pareto-smoothed, through a density learned afresh.

    The density is that of `relearned_density`, cross-fitted: no draw is weighed by a network that was trained
    on it. It corrects shape and the weights of modes that are there; what has no draws it cannot bring.

    Args:
        guide: A guide that has been trained, or the fit of one.
        model: The Pyro model.
        *args: Its arguments, as in training.
        num_samples: Draws to return, of four times as many of the guide.
        seed: Of the draws, the fresh adversary and the choice.
        **kwargs: Its keyword arguments.

    Raises:
        SetupError: The guide has not been trained, or is amortized, or is none.
        ModelError: The density cannot be learned well enough to weigh draws by, or a few have most of the weight.

    References:
        Pareto smoothed importance sampling, Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry, 2024.
    """
    check_at_least("num_samples", num_samples, 1)
    guide = _guide_of(guide)
    density = target_of(guide, model, args, kwargs, seed)
    count = max(_POOL * num_samples, LEAST, 40 * density.layout.dim)
    with RandomStream(seed):
        pool = guide.sample_unconstrained(count)
    density.choose(pool)
    found = relearn_density(pool, density, seed=seed)
    if not found.trusted:
        raise ModelError(
            "the density of the draws cannot be learned well enough to weigh them by",
            got=f"a fresh adversary {abs(found.auc_corrected - 0.5):.2f} off in AUC and {found.log_mass:+.2f} nats in "
            f"mass, with halves {found.unsure:.1f} nats apart",
            do="Use fit.polish(), which needs no density.",
        )
    log_weights, k_hat = psis(found.log_weights.nan_to_num(-torch.inf))
    weights = log_weights.softmax(0)
    num_effective = 1 / weights.square().sum().item()
    # of weights that hardly differ the tail has a shape too, which says nothing
    if k_hat > _PARETO_K and num_effective < count / 2:
        raise ModelError(
            "a few draws have most of the weight: the fit misses mass, or its density is not known well enough",
            got=f"Pareto k {k_hat:.2f}, and {count} draws worth {num_effective:.0f} of the posterior",
            expected=f"Pareto k below {_PARETO_K}",
            do="Train longer, look at fit.diagnose(), or use fit.polish(), which needs no weights.",
        )
    with RandomStream(seed):
        places = (torch.arange(num_samples) + torch.rand(())).double() / num_samples
    chosen = torch.searchsorted(weights.cumsum(0), places).clamp(max=count - 1)
    return Resampled(
        draws=density.layout.unpack(pool[chosen.to(pool.device)])[0],
        num_pool=count,
        num_effective=num_effective,
        k_hat=k_hat,
    )


def polish(
    guide: TrainedGuide | Fitted,
    model: Callable[..., Any],
    *args: Any,
    num_steps: int = 15,
    num_samples: int = 4000,
    seed: int = 0,
    **kwargs: Any,
) -> Polished:
    """Move a guide's draws on by Hamiltonian Monte Carlo, all chains at once.

    Each transition leaves the posterior as it is and brings the draws nearer to it, in directions in which a chain gets
    anywhere within ``num_steps``: details of shape, hardly the weights of modes that lie apart.

    Args:
        guide: A guide that has been trained, or the fit of one.
        model: The Pyro model.
        *args: Its arguments, as in training.
        num_steps: Transitions, of six gradients each; as many again find the step size.
        num_samples: Draws, each a chain.
        seed: Of the draws, the momenta and the acceptances.
        **kwargs: Its keyword arguments.

    Raises:
        SetupError: The guide has not been trained, or is amortized, or is none.
    """
    check_at_least("num_samples", num_samples, 1)
    guide = _guide_of(guide)
    density = target_of(guide, model, args, kwargs, seed)
    with RandomStream(seed):
        pool = guide.sample_unconstrained(max(num_samples, FRAME * density.layout.dim))
    density.choose(pool)
    u, acceptance = transitions(density, pool[:num_samples], num_steps=num_steps, reference=pool, seed=seed)
    return Polished(density.layout.unpack(u)[0], num_steps, acceptance)


def _guide_of(source: TrainedGuide | Fitted) -> TrainedGuide:
    guide = getattr(source, "guide", source)
    if not is_guide(guide):
        raise SetupError(
            "there are no draws to refine", got=type(source).__name__, expected="a fit or an ImplicitGuide"
        )
    return guide
