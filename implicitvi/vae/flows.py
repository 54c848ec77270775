"""Flow posteriors: a Gaussian given the features of a datum, then invertible maps that the same features steer.

Drawing is one pass through the maps, and the density of a draw comes with it (`Flow.rsample_and_log_prob`): a `VAE`
asks for no more. The density of any other code needs the inverse, which is a pass for each dimension of an
autoregressive flow and a root for each map of a planar one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, TransformedDistribution, constraints
from torch.distributions.transforms import Transform
from torch.nn.functional import softplus

from implicitvi.errors import check_at_least
from implicitvi.nn import zuko_imported
from implicitvi.vae.encoders import gaussian_of


class Flow(TransformedDistribution):
    """A transformed distribution that knows the density of its own draws without inverting anything.

    Args:
        base: Distribution with event shape ``[D]``.
        transforms: Maps with ``call_and_ladj``, from the base outwards.
    """

    def __init__(self, base: Distribution, transforms: list[Any]):
        super().__init__(base, transforms, validate_args=False)
        self.maps = tuple(transforms)

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:
        """Differentiable draws ``[*sample_shape, B, D]`` and their log density ``[*sample_shape, B]`` in nats."""
        z = self.base_dist.rsample(torch.Size(sample_shape))
        log_prob = self.base_dist.log_prob(z)
        for transform in self.maps:
            z, log_abs_det = transform.call_and_ladj(z)
            log_prob = log_prob - log_abs_det
        return z, log_prob


class PlanarTransform(Transform):
    """``z + û tanh(wᵀz + b)``, which moves codes towards or away from a plane.

    ``û`` is ``u`` with as much of ``w`` added as makes ``wᵀû > -1``, so that the map is invertible. Its inverse needs
    one number for each code, the root of ``a + wᵀû tanh(a + b) = wᵀz``, which grows in ``a``.

    Args:
        u: Direction of the move ``[B, D]``.
        w: Normal of the plane ``[B, D]``.
        b: Offset of the plane ``[B]``.

    References:
        Variational Inference with Normalizing Flows, Danilo Rezende, Shakir Mohamed, 2015; eq. 10 and appendix A.1.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, u: Tensor, w: Tensor, b: Tensor):
        super().__init__()
        self.w, self.b = w, b
        along = (w * u).sum(-1)
        self.slope = softplus(along) - 1  # wᵀû
        self.u = u + ((self.slope - along) / (w.square().sum(-1) + 1e-12))[..., None] * w

    def call_and_ladj(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The map of ``z [..., B, D]`` and the log of its Jacobian's determinant ``[..., B]``."""
        h = ((self.w * z).sum(-1) + self.b).tanh()
        return z + self.u * h[..., None], (1 + self.slope * (1 - h.square())).log()

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log of the Jacobian's determinant at ``x [..., B, D]``: ``[..., B]``."""
        return self.call_and_ladj(x)[1]

    def _inverse(self, y: Tensor) -> Tensor:
        target = (self.w * y).sum(-1)
        with torch.no_grad():
            low, high = target - self.slope.abs(), target + self.slope.abs()
            for _ in range(60 if y.dtype == torch.float64 else 30):
                middle = (low + high) / 2
                below = middle + self.slope * (middle + self.b).tanh() < target
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            a = (low + high) / 2
        # a last step of Newton's, which also carries the gradient of the root
        h = (a + self.b).tanh()
        a = a - (a + self.slope * h - target) / (1 + self.slope * (1 - h.square()))
        return y - self.u * (a + self.b).tanh()[..., None]


class PlanarFlow(nn.Module):
    """Features to a Gaussian and planar maps of it, all of whose parameters are given datum by datum.

    Args:
        latent_dim: Dimension ``D`` of a code.
        context_dim: Number ``C`` of features.
        transforms: Number of planar maps.
    """

    def __init__(self, latent_dim: int, context_dim: int, *, transforms: int = 8):
        super().__init__()
        check_at_least("latent_dim", latent_dim, 1)
        check_at_least("transforms", transforms, 1)
        self.base = nn.Linear(context_dim, 2 * latent_dim)
        self.maps = nn.Linear(context_dim, transforms * (2 * latent_dim + 1))
        self.sizes = (latent_dim, latent_dim, 1)

    def forward(self, h: Tensor) -> Distribution:
        """``q(z | x)`` for features ``h [B, C]``: batch shape ``[B]``, event shape ``[D]``."""
        parts = self.maps(h).unflatten(-1, (-1, sum(self.sizes))).unbind(-2)
        planes = [part.split(self.sizes, -1) for part in parts]
        maps = [PlanarTransform(u, w, b.squeeze(-1)) for u, w, b in planes]
        return Flow(gaussian_of(self.base(h)), maps)


class InverseAutoregressiveFlow(nn.Module):
    """Features to a Gaussian and autoregressive maps of it, in the direction in which draws are cheap; needs zuko.

        z_i ← m_i(z_{<i}, h) + s_i(z_{<i}, h) z_i

    The order of the dimensions is turned round from one map to the next.

    Args:
        latent_dim: Dimension ``D`` of a code.
        context_dim: Number ``C`` of features.
        transforms: Number of maps.
        hidden: Widths of the hidden layers of each.
        steering: Number of features that each map is given; a linear map makes them of all.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow, Diederik Kingma et al., 2016.
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        *,
        transforms: int = 4,
        hidden: tuple[int, ...] = (128, 128),
        steering: int = 32,
    ):
        super().__init__()
        check_at_least("latent_dim", latent_dim, 1)
        check_at_least("transforms", transforms, 1)
        self.base = nn.Linear(context_dim, 2 * latent_dim)
        self.steer = nn.Linear(context_dim, steering)
        order = torch.arange(latent_dim)
        with zuko_imported() as zuko:
            self.maps = nn.ModuleList(
                zuko.flows.MaskedAutoregressiveTransform(
                    latent_dim, steering, order=order.flip(0) if i % 2 else order, hidden_features=hidden
                )
                for i in range(transforms)
            )

    def forward(self, h: Tensor) -> Distribution:
        """``q(z | x)`` for features ``h [B, C]``: batch shape ``[B]``, event shape ``[D]``."""
        steer = self.steer(h)
        return Flow(gaussian_of(self.base(h)), [each(steer) for each in self.maps])
