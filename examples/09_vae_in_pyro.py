"""
A variational autoencoder in Pyro
=================================

Write a variational autoencoder as a Pyro model with a latent in its data plate; the encoder is an amortized guide.

Each digit of scikit-learn, 8 x 8 pixels in black and white, gets two latent dimensions, so that quadrature gives the
evidence and the posterior of every image. The decoder's weights are parameters of the model, learned with the guide.
The posterior of an image need not be Gaussian: `ImplicitGuide` draws from a network that takes noise and the image,
without assumptions about the shape of the posterior.

Run it with ``python examples/09_vae_in_pyro.py``; ``--smoke`` runs a tiny version to check that
it works; its results are meaningless.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from sklearn.datasets import load_digits
from torch import Tensor, nn

from implicitvi import AVBSVI, ImplicitGuide, plots

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
steps = 20 if options.smoke else 2500


# %%
# The model
# ---------
# A plain Pyro model. Every step uses 100 of the images.


class VAE(PyroModule[nn.Module]):
    """A model with two standard normal latents for each image, and a decoder to the logits of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 64))
        to_pyro_module_(self.decoder)  # otherwise its weights would not be learned

    def forward(self, x: Tensor, minibatch: int | None = None) -> None:
        with pyro.plate("images", len(x), subsample_size=minibatch) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x[index])


pixels = torch.tensor(load_digits().data, dtype=torch.float32)
labels = torch.tensor(load_digits().target)
images = (pixels > 7).float()
train, test = images[:1500], images[1500:]

# %%
# The fit
# -------
# The guide is amortized over the plate: it takes the image and draws its latents. `AVBSVI` learns guide and decoder.

pyro.clear_param_store()
torch.manual_seed(options.seed)
model = VAE()
guide = ImplicitGuide(model, amortize={"images": lambda x, minibatch=None: x})
fit = AVBSVI(model, guide, num_steps=steps, seed=options.seed).run(train, minibatch=100)
print(fit)

# %%
# How good is it?
# ---------------
# A sum over a grid of two dimensions gives the exact log evidence and posterior of every image.

ticks = torch.linspace(-5, 5, 161)
grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), -1).flatten(0, 1)


@torch.no_grad()
def log_joint(x: Tensor, z: Tensor) -> Tensor:
    """Return ``log p(x, z)`` of images ``[B, 64]`` at codes ``[..., 2]``: ``[..., B]`` in nats."""
    logits = model.decoder(z)
    log_likelihood = logits @ x.mT - nn.functional.softplus(logits).sum(-1, keepdim=True)
    return log_likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1, keepdim=True)


def log_joint_on_grid(x: Tensor) -> Tensor:
    """Return ``log p(x, z) dz`` of images ``[B, 64]`` at every point of the grid: ``[B, G]`` in nats."""
    cell = 2 * (ticks[1] - ticks[0]).log()
    return log_joint(x, grid).mT + cell


evidence = {name: log_joint_on_grid(x).logsumexp(-1) for name, x in (("train", train), ("test", test))}


def posterior(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the exact posterior of images on the grid, ``[B, G]``, with its means and sds, ``[B, 2]``."""
    weights = log_joint_on_grid(x).softmax(-1)
    mean = weights @ grid
    return weights, mean, (weights @ grid.square() - mean.square()).sqrt()


def errors(x: Tensor) -> tuple[float, float]:
    """Return the mean error of the guide's means in posterior sds, and the median ratio of its sds to the exact sds."""
    _, mean, sd = posterior(x)
    draws = guide.sample(2000, x)["z"]
    return ((draws.mean(0) - mean).abs() / sd).mean().item(), (draws.std(0) / sd).median().item()


seen, unseen = errors(train[:200]), errors(test[:200])
bound = -fit.losses[-steps // 5 :].mean() / len(train)
print(f"learned bound {bound:.2f} nats per image, an estimate\n")
print(f"{'images':24}{'seen':>10}{'never seen':>12}")
print(f"{'exact log evidence':24}{evidence['train'].mean():10.2f}{evidence['test'].mean():12.2f}")
print(f"{'posterior mean error':24}{seen[0]:10.3f}{unseen[0]:12.3f}")
print(f"{'posterior sd ratio':24}{seen[1]:10.3f}{unseen[1]:12.3f}")
print("\nnats per image; mean over 200 images in posterior sds; median over the same images\n")

# %%
# The pictures
# ------------
# Left: decoded images over the latent plane. Right: of 200 training images, the four whose exact posterior is least
# Gaussian, and thus hardest for an encoder. Contours enclose 50 and 90 % of the exact posterior; dots are draws.

shown = train[:200]
weights, exact_mean, exact_sd = posterior(shown)
draws = guide.sample(2000, shown)["z"]
fourth = (weights[..., None] * (grid - exact_mean[:, None]) ** 4).sum(1) / exact_sd**4
hardest = (fourth - 3).abs().amax(-1).topk(4).indices.tolist()

figure, axes = plt.subplot_mosaic("mmab;mmcd", figsize=(12, 6), layout="constrained", gridspec_kw={"wspace": 0.05})
places = torch.linspace(-2.15, 2.15, 12)
plane = torch.stack(torch.meshgrid(places, places.flip(0), indexing="xy"), -1).flatten(0, 1)
plots.images(model.decoder(plane).sigmoid().unflatten(-1, (8, 8)), columns=12, ax=axes["m"])
axes["m"].set(title="Decoded images over the latent plane", xlabel="$z_1$, from -2.15 to 2.15 prior sd")
axes["m"].set_ylabel("$z_2$, from -2.15 to 2.15 prior sd")
for name, i in zip("abcd", hardest, strict=True):
    ax = axes[name]
    plots.draws_on_density(
        draws[:, i],
        lambda z, x=shown[i : i + 1]: log_joint(x, z).squeeze(-1),
        masses=(0.5, 0.9),
        num_draws=600,
        legend=False,
        ax=ax,
    )
    ax.set(xlabel="$z_1$ (prior sd)", ylabel="$z_2$ (prior sd)")
    ax.set_title(f"an image of a {labels[i].item()}", fontsize=10)
    inset = ax.inset_axes((0.76, 0.72, 0.24, 0.28))
    inset.imshow(shown[i].reshape(8, 8).numpy(), cmap="gray_r")
    inset.set(xticks=[], yticks=[])
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "vae_in_pyro.png"
figure.savefig(path, dpi=130)
print(f"wrote {path}")
