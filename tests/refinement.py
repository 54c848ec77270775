"""Measure the effect of refinement on draws of bad fits: `make refinement` runs this and writes ``docs/results``.

On every target of the suite a fit is stopped far too early, and its draws before and after ``fit.resample()`` and
``fit.polish()`` are compared with as many exact draws by the squared kernel Stein discrepancy to the posterior, in
coordinates that whiten exact draws. Its standard error is that over parts of the draws.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accuracy import at_hand, write_whole
from implicitvi.diagnostics.stein import kernel_stein
from implicitvi.errors import ModelError
from implicitvi.metrics import mean_error, sd_ratio
from suite.measure import of_method
from suite.methods import REFINED, fitted
from suite.target import Target
from suite.targets import TARGETS

OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "refinement.json"
STEPS = (20, 100)  # of fits with errors to correct
DRAWS, PARTS = 4000, 8
UNREFINED, EXACT = "as drawn", "exact draws"
NO_BREAK, MINUS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"
MARKS = {"refused": "", "within noise": "", "lowered": f"{NO_BREAK}↓", "raised": f"{NO_BREAK}↑"}
Row = dict[str, Any]


def judged(target: Target, found: Tensor) -> Row:
    """Return the discrepancy of draws ``[S, D]`` in whitened coordinates, and the errors of their moments."""
    dtype = torch.get_default_dtype()
    reference = target.unconstrain(target.reference[-target.num_draws :]).to(dtype)
    u = target.unconstrain(of_method(target, found).found).to(dtype)
    parts = zip(u.chunk(PARTS), target.score(u)[1].chunk(PARTS), strict=True)
    each = [kernel_stein(*part, reference=reference, num_bootstrap=1).discrepancy for part in parts]
    low, high = sd_ratio(found, target.reference)
    return {
        "discrepancy": statistics.fmean(each),
        "error": statistics.stdev(each) / math.sqrt(PARTS),
        "mean_error": mean_error(found, target.reference),
        "sd_low": low,
        "sd_high": high,
    }


def measure(target: Target, steps: int, seed: int) -> list[Row]:
    """Return a row for each way to refine, for the draws as they are, and for exact ones."""
    fit = fitted(target, seed=seed, quick=False, num_steps=steps)

    def refined(how: str) -> Tensor:
        return target.compare(getattr(fit, how)(num_samples=DRAWS).draws)

    ways: dict[str, Callable[[], Tensor]] = {
        EXACT: lambda: target.reference[:DRAWS],
        UNREFINED: lambda: target.compare(fit.guide.sample(DRAWS)),
        **{how: partial(refined, how) for how in REFINED},
    }
    rows = []
    for how, draws in ways.items():
        row = {"target": target.name, "steps": steps, "seed": seed, "how": how}
        try:
            rows.append({**row, **judged(target, draws())})
        except ModelError as error:
            rows.append({**row, "refused": str(error).splitlines()[0]})
    return rows


def change(before: Row, after: Row) -> str:
    """Describe the change, if it exceeds two standard errors of the difference."""
    if "refused" in after:
        return "refused"
    difference = after["discrepancy"] - before["discrepancy"]
    if abs(difference) <= 2 * math.hypot(before["error"], after["error"]):
        return "within noise"
    return "lowered" if difference < 0 else "raised"


def count(how: str, fits: list[dict[str, Row]]) -> str:
    """Count the fits that a way to refine lowered, raised or refused, in words."""
    changes = [change(found[UNREFINED], found[how]) for found in fits]
    visible = [
        verdict
        for verdict, found in zip(changes, fits, strict=True)
        if verdict != "refused" and found[UNREFINED]["discrepancy"] > 2 * found[UNREFINED]["error"]
    ]
    return (
        f"- {how}: of {len(fits)} fits refused {changes.count('refused')}, lowered {changes.count('lowered')}, raised "
        f"{changes.count('raised')}; of the {len(visible)} others that showed a discrepancy of more than two standard "
        f"errors, lowered {visible.count('lowered')}."
    )


def table(result: Row) -> str:
    """Return the result in Markdown: how often each way lowered the discrepancy, then a line for each fit."""
    fits: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in result["rows"]:
        fits.setdefault((row["target"], row["steps"], row["seed"]), {})[row["how"]] = row
    ways = (EXACT, UNREFINED, *REFINED)
    head = ["target", "steps", *ways, f"mean error: {', '.join(ways[1:])}"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        "# What refinement does to draws that need it",
        "",
        "`make refinement` measures this: `tests/refinement.py`. Squared kernel Stein discrepancy with its standard "
        f"error, and the worst error of a mean in posterior standard deviations, of {DRAWS} draws of fits that were "
        "stopped after so few steps. ↓ lowered, ↑ raised: by more than two standard errors of the difference; "
        "– refused.",
        "",
        *(count(how, list(fits.values())) for how in REFINED),
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for (target, steps, _), found in fits.items():
        shown = [target, str(steps)]
        for how in ways:
            mark = MARKS[change(found[UNREFINED], found[how])] if how in REFINED else ""
            shown.append(number(found[how], "discrepancy", "error") + mark)
        shown.append(", ".join(number(found[how], "mean_error") for how in ways[1:]))
        lines.append("| " + " | ".join(shown) + " |")
    lines += ["", f"{result['date']}, Python {result['python']}, {versions}, one thread."]
    return "\n".join(lines) + "\n"


def number(row: Row, figure: str, error: str | None = None) -> str:
    """Format a figure, with its standard error if it has one, on one line; a dash if there are no draws."""
    if figure not in row:
        return "–"
    shown = f"{row[figure]:.3f}" if error is None else f"{row[figure]:.4f} ± {row[error]:.4f}"
    return shown.replace(" ", NO_BREAK).replace("-", MINUS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    result: Row = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("implicitvi", "torch", "pyro-ppl")},
        "rows": [],
    }
    for target in at_hand(options.only):
        for steps in options.steps:
            found = measure(target, steps, options.seed)
            for row in found:
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            result["rows"] += found
            write_whole(options.output, json.dumps(result, indent=1) + "\n")
            write_whole(options.output.with_suffix(".md"), table(result))


if __name__ == "__main__":
    main()
