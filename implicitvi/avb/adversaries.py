"""Adversaries: networks ``T(z, x)`` that learn ``log q - log r`` from draws of both.

``adversary(z, x)`` maps standardised draws ``z [S, (B,) D]`` to scores ``[S, (B,)]``; only it squeezes the last axis.
The scores start at zero: until something is learned the objective is that of ``q = r``.

Implementing an adversary: a module with this signature and a zero last layer; add it to ``tests/contracts.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from implicitvi import distributed
from implicitvi.errors import check_at_least, check_positive
from implicitvi.nn import Injected, ResidualBlock, concat_context, gated_net, last_layer, zero_init


class _NetworkAdversary(nn.Module):
    """An adversary that is one network on draw and context, concatenated."""

    net: nn.Sequential

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Score standardised draws ``z [S, (B,) D]`` and context ``x [B, C]``: ``[S, (B,)]``."""
        scores: Tensor = self.net(concat_context(z, x)).squeeze(-1)
        return scores


class GatedAdversary(_NetworkAdversary):
    """An adversary of gated residual blocks: the default. Gates multiply coordinates, as log densities do.

    Args:
        latent_dim: Dimension ``D`` of a draw.
        context_dim: Dimension ``C`` of the context; 0 for none.
        width: Width of every hidden layer.
        blocks: Number of residual blocks.

    >>> GatedAdversary(3)(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    def __init__(self, latent_dim: int, *, context_dim: int = 0, width: int = 64, blocks: int = 1):
        super().__init__()
        _check_sizes(width, blocks)
        self.net = gated_net(latent_dim + context_dim, 1, width=width, blocks=blocks)
        zero_init(last_layer(self.net))


class ResidualAdversary(_NetworkAdversary):
    """A residual network on draw and context, concatenated (Mescheder et al. 2017, section 5.1).

    Args:
        latent_dim: Dimension ``D`` of a draw.
        context_dim: Dimension ``C`` of the context; 0 for none.
        width: Width of every hidden layer.
        blocks: Number of residual blocks.

    >>> ResidualAdversary(3)(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    def __init__(self, latent_dim: int, *, context_dim: int = 0, width: int = 128, blocks: int = 2):
        super().__init__()
        _check_sizes(width, blocks)
        self.net = nn.Sequential(
            nn.Linear(latent_dim + context_dim, width),
            nn.ELU(),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.ELU(),
            zero_init(nn.Linear(width, 1)),
        )


class InformedAdversary(nn.Module):
    """An adversary with a hint: ``T(z) + a · clip(log p(x, z) - log r(z | x) - c)``.

    At the optimum of the sampler ``log q - log r`` *is* ``log p - log r`` up to a constant, so with ``a = 1`` the
    network has nothing left to learn and its error vanishes where it matters. ``a`` is learned from 0 (far from
    the optimum the hint misleads) and ``c`` follows the median over draws of ``q``.

    Args:
        network: The adversary ``T``.
        clip: Bound on the clipped difference, in nats.
        momentum: Share of the old centre kept at each `recentre`.
    """

    centre: Tensor

    def __init__(self, network: nn.Module, *, clip: float = 20.0, momentum: float = 0.9):
        super().__init__()
        check_positive("clip", clip)
        self.network, self.clip, self.momentum = network, clip, momentum
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("centre", torch.full((), torch.nan))

    def recentre(self, gap: Tensor) -> None:
        """Move ``c`` toward the median over all processes' ``q`` of ``gap = log p - log r [S, (B,)]``, without NaN."""
        median = distributed.gather(gap.detach()).nanmedian()
        blend = self.momentum * self.centre + (1 - self.momentum) * median
        known = torch.where(blend.isfinite(), blend, median)
        self.centre.copy_(torch.where(known.isfinite(), known, self.centre))

    def forward(self, z: Tensor, gap: Tensor, x: Tensor | None = None) -> Tensor:
        """Score standardised draws ``z [S, (B,) D]`` with ``gap = log p - log r [S, (B,)]``: ``[S, (B,)]``."""
        scores: Tensor = self.network(z) if x is None else self.network(z, x)
        hint = (gap - self.centre).nan_to_num(-self.clip, self.clip, -self.clip)
        return scores + self.weight * hint.clamp(-self.clip, self.clip)

    def slope(self, gap: Tensor) -> Tensor:
        """Return the derivative of the score in ``gap [S, (B,)]``: ``a``, and 0 where the hint is clipped."""
        return self.weight.detach() * ((gap - self.centre).abs() < self.clip)


class PairwiseAdversary(nn.Module):
    """An adversary ``⟨θ(x), s(z)⟩ / √K + T_x(x) + T_z(z) + ½(‖z‖² - D)`` (Mescheder 2017, section 5.2, without ``√K``).

    A datum passes through its network once for all its codes. Without the root, one step of Adam moves a product of
    hundreds of terms by tens of nats. The last term subtracts a standard normal contrast, over which it averages 0, so
    that the networks learn ``log q`` alone. It helps where ``q`` is much narrower than the contrast; it hinders an
    Adaptive Contrast, near ``q`` from the start. Networks that end in a linear layer contribute 0 at the start.

    Args:
        x_net: Data ``[B, *x_shape]`` to ``[B, K + 1]``: features, then ``T_x``.
        z_net: Codes ``[..., D]`` to ``[..., K + 1]``: features, then ``T_z``.
        square: Whether ``½(‖z‖² - D)`` is added.

    >>> T = PairwiseAdversary(nn.Linear(4, 9), nn.Linear(2, 9))
    >>> T(torch.zeros(5, 3, 2), torch.zeros(3, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, x_net: nn.Module, z_net: nn.Module, *, square: bool = True):
        super().__init__()
        self.x_net, self.z_net, self.square = x_net, z_net, square
        with torch.no_grad():
            for layer, first in ((last_layer(x_net), 0), (last_layer(z_net), -1)):
                if isinstance(layer, nn.Linear):
                    layer.weight[first:] = 0
                    layer.bias[first:] = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Score codes ``z [..., B, D]`` and data ``x [B, *x_shape]``: ``[..., B]``."""
        of_x, of_z = self.x_net(x), self.z_net(z)
        product = (of_x[..., :-1] * of_z[..., :-1]).sum(-1) / (of_z.shape[-1] - 1) ** 0.5
        return _add_square(product + of_x[..., -1] + of_z[..., -1], z, self.square)


class JointAdversary(nn.Module):
    """A gated residual network on the sum of features of code and datum; zero at the start.

    A datum passes through its network once for all codes that are paired with it.

    Args:
        x_net: Data ``[B, *x_shape]`` to ``[B, width]``.
        latent_dim: Dimension ``D`` of a code.
        width: Width of every hidden layer.
        blocks: Number of residual blocks.
        square: Whether ``½(‖z‖² - D)`` is added, as in `PairwiseAdversary`.

    >>> T = JointAdversary(nn.Linear(4, 16), 2, width=16)
    >>> T(torch.zeros(5, 3, 2), torch.zeros(3, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, x_net: nn.Module, latent_dim: int, *, width: int = 64, blocks: int = 1, square: bool = False):
        super().__init__()
        self.x_net, self.square = x_net, square
        _check_sizes(width, blocks)
        self.z_net, *layers = gated_net(latent_dim, 1, width=width, blocks=blocks)
        zero_init(layers[-1])
        self.net = nn.Sequential(*layers)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Score codes ``z [..., B, D]`` and data ``x [B, *x_shape]``: ``[..., B]``."""
        return _add_square(self.net(self.z_net(z) + self.x_net(x)).squeeze(-1), z, self.square)


class InjectedAdversary(nn.Module):
    """A network on the datum, with a linear image of the code added after each layer; zero at the start.

    The convolutional adversary for faces in the code of Mescheder et al. (2017), without its batch normalisation.

    Args:
        layers: Layers from ``x`` to the last features, without their activations.
        latent_dim: Dimension ``D`` of a code.
        x_shape: Shape of one datum.
        square: Whether ``½(‖z‖² - D)`` is added, as in `PairwiseAdversary`.
    """

    def __init__(self, layers: Sequence[nn.Module], latent_dim: int, *, x_shape: Sequence[int], square: bool = False):
        super().__init__()
        self.net = Injected(layers, latent_dim, 1, x_shape=x_shape)
        zero_init(self.net.head)
        self.square = square

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Score codes ``z [..., B, D]`` and data ``x [B, *x_shape]``: ``[..., B]``."""
        return _add_square(self.net(z, x).squeeze(-1), z, self.square)


def _add_square(scores: Tensor, z: Tensor, square: bool) -> Tensor:
    """Add ``½(‖z‖² - D)`` of codes ``z [..., D]`` to scores ``[...]`` if asked to."""
    return scores + 0.5 * (z.square() - 1).sum(-1) if square else scores


def _check_sizes(width: int, blocks: int) -> None:
    check_at_least("width", width, 1)
    check_at_least("blocks", blocks, 0)
