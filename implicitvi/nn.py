"""Building blocks of samplers, adversaries and encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import silu

LOG_RANGE = 10.0  # an encoder's scales stay within exp(±10), whatever its input


def concat_context(z: Tensor, x: Tensor | None) -> Tensor:
    """Concatenate ``z [S, (B,) D]`` and context ``x [B, C]`` to one input ``[S, (B,) D + C]``."""
    return z if x is None else torch.cat([z, x.expand(*z.shape[:-1], -1)], -1)


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ELU) -> nn.Sequential:
    """Return a multilayer perceptron through ``sizes``, linear at the end."""
    layers = [layer for sides in pairwise(sizes) for layer in (nn.Linear(*sides), activation())]
    return nn.Sequential(*layers[:-1])


def zero_init(layer: nn.Module) -> nn.Module:
    """Set weight and bias of a linear layer to zero and return it."""
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """A block ``h + W₂ σ(W₁ h)`` with ``W₂`` zero at the start: the identity until it has learned something."""

    def __init__(self, width: int, activation: type[nn.Module] = nn.ELU):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.activation = activation()
        self.outer = zero_init(nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Map ``[..., width]`` to the same shape."""
        out: Tensor = h + self.outer(self.activation(self.inner(h)))
        return out


class GatedLayer(nn.Module):
    """A layer ``silu(U h) ⊙ (V h)`` that multiplies inputs (GLU Variants Improve Transformer, Noam Shazeer, 2020)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.both = nn.Linear(in_dim, 2 * out_dim)

    def forward(self, h: Tensor) -> Tensor:
        """Map ``[..., in_dim]`` to ``[..., out_dim]``."""
        gate, value = self.both(h).chunk(2, -1)
        out: Tensor = silu(gate) * value
        return out


class GatedBlock(nn.Module):
    """A block ``h + W (silu(U h) ⊙ V h)`` with ``W`` zero at the start."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = GatedLayer(width, width)
        self.outer = zero_init(nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Map ``[..., width]`` to the same shape."""
        out: Tensor = h + self.outer(self.inner(h))
        return out


def gated_net(in_dim: int, out_dim: int, *, width: int, blocks: int) -> nn.Sequential:
    """Return a network of gated residual blocks of one width between two linear layers."""
    inner = (GatedBlock(width) for _ in range(blocks))
    return nn.Sequential(nn.Linear(in_dim, width), *inner, GatedLayer(width, width), nn.Linear(width, out_dim))


def last_layer(network: nn.Module) -> nn.Module:
    """Return the last layer of a sequence, or the network itself."""
    return last_layer(network[-1]) if isinstance(network, nn.Sequential) else network


class SkipNet(nn.Module):
    """A network ``A ε + net(ε, x)`` with ``A`` the identity on the first outputs and a net that starts small.

    Args:
        noise_dim: Dimension of ``ε``.
        out_dim: Dimension of the output.
        net: Network on noise and context, concatenated; ends in a linear layer.
    """

    def __init__(self, noise_dim: int, out_dim: int, net: nn.Sequential):
        super().__init__()
        self.skip = nn.Linear(noise_dim, out_dim, bias=False)
        self.net = net
        last = last_layer(net)
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            self.skip.weight.copy_(torch.eye(out_dim, noise_dim))
            last.weight.mul_(0.1)
            last.bias.zero_()

    @torch.no_grad()
    def be_linear(self) -> None:
        """Return to ``A ε``, with ``A`` the identity on the first outputs."""
        self.skip.weight.copy_(torch.eye(*self.skip.weight.shape))
        zero_init(last_layer(self.net))

    def forward(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        """Map ``eps [S, (B,) noise_dim]`` and ``x [B, C]`` to ``[S, (B,) out_dim]``."""
        h: Tensor = self.skip(eps) + self.net(concat_context(eps, x))
        return h


class Ensemble(nn.Module):
    """An ensemble of ``M`` networks of the same sizes, each on its own input, in one batched product a layer.

    Args:
        nets: The networks, whose weights are copied.

    >>> nets = [SkipNet(2, 3, mlp([2, 8, 3])) for _ in range(4)]
    >>> Ensemble(nets)(torch.zeros(5, 4, 2)).shape
    torch.Size([5, 4, 3])
    """

    def __init__(self, nets: Sequence[SkipNet]):
        super().__init__()
        columns = list(zip(*(net.net for net in nets), strict=True))
        linear = [column for column in columns if isinstance(column[0], nn.Linear)]
        self.skip = nn.Parameter(torch.stack([net.skip.weight.detach().mT for net in nets]))
        self.weights = nn.ParameterList(torch.stack([each.weight.detach().mT for each in layer]) for layer in linear)
        self.biases = nn.ParameterList(torch.stack([each.bias.detach()[None] for each in layer]) for layer in linear)
        self.activation = columns[1][0] if len(columns) > 1 else nn.Identity()

    def forward(self, eps: Tensor) -> Tensor:
        """Map inputs ``[..., M, in]`` to outputs ``[..., M, out]``, the ``m``-th by the ``m``-th network."""
        h = each = eps.reshape(-1, *eps.shape[-2:]).transpose(0, 1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, self.activation(h) if i else h, weight)
        out: Tensor = torch.baddbmm(h, each, self.skip)
        return out.transpose(0, 1).reshape(*eps.shape[:-1], -1)


class Injected(nn.Module):
    """A sequence of layers on ``x``, with a linear image of one and the same vector added to the outputs of each.

    A datum passes through the first layer once for all vectors that are paired with it.

    Args:
        layers: Layers from ``x`` to the last features, without their activations.
        vector_dim: Dimension ``V`` of the vector.
        out_dim: Dimension of the output, a linear image of the last features.
        x_shape: Shape of one datum.
        activation: Applied after each addition.

    >>> net = Injected([nn.Linear(4, 8), nn.Linear(8, 8)], 2, 3, x_shape=[4])
    >>> net(torch.zeros(6, 5, 2), torch.zeros(5, 4)).shape
    torch.Size([6, 5, 3])
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        vector_dim: int,
        out_dim: int,
        *,
        x_shape: Sequence[int],
        activation: Callable[[Tensor], Tensor] = nn.functional.elu,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation = activation
        with torch.no_grad():
            h = torch.zeros(1, *x_shape)
            shapes = [(h := layer(h)).shape[1:] for layer in layers]
        self.projections = nn.ModuleList(nn.Linear(vector_dim, s.numel()) for s in shapes)
        self.head = nn.Linear(shapes[-1].numel(), out_dim)

    def forward(self, vector: Tensor, x: Tensor) -> Tensor:
        """Map vectors ``[..., B, V]`` and data ``x [B, *x_shape]`` to ``[..., B, out_dim]``."""
        rows = vector.reshape(-1, *vector.shape[-2:])
        h = x
        for layer, projection in zip(self.layers, self.projections, strict=True):
            features = layer(h).unflatten(0, (-1, len(x)))
            added = projection(rows).unflatten(-1, features.shape[2:])
            h = self.activation(features + added).flatten(0, 1)
        out: Tensor = self.head(h.flatten(1))
        return out.reshape(*vector.shape[:-1], -1)


def bounded_exp(log_scale: Tensor) -> Tensor:
    """Return the scale ``exp(log_scale)`` of the same shape, kept smoothly within ``exp(±10)``."""
    return (LOG_RANGE * (log_scale / LOG_RANGE).tanh()).exp()


class LocationScaleNet(nn.Module):
    """A network from a context to the location and scale of a Gaussian; 0 and 1 at the start.

    Args:
        context_dim: Dimension ``C`` of the context.
        latent_dim: Dimension ``D`` of a draw.
        hidden: Widths of the hidden layers, beside a linear path.

    >>> loc, scale = LocationScaleNet(4, 2)(torch.zeros(5, 4))
    >>> loc.shape, scale.shape
    (torch.Size([5, 2]), torch.Size([5, 2, 2]))
    """

    def __init__(self, context_dim: int, latent_dim: int, *, hidden: Sequence[int] = (64, 64)):
        super().__init__()
        self.latent_dim = latent_dim
        size = latent_dim * (latent_dim + 3) // 2
        self.skip = zero_init(nn.Linear(context_dim, size))
        self.net = mlp([context_dim, *hidden, size])
        zero_init(last_layer(self.net))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x [..., C]`` to ``loc [..., D]`` and lower triangular ``scale [..., D, D]``."""
        raw = self.skip(x) + self.net(x)
        d = self.latent_dim
        loc, log_diagonal, below = raw.split([d, d, d * (d - 1) // 2], -1)
        diagonal = bounded_exp(log_diagonal)
        rows, columns = torch.tril_indices(d, d, -1, device=x.device)
        lower = raw.new_zeros(*raw.shape[:-1], d, d)
        lower[..., rows, columns] = below * diagonal[..., rows]
        return loc, lower + torch.diag_embed(diagonal)


@contextmanager
def zuko_imported() -> Iterator[Any]:
    """Import zuko, and undo the changes that its import makes to all distributions of the process."""
    validate, checked = Distribution._validate_args, Distribution.arg_constraints
    try:
        import zuko

        zuko.distributions.NormalizingFlow._validate_args = False  # it names no constraints
        yield zuko
    finally:
        Distribution._validate_args = validate
        setattr(Distribution, "arg_constraints", checked)  # noqa: B010
