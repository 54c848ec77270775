"""A sampler and a contrast for each far mode, for posteriors whose modes lie too far apart for one of either."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import one_hot, pad

from implicitvi.avb.contrasts import Contrast, refuse_context
from implicitvi.avb.samplers import Sampler
from implicitvi.numerics.gaussian import GaussianMixture, Mixture, gather_draws, whiten


class MixtureSampler(Sampler):
    """A mixture of samplers with frames of their own, for modes that lie far apart; one of them makes each draw.

    One additional noise, stratified, chooses among them: each makes its share of a batch to within one draw. Between
    far modes only the weights can move mass. Their natural gradient needs no score function:

        ∂ELBO / ∂log w_k, in the metric of the simplex = E_{q_k}[elbo] - E_q[elbo]

    It vanishes where ``w_k ∝ Z_k exp(-KL(q_k‖p_k))`` with the evidence ``Z_k`` of a mode.

    Args:
        samplers: A sampler for each mode, without context, of one latent dimension ``D``.
        weights: Their weights ``[K]`` at the start.
        rate: Step size of the logarithms of the weights; 0 keeps them.

    >>> from implicitvi.avb.samplers import DenseSampler
    >>> MixtureSampler([DenseSampler(3), DenseSampler(3)], torch.tensor([0.3, 0.7]))(5).shape
    torch.Size([5, 3])
    """

    weights: Tensor

    def __init__(self, samplers: Sequence[Sampler], weights: Tensor, *, rate: float = 0.02):
        super().__init__(samplers[0].latent_dim, noise_dim=max(s.noise_dim for s in samplers) + 1)
        self.samplers: Sequence[Sampler] = nn.ModuleList(samplers)  # type: ignore[assignment]
        self.rate = rate
        self.register_buffer("weights", weights / weights.sum())
        self.initialised.fill_(True)
        self._chosen: Tensor | None = None

    def noise(self, num_samples: int, x: Tensor | None = None) -> Tensor:
        eps = super().noise(num_samples, x)
        strata = torch.randperm(num_samples, device=eps.device).to(eps.dtype)
        share = (strata + torch.rand_like(strata)) / num_samples
        return torch.cat([eps[:, :-1], torch.special.ndtri(share)[:, None]], -1)

    def transform(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        bounds = self.weights.cumsum(0)[:-1].to(eps)
        chosen = self._chosen = torch.searchsorted(bounds, torch.special.ndtr(eps[:, -1]))
        order = chosen.argsort()
        counts = chosen.bincount(minlength=len(self.samplers)).tolist()
        parts = [
            sampler.to_latent(sampler.transform(part[:, : sampler.noise_dim]))
            for sampler, part in zip(self.samplers, eps[order].split(counts), strict=True)
        ]
        return torch.cat(parts)[order.argsort()]

    def be_gaussian(self) -> bool:
        return all(sampler.be_gaussian() for sampler in self.samplers)

    @torch.no_grad()
    def observe(self, elbo: Tensor) -> None:
        """Move the weights along their natural gradient, by the objective ``[S]`` of the last draws; NaN if dropped."""
        assert self._chosen is not None
        each = torch.stack([elbo[self._chosen == k].nanmean() for k in range(len(self.weights))])
        gain = (each - elbo.nanmean()).nan_to_num(0.0).clamp(-5.0, 5.0)
        # a sampler of weight 0 would make no draws, so that its weight could not grow again
        weights = (self.weights.log() + self.rate * gain.to(self.weights)).softmax(0).clamp(min=1e-3)
        self.weights.copy_(weights / weights.sum())

    def frames(self) -> tuple[Tensor, Tensor]:
        """Return locations ``[K, D]`` and lower triangular scales ``[K, D, D]`` of the samplers."""
        return torch.stack([s.loc for s in self.samplers]), torch.stack([s.scale_tril for s in self.samplers])

    def modes(self, z: Tensor) -> Tensor:
        """Return the sampler whose frame, as a Gaussian, is densest at each of ``z [..., D]``: ``[...]``."""
        scores = [
            -0.5 * whiten(z.flatten(0, -2), s.loc, s.scale_tril).square().sum(-1) - s.scale_tril.diagonal().log().sum()
            for s in self.samplers
        ]
        return torch.stack(scores, -1).argmax(-1).reshape(z.shape[:-1])


class PerModeContrast(Contrast):
    """A contrast for each of several far modes, and coordinates in which each mode has its own location and scale.

    In the units of the whole, modes that lie ``d`` standard deviations apart are spikes of width ``2 / d``, which no
    network resolves. Here a draw belongs to the mode whose Gaussian is densest at it: ``standardise`` gives the
    coordinates of that mode's contrast, and the mode one-hot, ``[K]``.

    Args:
        contrasts: Contrasts without context, one for each of ``K`` modes.
        weights: Weights of the modes ``[K]`` at the start; they follow the draws.
        locs: Locations of the modes' Gaussians ``[K, D]``.
        scale_trils: Their lower triangular scales ``[K, D, D]``.
        rate: Share of the current batch in the weights.
    """

    weights: Tensor
    locs: Tensor
    scale_trils: Tensor

    def __init__(
        self, contrasts: Sequence[Contrast], weights: Tensor, locs: Tensor, scale_trils: Tensor, *, rate: float = 0.25
    ):
        super().__init__()
        self.contrasts: Sequence[Contrast] = nn.ModuleList(contrasts)  # type: ignore[assignment]
        # a contrast of fewer coordinates than another leaves the rest of them 0
        self.extra_dim = max(contrast.extra_dim for contrast in contrasts) + len(contrasts)
        self.rate = rate
        self.register_buffer("weights", weights.clone())
        self.register_buffer("locs", locs.clone())
        self.register_buffer("scale_trils", scale_trils.clone())

    def modes(self, z: Tensor) -> Tensor:
        """Return the mode of each of ``z [..., D]``: ``[...]``."""
        return GaussianMixture(self.weights, self.locs, self.scale_trils).log_joint(z).argmax(-1)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        refuse_context(x)
        modes = self.modes(z.detach())
        parts = [part(self._draws_of(k, z, modes)) for k, part in enumerate(self.contrasts)]
        return Mixture(self.weights.clone(), parts)

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        assert isinstance(r, Mixture)
        own = one_hot(self.modes(z.detach()), len(self.contrasts)).to(z)
        each = [c.standardise(z, part) for c, part in zip(self.contrasts, r.parts, strict=True)]
        widest = z.shape[-1] + self.extra_dim - len(each)
        wide = torch.stack([pad(e, (0, widest - e.shape[-1])) for e in each], -1)
        return torch.cat([(wide * own[..., None, :]).sum(-1), own], -1)

    @torch.no_grad()
    def observe(self, z: Tensor, r: Distribution) -> None:
        assert isinstance(r, Mixture)
        modes = self.modes(z)
        for k, (contrast, part) in enumerate(zip(self.contrasts, r.parts, strict=True)):
            contrast.observe(self._draws_of(k, z, modes), part)
        found = one_hot(gather_draws(modes[:, None])[:, 0], len(self.contrasts)).to(z).mean(0)
        weights = self.weights.lerp(found, self.rate).clamp(min=1e-3)
        self.weights.copy_(weights / weights.sum())

    @torch.no_grad()
    def be_gaussian(self, weights: Tensor, locs: Tensor, scale_trils: Tensor) -> None:
        self.weights.copy_(weights)
        one = weights.new_ones(1)
        for contrast, loc, scale_tril in zip(self.contrasts, locs, scale_trils, strict=True):
            contrast.be_gaussian(one, loc[None], scale_tril[None])

    def _draws_of(self, k: int, z: Tensor, modes: Tensor) -> Tensor:
        """Return the draws of mode ``k``; if they are too few, with ``2 D`` points that have its Gaussian's moments."""
        own, dim = z[modes == k], z.shape[-1]
        if len(own) >= 4 * dim:
            return own
        steps = dim**0.5 * self.scale_trils[k].mT
        return torch.cat([own, self.locs[k] + steps, self.locs[k] - steps])
