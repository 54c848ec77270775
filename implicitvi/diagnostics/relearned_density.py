"""A fresh adversary: the density of a sampler learned anew, by someone who knows nothing of its training.

A Gaussian mixture ``r`` is fitted to half of the draws, then a small network learns ``log q - log r`` from that half
and draws of ``r``. On the other half, which neither has seen,

    log q̂ = log r + T̂

is an honest estimate: with it go importance weights, and the learned ``log q`` of a fit is held against it.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass
from math import log, nan

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from implicitvi.errors import ShapeError
from implicitvi.numerics.gaussian import mean_and_cholesky, whiten
from implicitvi.numerics.types import LogDensity

LEAST = 400  # draws; from fewer no network learns a density
TRUSTED_AUC, _TRUSTED_MASS, _TRUSTED_DOUBT = 0.15, 0.2, 3.0
_CLIP = 20.0  # nats by which the log joint may speak for or against a draw
_REACH = 4.0  # standard deviations up to which the network can tell places apart
_STEPS, _BATCH = 500, 512
_COMPONENTS = (1, 8)


@dataclass(frozen=True, eq=False)
class RelearnedDensity:
    """A density learned afresh on one half of the draws and judged on the other, both ways.

    The same number of draws of ``q`` and of the mixtures ``r`` stand behind all figures, each held out from
    what judges it.

    Attributes:
        log_p: ``log p [S]`` of the draws of ``q``.
        log_q: The fresh ``log q̂ [S]`` of the same draws.
        kl_contrast: ``KL(q‖r)`` that the fresh adversary has found, in nats: what there was to be learned.
        log_mass: ``log E_r exp T̂``, 0 for a normalised density.
        auc: How well the fresh adversary tells ``q`` from ``r``: 0.5 where ``r`` is ``q``.
        auc_corrected: How well ``log p`` and it tell ``q`` from ``r`` weighted by ``exp T̂``: 0.5 where ``T̂`` is
            right.
        unsure: Mean difference between the densities learned on the two halves, over the hundredth of the draws that
            weigh most, in nats: where it is large, their weights say nothing.
    """

    log_p: Tensor
    log_q: Tensor
    kl_contrast: float
    log_mass: float
    auc: float
    auc_corrected: float
    unsure: float
    _log_r: tuple[Tensor, Tensor]
    _ratio: tuple[Tensor, Tensor]
    _r_draws: Tensor

    @property
    def log_weights(self) -> Tensor:
        """``log p - log q̂ [S]``, in the order of the draws."""
        return self.log_p - self.log_q

    @property
    def trusted(self) -> bool:
        """Whether the fresh density is good enough to weigh draws by: it passes its own tests, on draws held out."""
        return (
            abs(self.auc_corrected - 0.5) < TRUSTED_AUC
            and abs(self.log_mass) < _TRUSTED_MASS
            and self.unsure < _TRUSTED_DOUBT
        )

    def compare(self, log_q: LogDensity, z: Tensor) -> DensityComparison:
        """Hold a learned density against the fresh one.

        Args:
            log_q: Learned log density of points ``[S, D]``: ``[S]`` in nats.
            z: The draws that were audited ``[S, D]``.
        """
        with torch.no_grad():
            # together: some contrasts take their moments from whatever they are shown
            both = log_q(torch.cat([z, self._r_draws.to(z)])).double().cpu()
        mine, at_r = both.split(len(z))
        claimed = (mine - self._log_r[0], at_r - self._log_r[1])
        finite = mine.isfinite()
        if not finite.any():
            return DensityComparison(nan, nan, nan, nan, nan, nan)
        off = (self.log_q - mine)[finite]
        residual = tuple(fresh - old for fresh, old in zip(self._ratio, claimed, strict=True))
        return DensityComparison(
            kl_gap=off.mean().item(),
            kl_gap_error=off.std().item() / len(off) ** 0.5,
            scatter=off.std().item(),
            auc=_auc(residual[0], residual[1], claimed[1]),
            log_mass=_log_mean_exp(claimed[1]),
            slope=_logistic(*claimed)[1].item(),
        )


@dataclass(frozen=True)
class DensityComparison:
    """How a learned density stands against a fresh one.

    Attributes:
        kl_gap: Mean of ``log q̂ - log q`` over the draws, in nats: by so much the learned ELBO is too good.
        kl_gap_error: Its standard error, without what the fresh one itself is wrong by.
        scatter: Standard deviation of the same difference.
        auc: How well a fresh adversary tells ``q`` from the contrast corrected by the learned ratio: 0.5 where that
            is right.
        log_mass: ``log E_r exp T`` of the learned ratio, 0 where it is a density's.
        slope: Calibration: slope of the log odds of being a draw of ``q`` in the learned ratio; 1 where it is right
            and says anything at all.
    """

    kl_gap: float
    kl_gap_error: float
    scatter: float
    auc: float
    log_mass: float
    slope: float


def relearn_density(z: Tensor, log_joint: LogDensity, *, seed: int = 0) -> RelearnedDensity:
    """Learn the density of draws afresh, cross-fitted.

    The network adds to a multiple of the clipped ``log p - log r``, which it is free to ignore: where ``q`` is ``p``
    there is then nothing left to learn.

    Args:
        z: Independent draws of ``q``, ``[S, D]``.
        log_joint: ``log p`` of points ``[S, D]`` in nats, ``[S]``.
        seed: Of the mixture, the network and its batches.

    Raises:
        ShapeError: There are fewer than 400 draws, or fewer than 20 for each dimension.

    >>> z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> found = relearn_density(z, lambda z: -z.square().sum(1) / 2)
    >>> abs(found.log_q.mean() + 2.838) < 0.1  # the entropy of N(0, I) is log 2π + 1
    tensor(True)

    References:
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017, eq. 3.3.
        Double/debiased machine learning, Victor Chernozhukov et al., 2018: halves that change places.
    """
    least = max(LEAST, 20 * z.shape[-1])
    if z.dim() != 2 or len(z) < least:
        raise ShapeError(
            "there are too few draws to learn their density from",
            got=f"shape {tuple(z.shape)}",
            expected=f"[S, D] with S >= {least}",
        )
    here = z.detach().double().cpu()
    halves = torch.arange(len(here)).tensor_split(2)
    shuffled = torch.randperm(len(here), generator=torch.Generator().manual_seed(seed))
    log_p, log_r, ratio = (torch.empty(len(here), dtype=torch.float64) for _ in range(3))
    log_r_r, ratio_r, r_draws = (torch.empty_like(log_p), torch.empty_like(log_p), torch.empty_like(here))
    log_p_r, again = torch.empty_like(log_p), torch.empty_like(log_p)
    with torch.no_grad():
        log_p.copy_(log_joint(z.detach()))
    for i, half in enumerate(halves):
        held, train = shuffled[half], shuffled[halves[1 - i]]
        mixture = _Mixture(here[train], seed + i)
        new = mixture.sample(len(train) + len(held))
        with torch.no_grad():
            log_p_new = log_joint(new.to(z)).double().cpu()
        log_r_new = mixture.log_prob(new)
        gap_q, gap_new = log_p - mixture.log_prob(here), log_p_new - log_r_new
        own, other = slice(0, len(train)), slice(len(train), None)
        adversary = _train(
            (mixture.standardise(here[train]), gap_q[train]), (mixture.standardise(new[own]), gap_new[own]), seed + i
        )
        with torch.no_grad():
            again[train] = adversary(mixture.standardise(here[train]), gap_q[train])
            again[train] += mixture.log_prob(here[train])
            ratio[held] = adversary(mixture.standardise(here[held]), gap_q[held])
            ratio_r[held] = adversary(mixture.standardise(new[other]), gap_new[other])
        log_r[held] = mixture.log_prob(here[held])
        log_r_r[held], r_draws[held], log_p_r[held] = log_r_new[other], new[other], log_p_new[other]
    log_q = log_r + ratio
    heaviest = (log_p - log_q).topk(max(len(log_p) // 100, 5)).indices
    residual = (log_p - log_q, log_p_r - log_r_r - ratio_r)
    return RelearnedDensity(
        log_p=log_p,
        log_q=log_q,
        kl_contrast=ratio.mean().item(),
        log_mass=_log_mean_exp(ratio_r),
        auc=_auc(ratio, ratio_r, torch.zeros_like(ratio_r)),
        auc_corrected=_auc(residual[0], residual[1], ratio_r),
        unsure=(log_q - again)[heaviest].abs().mean().item(),
        _log_r=(log_r, log_r_r),
        _ratio=(ratio, ratio_r),
        _r_draws=r_draws,
    )


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    """Log importance weights ``[S]`` with the largest smoothed, normalised, and Pareto k-hat.

    Above about 0.7 a few of them decide everything.

    References:
        Pareto smoothed importance sampling, Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry, 2024.
    """
    import arviz

    numbers = log_weights.double().numpy(force=True)
    if int(arviz.__version__.split(".")[0]) >= 1:
        from arviz_stats.base import array_stats

        # since 1.0 it takes log likelihoods of what is left out, and weighs by their inverse
        smoothed, k = array_stats.psislw(-numbers)
    else:
        smoothed, k = arviz.psislw(numbers)
    return torch.from_numpy(smoothed).log_softmax(0), float(k)


class _Mixture:
    """A Gaussian mixture fitted to draws ``[S, D]`` in their own frame."""

    def __init__(self, z: Tensor, seed: int):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        self.loc, self.scale_tril = mean_and_cholesky(z)
        w = self.standardise(z).numpy()
        fits = [
            GaussianMixture(count, max_iter=40, reg_covar=1e-4, init_params="k-means++", random_state=seed)
            for count in _COMPONENTS
            if count == 1 or count * 20 * z.shape[1] <= len(z)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # any mixture near q will do
            self.fit = min((fit.fit(w) for fit in fits), key=lambda fit: fit.bic(w))
        self.log_scale = self.scale_tril.diagonal().log().sum()
        self.generator = torch.Generator().manual_seed(seed)

    def standardise(self, z: Tensor) -> Tensor:
        return whiten(z, self.loc, self.scale_tril).contiguous()

    def log_prob(self, z: Tensor) -> Tensor:
        scores = torch.from_numpy(self.fit.score_samples(self.standardise(z).numpy()))
        return scores - self.log_scale

    def sample(self, count: int) -> Tensor:
        weights, means = (torch.from_numpy(a) for a in (self.fit.weights_, self.fit.means_))
        which = torch.multinomial(weights, count, replacement=True, generator=self.generator)
        noise = torch.randn(count, means.shape[1], generator=self.generator, dtype=torch.float64)
        roots = torch.linalg.cholesky(torch.from_numpy(self.fit.covariances_))
        w = means[which]
        for i, root in enumerate(roots):
            w[which == i] += noise[which == i] @ root.mT
        return self.loc + w @ self.scale_tril.mT


class _Adversary(nn.Module):
    """``T(w) + a clip(log p - log r - c) + b``: a bounded network beside the logistic regression on the hint.

    Args:
        dim: Dimension ``D``.
        centre: ``c``.
        generator: Of the first weights.
        width: Of both hidden layers.
    """

    def __init__(self, dim: int, centre: Tensor, generator: torch.Generator, width: int = 32):
        super().__init__()
        self.centre = centre
        self.hint = torch.zeros(2, dtype=torch.float64)
        sizes = [(dim, 2 * width), (width, 2 * width), (width, 1)]
        self.weights = nn.ParameterList(
            torch.randn(i, o, generator=generator, dtype=torch.float32) * (i**-0.5 if o > 1 else 0.0) for i, o in sizes
        )
        self.biases = nn.ParameterList(torch.zeros(o, dtype=torch.float32) for _, o in sizes)

    def known(self, gap: Tensor) -> Tensor:
        """The clipped hint of ``log p - log r [S]``."""
        return (gap - self.centre).nan_to_num(-_CLIP, _CLIP, -_CLIP).clamp(-_CLIP, _CLIP)

    def network(self, w: Tensor) -> Tensor:
        """``T(w) [S]``; far out, where there is nothing to learn from, it is flat."""
        h = _REACH * (w / _REACH).tanh()
        for weight, bias in list(zip(self.weights, self.biases, strict=True))[:-1]:
            gate, value = (h @ weight + bias).chunk(2, -1)
            h = silu(gate) * value
        scores: Tensor = (h @ self.weights[-1] + self.biases[-1]).squeeze(-1)
        return scores

    def forward(self, w: Tensor, gap: Tensor) -> Tensor:
        """``log q - log r [S]`` of standardised points ``w [S, D]`` with ``gap = log p - log r [S]``."""
        return self.network(w.float()).double() + self.hint[0] + self.hint[1] * self.known(gap)


def _train(q: tuple[Tensor, Tensor], r: tuple[Tensor, Tensor], seed: int) -> _Adversary:
    """An adversary of draws ``w [S, D]`` with gaps ``[S]`` of both, stopped where it stops to get better on a fifth."""
    generator = torch.Generator().manual_seed(seed)
    finite = q[1][q[1].isfinite()]
    centre = finite.median() if len(finite) else torch.zeros((), dtype=torch.float64)
    adversary = _Adversary(q[0].shape[1], centre, generator)
    adversary.hint = _logistic(adversary.known(q[1]), adversary.known(r[1]))
    w_q, w_r = q[0].float(), r[0].float()
    with torch.no_grad():
        base_q, base_r = adversary(*q).float(), adversary(*r).float()
    cut = len(w_q) // 5
    parameters = list(adversary.parameters())
    optimiser = torch.optim.Adam(parameters, lr=2e-3)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)

    def loss(rows_q: Tensor | slice, rows_r: Tensor | slice) -> Tensor:
        t_q = adversary.network(w_q[rows_q]) + base_q[rows_q]
        t_r = adversary.network(w_r[rows_r]) + base_r[rows_r]
        return -logsigmoid(t_q).mean() - logsigmoid(-t_r).mean()

    with torch.no_grad():
        best, kept = loss(slice(0, cut), slice(0, cut)).item(), deepcopy(adversary.state_dict())
    for step in range(1, _STEPS + 1):
        rows = [torch.randint(cut, len(w_q), (_BATCH,), generator=generator) for _ in range(2)]
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(*rows), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        cooling.step()
        if step % 25 == 0:
            with torch.no_grad():
                held_out = loss(slice(0, cut), slice(0, cut)).item()
            if held_out < best:
                best, kept = held_out, deepcopy(adversary.state_dict())
    adversary.load_state_dict(kept)
    return adversary.requires_grad_(False)


def _log_mean_exp(values: Tensor) -> float:
    finite = values[~values.isnan()]
    return (finite.logsumexp(0) - log(max(len(finite), 1))).item()


def _auc(q: Tensor, r: Tensor, log_weights: Tensor) -> float:
    """Chance that a score of ``q [S]`` is above one of ``r [R]``, whose draws count ``exp(log_weights)``."""
    keep_q, keep_r = q.isfinite(), r.isfinite() & log_weights.isfinite()
    q, r, log_weights = q[keep_q], r[keep_r], log_weights[keep_r]
    if not len(q) or not len(r):
        return nan
    order = r.argsort()
    below = torch.cat([torch.zeros(1).to(r), log_weights[order].softmax(0).cumsum(0)])
    ranked = r[order].contiguous()
    low, high = (below[torch.searchsorted(ranked, q, right=side)] for side in (False, True))
    return ((low + high) / 2).mean().item()


def _logistic(q: Tensor, r: Tensor, num_steps: int = 30) -> Tensor:
    """Intercept and slope ``[2]`` of the log odds of being a draw of ``q`` in the scores ``q [S]`` and ``r [R]``."""
    scores = torch.cat([q, r])
    labels = torch.cat([torch.ones_like(q), torch.zeros_like(r)])
    keep = scores.isfinite()
    scores, labels = scores[keep].clamp(-30, 30), labels[keep]
    design = torch.stack([torch.ones_like(scores), scores], 1)
    beta, ridge = design.new_zeros(2), 1e-6 * len(design)
    for _ in range(num_steps):
        chance = (design @ beta).sigmoid()
        curvature = (design * (chance * (1 - chance))[:, None]).mT @ design
        curvature += ridge * torch.eye(2).to(design)
        step = torch.linalg.solve(curvature, design.mT @ (labels - chance) - ridge * beta)
        beta = beta + step.clamp(-1, 1)
    return beta
