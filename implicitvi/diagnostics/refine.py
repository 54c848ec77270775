"""Improve posterior draws after training, by importance resampling or by a few steps of HMC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitvi.diagnostics.chains import transitions
from implicitvi.diagnostics.posterior import Trained, is_guide, target_of
from implicitvi.diagnostics.relearned_density import LEAST, psis, relearn_density
from implicitvi.diagnostics.stein import DRAWS_PER_DIM
from implicitvi.errors import ModelError, SetupError, check_whole
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.target import Target
from implicitvi.rng import RandomStream

_POOL = 4  # draws of the guide for each draw to return
_PARETO_K = 0.7


@dataclass(frozen=True, eq=False)
class Resampled:
    """A set of draws resampled by importance weights.

    Attributes:
        draws: ``{site: [S, *site shape]}``, constrained; some occur more than once.
        num_pool: Number of draws of the guide that were weighted.
        num_effective: Effective sample size of those, ``1 / Σ w²``.
        k_hat: Pareto shape of the weights; above 0.7 only where they hardly differ and it is meaningless.
    """

    draws: dict[str, Tensor]
    num_pool: int
    num_effective: float
    k_hat: float

    def __str__(self) -> str:
        count, worth = len(next(iter(self.draws.values()))), f"worth {self.num_effective:.0f} of the posterior"
        return f"{count} draws of {self.num_pool}, {worth}; Pareto k {self.k_hat:.2f}"


@dataclass(frozen=True, eq=False)
class Polished:
    """A set of draws after some transitions of a Markov chain that leaves the posterior invariant.

    Attributes:
        draws: ``{site: [S, *site shape]}``, constrained.
        num_steps: Transitions of each draw.
        acceptance: Share of the transitions that were accepted.
    """

    draws: dict[str, Tensor]
    num_steps: int
    acceptance: float

    def __str__(self) -> str:
        count = len(next(iter(self.draws.values())))
        return f"{count} draws after {self.num_steps} transitions, {self.acceptance:.0%} accepted"


def resample(
    guide: Trained, model: Model, *args: Any, num_samples: int = 4000, seed: int = 0, **kwargs: Any
) -> Resampled:
    """Resample a guide's draws by Pareto-smoothed importance weights, through a relearned density.

    The density is that of `relearn_density`, cross-fitted: the network that weights a draw was not trained on it.
    Resampling corrects the shape and the weights of modes that have draws; it cannot add a mode without draws.

    Args:
        guide: A trained guide, or the fit of one.
        model: The Pyro model.
        *args: Its arguments, as in training.
        num_samples: Number of draws to return, from four times as many of the guide.
        seed: Seed of the draws, the relearned density and the choice.
        **kwargs: Its keyword arguments.

    Raises:
        SetupError: ``guide`` has not been trained, is amortized, or is not a guide.
        ModelError: The density cannot be learned well enough to weight draws, or a few draws have most of the weight.

    References:
        Pareto smoothed importance sampling, Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry, 2024.
    """
    check_whole("num_samples", num_samples)
    target, pool = _pool(guide, model, args, kwargs, seed, max(_POOL * num_samples, LEAST), 40)
    count, found = len(pool), relearn_density(pool, target, seed=seed)
    if not found.trusted:
        errors = f"{abs(found.auc_corrected - 0.5):.2f} in AUC and {found.log_mass:+.2f} nats in mass"
        raise ModelError(
            f"The density of the draws cannot be learned well enough to weight them: a fresh adversary is off by "
            f"{errors}, its halves by {found.unsure:.1f} nats. Use fit.polish(), which needs no density."
        )
    log_weights, k_hat = psis(found.log_weights.nan_to_num(-torch.inf))
    weights = log_weights.softmax(0)
    num_effective = 1 / weights.square().sum().item()
    # the tail of weights that hardly differ has a shape too, which is meaningless
    if k_hat > _PARETO_K and num_effective < count / 2:
        raise ModelError(
            f"A few draws have most of the weight: Pareto k must be below {_PARETO_K}, got {k_hat:.2f}, and {count} "
            f"draws are worth {num_effective:.0f}. Train longer, see fit.diagnose(), or use fit.polish()."
        )
    with RandomStream(seed):
        places = (torch.arange(num_samples) + torch.rand(())).double() / num_samples
    chosen = torch.searchsorted(weights.cumsum(0), places).clamp(max=count - 1).to(pool.device)
    return Resampled(target.layout.unpack(pool[chosen])[0], count, num_effective, k_hat)


def polish(
    guide: Trained, model: Model, *args: Any, num_steps: int = 15, num_samples: int = 4000, seed: int = 0, **kwargs: Any
) -> Polished:
    """Move a guide's draws by Hamiltonian Monte Carlo, all chains at once.

    Each transition leaves the posterior invariant and brings the draws nearer to it, in directions that a chain
    explores within ``num_steps``: details of shape, hardly the weights of separate modes.

    Args:
        guide: A trained guide, or the fit of one.
        model: The Pyro model.
        *args: Its arguments, as in training.
        num_steps: Transitions, of six gradients each; as many again adapt the step size.
        num_samples: Number of draws, each a chain.
        seed: Seed of the draws, the momenta and the acceptances.
        **kwargs: Its keyword arguments.

    Raises:
        SetupError: ``guide`` has not been trained, is amortized, or is not a guide.
    """
    check_whole("num_samples", num_samples)
    check_whole("num_steps", num_steps)
    target, pool = _pool(guide, model, args, kwargs, seed, num_samples, DRAWS_PER_DIM)
    u, acceptance = transitions(target, pool[:num_samples], num_steps=num_steps, reference=pool, seed=seed)
    return Polished(target.layout.unpack(u)[0], num_steps, acceptance)


def _pool(
    source: Trained, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int, least: int, per_dim: int
) -> tuple[Target, Tensor]:
    """Return the target of a guide or fit, and ``least`` or more of its draws ``[S, D]``, ``per_dim`` per dimension."""
    guide = getattr(source, "guide", source)
    if not is_guide(guide):
        raise SetupError.must_be("guide", "a fit or an ImplicitGuide", type(source).__name__)
    target = target_of(guide, model, args, kwargs, seed)
    with RandomStream(seed):
        pool = guide.sample_unconstrained(max(least, per_dim * target.layout.dim))
    target.choose(pool)
    return target, pool
