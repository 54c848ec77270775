"""How good the defaults are, on posteriors whose draws are known: `make accuracy` runs this, for many hours.

One configuration of this package on every target, ``AVBSVI(model, ImplicitGuide(model), seed=seed)``, beside peers and,
by name, variants of itself. Each row is written to ``docs/results/accuracy.json`` as it is measured, the table and the
picture after each target; what is there is not measured again (``--again``), so that a run that was stopped goes on.

Targets of posteriordb need its data and reference draws in ``$IMPLICITVI_DATA/posteriors``; without them they are left
out, and said to be. Some of what can be asked::

    python tests/accuracy.py --only banana kidiq --methods implicit iaf --seeds 3
    python tests/accuracy.py --methods contrast=gaussian contrast=flow --output ablation.json
    python tests/accuracy.py --quick --output quick.json --picture quick.png
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from implicitvi.errors import ImplicitVIError
from suite.measure import measure, of_method, of_truth
from suite.methods import METHODS, OURS, PEERS
from suite.target import Missing, Target
from suite.targets import TARGETS

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "results" / "accuracy.json"
PICTURE = ROOT / "docs" / "images" / "accuracy.png"
PACKAGES = ("implicitvi", "torch", "pyro-ppl", "zuko", "scikit-learn")
EXACT = "exact draws"
Row = dict[str, Any]

HEADINGS = {
    "c2st": "C2ST",
    "mean_error": "mean error (sd)",
    "sd_low": "lowest sd ratio",
    "sd_high": "highest sd ratio",
    "kl_qp": "KL(q‖p)",
    "kl_pq": "KL(p‖q)",
    "sliced_w2": "sliced W2 (sd)",
    "mode_error": "mode error",
    "stein": "score error",
    "seconds": "seconds",
}
# What is accepted, by the median over seeds
C2ST, MEAN, LOW, HIGH, MODES = 0.55, 0.1, 0.9, 1.1, 0.1
NOISE = {"c2st": 0.01, "kl_qp": 0.03, "kl_pq": 0.03}  # two of their standard deviations for equal distributions


class Results:
    """Rows in a file, one for each target, method and seed, written whole after each."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def has(self, *key: Any) -> bool:
        """Whether the row of this target, method and seed has been measured, or has nothing to be measured."""
        return any(of(row) == key for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows = [each for each in self.rows if of(each) != of(row)] + [row]
        order = {name: i for i, name in enumerate([EXACT, *METHODS])}
        targets = list(TARGETS)
        self.rows.sort(key=lambda row: (targets.index(row["target"]), order[row["method"]], row["seed"]))
        write_whole(self.path, json.dumps(self.whole(), indent=1) + "\n")

    def whole(self) -> Row:
        return {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
            "rows": self.rows,
        }


def of(row: Row) -> tuple[Any, ...]:
    return row["target"], row["method"], row["seed"]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def at_hand(names: Sequence[str]) -> Iterator[Target]:
    """The targets of these names whose data are there; of the others it says that they are left out."""
    for name in names:
        try:
            yield TARGETS[name]()
        except Missing as missing:
            print(f"{name} left out: {missing}", flush=True)


def row_of(target: Target, method: str, seed: int, *, quick: bool) -> Row:
    """Fit, draw and measure; a method that cannot be had for this target says why."""
    today = datetime.date.today().isoformat()
    row: Row = {"target": target.name, "method": method, "seed": seed, "date": today}
    if method == EXACT:
        return {**row, "figures": measure(of_truth(target))}
    began = time.perf_counter()
    try:
        sites = METHODS[method](target, seed=seed, quick=quick)
    except (ImplicitVIError, RuntimeError, ValueError) as error:
        return {**row, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    seconds = time.perf_counter() - began
    found = target.compare(sites)
    finite = found.isfinite().all(1)
    if not finite.all():
        return {**row, "failed": f"{int((~finite).sum())} of {len(found)} draws are not finite"}
    return {**row, "seconds": seconds, "figures": measure(of_method(target, found))}


def groups(result: Row) -> dict[str, dict[str, list[Row]]]:
    """Rows by target and method."""
    grouped: dict[str, dict[str, list[Row]]] = {}
    for row in result["rows"]:
        grouped.setdefault(row["target"], {}).setdefault(row["method"], []).append(row)
    return grouped


def values(rows: Sequence[Row], figure: str) -> list[float]:
    """A figure of every row that has it, in order."""
    each = (row if figure == "seconds" else row.get("figures", {}) for row in rows)
    return sorted(value[figure] for value in each if value.get(figure) is not None)


def median(rows: Sequence[Row], figure: str) -> float | None:
    """Of a figure over the seeds, ``None`` where it was not measured."""
    some = values(rows, figure)
    return statistics.median(some) if some else None


def table(result: Row) -> str:
    """The result in Markdown: medians over the seeds, with the range, and what of it is accepted."""
    head = ["target", "method", "seeds", *HEADINGS.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    notes = []
    for target, methods in groups(result).items():
        for method, rows in methods.items():
            lines.append("| " + " | ".join([target, method, *cells(rows)]) + " |")
            notes += [f"- {target}, {method}, seed {row['seed']}: {row['failed']}" for row in rows if "failed" in row]
    if notes:
        lines += ["", "Not to be had:", "", *notes]
    lines += ["", *summary(result)]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    dates = sorted({row.get("date", result["date"]) for row in result["rows"]})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else result["date"]
    lines += ["", f"{when}, Python {result['python']}, {versions}, one thread."]
    return "\n".join(lines) + "\n"


def brief(result: Row) -> str:
    """C2ST and both divergences of ours, beside the best variational peer of each figure: for the README."""
    figures = ("c2st", "kl_qp", "kl_pq")
    head = ["posterior", *(f"{HEADINGS[f]} ours, best peer" for f in figures), "C2ST NUTS"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    (ours,) = OURS
    for target, methods in groups(result).items():
        if ours not in methods:
            continue
        shown = [target]
        for figure in figures:
            mine = median(methods[ours], figure)
            found = {
                name: value
                for name in PEERS
                if name != "nuts" and (value := median(methods.get(name, []), figure)) is not None
            }
            best = min(found, key=lambda name: found[name], default=None)
            theirs = "" if best is None else f", {found[best]:.3f} ({best})"
            shown.append(f"{mine:.3f}{theirs}")
        nuts = median(methods.get("nuts", []), "c2st")
        shown.append("" if nuts is None else f"{nuts:.3f}")
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def cells(rows: Sequence[Row]) -> list[str]:
    """Seeds that gave draws, then each figure."""
    shown = [str(sum("figures" in row for row in rows))]
    for figure in HEADINGS:
        some = values(rows, figure)
        digits = 0 if figure == "seconds" else 3
        spread = f" ({some[0]:.{digits}f}–{some[-1]:.{digits}f})" if len(some) > 1 else ""
        shown.append(f"{statistics.median(some):.{digits}f}{spread}" if some else "")
    return shown


def faults(rows: Sequence[Row]) -> list[str]:
    """Which of the limits the medians over seeds miss, in words; modes by the worst seed, which must all give draws."""
    if not all("figures" in row for row in rows):
        return ["no draws"]
    checks = {
        "C2ST": median(rows, "c2st") <= C2ST,
        "mean": median(rows, "mean_error") <= MEAN,
        "sd": LOW <= median(rows, "sd_low") and median(rows, "sd_high") <= HIGH,
        "modes": max(values(rows, "mode_error"), default=0.0) <= MODES,
    }
    return [name for name, holds in checks.items() if not holds]


def behind(methods: dict[str, list[Row]], ours: str) -> list[str] | None:
    """Figures by which the best variational peer is ahead of ours by more than noise; ``None`` without one."""
    peers = [methods[name] for name in PEERS if name != "nuts" and name in methods]
    lost = []
    compared = False
    for figure, noise in NOISE.items():
        theirs = [m for rows in peers if (m := median(rows, figure)) is not None]
        mine = median(methods[ours], figure)
        if theirs and mine is not None:
            compared = True
            # an estimate below zero is noise and no better than zero
            level = min(theirs) if figure == "c2st" else max(min(theirs), 0.0)
            level = max(level, 0.5) if figure == "c2st" else level
            if mine > level + noise:
                lost.append(HEADINGS[figure])
    return lost if compared else None


def summary(result: Row) -> list[str]:
    """On how many targets the defaults, and the variants beside them, are accepted, and where they are not."""
    lines = [
        f"Accepted: C2ST ≤ {C2ST}, mean error ≤ {MEAN} sd, sd ratios within {LOW}–{HIGH}, shares of modes within "
        f"{MODES} on every seed; the others by the median over seeds.",
        "",
    ]
    grouped = groups(result)
    for method in [EXACT, *METHODS]:
        measured = {t: faults(m[method]) for t, m in grouped.items() if method in m}
        if measured:
            good = sum(not missed for missed in measured.values())
            missed = ", ".join(f"{t} ({' '.join(f)})" for t, f in measured.items() if f)
            where = f"; not on {missed}" if missed else ""
            lines.append(f"- {method}: {good} of {len(measured)}{where}.")
    (ours,) = OURS
    lost = {t: behind(m, ours) for t, m in grouped.items() if ours in m}
    compared = {t: each for t, each in lost.items() if each is not None}
    if compared:
        good = sum(not each for each in compared.values())
        where = ", ".join(f"{t} ({', '.join(each)})" for t, each in compared.items() if each)
        lines += [
            "",
            f"Better than the best variational peer of each figure, or within noise of it: {good} of {len(compared)}"
            + (f"; not on {where}." if where else "."),
        ]
    return lines


def picture(result: Row, path: Path) -> None:
    """C2ST and both divergences of every method, target by target."""
    import matplotlib.pyplot as plt

    from implicitvi.plots import PALETTE

    grouped = groups(result)
    shown = [name for name in [EXACT, *OURS, *PEERS] if any(name in m for m in grouped.values())]
    fig, axes = plt.subplots(1, 3, figsize=(12, 1.2 + 0.32 * len(grouped)), sharey=True, layout="constrained")
    panels = {
        "c2st": "C2ST (0.5 is perfect)",
        "kl_qp": "KL(q‖p), nats; 0.001 or less at the edge",
        "kl_pq": "KL(p‖q), nats; 0.001 or less at the edge",
    }
    colours = dict(zip([*OURS, *PEERS], PALETTE, strict=False))
    for ax, (figure, label) in zip(axes, panels.items(), strict=True):
        for method in shown:
            points = [
                (value, place)
                for place, methods in enumerate(grouped.values())
                for value in values(methods.get(method, []), figure)
            ]
            if points:
                x, y = zip(*points, strict=True)
                style: dict[str, Any] = {"s": 22, "color": colours.get(method)}
                if method == EXACT:
                    style = {"marker": "|", "s": 90, "color": "0.6"}
                x = x if figure == "c2st" else [max(value, 1e-3) for value in x]
                ax.scatter(x, y, label=method, zorder=3 if method in OURS else 2, **style)
        if figure == "c2st":
            ax.axvline(C2ST, color="0.8", zorder=0)
        else:
            ax.set_xscale("log")
        ax.set_xlabel(label)
        ax.grid(axis="y", color="0.93", zorder=0)
    axes[0].set_yticks(range(len(grouped)), list(grouped))
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(shown))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> None:
    """Run what is asked for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TARGETS, metavar="TARGET", default=[*TARGETS])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD", default=[*OURS, *PEERS], help=", ".join(METHODS)
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that all runs")
    parser.add_argument("--again", action="store_true", help="measure anew what has a row")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    if options.quick and options.output == OUTPUT:
        parser.error("--quick measures nothing: give it an --output (and a --picture) of its own")
    torch.set_num_threads(1)  # the networks are small: more threads cost more than they bring
    results = Results(options.output)
    for target in at_hand(options.only):
        name = target.name
        if options.quick:
            target = replace(target, num_draws=500, num_reference=2000)
        wanted = [(EXACT, 0), *((m, s) for m in options.methods for s in range(options.seeds))]
        for method, seed in wanted:
            if results.has(name, method, seed) and not options.again:
                continue
            row = row_of(target, method, seed, quick=options.quick)
            results.add(row)
            short = {k: None if v is None else round(v, 3) for k, v in row.get("figures", {}).items()}
            print(name, method, seed, row.get("failed", short), flush=True)
        if any(row["target"] == name for row in results.rows):
            write_whole(options.output.with_suffix(".md"), table(results.whole()))
            short = options.output.with_name(options.output.stem + "-brief.md")
            write_whole(short, brief(results.whole()))
            picture(results.whole(), options.picture)


if __name__ == "__main__":
    main()
