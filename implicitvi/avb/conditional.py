"""Samplers and contrasts of amortized guides: a location and a scale for every context, one shape for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints

from implicitvi.avb.contrasts import Contrast
from implicitvi.avb.samplers import NoiseBasisSampler, Sampler
from implicitvi.errors import OptionError, check_at_least
from implicitvi.nn import LocationScaleNet
from implicitvi.numerics.gaussian import JITTER, Whitening

Frame = Callable[[Tensor], tuple[Tensor, Tensor]]
Moments = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class ConditionalContrast(Contrast):
    """A contrast of one shape for all contexts, with a location and a scale for each.

    ``r(z | x)`` is the distribution of ``m(x) + L(x) h`` where ``h`` follows the inner contrast, which sees the draws
    of all contexts together. The adversary learns how the shape depends on the context.

    Args:
        inner: Contrast without context.
        frame: Location ``[..., D]`` and lower triangular scale ``[..., D, D]`` of contexts ``x [..., C]``.
    """

    def __init__(self, inner: Contrast, frame: Frame):
        super().__init__()
        self.inner, self.extra_dim = inner, inner.extra_dim
        self._frame = (frame,)  # a tuple: its module belongs to the sampler

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        assert x is not None
        with torch.no_grad():
            r = LocationScale(*self._frame[0](x))
            h = r.standardise(z.detach()).flatten(0, -2)
        r.base = self.inner(h)
        return r

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        assert isinstance(r, LocationScale) and r.base is not None
        return self.inner.standardise(r.standardise(z), r.base)

    def observe(self, z: Tensor, r: Distribution) -> None:
        assert isinstance(r, LocationScale) and r.base is not None
        self.inner.observe(r.standardise(z).flatten(0, -2), r.base)


class MomentContrast(Contrast):
    """A Gaussian with the conditional moments of the sampler in closed form (Mescheder et al. 2017, section 4).

    Args:
        moments: Mean ``[..., D]`` and covariance ``[..., D, D]`` from a number of noises and contexts ``x [..., C]``.
        num_samples: Noises that the moments of the basis are taken from.
    """

    def __init__(self, moments: Moments, *, num_samples: int = 512):
        super().__init__()
        check_at_least("num_samples", num_samples, 2)
        self._moments = (moments,)  # a tuple: their module belongs to the sampler
        self.num_samples = num_samples

    @torch.no_grad()
    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        assert x is not None
        loc, cov = self._moments[0](self.num_samples, x)
        cov = cov + torch.diag_embed(JITTER * cov.diagonal(dim1=-2, dim2=-1) + 1e-12)
        unit = torch.ones_like(loc[(0,) * (loc.dim() - 1)])
        base = Independent(Normal(torch.zeros_like(unit), unit, validate_args=False), 1)
        return LocationScale(loc, torch.linalg.cholesky(cov), base)

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        assert isinstance(r, LocationScale)
        return r.standardise(z)


class LocationScale(Distribution):
    """The distribution of ``m + L h`` for ``h`` of a base with event shape ``[D]``, ``m`` and ``L`` for each context.

    Args:
        loc: ``m [..., D]``.
        scale_tril: Lower triangular ``L [..., D, D]``.
        base: Distribution of ``h``.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, loc: Tensor, scale_tril: Tensor, base: Distribution | None = None):
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)
        self.loc, self.scale_tril, self.base = loc, scale_tril, base
        self._whitening = Whitening(loc, scale_tril)

    def standardise(self, z: Tensor) -> Tensor:
        """Return ``L⁻¹ (z - m)`` of ``z [..., D]``."""
        return self._whitening(z)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Return independent draws ``[*sample_shape, *batch_shape, D]``."""
        assert self.base is not None
        return _affine(self.base.sample(torch.Size(sample_shape) + self.batch_shape), self.loc, self.scale_tril)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of ``value [..., D]``: ``[...]`` in nats."""
        assert self.base is not None
        log_scale = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_prob: Tensor = self.base.log_prob(self.standardise(value)) - log_scale
        return log_prob


class ConditionalSampler(Sampler):
    """A sampler in a frame of its own for every context: ``z = m(x) + L(x) h(ε, x)``.

    A `LocationScaleNet` gives the frame. Trained first, alone, it is an amortized Gaussian posterior; the inner
    sampler then adds the shape, in coordinates that are alike for every context.

    Args:
        inner: Sampler with a context.
        encoder: Gives location and scale of each context, in units of ``loc`` and ``scale_tril``.
    """

    def __init__(self, inner: Sampler, encoder: LocationScaleNet):
        super().__init__(inner.latent_dim, noise_dim=inner.noise_dim, context_dim=inner.context_dim)
        self.inner, self.encoder = inner, encoder

    def frame(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return location ``[..., D]`` and lower triangular scale ``[..., D, D]`` of contexts ``x [..., C]``."""
        loc, scale = self.encoder(x)
        return self.loc + loc @ self.scale_tril.mT, self.scale_tril @ scale

    def to_latent(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        assert x is not None
        return _affine(h, *self.frame(x))

    def transform(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        return self.inner.transform(eps, x)

    def moments(self, num_samples: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the moments of ``z`` given ``x [B, C]`` if the inner sampler has them: `NoiseBasisSampler.moments`."""
        if not isinstance(self.inner, NoiseBasisSampler):
            got, do = type(self.inner).__name__, "Use sampler='noise_basis', or another contrast."
            raise OptionError(f"Closed-form conditional moments need the noise basis as sampler, got {got}. {do}")
        mean, cov = self.inner.moments(num_samples, x)
        loc, scale = self.frame(x)
        return _affine(mean, loc, scale), scale @ cov @ scale.mT


def _affine(h: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    z: Tensor = loc + (scale_tril @ h[..., None]).squeeze(-1)
    return z
