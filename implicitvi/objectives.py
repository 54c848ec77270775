"""The AVB objective: one formula for every contrast, and the losses of its players.

    elbo(z, x) = log p(x, z) - log r(z | x) - T(z, x)            T ≈ log q - log r

With the prior as contrast this is adversarial variational Bayes (Mescheder et al. 2017, eq. 3.6), with a
Gaussian of q's own moments adaptive contrast (eq. 4.2). Because ``E_q[∇_φ T*] = 0`` at the optimal
adversary (proposition 2), ``T`` is held fixed while the sampler learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi.adversaries import InformedAdversary
from implicitvi.contrasts import Contrast
from implicitvi.ratios import Logistic, RatioLoss
from implicitvi.samplers import Sampler

LogDensity = Callable[[Tensor], Tensor]


def elbo(log_joint: Tensor, log_contrast: Tensor, log_ratio: Tensor) -> Tensor:
    """``log p(x, z) - log r(z | x) - T(z, x)`` in nats, each of shape ``[S, (B,)]``; higher is better.

    An evidence lower bound in expectation where ``log_ratio`` is exactly ``log q - log r``; with a learned
    adversary it is an estimate and no bound.
    """
    return log_joint - log_contrast - log_ratio


class AVB:
    """Adversarial variational Bayes of a sampler, a contrast and an adversary.

    The sampler is shown a running average of the adversary's recent weights: a steadier opponent.

    Args:
        sampler: The implicit distribution ``q``.
        contrast: The explicit ``r`` beside it.
        adversary: Network that scores standardised draws; an `InformedAdversary` is shown ``log p - log r`` too.
        ratio: Ratio loss of the adversary.
        averaging: Share of the average that outlives a step of the adversary; 0 for its current weights.
    """

    def __init__(
        self,
        sampler: Sampler,
        contrast: Contrast,
        adversary: nn.Module,
        *,
        ratio: RatioLoss | None = None,
        averaging: float = 0.0,
    ):
        self.sampler = sampler
        self.contrast = contrast
        self.adversary = adversary
        self.ratio = Logistic() if ratio is None else ratio
        self.averaging = averaging
        self.average = deepcopy(adversary) if averaging else None
        # looked up once: walking through a network takes longer than moving its average
        both = [] if self.average is None else [self.average, adversary]
        self._weights: list[list[Tensor]] = [list(module.parameters()) for module in both]
        self._buffers = [list(module.buffers()) for module in both]

    def contrast_loss(self, num_samples: int) -> Tensor:
        """``-mean log r`` of fresh draws: a step of it lets a fitted contrast follow the sampler."""
        with torch.no_grad():
            z = self.sampler(num_samples)
        return self.contrast.loss(z)

    def adversary_losses(
        self, num_samples: int, num_steps: int, log_joint: LogDensity
    ) -> Iterator[Tensor]:
        """The ratio loss on fresh draws of ``q`` and as many of the contrast, for each of the adversary's steps.

        Neither ``q`` nor ``r`` moves meanwhile, so the draws of all steps are made and scored at once.
        """
        if not num_steps:
            return
        gap = None
        with torch.no_grad():
            z_q = self.sampler(num_samples * num_steps)
            r = self.contrast(z_q)
            z = torch.stack([z_q, r.sample(z_q.shape[:1])])
            standard = self.contrast.standardise(z, r)
            if isinstance(self.adversary, InformedAdversary):
                gap = log_joint(z.flatten(0, 1)).view(2, -1) - r.log_prob(z)
                self.adversary.recentre(gap[0])
            self.contrast.observe(z_q)
        for i in range(0, len(z_q), num_samples):
            step = slice(i, i + num_samples)
            known = None if gap is None else gap[:, step]
            t_q, t_r = self._scores(self.adversary, standard[:, step], known)
            yield self.ratio.loss(t_q, t_r)

    def elbo(self, num_samples: int, log_joint: LogDensity) -> tuple[Tensor, int]:
        """Per-draw `elbo` ``[S']`` of fresh draws, and how many of the ``S`` were dropped.

        A draw is dropped where the model gives it no finite log density; its gradient would be lost in any case,
        and would take the others' with it.
        """
        z = self.sampler(num_samples)
        r = self.contrast(z)
        log_p = log_joint(z)
        kept = log_p.isfinite()
        if not kept.all():
            z = z[kept]
            log_p = log_joint(z) if len(z) else log_p[kept]
        log_r = r.log_prob(z)
        return elbo(log_p, log_r, self._log_ratio(z, r, log_p, log_r)), num_samples - len(z)

    def log_q(self, z: Tensor, log_joint: LogDensity) -> Tensor:
        """The learned ``log q(z) = log r(z) + T(z)`` of draws ``z [S, D]``: ``[S]`` in nats.

        The statistics of the contrast are those of ``z``, so hand in many draws of the sampler.
        """
        r = self.contrast(z)
        log_r = r.log_prob(z)
        log_q: Tensor = log_r + self._log_ratio(z, r, log_joint(z), log_r)
        return log_q

    def keep_average(self) -> None:
        """Let the average follow; called after each step of the adversary."""
        if self.average is None:
            return
        with torch.no_grad():
            average, latest = self._weights
            torch._foreach_lerp_(average, latest, 1 - self.averaging)
            for mine, current in zip(*self._buffers, strict=True):
                mine.copy_(current)

    def _log_ratio(self, z: Tensor, r: Distribution, log_p: Tensor, log_r: Tensor) -> Tensor:
        adversary = self.adversary if self.average is None else self.average
        standard = self.contrast.standardise(z, r)
        return self.ratio.log_ratio(self._scores(adversary, standard, log_p - log_r))

    @staticmethod
    def _scores(adversary: nn.Module, standard: Tensor, gap: Tensor | None) -> Tensor:
        informed = isinstance(adversary, InformedAdversary)
        scores: Tensor = adversary(standard, gap) if informed else adversary(standard)
        return scores
