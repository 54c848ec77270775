"""
A decoder with two answers
==========================

Fit a bimodal decoder: the biadversarial VAE keeps both modes where a Gaussian decoder must blur.

Given a number ``s`` the datum is ``x = b + 0.3 s + 0.1 ε``, where ``b`` is -1 or 1 with equal probability. A Gaussian
decoder puts its mean between the two. The adversary of the biadversarial VAE sees pairs ``(s, x)`` and does not assume
a shape. It learns the divergence from the data to the decoder, so a decoder that misses one of the two answers is
penalised. Here the codes are given, and only the decoder is learned. The last table evaluates the whole objective with
exact adversaries: it is not just the evidence lower bound.

Run it with ``python examples/14_biadversarial_bimodal.py``; ``--smoke`` runs a tiny version to
check that it works; its results are meaningless.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from implicitvi.avb.adversaries import ResidualAdversary
from implicitvi.nn import mlp
from implicitvi.training import Player, Stage
from implicitvi.training.player import Metrics
from implicitvi.vae import ALI, BiadversarialVAE
from implicitvi.vae.distributions import Implicit
from implicitvi.vae.model import Batch, LatentModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0, help="the first of three seeds")
options = parser.parse_args()
seeds = range(options.seed, options.seed + (1 if options.smoke else 3))
epochs = 1 if options.smoke else 100
torch.set_num_threads(1)  # the networks are small: a second thread would slow them down


def pairs(num_rows: int, generator: torch.Generator) -> Tensor:
    """Draw rows ``(s, x)``, ``[num_rows, 2]``."""
    s = torch.randn(num_rows, 1, generator=generator)
    b = 2.0 * torch.randint(2, (num_rows, 1), generator=generator) - 1
    x = b + 0.3 * s + 0.1 * torch.randn(num_rows, 1, generator=generator)
    return torch.cat([s, x], 1)


# %%
# Encoder and decoders
# --------------------
# A datum is the pair, and its code is ``s``: the encoder returns ``s``, the decoder keeps it and adds ``x``.


class ReadOff(nn.Module):
    """An encoder ``q(z | s, x)`` with all its mass at ``s``."""

    def forward(self, pair: Tensor) -> Distribution:
        s = pair[:, :1]
        return Implicit(lambda shape: s.expand(shape + s.shape), s.shape[:1], [1])


class NoiseDecoder(nn.Module):
    """A decoder ``p(s, x | z)`` without a density: ``s`` is the code, ``x`` a network's output for code and noise."""

    def __init__(self, noise_dim: int = 4):
        super().__init__()
        self.noise_dim = noise_dim
        self.network = mlp([1 + noise_dim, 128, 128, 1], nn.ReLU)

    def forward(self, z: Tensor) -> Distribution:
        def draw(shape: torch.Size) -> Tensor:
            s = z.expand(shape + z.shape)
            noise = torch.randn(*s.shape[:-1], self.noise_dim)
            return torch.cat([s, self.network(torch.cat([s, noise], -1))], -1)

        return Implicit(draw, z.shape[:-1], [2])


class NormalDecoder(nn.Module):
    """A decoder ``p(s, x | z)`` with a Gaussian ``x`` whose location and scale a network returns."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp([1, 128, 128, 2], nn.ReLU)

    def forward(self, z: Tensor) -> Distribution:
        loc, log_scale = self.network(z).chunk(2, -1)
        given = torch.full_like(loc, 1e-3)
        scale = torch.cat([given, log_scale.exp()], -1)
        return Independent(Normal(torch.cat([z, loc], -1), scale, validate_args=False), 1)


# %%
# Maximum likelihood as an objective
# ----------------------------------
# The library does not have an objective for a decoder with given codes. Writing one takes one player and one line.


class MaximumLikelihood(LatentModel):
    """An objective that maximises ``E_q[log p(x | z)]`` over the decoder."""

    needs = {"decoder": {"density"}}

    def players(self, batch: Batch) -> list[Player]:
        return [self.player("decoder", [self.decoder], self._loss, batch)]

    def _loss(self, x: Tensor, stage: Stage) -> tuple[Tensor, Metrics]:
        return -self.decoder(self.encoder(x).sample()).log_prob(x).mean(), {}


def adversary() -> nn.Module:
    return ResidualAdversary(1, context_dim=2, width=64, blocks=1)


OBJECTIVES: dict[str, Callable[[], LatentModel]] = {
    "Gaussian decoder": lambda: MaximumLikelihood(ReadOff(), NormalDecoder(), 1),
    "ALI": lambda: ALI(ReadOff(), NoiseDecoder(), 1, adversary()),
    "biadversarial": lambda: BiadversarialVAE(ReadOff(), NoiseDecoder(), 1, None, adversary()),
    "biadversarial, f-GAN": lambda: BiadversarialVAE(ReadOff(), NoiseDecoder(), 1, None, adversary(), ratio="fgan_kl"),
}


@torch.no_grad()
def rest(pairs: Tensor) -> Tensor:
    """Return ``x - 0.3 s``, which is 1 or -1 plus noise."""
    return pairs[:, 1] - 0.3 * pairs[:, 0]


@torch.no_grad()
def judged(model: LatentModel, test: Tensor) -> list[float]:
    """Return the share of draws between the modes, the share in the positive one, and the Wasserstein distance."""
    drawn, true = rest(model.decoder(test[:, :1]).sample()), rest(test)
    blur, positive = (drawn.abs() < 0.5).float().mean(), (drawn > 0).float().mean()
    return [float(blur), float(positive), float(wasserstein_distance(drawn, true))]


results: dict[str, list[list[float]]] = {name: [] for name in OBJECTIVES}
shown: dict[str, Tensor] = {}
for seed in seeds:
    generator = torch.Generator().manual_seed(seed)
    train, test = pairs(4096, generator), pairs(20_000, generator)
    for name, objective in OBJECTIVES.items():
        torch.manual_seed(seed)
        model = objective()
        began = time.perf_counter()
        model.fit(
            train,
            epochs=epochs,
            batch_size=512,
            adversary_steps=2,
            lr=(1e-3, 1e-4),
            adversary_lr=(2e-3, 2e-4),
            seed=seed,
            progress=False,
        )
        seconds = time.perf_counter() - began
        results[name].append([*judged(model, test), seconds])
        if seed == seeds[0]:
            shown[name] = model.decoder(test[:3000, :1]).sample().detach()
    shown.setdefault("data", test[:3000])

print(f"{'means over seeds':24}{'blur':>10}{'positive':>12}{'distance':>12}{'seconds':>11}")
for name, rows in results.items():
    blur, positive, distance, seconds = np.mean(rows, 0)
    print(f"{name:24}{blur:10.3f}{positive:12.3f}{distance:12.3f}{seconds:11.1f}")
print(
    "\nshare of draws between the modes, truth 0; share in the positive mode, truth 0.5;"
    "\nWasserstein distance of x - 0.3 s to the data's\n"
)
for name, rows in results.items():
    print(f"{name:24}" + "".join(f"  blur {blur:.3f}, positive {positive:.3f}" for blur, positive, *_ in rows))

# %%
# The whole objective
# -------------------
# For six data points and four codes every sum is exact. With exact adversaries the sum of the two bounds is the
# negative ELBO minus the entropy of the data, plus the mutual information of data and codes. Here the decoder is
# optimal for its encoder, and the ELBO is optimal however informative the codes are. The sum of the bounds, in
# contrast, prefers uninformative codes.


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())


def worth(telling: float) -> tuple[float, float, float, float, float]:
    """Return ``V₁``, ``V₂``, ``-ELBO``, ``H`` and ``I`` for codes this informative, with the exact decoder."""
    data = torch.full((6,), 1 / 6, dtype=torch.float64)
    scores = telling * torch.eye(6, dtype=torch.float64)[:, [0, 1, 2, 3]]
    encoder = scores.softmax(1)  # q(z | x), [6, 4]
    joint = data[:, None] * encoder
    codes = joint.sum(0)
    prior = torch.full((4,), 1 / 4, dtype=torch.float64)
    decoder = joint / codes  # p(x | z) = q(x | z), the best decoder
    first, second = kl(joint, data[:, None] * prior), kl(joint, codes * decoder)
    elbo = float((joint * ((decoder * prior).log() - encoder.log())).sum())
    entropy = -float((data * data.log()).sum())
    return first, second, -elbo, entropy, kl(joint, data[:, None] * codes)


print(f"\n{'codes':16}{'V1 + V2':>10}{'-ELBO':>10}{'-H(x)':>10}{'+I(x; z)':>10}{'sum':>10}")
for telling, words in ((0.0, "tell nothing"), (2.0, "tell something"), (6.0, "tell much")):
    first, second, loss, entropy, information = worth(telling)
    total = abs(loss - entropy + information)  # avoids -0.0
    print(f"{words:16}{first + second:10.4f}{loss:10.4f}{-entropy:10.4f}{information:10.4f}{total:10.4f}")

# %%
# The pictures
# ------------

figure, axes = plt.subplots(1, len(shown), figsize=(14, 3.8), layout="constrained", sharey=True)
for ax, name in zip(axes, ["data", *OBJECTIVES], strict=True):
    ax.scatter(*shown[name].T.numpy(), s=2, alpha=0.5, linewidths=0, color="#D55E00" if name == "data" else "#0072B2")
    ax.set(xlim=(-3, 3), ylim=(-3, 3), xlabel="$s$")
    ax.set_title(name, fontsize=10)
axes[0].set_ylabel("$x$")
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "biadversarial_bimodal.png"
figure.savefig(path, dpi=150)
print(f"\nwrote {path}")
