"""An experiment: the gradient of the entropy from a denoiser, behind the same sampler and the same trainer.

A semi-implicit draw is ``h = f(ε) + σ η``, so its score is ``∇ log q(h) = -E[η | h] / σ``: regression on the noise
learns it (Vincent 2011). The sampler then follows ``∇ log p(h) - ∇ log q(h)`` along its path. In the plane the score of
such a mixture can be had from very many ``ε``, so that adversary and denoiser of one sampler can be held against it:

    python -m suite.denoising x_shaped banana multimodal     (in tests/)
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.avb.players import Turn
from implicitvi.avb.samplers import SemiImplicitSampler
from implicitvi.nn import GatedBlock, GatedLayer, zero_init
from implicitvi.training import Player, Schedule, Stage, Trainer
from suite.target import Sites, Target


class Denoiser(nn.Module):
    """``E[η | h]`` of a semi-implicit sampler: ``[S, D]`` to ``[S, D]``, in the frame's coordinates."""

    def __init__(self, dim: int, *, width: int = 64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, width), GatedBlock(width), GatedLayer(width, width), zero_init(nn.Linear(width, dim))
        )

    def forward(self, h: Tensor) -> Tensor:
        noise: Tensor = self.net(h)
        return noise


def drawn(sampler: SemiImplicitSampler, count: int) -> tuple[Tensor, Tensor]:
    """Draws ``h [S, D]`` in the frame and the Gaussian noise ``η [S, D]`` in each."""
    eps = sampler.noise(count)
    return sampler.transform(eps), eps[:, -sampler.latent_dim :]


def score(sampler: SemiImplicitSampler, denoiser: Denoiser, h: Tensor) -> Tensor:
    """The learned ``∇ log q(h)``, ``[S, D]``."""
    return -denoiser(h) / sampler.log_scale.exp()


def regression(sampler: SemiImplicitSampler, denoiser: Denoiser) -> Player:
    """The denoiser as a player, in the adversary's place."""

    def losses(stage: Stage) -> Turn:
        for _ in range(stage.adversary_steps):
            with torch.no_grad():
                h, eta = drawn(sampler, stage.num_particles)
            yield (denoiser(h) - eta).square().mean(), {}

    return Player("denoiser", denoiser, losses, lambda stage: stage.adversary_lr)


def denoised(target: Target, *, seed: int, quick: bool) -> Sites:
    """Fit with the schedule, the warm start and the sampler of the library, the adversary left out."""
    num_steps, warm_start = (20, 20) if quick else (Schedule.num_steps, 600)
    torch.manual_seed(seed)
    guide = ImplicitGuide(target.model, sampler="semi_implicit")
    svi = AVBSVI(
        target.model, guide, num_steps=num_steps, warm_start=warm_start, max_modes=1, seed=seed, progress=False
    )
    svi.setup(*target.args)
    objective, sampler = svi.objective, guide.sampler
    assert isinstance(sampler, SemiImplicitSampler)
    log_joint = objective.scorer(svi.target)
    denoiser = Denoiser(sampler.latent_dim)

    def ascent(stage: Stage) -> Turn:
        h, _ = drawn(sampler, stage.num_particles)
        log_p = log_joint(sampler.to_latent(h))
        with torch.no_grad():
            slope = score(sampler, denoiser, h)
        kept = log_p.isfinite()
        yield -(log_p - (slope * h).sum(-1))[kept].mean(), {}

    players = [regression(sampler, denoiser), Player("sampler", sampler, ascent, lambda stage: stage.lr)]
    Trainer(players, schedule=svi.schedule, stream=svi.trainer.stream).run(num_steps)
    return guide.sample(target.num_draws)


def agreement(target: Target, *, seed: int = 0, num_steps: int = Schedule.num_steps) -> dict[str, float]:
    """Root mean squared errors of ``∇ log q`` at draws of one trained sampler in the plane, relative to its size.

    The sampler and the adversary are those of `AVBSVI`; the denoiser regresses on the draws of the same sampler.
    """
    torch.manual_seed(seed)
    guide = ImplicitGuide(target.model, sampler="semi_implicit")
    svi = AVBSVI(target.model, guide, num_steps=num_steps, max_modes=1, seed=seed, progress=False)
    svi.run(*target.args)
    objective, sampler = svi.objective, guide.sampler
    assert isinstance(sampler, SemiImplicitSampler)
    denoiser = Denoiser(sampler.latent_dim)
    stream = svi.trainer.stream
    Trainer([regression(sampler, denoiser)], schedule=svi.schedule, stream=stream).run(num_steps)
    with stream, torch.no_grad():
        h, _ = drawn(sampler, 500)
        one, two = (mixture_score(sampler, h) for _ in range(2))
    u = sampler.to_latent(h).requires_grad_()
    (slope,) = torch.autograd.grad(objective.log_q(u).sum(), u)
    found = {"adversary": slope @ sampler.scale_tril, "denoiser": score(sampler, denoiser, h).detach()}
    size = (one * two).mean().sqrt()
    # the noise of the two halves is independent, and drops out of the product
    errors = {name: ((f - one) * (f - two)).mean().clamp(min=0.0).sqrt() for name, f in found.items()}
    errors["between the two"] = (found["adversary"] - found["denoiser"]).square().mean().sqrt()
    return {name: (error / size).item() for name, error in errors.items()}


def mixture_score(sampler: SemiImplicitSampler, h: Tensor, *, chunks: int = 40) -> Tensor:
    """``∇ log q(h)`` ``[S, D]`` from 50,000 Gaussians for each of the chunks."""
    scale = sampler.log_scale.exp()
    total, weight = torch.zeros_like(h), h.new_zeros(len(h), 1)
    for _ in range(chunks):
        means = sampler.mean(sampler.noise(50_000)[:, : -sampler.latent_dim])
        near = (-torch.cdist(h / scale, means / scale).square() / 2).exp()
        total, weight = total + near @ means, weight + near.sum(1, keepdim=True)
    return (total / weight - h) / scale.square()


if __name__ == "__main__":
    from suite.targets import TARGETS

    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        found = agreement(TARGETS[name]())
        print(name, {k: round(value, 3) for k, value in found.items()}, flush=True)  # noqa: T201
