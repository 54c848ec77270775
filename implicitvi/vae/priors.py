"""Priors: modules that return ``p(z)``, event shape ``[D]``, when they are called without arguments."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from implicitvi.errors import OptionError, ShapeError, check_size
from implicitvi.rng import forked
from implicitvi.vae.distributions import Implicit


class StandardNormal(nn.Module):
    """A prior ``N(0, I)`` in ``D`` dimensions, on the device of the model.

    >>> StandardNormal(2)().log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    unit: Tensor

    def __init__(self, latent_dim: int):
        super().__init__()
        check_size("latent_dim", latent_dim)
        self.register_buffer("unit", torch.ones(latent_dim), persistent=False)

    def forward(self) -> Distribution:
        each = Normal(torch.zeros_like(self.unit), self.unit, validate_args=False)
        return Independent(each, 1, validate_args=False)


class FixedPrior(nn.Module):
    """A prior that is a distribution of torch, with event shape ``[D]``; it follows the model to its device."""

    def __init__(self, distribution: Distribution):
        super().__init__()
        if distribution.batch_shape or len(distribution.event_shape) != 1:
            got = f"batch shape {tuple(distribution.batch_shape)}, event shape {tuple(distribution.event_shape)}"
            do = "torch.distributions.Independent(prior, 1) makes the last axis the event."
            raise ShapeError.must_be("The prior", "a distribution with batch shape () and event shape (D,)", got, do)
        self.distribution = distribution

    def forward(self) -> Distribution:
        return self.distribution

    def _apply(self, fn: Any, recurse: bool = True) -> FixedPrior:
        super()._apply(fn, recurse)
        self.distribution = _applied(fn, self.distribution)
        return self


class SampledPrior(nn.Module):
    """A prior that can only be drawn from.

    Args:
        draw: Number of draws to draws ``[S, D]``.
        latent_dim: Dimension ``D``; ``None`` to take it from a draw.
    """

    place: Tensor

    def __init__(self, draw: Callable[[int], Tensor], latent_dim: int | None = None):
        super().__init__()
        self.draw = draw
        with forked():
            draws = draw(2)
        known = isinstance(draws, Tensor)
        if not known or draws.dim() != 2 or len(draws) != 2 or latent_dim not in (None, draws.shape[1]):
            got = tuple(draws.shape) if known else type(draws).__name__
            raise ShapeError.must_be("Two draws of the prior", f"a tensor of shape (2, {latent_dim or 'D'})", got)
        self.latent_dim = draws.shape[1]
        self.register_buffer("place", torch.zeros(()), persistent=False)

    def forward(self) -> Distribution:
        return Implicit(self._draw, [], [self.latent_dim])

    def _draw(self, shape: torch.Size) -> Tensor:
        return self.draw(shape.numel()).to(self.place).reshape(*shape, self.latent_dim)


def prior_of(prior: Any) -> nn.Module:
    """Return a prior from a dimension, a distribution, or a function of a number of draws; a module unchanged."""
    if isinstance(prior, int | np.integer) and not isinstance(prior, bool):
        return StandardNormal(int(prior))
    if isinstance(prior, Distribution):
        return FixedPrior(prior)
    if not callable(prior):
        kinds = "a number of dimensions, a distribution, a function of a number of draws, or a torch.nn.Module"
        raise OptionError.must_be("prior", kinds, repr(prior))
    return prior if isinstance(prior, nn.Module) else SampledPrior(prior)


def _applied(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of a distribution with ``fn`` applied to all its tensors, those of its parts too."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Distribution):
        moved = deepcopy(value)
        moved.__dict__ = {name: _applied(fn, part) for name, part in value.__dict__.items()}
        return moved
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_applied(fn, part) for part in value)
    return value
