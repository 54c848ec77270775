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


class Ensemble(nn.Module):
    """``M`` networks of the same sizes, each on an input of its own, in one batched product a layer.

    Args:
        nets: The networks, whose weights are taken over as they are.

    >>> nets = [SkipNet(2, 3, dense([2, 8, 3])) for _ in range(4)]
    >>> Ensemble(nets)(torch.zeros(5, 4, 2)).shape
    torch.Size([5, 4, 3])
    """

    def __init__(self, nets: Sequence[SkipNet]):
        super().__init__()
        columns = list(zip(*(net.net for net in nets), strict=True))
        self.skip = nn.Parameter(torch.stack([net.skip.weight.detach().mT for net in nets]))
        linear = [column for column in columns if isinstance(column[0], nn.Linear)]
        self.weights = nn.ParameterList(
            torch.stack([layer.weight.detach().mT for layer in layers]) for layers in linear
        )
        self.biases = nn.ParameterList(
            torch.stack([layer.bias.detach()[None] for layer in layers]) for layers in linear
        )
        self.activation = columns[1][0] if len(columns) > 1 else nn.Identity()

    def forward(self, eps: Tensor) -> Tensor:
        """Inputs ``[..., M, in]`` to outputs ``[..., M, out]``, the ``m``-th by the ``m``-th network."""
        each = eps.movedim(-2, 0).flatten(1, -2)
        h = each
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, self.activation(h) if i else h, weight)
        out: Tensor = torch.baddbmm(h, each, self.skip)
        return out.unflatten(1, eps.shape[:-2]).movedim(0, -2)  # type: ignore[no-any-return]


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
