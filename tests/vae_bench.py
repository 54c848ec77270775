"""Images a second of `LatentModel.fit`: `make bench-vae` runs this and writes ``docs/results/vae-bench.json``.

The yardstick is a loop written out by hand in PyTorch with the same networks, batch, objective, optimiser and clipping.
It neither guards against values that are not finite, nor has a private stream, schedules, callbacks or checkpoints, and
keeps one figure a step. The two take turns, a step each: the one by hand is a callback of the fit. Seconds are those of
the processor, with one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.metadata import version
from math import log, pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, elu, softplus

from implicitvi.avb.adversaries import PairwiseAdversary
from implicitvi.avb.samplers import NoiseBasisSampler
from implicitvi.nn import mlp
from implicitvi.training import Trainer
from implicitvi.vae import AVB, VAE
from implicitvi.vae.decoders import BernoulliLikelihood, Decoder
from implicitvi.vae.encoders import GaussianEncoder, ImplicitEncoder
from implicitvi.vae.model import LatentModel

OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "vae-bench.json"
X, H, D, BATCH = 784, 300, 32, 128
Row = dict[str, Any]


def vae() -> VAE:
    return VAE(GaussianEncoder(mlp([X, H, H, 2 * D])), decoder(), D)


def avb() -> AVB:
    sampler = NoiseBasisSampler(D, context_dim=H, num_basis=8, hidden=(64,))
    encoder = ImplicitEncoder(sampler, mlp([X, H, H]))
    adversary = PairwiseAdversary(mlp([X, H, H + 1]), mlp([D, H, H + 1]))
    return AVB(encoder, decoder(), D, adversary, contrast="gaussian")


def decoder() -> Decoder:
    return Decoder(mlp([D, H, H, X]), BernoulliLikelihood([X]))


def normal(x: Tensor) -> Tensor:
    return -0.5 * (x.square() + log(2 * pi)).sum(-1)


class ByHand:
    """What both loops share: the order of the rows, and a step of Adam."""

    def __init__(self, model: LatentModel):
        self.model: Any = deepcopy(model)
        self.optimisers: dict[str, torch.optim.Adam] = {}

    def steps(self, x: Tensor) -> Iterator[float]:
        """Steps on ``x [N, 784]``, one whenever asked for, epoch by epoch."""
        while True:
            for rows in torch.randperm(len(x)).split(BATCH):
                yield self.step(x[rows])

    def step(self, x: Tensor) -> float:
        raise NotImplementedError

    def descend(self, player: str, loss: Tensor, parameters: list[nn.Parameter], lr: float) -> float:
        if player not in self.optimisers:
            adam = torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999), fused=True)
            self.optimisers[player] = adam
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 100.0)
        self.optimisers[player].step()
        return loss.item()


class VAEByHand(ByHand):
    """The closed-form bound."""

    def step(self, x: Tensor) -> float:
        loc, log_scale = self.model.encoder.network(x).chunk(2, -1)
        log_scale = 10 * (log_scale / 10).tanh()
        scale = log_scale.exp()
        logits = self.model.decoder.network(loc + scale * torch.randn_like(loc))
        likelihood = -binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        divergence = (0.5 * (loc.square() + scale.square() - 1) - log_scale).sum(-1).mean()
        return self.descend("model", divergence - likelihood, list(self.model.parameters()), 1e-3)


class AVBByHand(ByHand):
    """Adaptive Contrast with the closed-form moments of the noise basis, and a pairwise adversary."""

    def step(self, x: Tensor) -> float:
        encoder, generator = self.model.encoder, self.model.decoder
        with torch.no_grad():
            z, loc, root = self.encode(x)
            standard = torch.stack([self.whiten(z, loc, root), torch.randn_like(z)])
        t_q, t_r = self.pairwise(standard, x)
        theirs = list(self.model.adversary.parameters())
        self.descend("adversary", softplus(-t_q).mean() + softplus(t_r).mean(), theirs, 2e-3)
        z, loc, root = self.encode(x)
        standard = self.whiten(z, loc, root)
        log_r = self.log_contrast(standard, root)
        loss = -(self.log_joint(z, x) - log_r - self.pairwise(standard, x)).mean()
        ours = [*encoder.parameters(), *generator.parameters()]
        return self.descend("model", loss, ours, 1e-3)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``[B, D]``, and mean and Cholesky factor of their conditional covariance, as constants."""
        sampler = self.model.encoder.sampler
        h = self.model.encoder.features(x)
        raw = sampler.offset + sampler.mix(h).unflatten(-1, sampler.offset.shape)
        base, a = raw[:, 0], (elu(raw[:, 1:]) + 1) / sampler.num_basis**0.5
        z = base + (a * self.basis(len(x))).sum(1)
        with torch.no_grad():
            v = self.basis(512)
            mean_v = v.mean(0)
            centred = v - mean_v
            cov_v = torch.einsum("smd,sme->mde", centred, centred) / 512
            cov = torch.zeros_like(cov_v[0])
            for scale, each in zip(a.unbind(1), cov_v, strict=True):
                cov = torch.addcmul(cov, scale[:, :, None] * scale[:, None, :], each)
            loc = base + (a * mean_v).sum(1)
            jitter = torch.diag_embed(1e-5 * cov.diagonal(dim1=-2, dim2=-1) + 1e-12)
            return z, loc, torch.linalg.cholesky(cov + jitter)

    def basis(self, count: int) -> Tensor:
        v: Tensor = self.model.encoder.sampler.basis(torch.randn(count, 8, D))
        return v

    def log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        logits = self.model.decoder.network(z)
        target = x.expand_as(logits)
        likelihood = -binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        return likelihood + normal(z)

    def pairwise(self, z: Tensor, x: Tensor) -> Tensor:
        pair = self.model.adversary
        of_x, of_z = pair.x_net(x), pair.z_net(z)
        inner = (of_x[..., :-1] * of_z[..., :-1]).sum(-1) / H**0.5
        return inner + of_x[..., -1] + of_z[..., -1] + 0.5 * (z.square() - 1).sum(-1)

    @staticmethod
    def whiten(z: Tensor, loc: Tensor, root: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root, (z - loc)[..., None], upper=False).squeeze(-1)

    @staticmethod
    def log_contrast(standard: Tensor, root: Tensor) -> Tensor:
        return normal(standard) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


OBJECTIVES: dict[str, tuple[Callable[[], LatentModel], type[ByHand]]] = {
    "VAE": (vae, VAEByHand),
    "AVB, noise basis, Gaussian contrast": (avb, AVBByHand),
}


def measure(name: str, epochs: int, size: int) -> Row:
    """Images a second of both and their ratio, from the medians of their steps, and quartiles of the paired ratios."""
    make, by_hand = OBJECTIVES[name]
    torch.manual_seed(0)
    x = torch.rand(size, X).round()
    model = make()
    hand = by_hand(model).steps(x)
    ours, theirs, left = [], [], []

    def turn(trainer: Trainer) -> None:
        entered = time.process_time()
        if left:
            ours.append(entered - left.pop())
            began = time.process_time()
            next(hand)
            theirs.append(time.process_time() - began)
        left.append(time.process_time())

    model.fit(
        x,
        epochs=epochs,
        batch_size=BATCH,
        lr=1e-3,
        adversary_lr=2e-3,
        seed=0,
        progress=False,
        device="cpu",
        callbacks=[turn],
    )
    del ours[:20], theirs[:20]  # while caches and allocator warm up
    paired = [b / a for a, b in zip(ours, theirs, strict=True)]
    quartiles = statistics.quantiles(paired, n=4)
    return {
        "system": name,
        "steps": len(ours),
        "by hand": BATCH / statistics.median(theirs),
        "fit": BATCH / statistics.median(ours),
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "all": sum(theirs) / sum(ours),
        "quartiles": [quartiles[0], quartiles[2]],
    }


def table(result: Row) -> str:
    """The result as Markdown."""
    names = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    head = ["system", "steps", "by hand", "`fit`", "ratio", "quartiles of pairs", "of all time"]
    lines = [
        f"Measured on {result['date']} with Python {result['python']}, {names}; one thread of {result['machine']}.",
        "",
        f"Images a second of processor time: dense networks {X}-{H}-{H}-{D} and back, batches of {BATCH}. `fit` and "
        "the same loop written by hand in PyTorch take turns, a step each; images a second and their ratio are from "
        "the medians of the steps, the last column is the ratio of all seconds. Target: 0.95.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in result["rows"]:
        low, high = row["quartiles"]
        cells = [row["system"], str(row["steps"]), f"{row['by hand']:.0f}", f"{row['fit']:.0f}"]
        cells += [f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['all']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=12800, help="images of an epoch")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("implicitvi", "torch")},
        "rows": [measure(name, options.epochs, options.size) for name in OBJECTIVES],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(result))
    print(table(result))  # noqa: T201


if __name__ == "__main__":
    main()
