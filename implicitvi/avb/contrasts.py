"""Contrasts: explicit distributions ``r(z | x)`` against which the adversary compares an implicit ``q``.

``contrast(z, x)`` takes draws ``z [S, (B,) D]`` of ``q`` and returns an ordinary `torch.distributions.Distribution`
with batch shape ``[(B,)]`` and event shape ``[D]`` that is easy to draw from and to score. It is a constant for the
sampler: its statistics are detached, because the objective needs ``E_q[∇ log r]`` without the gradient of the moments
(Mescheder et al. 2017, section 4).

The closer ``r`` is to ``q``, the less is left for the adversary to learn. ``KL(q‖r)`` does not change under a
common bijection of both, so the adversary sees standardised draws, ``contrast.standardise(z, r)``.

Implementing a contrast: subclass `Contrast`, define ``forward`` and ``standardise``, ``loss`` for parameters that are
fitted to the draws, ``observe`` for a memory of them; then join the list in ``tests/contracts.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, TransformedDistribution

from implicitvi import distributed
from implicitvi.errors import ModelError, OptionError, check_at_least, check_positive
from implicitvi.nn import zuko_imported
from implicitvi.numerics.gaussian import Gaussian, GaussianMixture, gather_draws, moments, whiten


class Contrast(nn.Module, ABC):
    """An explicit distribution made from, or fitted to, the draws of ``q``."""

    extra_dim = 0  # coordinates that `standardise` adds to those of a draw

    @abstractmethod
    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        """Return ``r(· | x)`` for draws ``z [S, (B,) D]``: batch shape ``[(B,)]``, event shape ``[D]``."""

    @abstractmethod
    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        """Map ``z [S, (B,) D]`` to a network's coordinates, by a bijection fixed by ``r``, and add `extra_dim` more."""

    def observe(self, z: Tensor, r: Distribution) -> None:
        """Learn from draws ``z [S, (B,) D]`` that have been compared with ``r``; for contrasts with a memory."""

    def be_gaussian(self, weights: Tensor, locs: Tensor, scale_trils: Tensor) -> None:
        """Be a mixture with these weights ``[K]``, means ``[K, D]`` and scales ``[K, D, D]``; if it has a memory."""

    def loss(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Return ``-mean log r(z | x)`` in nats, the loss of the contrast's own parameters if it has any."""
        loss: Tensor = -self(z, x).log_prob(z).mean()
        return loss


class PriorContrast(Contrast):
    """The prior of the model as contrast: plain AVB (Mescheder et al. 2017, section 3).

    Args:
        prior: Distribution with event shape ``[D]``; only its ``sample`` and ``log_prob`` are used.
        loc: Centre ``[D]`` for the adversary's coordinates, default 0.
        scale: Scale ``[D]`` for the adversary's coordinates, default 1.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, prior: Distribution, *, loc: Tensor | None = None, scale: Tensor | None = None):
        super().__init__()
        self.prior = prior
        self.register_buffer("loc", torch.zeros(prior.event_shape) if loc is None else loc)
        self.register_buffer("scale", torch.ones(prior.event_shape) if scale is None else scale)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        return self.prior

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        return (z - self.loc) / self.scale


class DiagonalGaussianContrast(Contrast):
    """A Gaussian with the draws' mean and variances: adaptive contrast (Mescheder et al. 2017, section 4, eq. 4.2)."""

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        z = gather_draws(z.detach())
        return Independent(Normal(z.mean(0), z.std(0) + 1e-6, validate_args=False), 1)

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        return (z - r.mean) / r.stddev


class GaussianContrast(Contrast):
    """A Gaussian with the mean and full covariance of the current draws.

    With fewer draws than dimensions a small multiple of the covariance's diagonal completes it.
    """

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        loc, scale_tril = moments(z.detach())
        return Gaussian(loc, scale_tril=scale_tril, validate_args=False)

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        assert isinstance(r, Gaussian)
        return r.standardise(z)


class MixtureContrast(Contrast):
    """A mixture of Gaussians that follows the draws by expectation maximisation.

    A few components capture most of the shape that one Gaussian misses, such as modes, bends and funnels, at little
    more than its cost. Each batch but the first, which starts the mixture, updates it after its use, so that no draw is
    scored by a mixture that has already seen it.

    In the coordinates of the whole mixture the neck of a funnel is a spike that no network resolves. So ``standardise``
    gives ``[S, D + D + K]``: the draw standardised by the whole, by its components, and its shares in them.

    Args:
        latent_dim: Dimension ``D`` of a draw.
        components: Number ``K`` of Gaussians.
        rate: Share of the current batch in the running estimates.
        ridge: Least variance of a component along each axis, as a share of the whole mixture's.

    References:
        On-line expectation–maximization algorithm for latent data models, Olivier Cappé, Eric Moulines, 2009.
    """

    weights: Tensor
    locs: Tensor
    covs: Tensor
    scale_trils: Tensor
    loc: Tensor
    scale_tril: Tensor
    fitted: Tensor

    def __init__(self, latent_dim: int, *, components: int = 8, rate: float = 0.25, ridge: float = 1e-5):
        super().__init__()
        check_at_least("components", components, 1)
        if not 0 < rate <= 1:
            raise OptionError.must_be("rate", "above 0 and at most 1", rate)
        check_positive("ridge", ridge)
        self.components, self.rate, self.ridge = components, rate, ridge
        self.extra_dim = latent_dim + components
        unit = torch.eye(latent_dim)
        self.register_buffer("weights", torch.full((components,), 1 / components))
        self.register_buffer("locs", torch.zeros(components, latent_dim))
        self.register_buffer("covs", unit.repeat(components, 1, 1))
        self.register_buffer("scale_trils", unit.repeat(components, 1, 1))
        self.register_buffer("loc", torch.zeros(latent_dim))
        self.register_buffer("scale_tril", unit.clone())
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self._equal = False  # whether all components are one Gaussian

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        refuse_context(x)
        if not self.fitted:
            self._begin(z.detach())
        return GaussianMixture(self.weights, self.locs, self.scale_trils)

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        assert isinstance(r, GaussianMixture)
        return torch.cat([whiten(z, self.loc, self.scale_tril), *r.local(z)], -1)

    @torch.no_grad()
    def observe(self, z: Tensor, r: Distribution) -> None:
        if self._equal:  # they would stay so
            self._begin(z)
        self._step(gather_draws(z), self.rate)

    @torch.no_grad()
    def be_gaussian(self, weights: Tensor, locs: Tensor, scale_trils: Tensor) -> None:
        """Make all components one Gaussian; the next draws that are observed spread them."""
        if len(locs) > 1:
            raise OptionError.must_be("the components of a mixture contrast", "of one Gaussian", len(locs))
        self.weights.fill_(1 / self.components)
        self.locs.copy_(locs)
        self.covs.copy_(scale_trils @ scale_trils.mT)
        self.fitted.fill_(True)
        self._equal = self.components > 1
        self._factorise()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._equal = self.components > 1 and bool(self.fitted & (self.locs == self.locs[0]).all())

    @torch.no_grad()
    def _begin(self, z: Tensor) -> None:
        """Spread the components over the draws, then take ten large steps on the batch."""
        self._equal = False
        loc, scale_tril = moments(z)
        z = gather_draws(z)
        chosen = _spread(whiten(z, loc, scale_tril), self.components)
        distributed.broadcast([chosen])
        self.locs.copy_(z[chosen])
        self.covs.copy_(scale_tril @ scale_tril.mT / self.components)
        self.fitted.fill_(True)
        self._factorise()
        for _ in range(10):
            self._step(z, 0.5)

    def _step(self, z: Tensor, rate: float) -> None:
        """Take one step of expectation maximisation, in updates that do not cancel far from the origin."""
        now = GaussianMixture(self.weights, self.locs, self.scale_trils)
        shares = now.log_joint(z).softmax(-1)
        found = shares.mean(0)
        weights = (1 - rate) * self.weights + rate * found
        gain = (rate * found / weights)[:, None]
        within = (shares / shares.sum(0).clamp(min=1e-12)).mT
        off = z - (within @ z)[:, None]
        spread = (within[..., None] * off).mT @ off
        shift = within @ z - self.locs
        outer = shift[:, :, None] * shift[:, None, :]
        self.locs.add_(gain * shift)
        gain = gain[..., None]
        self.covs.copy_((1 - gain) * self.covs + gain * spread + gain * (1 - gain) * outer)
        # a component of weight 0 could not return when a mode appears
        self.weights.copy_((weights + 1e-3 / self.components) / (1 + 1e-3))
        self._factorise()

    def _factorise(self) -> None:
        """Update the factors, and the moments of the whole mixture, from the components."""
        loc = self.weights @ self.locs
        off = self.locs - loc
        cov = (self.weights[:, None] * off).mT @ off + torch.einsum("k,kde", self.weights, self.covs)
        floor = torch.diag_embed(self.ridge * cov.diagonal() + 1e-12)
        # of draws that are not finite the factors are not either, and the trainer skips the turn
        factors = torch.linalg.cholesky_ex(torch.cat([self.covs + floor, (cov + floor)[None]])).L
        self.scale_trils.copy_(factors[:-1])
        self.loc.copy_(loc)
        self.scale_tril.copy_(factors[-1])


class FlowContrast(Contrast):
    """A coupling flow around the Gaussian of the draws, fitted to them by maximum likelihood.

    Needs zuko. It captures the shape of a funnel or a banana, and follows the sampler by one step of `loss` for each of
    the adversary's. Coupling layers cost one pass for scoring and two for drawing.

    Args:
        latent_dim: Dimension ``D`` of a draw.
        transforms: Number of coupling layers.
        hidden: Widths of the hidden layers of each.
    """

    def __init__(self, latent_dim: int, *, transforms: int = 4, hidden: tuple[int, ...] = (64, 64)):
        super().__init__()
        with zuko_imported() as zuko:
            self.flow = zuko.flows.MAF(
                latent_dim, transforms=transforms, hidden_features=hidden, passes=2, randperm=True
            )

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        refuse_context(x)
        from pyro.distributions.transforms import LowerCholeskyAffine

        affine = LowerCholeskyAffine(*moments(z.detach()))
        return TransformedDistribution(self.flow(), [affine], validate_args=False)

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        assert isinstance(r, TransformedDistribution)
        affine: Any = r.transforms[0]
        return whiten(z, affine.loc, affine.scale_tril)


def _spread(z: Tensor, count: int) -> Tensor:
    """Return indices ``[count]`` of draws far apart, by the rule of k-means++ (Arthur & Vassilvitskii 2007)."""
    chosen = torch.randint(len(z), (1,), device=z.device)
    for _ in range(count - 1):
        nearest = torch.cdist(z, z[chosen]).min(1).values
        chosen = torch.cat([chosen, torch.multinomial((nearest.square() + 1e-12).nan_to_num(1.0), 1)])
    return chosen


def refuse_context(x: Tensor | None) -> None:
    """Raise `ModelError` if a contrast without context is given one."""
    if x is not None:
        raise ModelError("This contrast does not take a context. Use contrast='gaussian'.")
