"""Re-estimate a sampler's density with an independent classifier.

A Gaussian mixture ``r`` is fitted to half of the draws, then a small network ``T̂`` learns ``log q - log r`` from that
half and draws of ``r``. On the other half, which neither has seen, ``log q̂ = log r + T̂`` is a held-out estimate: it
gives importance weights, and `RelearnedDensity.compare` checks a learned ``log q``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import log, nan

import torch
from torch import Tensor

from implicitvi.diagnostics.fresh_adversary import auc, train_adversary
from implicitvi.errors import ShapeError, check_seed
from implicitvi.numerics.gaussian import mean_and_cholesky, whiten
from implicitvi.numerics.types import LogDensity

LEAST = 400  # draws; fewer are not enough to learn a density
_COMPONENTS = (1, 8)  # of the mixture; the BIC decides
TRUSTED_AUC, _TRUSTED_MASS, _TRUSTED_DIFFERENCE = 0.15, 0.2, 3.0


@dataclass(frozen=True, eq=False)
class RelearnedDensity:
    """A density learned on one half of the draws and evaluated on the other, for both halves.

    All figures use the same number of draws of ``q`` and of the mixtures ``r``, held out from the classifier.

    Attributes:
        log_p: ``log p [S]`` of the draws of ``q``.
        log_q: The relearned ``log q̂ [S]`` of the same draws.
        log_mass: ``log E_r exp T̂``, 0 for a normalised density.
        auc: AUC of ``T̂`` between ``q`` and ``r``: 0.5 where ``r`` is ``q``.
        auc_corrected: AUC of ``log p - log q̂`` between ``q`` and ``r`` weighted by ``exp T̂``: 0.5 where ``T̂`` is right.
        unsure: Mean absolute difference between the densities learned on the two halves, over the hundredth of the
            draws with the largest weights, in nats: where it is large, the weights are meaningless.
    """

    log_p: Tensor
    log_q: Tensor
    log_mass: float
    auc: float
    auc_corrected: float
    unsure: float
    _log_r: tuple[Tensor, Tensor]
    _ratio: tuple[Tensor, Tensor]
    _r_draws: Tensor

    @property
    def log_weights(self) -> Tensor:
        """Importance weights ``log p - log q̂ [S]``, in the order of the draws."""
        return self.log_p - self.log_q

    @property
    def trusted(self) -> bool:
        """Return whether the density is good enough to weight draws by: it passes its own tests on held-out draws."""
        off, mass = abs(self.auc_corrected - 0.5), abs(self.log_mass)
        return off < TRUSTED_AUC and mass < _TRUSTED_MASS and self.unsure < _TRUSTED_DIFFERENCE

    def compare(self, log_q: LogDensity, z: Tensor) -> DensityComparison:
        """Compare the density that a fit has learned with this one.

        Args:
            log_q: Learned log density of points ``[S, D]``: ``[S]`` in nats.
            z: The draws ``[S, D]`` from which this density was learned.
        """
        with torch.no_grad():
            # in one batch: some contrasts take their moments from it
            both = log_q(torch.cat([z, self._r_draws.to(z)])).double().cpu()
        mine, at_r = both.split(len(z))
        finite = mine.isfinite()
        if not finite.any():
            return DensityComparison(nan, nan, nan)
        claimed, claimed_r = mine - self._log_r[0], at_r - self._log_r[1]
        corrected = auc(self._ratio[0] - claimed, self._ratio[1] - claimed_r, claimed_r)
        return DensityComparison((self.log_q - mine)[finite].mean().item(), corrected, _log_mean_exp(claimed_r))


@dataclass(frozen=True)
class DensityComparison:
    """A comparison of the density that a fit has learned with a relearned one.

    Attributes:
        kl_gap: Mean of ``log q̂ - log q`` over the draws, in nats: the learned ELBO is too high by this much.
        auc: AUC of an independent adversary between ``q`` and the contrast corrected by the learned ratio: 0.5 where
            the ratio is right.
        log_mass: ``log E_r exp T`` of the learned ratio, 0 for a normalised density.
    """

    kl_gap: float
    auc: float
    log_mass: float


def relearn_density(z: Tensor, log_joint: LogDensity, *, seed: int = 0) -> RelearnedDensity:
    """Learn the density of draws from scratch, cross-fitted.

    The network adds to a multiple, possibly 0, of the clipped ``log p - log r``, which is all there is where ``q`` is
    ``p``.

    Args:
        z: Independent draws of ``q``, ``[S, D]``.
        log_joint: ``log p`` of points ``[S, D]`` in nats, ``[S]``.
        seed: Seed of the mixture, the network and its batches.

    Raises:
        ShapeError: There are fewer than 400 draws, or fewer than 20 for each dimension.

    >>> z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> found = relearn_density(z, lambda z: -z.square().sum(1) / 2)
    >>> abs(found.log_q.mean() + 2.838) < 0.1  # the entropy of N(0, I) is log 2π + 1
    tensor(True)

    References:
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017, eq. 3.3.
        Double/debiased machine learning, Victor Chernozhukov et al., 2018 (cross-fitting).
    """
    seed = check_seed("seed", seed)
    least = max(LEAST, 20 * z.shape[-1])
    if z.dim() != 2 or len(z) < least:
        raise ShapeError.must_be("The draws", f"[S, D] with S >= {least} to learn their density", tuple(z.shape))
    here = z.detach().double().cpu()
    halves = torch.randperm(len(here), generator=torch.Generator().manual_seed(seed)).tensor_split(2)
    log_r, ratio, again, log_p_r, log_r_r, ratio_r = torch.empty(6, len(here), dtype=torch.float64)
    r_draws = torch.empty_like(here)
    with torch.no_grad():
        log_p = log_joint(z.detach()).double().cpu()
    for i, (held, train) in enumerate([halves, halves[::-1]]):
        own_seed = (seed + i) % 2**64
        mixture = _Mixture(here[train], own_seed)
        new = mixture.sample(len(here))
        with torch.no_grad():
            log_p_new = log_joint(new.to(z)).double().cpu()
        log_r_new = mixture.log_prob(new)
        gap_q, gap_new = log_p - mixture.log_prob(here), log_p_new - log_r_new
        own, other = slice(len(train)), slice(len(train), None)
        q, r = (mixture.standardise(here[train]), gap_q[train]), (mixture.standardise(new[own]), gap_new[own])
        adversary = train_adversary(q, r, own_seed)
        with torch.no_grad():
            again[train] = adversary(*q) + mixture.log_prob(here[train])
            ratio[held] = adversary(mixture.standardise(here[held]), gap_q[held])
            ratio_r[held] = adversary(mixture.standardise(new[other]), gap_new[other])
        log_r[held] = mixture.log_prob(here[held])
        log_r_r[held], r_draws[held], log_p_r[held] = log_r_new[other], new[other], log_p_new[other]
    log_q = log_r + ratio
    heaviest = (log_p - log_q).topk(max(len(log_p) // 100, 5)).indices
    return RelearnedDensity(
        log_p=log_p,
        log_q=log_q,
        log_mass=_log_mean_exp(ratio_r),
        auc=auc(ratio, ratio_r, torch.zeros_like(ratio_r)),
        auc_corrected=auc(log_p - log_q, log_p_r - log_r_r - ratio_r, ratio_r),
        unsure=(log_q - again)[heaviest].abs().mean().item(),
        _log_r=(log_r, log_r_r),
        _ratio=(ratio, ratio_r),
        _r_draws=r_draws,
    )


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    """Smooth the largest of log importance weights ``[S]``; return them normalised, and Pareto k-hat.

    Above about 0.7 a few of the weights dominate any estimate.

    References:
        Pareto smoothed importance sampling, Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry, 2024.
    """
    import arviz

    numbers = log_weights.double().numpy(force=True)
    if int(arviz.__version__.split(".")[0]) >= 1:
        from arviz_stats.base import array_stats

        # since 1.0 it takes log likelihoods of left-out data, whose inverse are the weights
        smoothed, k = array_stats.psislw(-numbers)
    else:
        smoothed, k = arviz.psislw(numbers)
    return torch.from_numpy(smoothed).log_softmax(0), float(k)


class _Mixture:
    """A Gaussian mixture fitted to draws ``[S, D]`` after whitening."""

    def __init__(self, z: Tensor, seed: int):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        self.loc, self.scale_tril = mean_and_cholesky(z)
        w = self.standardise(z).numpy()
        fits = [
            GaussianMixture(count, max_iter=40, reg_covar=1e-4, init_params="k-means++", random_state=seed % 2**32)
            for count in _COMPONENTS
            if count == 1 or count * 20 * z.shape[1] <= len(z)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a rough fit is enough
            self.fit = min((fit.fit(w) for fit in fits), key=lambda fit: fit.bic(w))
        self.log_scale = self.scale_tril.diagonal().log().sum()
        self.generator = torch.Generator().manual_seed(seed)

    def standardise(self, z: Tensor) -> Tensor:
        return whiten(z, self.loc, self.scale_tril).contiguous()

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.from_numpy(self.fit.score_samples(self.standardise(z).numpy())) - self.log_scale

    def sample(self, count: int) -> Tensor:
        weights, means = (torch.from_numpy(a) for a in (self.fit.weights_, self.fit.means_))
        which = torch.multinomial(weights, count, replacement=True, generator=self.generator)
        noise = torch.randn(count, means.shape[1], generator=self.generator, dtype=torch.float64)
        w = means[which]
        for i, root in enumerate(torch.linalg.cholesky(torch.from_numpy(self.fit.covariances_))):
            w[which == i] += noise[which == i] @ root.mT
        return self.loc + w @ self.scale_tril.mT


def _log_mean_exp(values: Tensor) -> float:
    """Return ``log mean exp`` of the values that are not NaN."""
    finite = values[~values.isnan()]
    return (finite.logsumexp(0) - log(max(len(finite), 1))).item()
