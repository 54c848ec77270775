"""
Learning as a game
==================

Fit decoder and encoder as two players, each by maximum likelihood to draws of the other.

A variational autoencoder needs the density of its prior, and a gradient through every code. Symmetric equilibrium
learning needs neither. This page shows three applications.

It learns **codes whose prior has no density**: which of eight bars an image shows, from 5,000 images, a sampler of
codes and 24 labelled images. For a **linear Gaussian** encoder and decoder its equilibrium is probabilistic PCA. Its
encoder and decoder are nearly the conditionals of **one joint distribution**: a chain that alternates between images
and codes two hundred times still shows digits.

Run it with ``python examples/15_symmetric_equilibrium.py``; ``--smoke`` runs a tiny version to
check that it works; its results are meaningless.

References: Symmetric Equilibrium Learning of VAEs, Boris Flach, Dmitrij Schlesinger, Alexander Shekhovtsov, 2024.
Probabilistic Principal Component Analysis, Michael Tipping, Christopher Bishop, 1999.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits, load_wine
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent

from implicitvi import plots
from implicitvi.nn import mlp
from implicitvi.training import Player, Stage
from implicitvi.training.player import Metrics
from implicitvi.vae import VAE
from implicitvi.vae.decoders import BernoulliLikelihood, Decoder, GaussianLikelihood
from implicitvi.vae.encoders import BinaryEncoder, GaussianEncoder
from implicitvi.vae.ladder import LadderEncoder, LadderPrior, LowerLevel
from implicitvi.vae.model import Batch, LatentModel
from implicitvi.vae.objectives.symmetric import SymmetricVAE

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seeds", type=int, default=3, help="number of fits of each method on the bars")
options = parser.parse_args()
torch.set_num_threads(1)  # the networks are small: a second thread would slow them down
seeds = range(1 if options.smoke else options.seeds)
bar_epochs, wine_epochs, digit_epochs, chain_steps = (1, 2, 1, 3) if options.smoke else (100, 2000, 200, 200)


# %%
# Bars: a prior known by its draws
# --------------------------------
# A code switches four rows and four columns on or off. Two rows and one column are always on, in 24 combinations. The
# image is their union, with 15 % of the pixels flipped. `SymmetricVAE` takes the sampler of codes as its prior.
# After the bars problem of P. Földiák, Forming sparse representations by local anti-Hebbian learning, 1990.


def greatest(scores: Tensor, count: int) -> Tensor:
    """Return 1 for the ``count`` greatest scores of each row, else 0."""
    return torch.zeros_like(scores).scatter(1, scores.topk(count, 1).indices, 1.0)


def bar_codes(num: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw codes ``[num, 8]``: two of four rows, then one of four columns, uniformly."""
    rows = torch.rand(num, 4, generator=generator)
    columns = torch.rand(num, 4, generator=generator)
    return torch.cat([greatest(rows, 2), greatest(columns, 1)], 1)


def bar_images(codes: Tensor) -> Tensor:
    """Return images ``[N, 1, 8, 8]`` of codes without noise: each row and each column is two pixels wide."""
    rows, columns = codes.repeat_interleave(2, 1).split([8, 8], 1)
    return torch.maximum(rows[:, None, :, None], columns[:, None, None, :])


def or_bars(num: int, *, flip: float = 0.15, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw images ``[num, 1, 8, 8]``, each pixel flipped with a probability, and their codes ``[num, 8]``."""
    codes = bar_codes(num, generator=generator)
    clean = bar_images(codes)
    flipped = torch.rand(clean.shape, generator=generator) < flip
    return torch.where(flipped, 1 - clean, clean), codes


def networks(straight_through: bool = False) -> tuple[nn.Module, nn.Module]:
    """Return encoder and decoder of the bars, the same for every method."""
    network = nn.Sequential(nn.Flatten(), mlp([64, 128, 128, 8], nn.Tanh))
    encoder = BinaryEncoder(network, straight_through=straight_through)
    return encoder, Decoder(mlp([8, 128, 128, 64], nn.Tanh), BernoulliLikelihood([1, 8, 8]))


class LabelledVAE(VAE):
    """A VAE with the ELBO of unlabelled images and the log likelihood of encoder and decoder on labelled ones."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, pairs: tuple[Tensor, Tensor]):
        share = torch.tensor([0.5] * 4 + [0.25] * 4)  # the right marginals, without their dependence
        super().__init__(encoder, decoder, Independent(Bernoulli(share), 1))
        self.pairs = pairs

    def players(self, batch: Batch) -> list[Player]:
        return [self.player("model", [self.encoder, self.decoder], self.loss, batch)]

    def loss(self, x: Tensor, stage: Stage) -> tuple[Tensor, Metrics]:
        return -torch.cat([self.elbo(x, stage.num_particles).mean(0), self.labelled()]).mean(), {}

    def labelled(self) -> Tensor:
        x, z = self.pairs
        return self.log_joint(z, x) + self.encoder(x).log_prob(z)


class LabelsOnly(LabelledVAE):
    """A VAE with supervised learning of encoder and decoder, without the unlabelled images."""

    def loss(self, x: Tensor, stage: Stage) -> tuple[Tensor, Metrics]:
        return -self.labelled().mean(), {}


all_codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
occurs = (all_codes[:, :4].sum(1) == 2) & (all_codes[:, 4:].sum(1) == 1)
log_prior = (occurs / occurs.sum()).log()
true_means = 0.15 + 0.7 * bar_images(all_codes)


@torch.no_grad()
def score(log_q: Tensor, means: Tensor, z: Tensor) -> Tensor:
    """Return the share of correct codes, their total variation from the prior, and the decoder's squared error.

    Args:
        log_q: ``log q(z | x)`` of all codes for test images, ``[256, N]``.
        means: Mean image of all codes, ``[256, 1, 8, 8]``.
        z: True codes of the images, ``[N, 8]``.
    """
    right = (all_codes[log_q.argmax(0)] == z).all(1).float().mean()
    variation = 0.5 * (log_q.exp().mean(1) - log_prior.exp()).abs().sum()
    return torch.stack([right, variation, (means - true_means)[occurs].square().mean()])


def fitted(method: str, seed: int) -> tuple[LatentModel, Tensor]:
    """Return a model of the bars fitted by a method, and its scores ``[3]``."""
    torch.manual_seed(seed)
    x, _ = or_bars(5000)
    pairs = or_bars(24)
    test, z = or_bars(5000)
    encoder, decoder = networks(straight_through=method != "SEL")
    common = {"epochs": bar_epochs, "lr": 1e-3, "seed": seed, "progress": False}
    model: LatentModel
    if method == "SEL":
        model = SymmetricVAE(encoder, decoder, bar_codes)
        model.fit(x, pairs=pairs, **common)
    else:
        model = (LabelledVAE if method == "ELBO" else LabelsOnly)(encoder, decoder, pairs)
        model.fit(x, **common)
    with torch.no_grad():
        log_q = model.encoder(test).log_prob(all_codes[:, None])
    return model, score(log_q, model.decode(all_codes), z)


def bayes(seed: int) -> Tensor:
    """Return the scores of the exact posterior, which no method can exceed."""
    torch.manual_seed(seed)
    test, z = or_bars(5000)
    truth = Independent(Bernoulli(true_means[:, None]), 3)
    log_joint = truth.log_prob(test) + log_prior[:, None]
    return score(log_joint.log_softmax(0), true_means, z)


results: dict[str, list[tuple[LatentModel | None, Tensor]]] = {
    method: [fitted(method, seed) for seed in seeds] for method in ("labels only", "ELBO", "SEL")
}
results["Bayes' rule"] = [(None, bayes(seed)) for seed in seeds]
print(f"{'bars':14}{'codes right':>14}{'worst':>10}{'variation':>12}{'worst':>10}{'error':>12}")
for method, runs in results.items():
    right, variation, error = torch.stack([scores for _, scores in runs]).T
    print(
        f"{method:14}{right.mean():14.3f}{right.min():10.3f}{variation.mean():12.3f}"
        f"{variation.max():10.3f}{error.mean():12.4f}"
    )
print(
    f"\nshare of correct codes, total variation of codes from the prior, squared error of the decoder's means;\n"
    f"24 labelled images, mean and worst of {len(seeds)} seeds\n"
)

# %%
# Linear Gaussians: probabilistic PCA
# -----------------------------------
# With a linear encoder and decoder each player's best response is a regression, and alternating them is the EM
# algorithm of probabilistic PCA. Its maximum is known: variances ``λ - σ²`` along the first eigenvectors. The data are
# the 13 measurements of scikit-learn's wines. They are not Gaussian, but only their covariance matters.

wine = torch.tensor(load_wine().data)
wine = (wine - wine.mean(0)) / wine.std(0, correction=0)
cov = wine.T @ wine / len(wine)
eigenvalues = torch.linalg.eigvalsh(cov).flip(0)
noise = eigenvalues[2:].mean()


def best_responses(rounds: int) -> tuple[Tensor, Tensor]:
    """Return variances ``[2]`` and noise after this number of exact best responses of either player."""
    w, s = torch.eye(13, 2).double(), torch.ones(()).double()
    for _ in range(rounds):
        inner = w.T @ w + s * torch.eye(2).double()
        v, left = torch.linalg.solve(inner, w.T), s * torch.linalg.inv(inner)  # Bayes' rule
        cross = cov @ v.T
        w = torch.linalg.solve(v @ cross + left, cross, left=False)  # regression of x on z
        s = (cov - w @ cross.T).trace() / 13
    return torch.linalg.svdvals(w).square(), s


torch.manual_seed(0)
linear = SymmetricVAE(GaussianEncoder(nn.Linear(13, 4)), Decoder(nn.Linear(2, 13), GaussianLikelihood([13])), 2)
linear.fit(wine.float(), epochs=wine_epochs, batch_size=178, lr=(1e-2, 1e-5), seed=0, progress=False)
weight, learned = linear.decoder.network.weight.detach(), linear.decoder.likelihood.log_scale
trained = [*torch.linalg.svdvals(weight).square().tolist(), (2 * learned).exp().item()]
variances, rest = best_responses(2000)
print(f"{'wines':14}{'PCA':>10}{'best responses':>18}{'trained':>12}")
for name, one, two, three in zip(
    ("first", "second", "noise"),
    [*(eigenvalues[:2] - noise).tolist(), noise.item()],
    [*variances.tolist(), rest.item()],
    trained,
    strict=True,
):
    print(f"{name:14}{one:10.4f}{two:18.4f}{three:12.4f}")
print("\nvariances along the first two components in excess of the noise, and the noise, of standardised data\n")

# %%
# Digits: one joint distribution
# ------------------------------
# The codes have two levels of 8 and 32 bits; the images have 8 x 8 pixels in black and white. Encoder and prior share a
# network, as in a ladder VAE. The chain repeatedly draws a code of an image and an image of the code. If encoder and
# decoder are the conditionals of one joint, the chain keeps the distribution of the model's images. With the same
# networks and training time, the ELBO leaves the codes of the data away from the prior: draws of its model are further
# from the digits than the end of its chain.

UPPER, LOWER = 8, 32
digits = torch.tensor(load_digits().data, dtype=torch.float32)
digits = (digits[torch.randperm(len(digits))] > 7).float()
axes = torch.linalg.svd(digits - digits.mean(0), full_matrices=False).Vh[:20].T


def features(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean ``[20]`` and covariance of images ``[N, 64]`` along the first principal components of the digits."""
    y = (x @ axes).double()
    return y.mean(0), y.T.cov()


def frechet(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance of Gaussians with the moments of the features of two sets of images."""
    (m, a), (n, b) = features(x), features(y)
    cross = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return ((m - n).square().sum() + (a + b).trace() - 2 * cross).item()


def ladder(objective: Callable[..., LatentModel], straight_through: bool) -> LatentModel:
    """Return a model of the digits with two levels of bits, fitted by an objective."""
    torch.manual_seed(0)
    prior = LadderPrior(mlp([UPPER, 128, LOWER], nn.Tanh), UPPER)
    says = mlp([64, 256, 128, UPPER + LOWER], nn.Tanh)
    encoder = LadderEncoder(says, prior, straight_through=straight_through)
    network = nn.Sequential(LowerLevel(UPPER), mlp([LOWER, 128, 256, 64], nn.Tanh))
    model = objective(encoder, Decoder(network, BernoulliLikelihood([64])), prior)
    model.fit(digits, epochs=digit_epochs, lr=(1e-3, 1e-4), seed=0, progress=False)
    return model


def chain(model: LatentModel, x: Tensor, num_steps: int) -> list[Tensor]:
    """Return the images of all steps, each drawn given a code drawn given the image before."""
    visited = [x]
    for _ in range(num_steps):
        with torch.no_grad():
            visited.append(model.decoder(model.encode(visited[-1])).sample())
    return visited


marks = [n for n in (0, 1, 2, 5, 10, 20, 50, 100, 200) if n <= chain_steps]
ends: dict[str, tuple[Tensor, Tensor]] = {}
curves: dict[str, list[float]] = {}
for name, objective in (("ELBO", VAE), ("SEL", SymmetricVAE)):
    model = ladder(objective, straight_through=objective is VAE)
    visited = chain(model, model.sample(len(digits)), chain_steps)
    curves[name] = [frechet(visited[n], digits) for n in marks]
    ends[name] = visited[0], visited[-1]
half = len(digits) // 2
print(f"{'digits':14}{'samples':>12}{'end of chain':>16}{'moved':>10}")
for name, (first, last) in ends.items():
    print(f"{name:14}{frechet(first, digits):12.3f}{frechet(last, digits):16.3f}{frechet(first, last):10.3f}")
print(
    f"\nsquared Fréchet distance on 20 principal components: of images drawn from the model, and of those "
    f"{chain_steps} steps\nof the chain later, from the digits, and of the two from each other; of one half of the "
    f"digits from the other: {frechet(digits[:half], digits[half:]):.3f}\n"
)

# %%
# The pictures
# ------------
# Bars: the share of correct codes, with a dot for every seed, and six decoded codes. Digits: the distance of the
# chain's images from the digits, and images at its end.

options.output.mkdir(parents=True, exist_ok=True)
colours = {"labels only": plots.GREEN, "ELBO": plots.VERMILION, "SEL": plots.BLUE, "Bayes' rule": plots.BLACK}

figure, (dots, tiles) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=[1, 1.6])
for place, (method, runs) in enumerate(results.items()):
    shares = [scores[0].item() for _, scores in runs]
    dots.plot([place] * len(shares), shares, "o", color=colours[method], ms=8, alpha=0.7)
dots.set_xticks(range(len(results)), list(results))
dots.set(ylim=(0, 1.03), ylabel="share of correct codes, test images", title="24 labelled images")
dots.grid(axis="y", color="0.9")
dots.margins(x=0.15)
shown = occurs.nonzero()[[0, 5, 10, 13, 18, 23], 0]
rows = {"truth": true_means[shown]}
for method, runs in results.items():
    if runs[0][0] is not None:
        rows[method] = runs[0][0].decode(all_codes[shown])
plots.images(torch.cat([*rows.values()]), columns=6, rows=list(rows), ax=tiles)
tiles.set_title("six decoded codes")
figure.savefig(options.output / "symmetric_bars.png", dpi=150)

figure, (course, tiles) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=[1, 1.2])
for name, curve in curves.items():
    course.plot(range(len(marks)), curve, "o-", color=colours[name], label=name)
course.axhline(frechet(digits[:half], digits[half:]), color="0.5", ls="--", label="half the digits")
course.set_xticks(range(len(marks)), list(map(str, marks)))
course.set(xlabel="steps of the chain", ylabel="squared Fréchet distance from the digits")
course.set_ylim(bottom=0)
course.legend(frameon=False)
rows = {"digits": digits, **{name: last for name, (_, last) in ends.items()}}
sheet = torch.cat([row[:24].reshape(24, 8, 8) for row in rows.values()])
plots.images(sheet, columns=12, rows=list(rows), ax=tiles)
tiles.set_title(f"digits, and images after {chain_steps} steps")
figure.savefig(options.output / "symmetric_chain.png", dpi=150)
print(f"symmetric_bars.png and symmetric_chain.png are in {options.output}/")
