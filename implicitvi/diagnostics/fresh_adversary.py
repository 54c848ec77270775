"""Train an adversary from scratch on draws of ``q`` and ``r``, and measure how well it tells them apart."""

from __future__ import annotations

from copy import deepcopy
from math import nan

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

_CLIP = 20.0  # nats: largest weight of the log joint for or against a draw
_REACH = 4.0  # standard deviations within which the network distinguishes points
_STEPS, _BATCH = 500, 512


class Adversary(nn.Module):
    """A classifier ``T(w) + a clip(log p - log r - c) + b``: a bounded network plus a logistic regression on the hint.

    Args:
        dim: Dimension ``D``.
        centre: ``c``.
        generator: Generator of the initial weights.
        width: Width of both hidden layers.
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
        """Return the clipped hint of ``gap = log p - log r [S]``."""
        return (gap - self.centre).nan_to_num(-_CLIP, _CLIP, -_CLIP).clamp(-_CLIP, _CLIP)

    def network(self, w: Tensor) -> Tensor:
        """Return ``T(w) [S]``, which is flat far out, where there are no draws to learn from."""
        h = _REACH * (w / _REACH).tanh()
        for weight, bias in list(zip(self.weights, self.biases, strict=True))[:-1]:
            gate, value = (h @ weight + bias).chunk(2, -1)
            h = silu(gate) * value
        scores: Tensor = (h @ self.weights[-1] + self.biases[-1]).squeeze(-1)
        return scores

    def forward(self, w: Tensor, gap: Tensor) -> Tensor:
        """Return ``log q - log r [S]`` of standardised points ``w [S, D]`` with ``gap = log p - log r [S]``."""
        return self.network(w.float()).double() + self.hint[0] + self.hint[1] * self.known(gap)


def train_adversary(q: tuple[Tensor, Tensor], r: tuple[Tensor, Tensor], seed: int) -> Adversary:
    """Train an adversary on draws ``w [S, D]`` of ``q`` and ``r`` with gaps ``[S]``; a fifth decides when to stop."""
    generator = torch.Generator().manual_seed(seed)
    finite = q[1][q[1].isfinite()]
    centre = finite.median() if len(finite) else torch.zeros((), dtype=torch.float64)
    adversary = Adversary(q[0].shape[1], centre, generator)
    adversary.hint = logistic_regression(adversary.known(q[1]), adversary.known(r[1]))
    w_q, w_r = q[0].float(), r[0].float()
    with torch.no_grad():
        base_q, base_r = adversary(*q).float(), adversary(*r).float()
    cut = len(w_q) // 5
    optimiser = torch.optim.Adam(adversary.parameters(), lr=2e-3)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)

    def loss(rows_q: Tensor | slice = slice(cut), rows_r: Tensor | slice = slice(cut)) -> Tensor:
        t_q = adversary.network(w_q[rows_q]) + base_q[rows_q]
        t_r = adversary.network(w_r[rows_r]) + base_r[rows_r]
        return -logsigmoid(t_q).mean() - logsigmoid(-t_r).mean()

    with torch.no_grad():
        best, kept = loss().item(), deepcopy(adversary.state_dict())
    for step in range(1, _STEPS + 1):
        rows = [torch.randint(cut, len(w_q), (_BATCH,), generator=generator) for _ in range(2)]
        optimiser.zero_grad()
        with torch.enable_grad():
            loss(*rows).backward()
        optimiser.step()
        cooling.step()
        if step % 25 == 0:
            with torch.no_grad():
                held_out = loss().item()
            if held_out < best:
                best, kept = held_out, deepcopy(adversary.state_dict())
    adversary.load_state_dict(kept)
    return adversary.requires_grad_(False)


def auc(q: Tensor, r: Tensor, log_weights: Tensor) -> float:
    """Return the probability that a score of ``q [S]`` exceeds one of ``r [R]``, weighted by ``exp(log_weights)``."""
    keep_q, keep_r = q.isfinite(), r.isfinite() & log_weights.isfinite()
    q, r, log_weights = q[keep_q], r[keep_r], log_weights[keep_r]
    if not len(q) or not len(r):
        return nan
    ranked, order = r.sort()
    below = torch.cat([torch.zeros(1).to(r), log_weights[order].softmax(0).cumsum(0)])
    low, high = (below[torch.searchsorted(ranked, q, right=side)] for side in (False, True))
    return ((low + high) / 2).mean().item()


def logistic_regression(q: Tensor, r: Tensor, num_steps: int = 30) -> Tensor:
    """Fit intercept and slope ``[2]`` of the log odds that a score is one of ``q [S]``, not of ``r [R]``."""
    scores = torch.cat([q, r])
    labels = torch.cat([torch.ones_like(q), torch.zeros_like(r)])
    keep = scores.isfinite()
    scores, labels = scores[keep].clamp(-30, 30), labels[keep]
    design = torch.stack([torch.ones_like(scores), scores], 1)
    beta, ridge = design.new_zeros(2), 1e-6 * len(design)
    for _ in range(num_steps):
        chance = (design @ beta).sigmoid()
        curvature = (design * (chance * (1 - chance))[:, None]).mT @ design + ridge * torch.eye(2).to(design)
        step = torch.linalg.solve(curvature, design.mT @ (labels - chance) - ridge * beta)
        beta = beta + step.clamp(-1, 1)
    return beta
