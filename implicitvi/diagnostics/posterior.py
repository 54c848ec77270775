"""The trained guides and fits that a diagnosis can judge, told by what they can do."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

from torch import Tensor

from implicitvi.errors import ModelError, SetupError
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.target import Target
from implicitvi.rng import RandomStream


class TrainedGuide(Protocol):
    """A guide whose draws can be judged: an `ImplicitGuide` is one."""

    sampler: Any
    amortization: Any

    @property
    def is_set_up(self) -> bool:
        """Whether the guide has its networks."""

    @property
    def has_log_density(self) -> bool:
        """Whether the guide has a learned log density."""

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


def is_guide(source: object) -> TypeGuard[TrainedGuide]:
    """Return whether ``source`` is a guide, trained or not; its properties are not asked for."""
    return hasattr(type(source), "sample_unconstrained")


def target_of(guide: TrainedGuide, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> Target:
    """The density that a trained guide stands for.

    Raises:
        SetupError: The guide has not been trained, or is amortized.
        ModelError: The model has other latent sites.
    """
    if not guide.is_set_up:
        raise SetupError("the guide has not been trained yet", do="Train it with AVBSVI first.")
    if guide.amortization is not None:
        raise SetupError(
            "an amortized guide has many posteriors, and this is about one",
            do="Draw from it with the model's arguments, draws = guide.sample(2000, ...), and diagnose those: "
            "diagnose(draws, model, ...).",
        )
    with RandomStream(seed):
        first = {name: value[0] for name, value in guide.sample(1).items()}
    density = Target.of(model, args, kwargs, first, seed)
    both = (guide.layout, density.layout)
    mine, theirs = ({site.name: site.shape for site in each.sites} for each in both)
    if mine != theirs:
        raise ModelError(
            "the model does not have the guide's latent sites",
            got=theirs,
            expected=mine,
            do="Pass the model and the arguments that the guide was trained with.",
        )
    return density
