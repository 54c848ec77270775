"""
Handwritten digits
==================

Compare adversarial variational Bayes with Adaptive Contrast to a variational autoencoder.

Both have the same decoder and the same number of steps on black and white digits, which every batch draws from the grey
digits (Mescheder, Nowozin and Geiger 2017, section 5.2, table 2 and figure 7). Annealed importance sampling, which does
not use the encoder's density, estimates the evidence of test digits.

Run it with ``python examples/11_mnist.py``. It uses the digits of scikit-learn, 8 x 8 pixels, unless ``--data folder``
or the environment variable ``IMPLICITVI_DATA`` gives the folder of MNIST. For the paper's networks, on a GPU::

    python examples/11_mnist.py --data mnist --paper --epochs 200 --test 2048 --anneal 1000 --chains 5

``--smoke`` runs a tiny version to check that it works; its results are meaningless.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implicitvi import plots
from implicitvi.datasets import digits, mnist
from implicitvi.vae import AVB, VAE
from implicitvi.vae.model import LatentModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--data", type=Path, default=os.environ.get("IMPLICITVI_DATA"))
parser.add_argument("--paper", action="store_true", help="convolutions as in the paper")
parser.add_argument("--codes", type=int, default=32, help="dimensions of a code")
parser.add_argument("--images", type=int, default=12_800, help="maximal number of training images")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--test", type=int, default=100, help="number of test images")
parser.add_argument("--anneal", type=int, default=100, help="intermediate distributions")
parser.add_argument("--chains", type=int, default=4)
options = parser.parse_args()
if options.smoke:
    options.images, options.epochs, options.test, options.anneal = 256, 1, 10, 5


# %%
# The data
# --------


def data() -> tuple[Tensor, Tensor]:
    """Return grey training digits, and black and white test digits."""
    if options.data is None or options.smoke:
        train, test = digits().split(1500)
    else:
        train, _, test = mnist(options.data)
    torch.manual_seed(0)
    return train.images[: options.images], torch.bernoulli(test.images[: options.test])


grey, test = data()
print(f"{len(grey)} digits of {grey.shape[-2]} x {grey.shape[-1]} pixels, {len(test)} test digits")

# %%
# The fits
# --------


def made(objective: type[VAE] | type[AVB]) -> LatentModel:
    """Return a model with initial weights from the seed."""
    torch.manual_seed(options.seed)
    if options.paper:
        return objective.mnist(options.codes)
    return objective.dense(grey.shape[1:], options.codes)


def evidence(model: LatentModel) -> Tensor:
    """Estimate ``log p(x)`` of the test digits, in nats."""
    steps = {"num_steps": options.anneal, "num_chains": options.chains}
    return model.log_evidence(test, "ais", num_leapfrog=5, **steps)


rows: dict[str, list[float]] = {}
fitted: dict[str, LatentModel] = {}
for name, objective in (("VAE", VAE), ("AVB + AC", AVB)):
    model = made(objective)
    fit = model.fit(grey, epochs=options.epochs, transform=torch.bernoulli, seed=options.seed)
    print(fit)
    log_px = evidence(model)
    x = test.to(model.device)
    with torch.no_grad():
        bound = model.elbo(x) if isinstance(model, VAE) else model.learned_elbo(x)  # type: ignore[attr-defined]
        likelihood = model.decoder(model.encode(x)).log_prob(x)
    error = log_px.std() / len(log_px) ** 0.5
    numbers = [log_px.mean(), error, bound.mean(), likelihood.mean()]
    rows[name] = [n.item() for n in numbers] + [fit.rows_per_second, fit.seconds]
    fitted[name] = model

print(f"\n{'objective':10}{'log p(x)':>10}{'+-':>8}{'bound':>10}{'log p(x|z)':>12}{'images/s':>10}{'s':>8}")
for name, numbers in rows.items():
    head = "".join(f"{n:{w}.2f}" for n, w in zip(numbers[:4], (10, 8, 10, 12), strict=True))
    print(f"{name:10}{head}{numbers[4]:10.0f}{numbers[5]:8.1f}")
print("\nnats per digit; +- is over digits, the same for both; AVB's bound is learned, an estimate\n")

# %%
# The pictures
# ------------
# Test digits, their reconstructions, and new digits.

figure, axes = plt.subplots(1, 3, figsize=(13, 2.9), layout="constrained")
count = min(6, len(test))  # three rows of six are as wide and high as five of ten

shown = test[:count]
torch.manual_seed(options.seed)
both = [fitted[name].reconstruct(shown).cpu() for name in fitted]
plots.images(torch.cat([shown, *both]), columns=count, rows=["data", "VAE", "AVB"], ax=axes[0])
axes[0].set_title("test digits and reconstructions")
for ax, (name, model) in zip(axes[1:], fitted.items(), strict=True):
    new = model.decode(model.prior().sample(torch.Size([50])))
    plots.images(new, columns=10, ax=ax)
    ax.set_title(f"new digits, {name}: {rows[name][0]:.1f} nats")
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "mnist.png"
figure.savefig(path, dpi=180)
print(f"wrote {path}")
