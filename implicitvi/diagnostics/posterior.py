"""Protocols of the trained guides and fits that a diagnosis can judge, and the density that they approximate."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from implicitvi.diagnostics.agreement import Agreement
from implicitvi.errors import ModelError, SetupError
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.target import Target
from implicitvi.rng import RandomStream
from implicitvi.training import History


class TrainedGuide(Protocol):
    """A guide whose draws can be judged, such as an `ImplicitGuide`."""

    sampler: Any
    amortization: Any

    @property
    def is_set_up(self) -> bool:
        """True once the guide has its networks."""

    @property
    def has_log_density(self) -> bool:
        """True if the guide has a learned log density."""

    @property
    def layout(self) -> SiteLayout:
        """The latent sites on the vector ``u``."""

    @property
    def num_modes(self) -> int:
        """Number of far modes with a sampler of their own."""

    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw ``{site: [S, *site shape]}``."""

    def sample_unconstrained(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """Draw ``u [S, D]``."""

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Return the distribution of ``u [D]``."""


@runtime_checkable
class TrainedFit(Protocol):
    """A finished run with its record, such as a `Fit`."""

    guide: TrainedGuide
    history: History
    num_steps: int
    skipped: int  # turns
    stop_reason: str
    agreement: Agreement | None  # of restarts


Trained = TrainedGuide | TrainedFit


def is_guide(source: object) -> TypeGuard[TrainedGuide]:
    """Return whether ``source`` is a guide, trained or not, without reading its properties."""
    return hasattr(type(source), "sample_unconstrained")


def target_of(guide: TrainedGuide, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> Target:
    """Return the posterior density that a guide approximates.

    Raises:
        SetupError: The guide has not been trained, or is amortized.
        ModelError: The model has other latent sites.
    """
    if not guide.is_set_up:
        raise SetupError("The guide has not been trained. Train it with AVBSVI first.")
    if guide.amortization is not None:
        do = "Diagnose draws at the model's arguments: diagnose(guide.sample(2000, ...), model, ...)."
        raise SetupError(f"An amortized guide has many posteriors, and this needs one. {do}")
    with RandomStream(seed):
        first = {name: value[0] for name, value in guide.sample(1).items()}
    target = Target.of(model, args, kwargs, first, seed)
    mine, theirs = ({site.name: site.shape for site in each.sites} for each in (guide.layout, target.layout))
    if mine != theirs:
        do = "Pass the model and the arguments with which the guide was trained."
        raise ModelError(f"The model does not have the guide's latent sites {mine}, got {theirs}. {do}")
    return target


def thin(u: Tensor, count: int) -> Tensor:
    """Return at most ``count`` evenly spaced rows of ``u [S, D]``."""
    return u if len(u) <= count else u[torch.linspace(0, len(u) - 1, count, dtype=torch.float64).long()]
