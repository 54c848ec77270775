"""Protocols of the trained guides and fits that a diagnosis can judge, and the density that they approximate."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from implicitvi.diagnostics.agreement import Agreement
from implicitvi.errors import ModelError, OptionError, SetupError, ShapeError, check_seed
from implicitvi.numerics.types import Draws, Model
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.target import Target
from implicitvi.rng import RandomStream
from implicitvi.training import History

ONE = "Diagnose draws at the model's arguments: diagnose(guide.sample(2000, ...), model, ...)."


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
    lost_modes: tuple[int, int] | None  # of an amortized guide


Trained = TrainedGuide | TrainedFit


def is_guide(source: object) -> TypeGuard[TrainedGuide]:
    """Return whether ``source`` is a guide, trained or not, without reading its properties."""
    return hasattr(type(source), "sample_unconstrained")


def check_model(model: object, seed: int = 0) -> None:
    """Raise `OptionError` unless a model is a function, and a seed one that torch takes."""
    if not callable(model):
        raise OptionError.must_be("model", "a Pyro model, which is a function", repr(model))
    check_seed("seed", seed)


def target_of(guide: TrainedGuide, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> Target:
    """Return the posterior density that a guide approximates.

    Raises:
        SetupError: The guide has not been trained, or is amortized.
        ModelError: The model has other latent sites.
    """
    check_model(model, seed)
    if not guide.is_set_up:
        raise SetupError("The guide has not been trained. Train it with AVBSVI first.")
    if guide.amortization is not None:
        raise SetupError(f"An amortized guide has many posteriors, and this needs one. {ONE}")
    with RandomStream(seed):
        first = {name: value[0] for name, value in guide.sample(1).items()}
    target = Target.of(model, args, kwargs, first, seed)
    mine, theirs = ({site.name: site.shape for site in each.sites} for each in (guide.layout, target.layout))
    if mine != theirs:
        do = "Pass the model and the arguments with which the guide was trained."
        raise ModelError(f"The model does not have the guide's latent sites {mine}, got {theirs}. {do}")
    return target


def tensors_of(draws: Draws) -> dict[str, Tensor]:
    """Return draws as tensors of floats, ``{site: [S, *site shape]}``."""
    tensors = {}
    for name, value in draws.items():
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ShapeError.must_be(f"draws of site {name!r}", "a tensor or array", type(value).__name__) from error
        if tensor.is_complex() or not tensor.numel() or not tensor.dim():
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ShapeError.must_be(f"draws of site {name!r}", "real numbers [S, *site shape]", got)
        tensors[name] = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
    return tensors


def as_array(value: Any) -> NDArray[Any]:
    """Return a tensor or anything like it as an array; a dtype that numpy lacks, such as bfloat16, becomes float32."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    dense = value.detach().to_dense()
    is_foreign = dense.is_floating_point() and dense.dtype not in (torch.float16, torch.float32, torch.float64)
    return (dense.float() if is_foreign else dense).numpy(force=True)


def thin(u: Tensor, count: int) -> Tensor:
    """Return at most ``count`` evenly spaced rows of ``u [S, D]``."""
    return u if len(u) <= count else u[torch.linspace(0, len(u) - 1, count, dtype=torch.float64).long()]
