"""
Faces
=====

Fit a folder of pictures by adversarial variational Bayes and by a variational autoencoder with the same decoder.

The setup is that of the AVB paper's code for CelebA: colour pictures, convolutions with noise injected into every
feature map of the encoder and the code into every feature map of the adversary, and Gaussian pixels, each with a
learned scale. Without ``--data`` the script draws the faces: ellipses with eyes and a mouth of random place, size and
colour.

Run it with ``python examples/12_faces.py``. For CelebA on a GPU::

    python examples/12_faces.py --data img_align_celeba --size 64 --crop 128 --width 64 --codes 64 --epochs 50

``--smoke`` runs a tiny version to check that it works; its results are meaningless.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from implicitvi import plots
from implicitvi.datasets import ImageFolder, image_folder
from implicitvi.vae import AVB, VAE

HEIGHT, WIDTH = 44, 36  # of a drawing, in pixels


# %%
# The drawings
# ------------
# Every shape is an ellipse with a soft edge, painted over the previous shapes.


def drawing(rng: np.random.Generator) -> np.ndarray:
    """Draw one face ``[HEIGHT, WIDTH, 3]``, bytes."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    canvas = np.ones((HEIGHT, WIDTH, 3)) * rng.uniform(0.2, 0.9, 3)

    def paint(centre: tuple[float, float], radii: tuple[float, float], colour: np.ndarray) -> None:
        distance = np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1])
        cover = np.clip((1 - distance) * min(radii) + 0.5, 0, 1)[..., None]
        canvas[:] = cover * colour + (1 - cover) * canvas

    cx, cy = WIDTH / 2 + rng.normal(0, 1), HEIGHT / 2 + rng.normal(0, 1)
    wide, high = rng.uniform(9, 12), rng.uniform(12, 15)
    turned = rng.normal(0, 1.2)
    skin = np.array([0.95, 0.8, 0.7]) * rng.uniform(0.4, 1.0)
    hair = np.array([0.6, 0.4, 0.2]) * rng.uniform(0.1, 1.4)
    paint((cx, cy - 4), (wide + 2, high), hair)
    paint((cx, cy), (wide, high), skin)
    size, gap = rng.uniform(1.2, 2.2), rng.uniform(3.8, 5)
    iris = rng.uniform(0, 0.6, 3)
    for side in (-1, 1):
        eye = cx + turned + side * gap
        paint((eye, cy - 3), (size + 0.8, size), np.full(3, 0.97))
        paint((eye + 0.4 * turned, cy - 3), (0.6 * size, 0.7 * size), iris)
    paint((cx + 1.3 * turned, cy + 2), (1.0, 2.0), 0.8 * skin)
    smile = (rng.uniform(2.5, 5), rng.uniform(0.7, 2.4))
    paint((cx + turned, cy + 0.55 * high), smile, np.array([0.75, 0.2, 0.25]) * rng.uniform(0.5, 1))
    return np.uint8(255 * canvas)


def draw_folder(folder: str, count: int, seed: int) -> None:
    """Fill a folder with drawings."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        plt.imsave(Path(folder) / f"{i:05}.png", drawing(rng))


# %%
# The models
# ----------
# If the pictures do not fit in memory, pass the dataset, or a ``DataLoader`` of it, to ``fit``.


def squared_error(model: AVB | VAE, x: Tensor) -> float:
    """Return the squared error of reconstructions from one code each, averaged over pixels."""
    errors = [(model.reconstruct(part).cpu() - part).square().mean() for part in x.split(200)]
    return torch.stack(errors).mean().item()


def compare(folder: ImageFolder, options: argparse.Namespace) -> tuple[Tensor, dict[str, AVB | VAE]]:
    """Fit both models, print the table and return held-out pictures and the models."""
    pictures = folder.tensor()
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(options.seed))
    held_out = max(20, len(pictures) // 10)
    test, train = pictures[order[:held_out]], pictures[order[held_out:]]
    sizes = {"width": options.width, "size": options.size}
    models: dict[str, AVB | VAE] = {}
    print(f"{len(train)} training pictures, {len(test)} held out\n")
    print(f"{'model':10}{'squared error':>16}{'images/s':>12}{'seconds':>10}")
    for name, objective in (("AVB", AVB), ("VAE", VAE)):
        torch.manual_seed(options.seed)
        model = models[name] = objective.faces(options.codes, **sizes)
        fit = model.fit(
            train,
            epochs=options.epochs,
            batch_size=min(64, len(train)),
            lr=(2e-3, 1e-4),
            seed=options.seed,
            progress=False,
        )
        error = squared_error(model, test)
        print(f"{name:10}{error:16.5f}{fit.rows_per_second:12.0f}{fit.seconds:10.1f}")
    alone = (test - train.mean(0)).square().mean()
    print(f"\nheld-out pictures, mean over pixels in [0, 1]; the mean picture scores {alone:.5f}")
    return test, models


# %%
# The picture
# -----------


@torch.no_grad()
def draw(test: Tensor, models: dict[str, AVB | VAE], seed: int) -> plt.Figure:
    """Plot reconstructions, new faces, and interpolations between faces."""
    torch.manual_seed(seed)
    shown = test[:10]
    avb = models["AVB"]
    z = avb.encode(shown[:4])
    steps = torch.linspace(0, 1, 10, device=z.device)[:, None]
    ways = torch.cat([torch.lerp(z[i], z[i + 1], steps) for i in (0, 2)])
    panels = {
        "held-out faces": shown,
        **{f"reconstructed, {name}": m.reconstruct(shown) for name, m in models.items()},
        **{f"new, {name}": m.decode(m.prior().sample(torch.Size([20]))) for name, m in models.items()},
        "from one held-out face to another, AVB": avb.decode(ways),
    }
    heights = [len(pictures) for pictures in panels.values()]
    figure, axes = plt.subplots(len(panels), figsize=(7, 8.6), height_ratios=heights, layout="constrained")
    for panel, (title, pictures) in zip(axes, panels.items(), strict=True):
        plots.images(pictures, columns=10, ax=panel)
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of your own pictures")
    parser.add_argument("--crop", type=int, help="side of the central square to crop, in pixels")
    parser.add_argument("--size", type=int, default=32, help="side after resizing, in pixels")
    parser.add_argument("--width", type=int, default=8, help="channels of the first convolution")
    parser.add_argument("--codes", type=int, default=16, help="latent dimensions")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--count", type=int, default=2000, help="number of drawings without --data")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.smoke:
        options.count, options.epochs, options.width = 60, 1, 2
    with TemporaryDirectory() as drawn:
        if options.data is None:
            draw_folder(drawn, options.count, options.seed)
        folder = image_folder(options.data or drawn, options.size, crop=options.crop)
        test, models = compare(folder, options)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(test, models, options.seed).savefig(options.output / "faces.png", dpi=150)
    print(f"\nfaces.png is in {options.output}/")


if __name__ == "__main__":
    main()
