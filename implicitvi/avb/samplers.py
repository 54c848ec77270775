"""Samplers: networks that map noise to draws of an implicit distribution.

``sampler(num_samples, x=None)`` returns reparameterised draws ``z [S, D]``, or ``[S, B, D]`` for a context
``x [B, C]``, or ``[S, B, C]`` for one of every draw. Every sampler ends in an affine map, its *frame*,
``z = loc + scale_tril · h(ε, x)``, which a short Gaussian fit sets before training: the network works in coordinates
``h`` in which the posterior has roughly zero mean and unit covariance, whatever the units of the model.

Implementing a sampler: subclass `Sampler`, define ``transform(eps, x) -> h`` in the frame's coordinates,
start it near ``h = ε[..., :D]``, then join the list in ``tests/contracts.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn.functional import elu

from implicitvi import distributed
from implicitvi.errors import OptionError, ShapeError, check_at_least
from implicitvi.nn import Ensemble, ResidualBlock, SkipNet, gated_net, mlp

AT_ONCE = 2**17  # draws without gradients that a network makes at once, in about 1 kB each


class Sampler(nn.Module, ABC):
    """A distribution with reparameterised draws whose density is never computed.

    Args:
        latent_dim: Dimension ``D`` of a draw.
        noise_dim: Dimension of the standard normal noise, at least ``D`` for a density; ``None`` for ``D``.
        context_dim: Dimension ``C`` of the context ``x``; 0 for none.
    """

    loc: Tensor
    scale_tril: Tensor
    initialised: Tensor

    def __init__(self, latent_dim: int, *, noise_dim: int | None = None, context_dim: int = 0):
        super().__init__()
        check_at_least("latent_dim", latent_dim, 1)
        self.latent_dim = latent_dim
        self.noise_dim = latent_dim if noise_dim is None else noise_dim
        self.context_dim = context_dim
        if self.noise_dim < latent_dim:
            least = f"at least the latent dimension {latent_dim}"
            raise OptionError.must_be("noise_dim", least, self.noise_dim, "With less noise the draws have no density.")
        self.register_buffer("loc", torch.zeros(latent_dim))
        self.register_buffer("scale_tril", torch.eye(latent_dim))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def set_affine(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the frame: ``loc [D]`` and lower triangular ``scale_tril [D, D]``."""
        self.loc.copy_(loc)
        self.scale_tril.copy_(scale_tril)
        self.initialised.fill_(True)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Read states of version 0.1.0 too, in which `initialised` was ``placed``."""
        if f"{prefix}placed" in state_dict:
            state_dict[f"{prefix}initialised"] = state_dict.pop(f"{prefix}placed")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def frames(self) -> tuple[Tensor, Tensor]:
        """Return locations ``[K, D]`` and lower triangular scales ``[K, D, D]`` of the frames, ``K = 1`` for most."""
        return self.loc[None], self.scale_tril[None]

    def be_gaussian(self) -> bool:
        """Make the draws exactly those of the frame as a Gaussian; return whether this sampler can."""
        return False

    def noise(self, num_samples: int, x: Tensor | None = None) -> Tensor:
        """Draw standard normal noise ``[S, (B,) noise_dim]`` on the sampler's device, in its dtype."""
        if (x is None) != (self.context_dim == 0) or (x is not None and x.shape[-1] != self.context_dim):
            expected = f"a context [B, {self.context_dim}]" if self.context_dim else "no context"
            got = "none" if x is None else f"shape {tuple(x.shape)}"
            raise ShapeError(f"The sampler needs {expected}, got {got}.")
        shape = (num_samples, *(() if x is None else x.shape[-2:-1]), self.noise_dim)
        return torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def forward(self, num_samples: int, x: Tensor | None = None) -> Tensor:
        """Draw ``z [S, (B,) D]``, differentiable in the sampler's parameters."""
        return self.to_latent(self.transform(self.noise(num_samples, x), x), x)

    def draws(self, num_samples: int, x: Tensor | None = None) -> Tensor:
        """Draw ``z [S, (B,) D]`` as a call does; many without gradients are made in parts, of the same noise."""
        each = max(1, AT_ONCE // (1 if x is None else x.shape[-2]))
        if torch.is_grad_enabled() or num_samples <= each:
            draws: Tensor = self(num_samples, x)
            return draws
        if type(self).forward is not Sampler.forward:  # it makes its own noise
            counts = [each] * (num_samples // each) + [num_samples % each] * (num_samples % each > 0)
            return torch.cat([self(n, x) for n in counts])
        eps, parts = self.noise(num_samples, x), []
        for start in range(0, num_samples, each):
            part = slice(start, start + each)
            context = x[part] if x is not None and x.dim() > 2 else x
            parts.append(self.to_latent(self.transform(eps[part], context), context))
        return torch.cat(parts)

    def to_latent(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        """Map ``h [..., D]`` from the frame's coordinates to ``z [..., D]``."""
        return self.loc + h @ self.scale_tril.mT

    @abstractmethod
    def transform(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        """Map noise ``eps [S, (B,) noise_dim]`` to ``h [S, (B,) D]`` in the frame's coordinates."""


class _NetworkSampler(Sampler):
    """A sampler that consists of one network beside a linear path."""

    net: SkipNet

    def transform(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        h: Tensor = self.net(eps, x)
        return h

    def be_gaussian(self) -> bool:
        self.net.be_linear()
        return True


class DenseSampler(_NetworkSampler):
    """A multilayer perceptron beside a linear path (Mescheder et al. 2017, section 5.1).

    Args:
        latent_dim: Dimension ``D`` of a draw.
        noise_dim: Dimension of the noise, at least ``D``; ``None`` for ``D``.
        context_dim: Dimension ``C`` of the context; 0 for none.
        hidden: Widths of the hidden layers.

    >>> DenseSampler(3)(5).shape
    torch.Size([5, 3])
    >>> DenseSampler(3, context_dim=2)(5, torch.zeros(4, 2)).shape
    torch.Size([5, 4, 3])
    """

    def __init__(
        self, latent_dim: int, *, noise_dim: int | None = None, context_dim: int = 0, hidden: Sequence[int] = (128, 128)
    ):
        super().__init__(latent_dim, noise_dim=noise_dim, context_dim=context_dim)
        self.net = SkipNet(self.noise_dim, latent_dim, mlp([self.noise_dim + context_dim, *hidden, latent_dim]))


class ResidualSampler(_NetworkSampler):
    """A network of residual blocks beside a linear path; deeper than `DenseSampler` and as easy to train.

    Args:
        latent_dim: Dimension ``D`` of a draw.
        noise_dim: Dimension of the noise, at least ``D``; ``None`` for ``D``.
        context_dim: Dimension ``C`` of the context; 0 for none.
        width: Width of every hidden layer.
        blocks: Number of residual blocks.
    """

    def __init__(
        self, latent_dim: int, *, noise_dim: int | None = None, context_dim: int = 0, width: int = 128, blocks: int = 2
    ):
        super().__init__(latent_dim, noise_dim=noise_dim, context_dim=context_dim)
        net = nn.Sequential(
            nn.Linear(self.noise_dim + context_dim, width),
            nn.ELU(),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.Linear(width, latent_dim),
        )
        self.net = SkipNet(self.noise_dim, latent_dim, net)


class GatedSampler(_NetworkSampler):
    """A network of gated residual blocks beside a linear path: the default.

    With more noise than latents a draw chooses its mode independently of its position; gates multiply noises.

    Args:
        latent_dim: Dimension ``D`` of a draw.
        noise_dim: Dimension of the noise, at least ``D``; ``None`` for ``2 D``.
        context_dim: Dimension ``C`` of the context; 0 for none.
        width: Width of every hidden layer.
        blocks: Number of residual blocks.
    """

    def __init__(
        self, latent_dim: int, *, noise_dim: int | None = None, context_dim: int = 0, width: int = 64, blocks: int = 1
    ):
        noise_dim = 2 * latent_dim if noise_dim is None else noise_dim
        super().__init__(latent_dim, noise_dim=noise_dim, context_dim=context_dim)
        net = gated_net(self.noise_dim + context_dim, latent_dim, width=width, blocks=blocks)
        self.net = SkipNet(self.noise_dim, latent_dim, net)


class NoiseBasisSampler(Sampler):
    """A sampler that mixes ``M`` basis networks of the noise with coefficients of ``x`` (Mescheder 2017, section 4).

        h_k(ε, x) = h⁰_k(x) + Σ_m a_mk(x) · v_mk(ε_m)

    Given ``x`` the draws are linear in the basis, so their conditional moments follow in closed form from the moments
    of the basis, which one batch of noise gives for every ``x`` at once (`moments`).

    Args:
        latent_dim: Dimension ``D`` of a draw.
        noise_dim: Dimension of the noise of *each* basis network, ``None`` for ``D``.
        context_dim: Dimension ``C`` of the context; 0 for none.
        num_basis: Number ``M`` of basis networks.
        hidden: Widths of the hidden layers, of the basis and of the coefficient networks.
        mixing: Widths of the coefficient network's hidden layers, ``None`` for ``hidden``; ``()`` for a linear one.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        noise_dim: int | None = None,
        context_dim: int = 0,
        num_basis: int = 8,
        hidden: Sequence[int] = (64, 64),
        mixing: Sequence[int] | None = None,
    ):
        each = latent_dim if noise_dim is None else noise_dim
        super().__init__(latent_dim, noise_dim=each * num_basis, context_dim=context_dim)
        self.num_basis = num_basis
        self.basis = Ensemble([SkipNet(each, latent_dim, mlp([each, *hidden, latent_dim])) for _ in range(num_basis)])
        widths = hidden if mixing is None else mixing
        self.mix = mlp([context_dim, *widths, (num_basis + 1) * latent_dim]) if context_dim else None
        self.offset = nn.Parameter(torch.zeros(num_basis + 1, latent_dim))

    def values(self, eps: Tensor) -> Tensor:
        """Evaluate the basis at noise ``eps [S, (B,) M · noise]``: ``v [S, (B,) M, D]``."""
        v: Tensor = self.basis(eps.unflatten(-1, (self.num_basis, -1)))
        return v

    def coefficients(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``h⁰ [(B,) D]`` and positive ``a [(B,) M, D]``; the ``a²`` sum to 1 at the start.

        ``a`` grows linearly in the network's output, as in the paper's code; an exponential diverges.
        """
        raw = self.offset
        if self.mix is not None:
            raw = raw + self.mix(x).unflatten(-1, raw.shape)
        return raw[..., 0, :], (elu(raw[..., 1:, :]) + 1) / self.num_basis**0.5

    def transform(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        base, a = self.coefficients(x)
        return base + (a * self.values(eps)).sum(-2)

    def moments(self, num_samples: int, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the conditional mean ``[(B,) D]`` and covariance ``[(B,) D, D]`` of ``z`` given ``x``.

        Exact in ``x``; every row, and every process without gradients, shares ``num_samples`` noises of the basis.
        """
        shape = (distributed.per_process(num_samples), self.noise_dim)
        eps = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        v = self.values(eps)
        base, a = self.coefficients(x)
        (mean_v,) = distributed.average([v.mean(0)])
        centred = v - mean_v
        (cov_v,) = distributed.average([torch.einsum("smd,sme->mde", centred, centred) / len(v)])
        mean = base + (a * mean_v).sum(-2)
        cov = torch.zeros_like(cov_v[0])
        # one network after the other: all at once takes M times the memory, and longer
        for scale, each in zip(a.unbind(-2), cov_v, strict=True):
            cov = torch.addcmul(cov, scale[..., :, None] * scale[..., None, :], each)
        half = (cov @ self.scale_tril.mT).mT.contiguous()  # then one product for all rows
        return self.to_latent(mean), half @ self.scale_tril.mT


class SemiImplicitSampler(Sampler):
    """A sampler with an implicit mean and a learned Gaussian around it (Yin & Zhou 2018).

        h = f(ε, x) + σ ⊙ η,   η ~ N(0, I)

    Its density ``E_ε N(z; f(ε, x), σ²)`` is positive and bounded from both sides by finitely many ``ε``, as certified
    bounds on the evidence require.

    Args:
        latent_dim: Dimension ``D`` of a draw.
        noise_dim: Dimension of ``ε``, at least ``D``; ``None`` for ``D``.
        context_dim: Dimension ``C`` of the context; 0 for none.
        hidden: Widths of the hidden layers of ``f``.
        init_scale: ``σ`` at the start, in the frame's units.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        noise_dim: int | None = None,
        context_dim: int = 0,
        hidden: Sequence[int] = (128, 128),
        init_scale: float = 0.1,
    ):
        mean_dim = latent_dim if noise_dim is None else noise_dim
        super().__init__(latent_dim, noise_dim=mean_dim + latent_dim, context_dim=context_dim)
        self.net = SkipNet(mean_dim, latent_dim, mlp([mean_dim + context_dim, *hidden, latent_dim]))
        self.log_scale = nn.Parameter(torch.full((latent_dim,), init_scale).log())

    def mean(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        """Return ``f(ε, x) [S, (B,) D]`` in the frame's coordinates, from ``eps [S, (B,) noise]``."""
        h: Tensor = self.net(eps, x)
        return h

    def transform(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        eps, eta = eps.split([self.noise_dim - self.latent_dim, self.latent_dim], -1)
        h: Tensor = self.mean(eps, x) + self.log_scale.exp() * eta
        return h

    def conditional(self, eps: Tensor, x: Tensor | None = None) -> Distribution:
        """Return ``q(h | ε, x)`` in the frame for ``eps [S, (B,) noise_dim]``: a Gaussian, event shape ``[D]``."""
        return Independent(Normal(self.mean(eps, x), self.log_scale.exp()), 1)


SAMPLERS: dict[str, type[Sampler]] = {
    "gated": GatedSampler,
    "dense": DenseSampler,
    "residual": ResidualSampler,
    "noise_basis": NoiseBasisSampler,
    "semi_implicit": SemiImplicitSampler,
}
