"""How good latent variable models are: `make accuracy-vae` runs this and writes ``docs/results/vae.json``.

One configuration, the defaults of `fit`. The four points of the AVB paper have an exact log likelihood (quadrature); of
MNIST it is estimated by annealed importance sampling. MNIST is looked for in ``$IMPLICITVI_DATA``; without it that part
is left out, and said to be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from implicitvi.datasets import four_points, mnist
from implicitvi.errors import DataError
from implicitvi.metrics import knn_kl
from implicitvi.vae import AVB, VAE
from implicitvi.vae.model import LatentModel

OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "vae.json"
Row = dict[str, Any]
EPOCHS = {"four points": 6000, "MNIST": 16}
PAPER = {"VAE": (-1.568, 88.5e-3, 0.165), "AVB": (-1.403, 5.77e-3, 0.026)}


def points(seed: int) -> list[Row]:
    """VAE and AVB on the four points: the rows of the paper's table 1."""
    train = four_points()
    x = train[:4]
    rows = []
    for name, system, options in (("VAE", VAE, {}), ("AVB", AVB, {"contrast": "prior"})):
        torch.manual_seed(seed)
        model = system.dense(4, 2, hidden=(128, 128), **options)
        fit = model.fit(train, epochs=EPOCHS["four points"], batch_size=len(train), seed=seed, progress=False)
        torch.manual_seed(seed)
        codes = model.encode(x, 2500)
        with torch.no_grad():
            error = -model.decoder(codes).log_prob(x).mean().item() / 4
        aggregate = codes.flatten(0, 1)
        figures = {
            "log likelihood": model.log_evidence(x, "quadrature").mean().item(),
            "reconstruction error": error,
            "KL of the codes": knn_kl(aggregate, torch.randn_like(aggregate)),
        }
        rows.append(row("four points", name, seed, figures, fit.seconds))
    return rows


def digits(seed: int) -> list[Row]:
    """VAE and AVB with Adaptive Contrast on MNIST: dense networks, a small budget, 500 test images."""
    train, _, test = mnist()
    torch.manual_seed(0)
    x = torch.bernoulli(test.images[torch.randperm(len(test.images))[:500]])
    rows = []
    for name, system in (("VAE", VAE), ("AVB + AC", AVB)):
        torch.manual_seed(seed)
        model: LatentModel = system.dense((1, 28, 28), 32)
        grey = train.images[:12_800]
        fit = model.fit(grey, epochs=EPOCHS["MNIST"], transform=torch.bernoulli, seed=seed, progress=False)
        log_px = model.log_evidence(x, "ais", num_steps=300, num_chains=4, num_leapfrog=5)
        figures = {"log likelihood": log_px.mean().item(), "standard error": log_px.std().item() / len(x) ** 0.5}
        rows.append(row("MNIST", name, seed, figures, fit.seconds))
    return rows


def row(data: str, system: str, seed: int, figures: dict[str, float], seconds: float) -> Row:
    made = {"data": data, "system": system, "seed": seed, "seconds": seconds, "figures": figures}
    print(json.dumps(made), flush=True)
    return made


def table(result: dict[str, Any]) -> str:
    """The rows, medians over seeds, in Markdown."""
    lines = [result["made"], ""]
    for data in EPOCHS:
        of_data = [r for r in result["rows"] if r["data"] == data]
        if not of_data:
            lines += [f"{data}: left out of this run.", ""]
            continue
        names = list(of_data[0]["figures"])
        lines += [f"## {data}, {EPOCHS[data]} epochs", ""]
        lines += [f"| system | seeds | {' | '.join(names)} | seconds |"]
        lines += ["|---" * (len(names) + 3) + "|"]
        for system in dict.fromkeys(r["system"] for r in of_data):
            mine = [r for r in of_data if r["system"] == system]
            cells = [shown([r["figures"][name] for r in mine]) for name in names]
            seconds = statistics.median(r["seconds"] for r in mine)
            lines += [f"| {system} | {len(mine)} | {' | '.join(cells)} | {seconds:.0f} |"]
            if data == "four points":
                paper = " | ".join(f"{number:.4g}" for number in PAPER[system])
                lines += [f"| the paper's {system} |  | {paper} |  |"]
        lines += [""]
    lines += ["Medians over seeds, with the range; nats. The best possible on four points is -1.3863."]
    return "\n".join(lines) + "\n"


def shown(values: list[float]) -> str:
    middle = f"{statistics.median(values):.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.4g} to {max(values):.4g})"


def main() -> None:
    """Run both parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=EPOCHS, help="run this part, and keep the other's rows")
    parser.add_argument("--seeds", type=int, help="seeds of each part; 5 and 2 if not given")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    packages = ", ".join(f"{p} {version(p)}" for p in ("implicitvi", "torch"))
    made = f"Measured on {datetime.date.today()} with Python {platform.python_version()}, {packages}; "
    made += f"one thread of {platform.machine()}, {platform.system()}."
    result: dict[str, Any] = {"made": made, "rows": []}
    if options.only and options.output.exists():
        kept = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
        result["rows"] = [r for r in kept if r["data"] != options.only]
    if options.only != "MNIST":
        for seed in range(options.seeds or 5):
            result["rows"] += points(seed)
    if options.only != "four points":
        try:
            for seed in range(options.seeds or 2):
                result["rows"] += digits(seed)
        except DataError as error:
            print(f"MNIST is left out: {error}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
