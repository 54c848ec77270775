"""
Four points
===========

Encode four data points: a Gaussian encoder cannot fill the prior without gaps and overlaps.

Four binary images of 2 x 2 pixels, each with one pixel on, get codes in the plane (Mescheder, Nowozin and Geiger 2017,
section 5.2, table 1 and figures 5 and 6). The best possible log p(x) is -log 4: each image gets a quarter of the prior
and is decoded with certainty there. The codes of one image then fill a region with sharp edges. A Gaussian encoder
leaves gaps between its four ellipses. The encoder of adversarial variational Bayes is a network that takes noise as
input, and it tiles the plane.

Run it with ``python examples/10_four_points.py``; ``--seeds 5`` repeats it and shows medians. ``--smoke`` runs a
tiny version to check that it works; its results are meaningless.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from implicitvi import plots
from implicitvi.datasets import four_points
from implicitvi.metrics import knn_kl
from implicitvi.vae import AVB, VAE
from implicitvi.vae.model import LatentModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0, help="the first seed")
parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
options = parser.parse_args()
torch.set_num_threads(1)  # the networks are small: a second thread would slow them down
epochs = 20 if options.smoke else 6000
draws = 250 if options.smoke else 2500

# %%
# The data, and two models of them
# --------------------------------
# A batch holds every point 128 times. Both models have the same decoder and otherwise use the constructors' defaults.

train = four_points()
points = train[:4]
HIDDEN = (128, 128)


def models(seed: int) -> dict[str, LatentModel]:
    """Return the two models, trained."""
    found: dict[str, LatentModel] = {}
    for name, make in (
        ("VAE", lambda: VAE.dense(4, 2, hidden=HIDDEN)),
        ("AVB", lambda: AVB.dense(4, 2, hidden=HIDDEN, contrast="prior")),
    ):
        torch.manual_seed(seed)
        found[name] = make()
        print(found[name].fit(train, epochs=epochs, batch_size=len(train), seed=seed))
    return found


# %%
# The results
# -----------
# A sum over a grid of the plane gives the exact log likelihood of either model.


def figures_of(model: LatentModel) -> dict[str, float]:
    """Return the rows of the paper's table 1, in nats."""
    z = model.encode(points, draws)
    aggregate = z.flatten(0, 1)
    elbo = model.elbo(points, draws) if isinstance(model, VAE) else model.learned_elbo(points, draws)  # type: ignore[attr-defined]
    return {
        "log likelihood": model.log_evidence(points, "quadrature").mean().item(),
        "reconstruction error": -model.decoder(z).log_prob(points).mean().item() / 4,
        "ELBO": elbo.mean().item(),
        "KL of the codes": knn_kl(aggregate, torch.randn(len(aggregate), 2)),
    }


PAPER = {
    "VAE": {"log likelihood": -1.568, "reconstruction error": 88.5e-3, "ELBO": -1.697, "KL of the codes": 0.165},
    "AVB": {"log likelihood": -1.403, "reconstruction error": 5.77e-3, "ELBO": -1.421, "KL of the codes": 0.026},
}

runs = []
for seed in range(options.seed, options.seed + options.seeds):
    fitted = models(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        runs.append({name: figures_of(model) for name, model in fitted.items()})
    print({name: round(run["log likelihood"], 4) for name, run in runs[-1].items()})

print(f"\n{'figure':24}{'VAE':>10}{'paper':>10}{'AVB':>10}{'paper':>10}")
for row in PAPER["VAE"]:
    line = f"{row:24}"
    for name in ("VAE", "AVB"):
        line += f"{statistics.median(run[name][row] for run in runs):10.4f}{PAPER[name][row]:10.4f}"
    print(line)
print(f"{'optimum':24}" + f"{-torch.tensor(4.0).log().item():10.4f}" * 4)
print(f"\nnats; error per pixel; AVB's ELBO is learned; medians over {options.seeds} seeds\n")

# %%
# The pictures
# ------------
# Above: draws of the codes of each point. Below: the point that the decoder returns at each place of the plane. The VAE
# is on the left, AVB on the right.

COLOURS = plots.PALETTE[:4]
figure, axes = plt.subplots(2, 2, figsize=(8, 8), layout="constrained", sharex=True, sharey=True)
side = torch.linspace(-3, 3, 301)
plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
palette = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLOURS])
for column, (name, model) in zip(axes.T, fitted.items(), strict=True):
    z = model.encode(points, 1500)
    plots.codes(z.flatten(0, 1), torch.arange(4).repeat(1500), ax=column[0])
    p = model.decode(plane)
    sure = (p / p.sum(-1, keepdim=True)).clamp(0, 1)
    column[1].imshow((sure @ palette).clamp(0, 1).numpy(), origin="lower", extent=(-3, 3, -3, 3))
    value = runs[-1][name]["log likelihood"]
    column[0].set(title=f"{name}: log p(x) = {value:.3f} nats", xlabel="", ylabel="")
    column[0].set(xlim=(-3, 3), ylim=(-3, 3))
    column[1].set(xlabel="$z_1$ (prior sd)")
axes[0, 0].set(ylabel="draws of the codes\n$z_2$ (prior sd)")
axes[1, 0].set(ylabel="point that the decoder returns\n$z_2$ (prior sd)")
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "four_points.png"
figure.savefig(path, dpi=130)
print(f"wrote {path}")
