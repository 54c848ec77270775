"""The AVB objective: one formula for every contrast, and the losses of its players.

    elbo(z, x) = log p(x, z) - log r(z | x) - T(z, x)            T ≈ log q - log r

With the prior as contrast this is adversarial variational Bayes (Mescheder et al. 2017, eq. 3.6), with a Gaussian of
q's own moments adaptive contrast (eq. 4.2). Because ``E_q[∇_φ T*] = 0`` at the optimal adversary (proposition 2),
``T`` is held fixed while the sampler learns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from math import log

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi.avb.adversaries import InformedAdversary
from implicitvi.avb.contrasts import Contrast
from implicitvi.avb.multimodal import MixtureSampler
from implicitvi.avb.ratios import Logistic, RatioLoss
from implicitvi.avb.samplers import Sampler
from implicitvi.numerics.optimise import finite_draws
from implicitvi.numerics.types import LogDensity


def elbo(log_joint: Tensor, log_contrast: Tensor, log_ratio: Tensor) -> Tensor:
    """Return ``log p(x, z) - log r(z | x) - T(z, x)`` in nats, each of shape ``[S, (B,)]``; higher is better.

    Its mean is an evidence lower bound if ``log_ratio`` is exactly ``log q - log r``; a learned one gives an estimate.
    """
    return log_joint - log_contrast - log_ratio


def importance_weighted(elbo: Tensor, z: Tensor | None, num_importance: int) -> Tensor:
    """Return the bound ``log mean_k exp elbo`` over ``K`` draws: ``elbo [S, (B,)]`` to ``[S / K, (B,)]``.

    The draws ``z [S, (B,) D]`` get the doubly reparameterised gradient: holding ``q`` fixed in the ELBO leaves its mean
    gradient unchanged only while all draws weigh the same; squaring the weights on the way through ``z`` (and only
    there) corrects it. With ``K = 1`` nothing changes; with ``z=None`` the gradient is that of the bound.

    References:
        Importance Weighted Autoencoders, Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, 2016, eq. 8.
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, Tucker, Lawson, Gu, Maddison 2019, eq. 8.
    """
    if num_importance == 1:
        return elbo
    groups: Tensor = elbo.unflatten(0, (num_importance, -1))
    if z is not None and z.requires_grad:
        weights = groups.detach().softmax(0).flatten(0, 1)[..., None]
        z.register_hook(lambda gradient: gradient * weights)
    return groups.logsumexp(0) - log(num_importance)


class AVBObjective:
    """An objective of adversarial variational Bayes: a sampler, a contrast and an adversary.

    The sampler plays against a running average of the adversary's recent weights: a steadier opponent. A context ``x``
    is ``[B, C]``, or ``[S, B, C]`` with one for each draw; the log joint of draws ``z [S, (B,) D]`` is ``[S, (B,)]``.
    Only the networks read a context, so it may have more axes than ``C``, as images do.

    Args:
        sampler: The implicit distribution ``q``.
        contrast: The explicit ``r`` beside it.
        adversary: Network that scores standardised draws; an `InformedAdversary` also gets ``log p - log r``.
        ratio: Ratio loss of the adversary.
        averaging: Share of the average that remains after a step of the adversary; 0 for its current weights.
        num_importance: Draws ``K`` in each importance-weighted bound; 1 for the ELBO.
        context_dims: Axes of the context of one datum.
    """

    def __init__(
        self,
        sampler: Sampler,
        contrast: Contrast,
        adversary: nn.Module,
        *,
        ratio: RatioLoss | None = None,
        averaging: float = 0.0,
        num_importance: int = 1,
        context_dims: int = 1,
    ):
        self.sampler, self.contrast, self.adversary = sampler, contrast, adversary
        self.ratio = Logistic() if ratio is None else ratio
        self.averaging, self.num_importance, self.context_dims = averaging, num_importance, context_dims
        self.average = deepcopy(adversary) if averaging else None
        self._slope: _Slope | None = None
        self.list_weights()

    def list_weights(self) -> None:
        """List the weights of average and adversary once: to walk through a network takes longer than to update it."""
        both = [] if self.average is None else [self.average, self.adversary]
        self._weights: list[list[Tensor]] = [list(module.parameters()) for module in both]
        self._buffers = [list(module.buffers()) for module in both]

    @property
    def opponent(self) -> nn.Module:
        """The network that the sampler plays against: the running average of the adversary, or the adversary itself."""
        return self.adversary if self.average is None else self.average

    @property
    def informed(self) -> bool:
        """True if the adversary gets ``log p - log r``."""
        return isinstance(self.adversary, InformedAdversary)

    def contrast_loss(self, num_samples: int, x: Tensor | None = None) -> Tensor:
        """Return ``-mean log r`` of fresh draws: a step of it lets a fitted contrast follow the sampler."""
        with torch.no_grad():
            z = self.sampler(num_samples, x)
        return self.contrast.loss(z, x)

    def adversary_losses(
        self, num_samples: int, num_steps: int, log_joint: LogDensity | None = None, x: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the ratio loss on fresh draws of ``q`` and as many of the contrast, for each of the adversary's steps.

        Only an informed adversary uses the log joint. Neither ``q`` nor ``r`` moves meanwhile, so the draws of all
        steps are made and scored at once; an ``x`` that differs from draw to draw has ``num_samples * num_steps`` rows.
        """
        if not num_steps:
            return
        with torch.no_grad():
            z_q = self.sampler(num_samples * num_steps, x)
        inputs = self.adversary_batch(z_q, num_samples, log_joint, x)
        for i in range(0, len(z_q), num_samples):
            step = slice(i, i + num_samples)
            per_draw = x is not None and x.dim() == self.context_dims + 2
            context = x[step] if x is not None and per_draw else x
            yield self.ratio.loss(*_scores(self.adversary, [each[:, step] for each in inputs], context))

    @torch.no_grad()
    def adversary_batch(
        self, z_q: Tensor, num_samples: int, log_joint: LogDensity | None = None, x: Tensor | None = None
    ) -> list[Tensor]:
        """Return the adversary's inputs for draws ``z_q [S, (B,) D]`` and as many of the contrast, which then learns.

        These are standardised draws ``[2, S, (B,) D']`` and, for an informed adversary, ``log p - log r [2, S, (B,)]``,
        relative to the other draws of the context if a step has several, ``num_samples``, as in `score`.
        """
        r = self.contrast(z_q, x)
        z_r = r.sample(z_q.shape[: z_q.dim() - 1 - len(r.batch_shape)])
        z = torch.stack([z_q, z_r])
        inputs = [self.contrast.standardise(z, r)]
        if isinstance(self.adversary, InformedAdversary):
            assert log_joint is not None
            gap = log_joint(z.flatten(0, 1)).unflatten(0, (2, -1)) - r.log_prob(z)
            if x is not None and num_samples > 1:
                gap = torch.stack([_relative(gap[0]), gap[1] - _context_mean(gap[0])])
            self.adversary.recentre(gap[0])
            inputs.append(gap)
        self.contrast.observe(z_q, r)
        return inputs

    def elbo(self, num_samples: int, log_joint: LogDensity, x: Tensor | None = None) -> tuple[Tensor, int]:
        """Return the bound of each of ``S`` fresh draws, ``[S / K, (B,)]``, and the number of dropped draws.

        ``num_samples`` is rounded up to groups of ``K`` draws. A draw without a finite log density, whose gradient
        would spoil all, is dropped with all that share its weights.
        """
        count = -(-num_samples // self.num_importance) * self.num_importance
        return self.bound(self.sampler(count, x), log_joint, x)

    def bound(self, z: Tensor, log_joint: LogDensity, x: Tensor | None = None) -> tuple[Tensor, int]:
        """Return the same as `elbo` for given draws ``z [S, (B,) D]``."""
        num_samples = len(z)
        r = self.contrast(z, x)
        log_p = log_joint(self.without_hint_gradient(z))
        kept = finite_draws(log_p, self.num_importance)
        if not kept.all():
            z = z[kept]
            log_p = log_joint(self.without_hint_gradient(z)) if len(z) else log_p[kept]
        scores = self.score(z, r, log_p, x)
        if isinstance(self.sampler, MixtureSampler) and scores.requires_grad:
            observed = scores.new_full((len(kept), *scores.shape[1:]), torch.nan)
            observed[kept] = scores.detach()
            self.sampler.observe(observed)
        return importance_weighted(scores, z, self.num_importance), num_samples - len(z)

    def without_hint_gradient(self, z: Tensor) -> Tensor:
        """Wrap ``z [S, (B,) D]`` so that gradients of the log joint exclude the adversary's hint; call before `score`.

        The hint contains the log joint as a function of ``z`` alone: in ``T`` all else that the log joint depends on is
        held fixed. So the hint's gradient is subtracted from that of the log joint on its way to ``z``, and only there.
        """
        self._slope = None
        if not (self.informed and z.requires_grad):
            return z
        wrapped, cell = z.view_as(z), _Slope()
        wrapped.register_hook(lambda gradient: gradient * (1 - cell.value[..., None]))
        self._slope = cell
        return wrapped

    def score(self, z: Tensor, r: Distribution, log_p: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the ELBO of draws ``z [S, (B,) D]`` with ``T`` held fixed.

        ``log_p [S, (B,)]`` is the log joint at `without_hint_gradient` of ``z``.
        """
        log_r, inputs = self.adversary_inputs(z, r, log_p.detach(), x)
        return elbo(log_p, log_r, self._log_ratio(inputs, x))

    def adversary_inputs(
        self, z: Tensor, r: Distribution, log_p: Tensor | None, x: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return ``log r [S, (B,)]`` of draws ``z [S, (B,) D]``, and the inputs of the `opponent`; as in `score`."""
        log_r: Tensor = r.log_prob(z)
        inputs = [self.contrast.standardise(z, r)]
        if isinstance(self.opponent, InformedAdversary):
            assert log_p is not None
            gap = log_p - log_r
            if x is not None and len(z) > 1:
                gap = _relative(gap)
            if self._slope is not None:
                self._slope.value = self.opponent.slope(gap.detach())
            inputs.append(gap)
        return log_r, inputs

    def log_q(self, z: Tensor, log_joint: LogDensity, x: Tensor | None = None) -> Tensor:
        """Return the learned ``log q(z | x) = log r + T`` of draws ``z [S, (B,) D]``: ``[S, (B,)]`` in nats.

        The statistics of the contrast are those of ``z``, so pass many draws of the sampler.
        """
        log_r, log_ratio = self.log_r_and_ratio(z, log_joint, x)
        return log_r + log_ratio

    def log_r_and_ratio(self, z: Tensor, log_joint: LogDensity, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the two parts of `log_q`: ``log r`` and the learned ``T`` of ``z [S, (B,) D]``, each ``[S, (B,)]``."""
        log_p = log_joint(z) if self.informed else None
        log_r, inputs = self.adversary_inputs(z, self.contrast(z, x), log_p, x)
        return log_r, self._log_ratio(inputs, x)

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the average of the adversary; called after each of its steps."""
        if self.average is None:
            return
        average, latest = self._weights
        torch._foreach_lerp_(average, latest, 1 - self.averaging)
        for old, new in zip(*self._buffers, strict=True):
            old.copy_(new)

    def _log_ratio(self, inputs: Sequence[Tensor], x: Tensor | None) -> Tensor:
        context = None if x is None else x.detach()  # q is held fixed, and so is its context
        return self.ratio.log_ratio(_scores(self.opponent, inputs, context))


def _scores(adversary: nn.Module, inputs: Sequence[Tensor], x: Tensor | None) -> Tensor:
    scores: Tensor = adversary(*inputs) if x is None else adversary(*inputs, x)
    return scores


class _Slope:
    """A cell for the derivative of an adversary's score in the log joint, known after the draws have been scored."""

    value: Tensor


def _context_mean(gap: Tensor) -> Tensor:
    """Return each context's mean ``[B]`` of ``log p - log r [S, B]``; its log evidence would hide the draws' part."""
    return torch.where(gap.isfinite(), gap, torch.nan).nanmean(0).nan_to_num().detach()


def _relative(gap: Tensor) -> Tensor:
    """Return ``gap [S, B]`` of draws of ``q`` less the mean of the other draws of the same context."""
    known = torch.where(gap.isfinite(), gap, 0.0).detach()
    others = gap.isfinite().sum(0) - gap.isfinite().long()
    return gap - (known.sum(0) - known) / others.clamp(min=1)
