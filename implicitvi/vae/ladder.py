"""Binary codes of two levels: a prior that learns its lower level, and an encoder that goes down the levels with it.

A code is one vector ``z = [z0, z1]``: the bits of the upper level, then those of the lower. Data depend on the lower
level only, so the first layer of a decoder is `LowerLevel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, constraints

from implicitvi.errors import ShapeError, check_whole
from implicitvi.vae.distributions import StraightThroughBernoulli


class TwoLevels(Distribution):
    """A distribution of binary codes of two levels, ``p(z0) p(z1 | z0)``.

    Args:
        first: Logits ``[*batch_shape, D0]`` of the upper level.
        second: Bits ``[..., *batch_shape, D0]`` to the logits ``[..., *batch_shape, D1]`` of the lower level.
        second_dim: Bits ``D1`` of the lower level.
        straight_through: Whether draws have gradients (`StraightThroughBernoulli`).

    >>> TwoLevels(torch.zeros(3), lambda z0: z0[..., :2], 2).log_prob(torch.zeros(5))
    tensor(-3.4657)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.independent(constraints.boolean, 1)

    def __init__(
        self, first: Tensor, second: Callable[[Tensor], Tensor], second_dim: int, *, straight_through: bool = False
    ):
        self.sizes = [first.shape[-1], second_dim]
        super().__init__(first.shape[:-1], torch.Size([sum(self.sizes)]), validate_args=False)
        self.first, self.second = first, second
        self.has_rsample = straight_through

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError("Draws of bits have gradients only with straight_through=True.")
        return self._draw(torch.Size(sample_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self._draw(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        upper, lower = value.split(self.sizes, -1)
        log_first: Tensor = _bits(self.first).log_prob(upper).sum(-1)
        log_second: Tensor = _bits(self.second(upper)).log_prob(lower).sum(-1)
        return log_first + log_second

    def _draw(self, shape: torch.Size) -> Tensor:
        upper = _bits(self.first).rsample(shape)
        return torch.cat([upper, _bits(self.second(upper)).rsample()], -1)


class LadderPrior(nn.Module):
    """A prior ``p(z0) p(z1 | z0)``: fair bits, then bits whose logits a network gives.

    Args:
        network: Upper bits ``[..., D0]`` to logits ``[..., D1]`` of the lower ones.
        upper_dim: Bits ``D0`` of the upper level.

    >>> LadderPrior(nn.Linear(3, 5), 3)().event_shape
    torch.Size([8])
    """

    upper: Tensor

    def __init__(self, network: nn.Module, upper_dim: int):
        super().__init__()
        check_whole("upper_dim", upper_dim)
        self.network = network
        self.register_buffer("upper", torch.zeros(upper_dim), persistent=False)
        with torch.no_grad():
            self.lower_dim = network(self.upper).shape[-1]

    def forward(self) -> Distribution:
        return TwoLevels(self.upper, self.network, self.lower_dim)


class LadderEncoder(nn.Module):
    """An encoder that goes down the levels with the prior and adds a term of the datum to its logits.

        logits of q(z0 | x)     = logits of p(z0) + a0(x)
        logits of q(z1 | z0, x) = logits of p(z1 | z0) + a1(x)

    If ``log p(x | z1)`` is linear in ``z1`` the second line is the exact posterior's. The prior's network is shared: it
    belongs to the decoder's player and gets no gradient here.

    Args:
        network: Data ``[B, *x_shape]`` to ``a0`` and ``a1`` side by side, ``[B, D0 + D1]``.
        prior: The prior of the same model.
        straight_through: For objectives shared by encoder, decoder and prior, such as `VAE`: draws have the gradients
            of `StraightThroughBernoulli`, and the prior's network gets the gradient of its part here too.

    References:
        Ladder Variational Autoencoders, Casper Kaae Sønderby, Tapani Raiko, Lars Maaløe, Søren Kaae Sønderby,
        Ole Winther, 2016.
        Symmetric Equilibrium Learning of VAEs, Boris Flach, Dmitrij Schlesinger, Alexander Shekhovtsov, 2024.
    """

    def __init__(self, network: nn.Module, prior: LadderPrior, *, straight_through: bool = False):
        super().__init__()
        self.network = network
        self.straight_through = straight_through
        self._prior = (prior,)  # a tuple: its parameters belong to the model

    def forward(self, x: Tensor) -> Distribution:
        (prior,) = self._prior
        sizes = [len(prior.upper), prior.lower_dim]
        terms: Tensor = self.network(x)
        if terms.shape[-1] != sum(sizes):
            expected = f"{sum(sizes)}, {sizes[0]} for the upper level and {sizes[1]} for the lower"
            raise ShapeError.must_be("The number of logits of the encoder's network", expected, terms.shape[-1])
        upper, lower = terms.split(sizes, -1)

        def given(z0: Tensor) -> Tensor:
            logits = prior.network(z0)
            total: Tensor = lower + (logits if self.straight_through else logits.detach())
            return total

        return TwoLevels(prior.upper + upper, given, sizes[1], straight_through=self.straight_through)


class LowerLevel(nn.Module):
    """A layer that selects the lower bits ``z1 [..., D1]`` of a code ``[..., upper_dim + D1]``."""

    def __init__(self, upper_dim: int):
        super().__init__()
        self.upper_dim = upper_dim

    def forward(self, z: Tensor) -> Tensor:
        return z[..., self.upper_dim :]


def _bits(logits: Tensor) -> Bernoulli:
    return StraightThroughBernoulli(logits=logits, validate_args=False)
