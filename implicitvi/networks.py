"""The pieces that samplers and adversaries are built from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


def side_by_side(z: Tensor, x: Tensor | None) -> Tensor:
    """``z [S, (B,) D]`` and context ``x [B, C]`` as one input ``[S, (B,) D + C]``."""
    return z if x is None else torch.cat([z, x.expand(*z.shape[:-1], -1)], -1)


def dense(sizes: Sequence[int], activation: type[nn.Module] = nn.ELU) -> nn.Sequential:
    """A multilayer perceptron through ``sizes``, linear at the end."""
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


class ResidualBlock(nn.Module):
    """``h + W₂ σ(W₁ h)`` with ``W₂`` zero at the start: the identity until it has learned something."""

    def __init__(self, width: int, activation: type[nn.Module] = nn.ELU):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.activation = activation()
        self.outer = zeroed(nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        """``[..., width]`` to the same shape."""
        out: Tensor = h + self.outer(self.activation(self.inner(h)))
        return out


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer with weight and bias set to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SkipNet(nn.Module):
    """``A ε + net(ε, x)`` with ``A`` the identity on the first outputs and a net that starts small.

    Args:
        noise_dim: Dimension of ``ε``.
        out_dim: Dimension of the output.
        net: Network on noise and context side by side, ending in a linear layer.
    """

    def __init__(self, noise_dim: int, out_dim: int, net: nn.Sequential):
        super().__init__()
        self.skip = nn.Linear(noise_dim, out_dim, bias=False)
        self.net = net
        last = net[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            self.skip.weight.copy_(torch.eye(out_dim, noise_dim))
            last.weight.mul_(0.1)
            last.bias.zero_()

    def forward(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        """``eps [S, (B,) noise_dim]`` and ``x [B, C]`` to ``[S, (B,) out_dim]``."""
        h: Tensor = self.skip(eps) + self.net(side_by_side(eps, x))
        return h


class GatedLayer(nn.Module):
    """``silu(U h) ⊙ (V h)``: products of inputs, which log densities are full of, in one layer.

    References:
        GLU Variants Improve Transformer, Noam Shazeer, 2020.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.both = nn.Linear(in_dim, 2 * out_dim)

    def forward(self, h: Tensor) -> Tensor:
        """``[..., in_dim]`` to ``[..., out_dim]``."""
        gate, value = self.both(h).chunk(2, -1)
        out: Tensor = silu(gate) * value
        return out


class GatedBlock(nn.Module):
    """``h + W (silu(U h) ⊙ V h)`` with ``W`` zero at the start."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = GatedLayer(width, width)
        self.outer = zeroed(nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        """``[..., width]`` to the same shape."""
        out: Tensor = h + self.outer(self.inner(h))
        return out
