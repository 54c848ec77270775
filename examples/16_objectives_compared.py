"""
Thirteen objectives compared
============================

Compare thirteen ways to fit one model, with the same networks, data and number of steps.

Digits of 8 x 8 pixels in black and white get codes in the plane, where quadrature gives the evidence of an image. All
use the same decoder. The codes are learned by a bound with various posteriors, by an adversary on codes, on pairs or on
both, or by two players that each fit the draws of the other. The table shows the strength of each objective: a high
evidence, sharp reconstructions, or codes that match the prior.

Run it with ``python examples/16_objectives_compared.py``; ``--smoke`` runs a tiny version to check
that it works; its results are meaningless.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from implicitvi import plots
from implicitvi.datasets import binarise, digits
from implicitvi.metrics import knn_kl
from implicitvi.vae import AAE, ALI, ASVAE, AVB, VAE, AuxiliaryVAE, BiadversarialVAE, SymmetricVAE
from implicitvi.vae.model import LatentModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.set_num_threads(1)  # the networks are small: a second thread would slow them down
epochs = 1 if options.smoke else 60

# %%
# The data
# --------

train, test = digits().split(1500)
x_train, x_test = binarise(train.images), binarise(test.images)
if options.smoke:
    x_train, x_test = x_train[:256], x_test[:64]

# %%
# The objectives
# --------------
# Each uses the same constructor, with its own defaults.

OBJECTIVES = {
    "VAE": (VAE, {}),
    "VAE, IAF": (VAE, {"posterior": "iaf"}),
    "IWAE, 8 weights": (VAE, {"num_importance": 8}),
    "auxiliary VAE": (AuxiliaryVAE, {}),
    "AVB": (AVB, {"contrast": "prior"}),
    "AVB + AC": (AVB, {}),
    "AVB, f-GAN": (AVB, {"contrast": "prior", "ratio": "fgan_kl"}),
    "AAE": (AAE, {}),
    "ALI": (ALI, {}),
    "ALICE": (ALI, {"cycle": 1.0}),
    "AS-VAE": (ASVAE, {}),
    "biadversarial": (BiadversarialVAE, {"cycle": 1.0}),
    "SEL": (SymmetricVAE, {}),
}


def row(model: LatentModel, seconds: float) -> list[float]:
    """Return evidence and reconstruction in nats per image, divergence of the codes from the prior in nats, seconds."""
    codes = model.encode(x_test, 4).flatten(0, 1)
    with torch.no_grad():
        likelihood = model.decoder(model.encode(x_test)).log_prob(x_test).mean()
    # an encoder without noise repeats its codes; a little noise makes them comparable
    codes = codes + 1e-3 * torch.randn_like(codes)
    return [
        model.log_evidence(x_test[:100], "quadrature", points=200).mean().item(),
        likelihood.item(),
        knn_kl(codes, torch.randn_like(codes)),
        seconds,
    ]


rows: dict[str, list[float]] = {}
fitted: dict[str, LatentModel] = {}
for name, (objective, arguments) in OBJECTIVES.items():
    torch.manual_seed(options.seed)
    model = objective.dense(x_train.shape[1:], 2, hidden=(128, 128), **arguments)
    fit = model.fit(x_train, epochs=epochs, seed=options.seed, progress=False)
    torch.manual_seed(options.seed)
    rows[name], fitted[name] = row(model, fit.seconds), model
    print(fit)

print(f"\n{'objective':20}{'log p(x)':>12}{'log p(x|z)':>12}{'KL codes':>12}{'seconds':>12}")
for name, numbers in rows.items():
    print(f"{name:20}" + "".join(f"{number:12.2f}" for number in numbers))
print("\nnats per test image, exact; nats per test image; nats between all codes and the prior\n")

# %%
# The picture
# -----------
# For each objective: codes of test images, with a colour for each digit, above new images.

figure, axes = plt.subplots(4, 7, figsize=(14, 8.4), layout="constrained")
pairs = [(axes[2 * r, c], axes[2 * r + 1, c]) for r in range(2) for c in range(7)]
for (above, below), (name, model) in zip(pairs, fitted.items(), strict=False):
    z = model.encode(x_test)
    plots.codes(z, test.labels[: len(z)], ax=above)
    above.set(title=f"{name}\nlog p(x) = {rows[name][0]:.1f}", xlim=(-4, 4), ylim=(-4, 4))
    above.set(xticks=[-3, 0, 3], yticks=[-3, 0, 3], xlabel="", ylabel="")
    torch.manual_seed(options.seed)
    plots.images(model.decode(torch.randn(25, 2)), ax=below)
for unused in [ax for pair in pairs[len(fitted) :] for ax in pair]:
    unused.set_axis_off()
figure.supxlabel(
    "above: codes of test images, $z_1$ and $z_2$ in prior sd, a colour for each digit;  below: new images",
    fontsize="medium",
)
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "objectives_compared.png"
figure.savefig(path, dpi=110)
print(f"wrote {path}")
