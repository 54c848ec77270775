"""Flow posteriors: a Gaussian given the features ``[B, C]`` of data, then invertible maps given the same features.

One pass through the maps makes a draw and its density (`Flow.rsample_and_log_prob`), which is all that a `VAE` needs.
The density of other codes needs the inverse: a pass for each dimension if autoregressive, a root for each planar map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, TransformedDistribution, constraints
from torch.distributions.transforms import Transform
from torch.nn.functional import softplus

from implicitvi.errors import check_whole
from implicitvi.nn import zuko_imported
from implicitvi.vae.distributions import diagonal_gaussian


class Flow(TransformedDistribution):
    """A transformed distribution that scores its own draws without an inverse.

    Args:
        base: Distribution with event shape ``[D]``.
        transforms: Maps with ``call_and_ladj``, from the base outwards.
    """

    def __init__(self, base: Distribution, transforms: list[Any]):
        super().__init__(base, transforms, validate_args=False)
        self.maps = tuple(transforms)

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:
        """Return draws ``[*sample_shape, B, D]`` with gradients, and their log density ``[*sample_shape, B]``."""
        z = self.base_dist.rsample(torch.Size(sample_shape))
        log_prob = self.base_dist.log_prob(z)
        for transform in self.maps:
            z, log_abs_det = transform.call_and_ladj(z)
            log_prob = log_prob - log_abs_det
        return z, log_prob


class PlanarTransform(Transform):
    """A map ``z + û tanh(wᵀz + b)``, which moves codes towards or away from a plane.

    ``û`` is ``u`` plus the multiple of ``w`` for which ``wᵀû > -1``, so that the map is invertible. The inverse needs
    one number for each code, the root of ``a + wᵀû tanh(a + b) = wᵀz``, whose left side increases in ``a``.

    Args:
        u: Direction of the move ``[B, D]``.
        w: Normal of the plane ``[B, D]``.
        b: Offset of the plane ``[B]``.

    References:
        Variational Inference with Normalizing Flows, Danilo Rezende, Shakir Mohamed, 2015; eq. 10 and appendix A.1.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, u: Tensor, w: Tensor, b: Tensor):
        super().__init__()
        self.w, self.b = w, b
        along = (w * u).sum(-1)
        self.slope = softplus(along) - 1  # wᵀû
        self.u = u + ((self.slope - along) / (w.square().sum(-1) + 1e-12))[..., None] * w

    def call_and_ladj(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of ``z [..., B, D]`` and the log of the Jacobian's determinant ``[..., B]``."""
        h = ((self.w * z).sum(-1) + self.b).tanh()
        return z + self.u * h[..., None], (1 + self.slope * (1 - h.square())).log()

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
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
        # a last step of Newton's method also carries the gradient of the root
        h = (a + self.b).tanh()
        a = a - (a + self.slope * h - target) / (1 + self.slope * (1 - h.square()))
        return y - self.u * (a + self.b).tanh()[..., None]


class PlanarFlow(nn.Module):
    """A Gaussian and planar maps of it, with all parameters given by the features.

    Args:
        latent_dim: Dimension ``D`` of a code.
        context_dim: Number ``C`` of features.
        transforms: Number of planar maps.
    """

    def __init__(self, latent_dim: int, context_dim: int, *, transforms: int = 8):
        super().__init__()
        check_whole("latent_dim", latent_dim)
        check_whole("transforms", transforms)
        self.base = nn.Linear(context_dim, 2 * latent_dim)
        self.maps = nn.Linear(context_dim, transforms * (2 * latent_dim + 1))
        self.sizes = (latent_dim, latent_dim, 1)

    def forward(self, h: Tensor) -> Distribution:
        parts = self.maps(h).unflatten(-1, (-1, sum(self.sizes))).unbind(-2)
        planes = (part.split(self.sizes, -1) for part in parts)
        return Flow(diagonal_gaussian(self.base(h)), [PlanarTransform(u, w, b.squeeze(-1)) for u, w, b in planes])


class InverseAutoregressiveFlow(nn.Module):
    """A Gaussian and autoregressive maps of it, in the direction in which draws are cheap; needs zuko.

        z_i ← m_i(z_{<i}, h) + s_i(z_{<i}, h) z_i

    Each map reverses the order of the dimensions of the one before.

    Args:
        latent_dim: Dimension ``D`` of a code.
        context_dim: Number ``C`` of features.
        transforms: Number of maps.
        hidden: Widths of the hidden layers of each.
        steering: Number of linear combinations of the features that each map is given.

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
        check_whole("latent_dim", latent_dim)
        check_whole("transforms", transforms)
        self.base = nn.Linear(context_dim, 2 * latent_dim)
        self.steer = nn.Linear(context_dim, steering)
        order = torch.arange(latent_dim)
        orders = [order.flip(0) if i % 2 else order for i in range(transforms)]
        with zuko_imported() as zuko:
            made = zuko.flows.MaskedAutoregressiveTransform
            self.maps = nn.ModuleList(made(latent_dim, steering, order=o, hidden_features=hidden) for o in orders)

    def forward(self, h: Tensor) -> Distribution:
        steer = self.steer(h)
        return Flow(diagonal_gaussian(self.base(h)), [each(steer) for each in self.maps])
