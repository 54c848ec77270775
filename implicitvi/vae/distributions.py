"""What an encoder, a decoder or a prior may return besides the distributions of torch.

Every arrow of a model is a module that returns a `torch.distributions.Distribution`: ``encoder(x)`` is ``q(z | x)``,
``decoder(z)`` is ``p(x | z)``. What that distribution can do (draw, draw with gradients, score) decides which
systems it may be part of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, constraints

from implicitvi.errors import ModelError

Draw = Callable[[torch.Size], Tensor]


class Implicit(Distribution):
    """A distribution known by its draws alone: it has ``rsample`` and no density.

    Args:
        draw: Sample shape to draws ``[*sample_shape, *batch_shape, *event_shape]``, differentiable.
        batch_shape: Shape of the batch.
        event_shape: Shape of one draw.

    >>> Implicit(lambda shape: torch.zeros(*shape, 3, 2), [3], [2]).rsample([5]).shape
    torch.Size([5, 3, 2])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(self, draw: Draw, batch_shape: Any = torch.Size(), event_shape: Any = torch.Size()):
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)
        self._draw = draw

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Differentiable draws ``[*sample_shape, *batch_shape, *event_shape]``."""
        return self._draw(torch.Size(sample_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``[*sample_shape, *batch_shape, *event_shape]``."""
        return self._draw(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises `ModelError`: nobody knows it."""
        raise ModelError(
            "an implicit distribution has no density",
            do="Use a system that needs draws of it only, or a network with a density.",
        )


class StraightThroughBernoulli(Bernoulli):
    """A Bernoulli whose draws are 0 or 1 and whose gradient is that of the probabilities.

    The gradient is biased; it is what a discriminator of binary data can send into a decoder, and what binary codes
    can send into an encoder.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons, Yoshua Bengio, Nicholas Léonard,
        Aaron Courville, 2013.
    """

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``[*sample_shape, *batch_shape]`` of 0 and 1."""
        draws: Tensor = self.sample(torch.Size(sample_shape))
        return draws + (self.probs - self.probs.detach())  # in this order the draws stay 0 and 1


def has_density(distribution: Distribution) -> bool:
    """Whether a distribution scores its own draws."""
    try:
        with torch.no_grad():
            distribution.log_prob(distribution.sample())
    except (NotImplementedError, ModelError):
        return False
    return True
