"""How long a step takes, and how it grows: `make bench` runs this and writes ``docs/results/bench.json``.

Every ratio is paired: the methods take turns, one step each, and medians are compared. The yardstick is the
same algorithm written out by hand in PyTorch (`ByHand`): the same networks, batch, adversary steps, Gaussian
contrast, averaging and clipping, with the log density of the model as a formula.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from math import log, pi
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from torch import Tensor, nn
from torch.nn.functional import softplus

from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.avb.adversaries import GatedAdversary
from implicitvi.avb.samplers import GatedSampler
from implicitvi.datasets import eight_schools

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "results" / "bench.json"
PICTURE = ROOT / "docs" / "images" / "bench.png"
STEPS = 3  # of the adversary for each of the sampler
Row = dict[str, Any]
LogDensity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A Pyro model with its arguments, and its log density on the unconstrained scale as a formula."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    dim: int
    log_density: LogDensity


def normal(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Log density of ``N(0, scale²)``."""
    log_scale = scale.log() if isinstance(scale, Tensor) else log(scale)
    return -0.5 * (x / scale).square() - log_scale - 0.5 * log(2 * pi)


def schools() -> Problem:
    data = eight_schools()

    def log_density(u: Tensor) -> Tensor:
        mean = u[:, :1] + u[:, 1:2] * u[:, 2:]
        return normal(u).sum(-1) + normal(data.y - mean, data.sigma).sum(-1)

    return Problem(data.model, (data.sigma, data.y), 10, log_density)


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    pyro.sample("obs", dist.Bernoulli(logits=w @ x.mT).to_event(1), obs=y)


def regression(size: int = 1000, dim: int = 25) -> Problem:
    x = torch.randn(size, dim) / dim**0.5
    y = (x @ torch.randn(dim)).sigmoid().bernoulli()

    def log_density(u: Tensor) -> Tensor:
        logits = u @ x.mT
        return normal(u).sum(-1) + (logits * y - softplus(logits)).sum(-1)

    return Problem(logistic, (x, y), dim, log_density)


def groups(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.LogNormal(y.new_tensor(0.0), 1.0))
    with pyro.plate("groups", len(y)):
        eta = pyro.sample("eta", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * eta, 1.0), obs=y)


def hierarchy(dim: int = 100) -> Problem:
    y = 2 * torch.randn(dim - 2)

    def log_density(u: Tensor) -> Tensor:
        mean = u[:, :1] + u[:, 1:2].exp() * u[:, 2:]  # the lognormal's own density is normal in its log
        return normal(u[:, 0], 5.0) + normal(u[:, 1:]).sum(-1) + normal(y - mean).sum(-1)

    return Problem(groups, (y,), dim, log_density)


def minibatches(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(y), subsample_size=100) as index:
        pyro.sample("obs", dist.Bernoulli(logits=x[index] @ w), obs=y[index])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "Eight Schools, D = 10": schools,
    "logistic regression, D = 25, n = 1000": regression,
    "hierarchical model, D = 100": hierarchy,
}


class ByHand:
    """What `AVBSVI` does with a Gaussian contrast, for one model, without a library.

    It neither guards against values that are not finite, nor tempers, nor keeps a history or a private stream.
    """

    def __init__(self, problem: Problem, num_particles: int, width: int):
        self.log_density = problem.log_density
        self.num_particles = num_particles
        self.sampler = GatedSampler(problem.dim, width=width)
        self.adversary = GatedAdversary(problem.dim, width=width)
        self.average = deepcopy(self.adversary).requires_grad_(False)
        self.theirs = list(self.adversary.parameters())
        self.ours = list(self.sampler.parameters())
        self.averaged = list(self.average.parameters())
        self.steps = [
            torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999), fused=True)
            for parameters, lr in ((self.ours, 1e-3), (self.theirs, 4e-3))
        ]

    def step(self) -> float:
        with torch.no_grad():
            z = self.sampler(STEPS * self.num_particles)
            loc, root = self.moments(z)
            standard = torch.cat([self.whiten(z, loc, root), torch.randn_like(z)])
            standard = standard.view(2, STEPS, self.num_particles, -1)
        for i in range(STEPS):
            t_q, t_r = self.adversary(standard[:, i])
            self.descend(1, softplus(-t_q).mean() + softplus(t_r).mean(), self.theirs)
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged, self.theirs, 0.1)
        z = self.sampler(self.num_particles)
        loc, root = self.moments(z.detach())
        standard = self.whiten(z, loc, root)
        log_r = self.log_contrast(standard, root)
        loss = -(self.log_density(z) - log_r - self.average(standard)).mean()
        self.descend(0, loss, self.ours)
        return loss.item()

    def descend(self, player: int, loss: Tensor, parameters: list[Any]) -> None:
        self.steps[player].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        self.steps[player].step()

    @staticmethod
    def moments(z: Tensor) -> tuple[Tensor, Tensor]:
        loc = z.mean(0)
        cov = (z - loc).mT @ (z - loc) / (len(z) - 1)
        return loc, torch.linalg.cholesky(cov + torch.diag_embed(1e-5 * cov.diagonal()))

    @staticmethod
    def whiten(z: Tensor, loc: Tensor, root: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root.mT, z - loc, upper=True, left=False)

    @staticmethod
    def log_contrast(standard: Tensor, root: Tensor) -> Tensor:
        return normal(standard).sum(-1) - root.diagonal().log().sum()


def avb(problem: Problem, num_particles: int, width: int, **options: Any) -> Callable[[], Any]:
    """A step of `AVBSVI`, set up."""
    guide = ImplicitGuide(problem.model, sampler=lambda dim: GatedSampler(dim, width=width))
    options = {"contrast": "gaussian", "warm_start": 10} | options
    svi = AVBSVI(
        problem.model,
        guide,
        num_particles=num_particles,
        adversary_steps=STEPS,
        adversary=lambda dim: GatedAdversary(dim, width=width),
        seed=0,
        **options,
    ).setup(*problem.args)
    if "compile" in options and "; compiled" not in svi.log_joint.reason:
        raise RuntimeError(svi.log_joint.reason)
    return lambda: svi.step(*problem.args)


def iaf(problem: Problem, num_particles: int, width: int) -> Callable[[], Any]:
    """A step of Pyro's SVI with an inverse autoregressive flow of four transforms."""
    pyro.clear_param_store()
    guide = AutoIAFNormal(problem.model, hidden_dim=[max(width, problem.dim)] * 2, num_transforms=4)
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(problem.model, guide, pyro.optim.ClippedAdam({"lr": 2e-3}), loss=elbo)
    return lambda: svi.step(*problem.args)


METHODS: dict[str, Callable[[Problem, int, int], Callable[[], Any]]] = {
    "by hand": lambda *of: ByHand(*of).step,
    "eager": avb,
    "graph": lambda *of: avb(*of, compile="graph"),
    "inductor": lambda *of: avb(*of, compile="inductor"),
    "eager, mixture": lambda *of: avb(*of, contrast="mixture"),
    "Pyro's IAF": iaf,
}


def paired(steps: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each step; they take turns, for about ``seconds`` and at least five times."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(3):
        for step in steps.values():
            step()
    gc.collect()
    began, times = time.perf_counter(), []
    while time.perf_counter() - began < seconds or len(times) < 5:
        for step, times in zip(steps.values(), taken.values(), strict=True):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def methods(seconds: float, sizes: tuple[int, ...], methods: list[str]) -> list[Row]:
    """The same step in every way, on every problem and batch."""
    rows = []
    for name, make in PROBLEMS.items():
        for num_particles, width in [*((size, 64) for size in sizes), (512, 128)]:
            problem = make()
            steps = {m: METHODS[m](problem, num_particles, width) for m in methods}
            medians = paired(steps, seconds)
            rows.append({"problem": name, "particles": num_particles, "width": width} | medians)
            print(line(list(map(cell, rows[-1].values()))), flush=True)
    return rows


def growth(seconds: float, sizes: tuple[int, ...]) -> list[Row]:
    """Latent dimension by dimension: by hand, eager with a Gaussian and with the default contrast."""
    rows = []
    for dim in sizes:
        problem = hierarchy(dim)
        steps = {m: METHODS[m](problem, 512, 64) for m in ("by hand", "eager", "eager, mixture")}
        rows.append({"D": dim} | paired(steps, seconds))
        print(line(list(map(cell, rows[-1].values()))), flush=True)
    return rows


def data_rows(seconds: float, sizes: tuple[int, ...]) -> list[Row]:
    """Minibatches of 100 out of ever more rows, all sizes taking turns."""
    x = torch.randn(max(sizes), 10)
    y = x.sum(-1).sigmoid().bernoulli()
    found: dict[str, dict[str, float]] = {}
    for method in ("eager", "graph"):
        steps = {
            str(size): METHODS[method](Problem(minibatches, (x[:size], y[:size]), 10, lambda u: u.sum(-1)), 512, 64)
            for size in sizes
        }
        found[method] = paired(steps, 4 * seconds)
    return [{"rows": size} | {method: found[method][str(size)] for method in found} for size in sizes]


MEMORY: dict[str, Callable[[], Problem]] = {
    "Eight Schools": schools,
    "regression": regression,
    "hierarchy": hierarchy,
    "hierarchy, D = 1000": lambda: hierarchy(1000),
}


def peak() -> float:
    """The most memory that this process has held, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # here ru_maxrss begins with the parent's
        lines = status.read_text().splitlines()
        return next(int(entry.split()[1]) for entry in lines if entry.startswith("VmHWM")) / 1024
    scale = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def memory(cases: list[tuple[str, str, int]]) -> list[Row]:
    """Peak memory of set-up and three steps, each in a process of its own, beyond what the imports take."""
    rows = []
    for problem, method, num_particles in cases:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", problem, method, str(num_particles)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        megabytes = float(done.stdout.split()[-1])
        rows.append({"problem": problem, "particles": num_particles, "method": method, "MB": megabytes})
        print(line(list(map(cell, rows[-1].values()))), flush=True)
    return rows


def measure(problem: str, method: str, num_particles: int) -> None:
    """The other side of `memory`."""
    made, before = MEMORY[problem](), peak()
    step = METHODS[method](made, num_particles, 64)
    for _ in range(3):
        step()
    print(peak() - before)


def cell(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def columns(rows: list[Row], keys: list[str], against: str | None = None) -> list[str]:
    """Rows as a Markdown table, with ratios to the column ``against`` in brackets."""
    lines = [line(keys), "|" + "---|" * len(keys)]
    for row in rows:
        cells = [
            cell(row[key])
            + (
                f" ({row[key] / row[against]:.2f})"
                if against and key != against and isinstance(row[key], float)
                else ""
            )
            for key in keys
        ]
        lines.append(line(cells))
    return lines


def table(result: Row) -> str:
    """The result as Markdown."""
    names = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    rows = result["rows"]
    least, most = rows[0], rows[-1]
    text = [
        f"Measured on {result['date']} with Python {result['python']}, {names}; one thread of {result['machine']}.",
        "",
        "## A step, in milliseconds",
        "",
        f"`S` particles, {STEPS} steps of the adversary, Gaussian contrast where nothing else is said; in brackets the "
        "ratio to the same algorithm written by hand in PyTorch, paired within one run. Pyro's IAF guide takes one "
        "gradient step where the others take four.",
        "",
        *columns(result["methods"], list(result["methods"][0]), "by hand"),
        "",
        "## Growth with the latent dimension, in milliseconds",
        "",
        "The hierarchical model at `S` = 512.",
        "",
        *columns(result["growth"], list(result["growth"][0]), "by hand"),
        "",
        "## Growth with the data, in milliseconds",
        "",
        f"Minibatches of 100 rows at `S` = 512. From {least['rows']} to {most['rows']} rows a step takes "
        + ", ".join(f"{most[m] / least[m]:.2f} times as long ({m})" for m in least if m != "rows")
        + ".",
        "",
        *columns(rows, list(least)),
        "",
        "## Peak memory, in MB",
        "",
        "Resident, of set-up and three steps in a process of its own, beyond the peak of its imports. Inductor's is "
        "that of its compiler, in the same process.",
        "",
        *columns(result["memory"], list(result["memory"][0])),
    ]
    return "\n".join(text) + "\n"


def picture(result: Row, path: Path) -> None:
    """Step time against particles, dimension and data rows."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    first = next(iter(PROBLEMS))
    by_size = [r for r in result["methods"] if r["problem"] == first and r["width"] == 64]
    panels = [
        (by_size, "particles", f"{first}"),
        (result["growth"], "D", "hierarchical model, 512 particles"),
        (result["rows"], "rows", "minibatches of 100, 512 particles"),
    ]
    for ax, (rows, key, title) in zip(axes, panels, strict=True):
        for i, method in enumerate(METHODS):
            if method in rows[0]:
                x, y = [r[key] for r in rows], [r[method] for r in rows]
                ax.plot(x, y, "o-", color=f"C{i}", label=method)
        ax.set(xscale="log", yscale="log", xlabel=key, title=title)
    axes[-1].set_ylim(axes[0].get_ylim())
    axes[0].set_ylabel("milliseconds a step")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute, no compiler")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small: more threads cost more than they bring
    torch.manual_seed(0)
    if options.measure:
        measure(options.measure[0], options.measure[1], int(options.measure[2]))
        return
    ways = [m for m in METHODS if not (options.quick and m == "inductor")]
    seconds = 0.5 if options.quick else 6.0
    cases = [("Eight Schools", m, 512) for m in ways]
    if not options.quick:
        cases += [("Eight Schools", m, 4096) for m in ways]
        cases += [("regression", m, 4096) for m in ways]
        cases += [("hierarchy, D = 1000", m, 512) for m in ("by hand", "eager", "eager, mixture")]
    result = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("implicitvi", "torch", "pyro-ppl")},
        "methods": methods(seconds, (64, 512) if options.quick else (64, 512, 4096), ways),
        "growth": growth(seconds, (10, 100) if options.quick else (10, 100, 1000)),
        "rows": data_rows(seconds, tuple(10**k for k in ((3, 6) if options.quick else range(3, 7)))),
        "memory": memory(cases),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(result))
    picture(result, options.picture)
    print(table(result))


if __name__ == "__main__":
    main()
