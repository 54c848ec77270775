"""Measure how often `diagnose` flags failures and exact draws: `make diagnose-rates` writes ``docs/results``.

The cases are every planted failure of `planted.py` over several seeds, exact draws dressed as fits, and fits by the
defaults (with fewer steps: the targets are small). The results are the share of reports that are not ok, and which
checks failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from implicitvi import diagnose
from implicitvi.rng import RandomStream
from planted import PLANTED, TARGETS, exact, planted, short_fit

OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "diagnose.json"
FIT_STEPS = 600
FIRST_SEED = 100  # the limits were chosen at smaller ones


def cases(planted_seeds: int, exact_seeds: int, fit_seeds: int) -> list[tuple[str, str, int]]:
    """Return kind, name and seed of every case."""
    found = [("planted", name, seed) for name in PLANTED for seed in range(planted_seeds)]
    found += [("exact", name, seed) for name in TARGETS for seed in range(exact_seeds)]
    found += [("fit", name, seed) for name in TARGETS for seed in range(fit_seeds)]
    return [(kind, name, FIRST_SEED + seed) for kind, name, seed in found]


def source_of(kind: str, name: str, seed: int) -> tuple[Any, Callable[[], None]]:
    if kind == "planted":
        return planted(name, seed)
    model = TARGETS[name].model
    with RandomStream(seed):
        return (exact(name) if kind == "exact" else short_fit(model, num_steps=FIT_STEPS)), model


def measure(kind: str, name: str, seed: int) -> dict[str, Any]:
    source, model = source_of(kind, name, seed)
    began = time.perf_counter()
    report = diagnose(source, model, seed=seed)
    seconds = time.perf_counter() - began
    values = {check.name: check.value for check in report}
    failed = [check.name for check in report.failed]
    return {
        "kind": kind,
        "name": name,
        "seed": seed,
        "ok": report.ok,
        "failed": failed,
        "values": values,
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# How often a diagnosis flags",
        "",
        "`make diagnose-rates` measures this: `tests/diagnose_rates.py` with the cases of `tests/planted.py`. Fits are "
        f"the defaults with {FIT_STEPS} steps. Beside each check stands the number of reports in which it failed.",
        "",
        "| | case | flagged | checks that failed | seconds |",
        "|---|---|---|---|---|",
    ]
    for kind, name in dict.fromkeys((row["kind"], row["name"]) for row in rows):
        mine = [row for row in rows if (row["kind"], row["name"]) == (kind, name)]
        counts = Counter(check for row in mine for check in row["failed"])
        flagged = sum(not row["ok"] for row in mine)
        seconds = sum(row["seconds"] for row in mine) / len(mine)
        checks = ", ".join(f"{check} {count}" for check, count in counts.most_common())
        lines.append(f"| {kind} | {name} | {flagged} of {len(mine)} | {checks} | {seconds:.0f} |")
    for kind in ("planted", "exact", "fit"):
        mine = [row for row in rows if row["kind"] == kind]
        flagged = sum(not row["ok"] for row in mine)
        lines.append(f"| {kind} | all | {flagged} of {len(mine)} | | |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--planted", type=int, default=5, help="seeds of each planted failure")
    parser.add_argument("--exact", type=int, default=4, help="seeds of each target, exact draws")
    parser.add_argument("--fits", type=int, default=4, help="seeds of each target, default fits")
    parser.add_argument("--again", action="store_true", help="measure again what has a row")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    kept = options.output.exists() and not options.again
    rows = json.loads(options.output.read_text())["rows"] if kept else []
    done = {(r["kind"], r["name"], r["seed"]) for r in rows}
    for case in cases(options.planted, options.exact, options.fits):
        if case in done:
            continue
        rows.append(measure(*case))
        print(f"{' '.join(map(str, case))}: {', '.join(rows[-1]['failed']) or 'ok'}", flush=True)
        about = {
            "torch": version("torch"),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "fit steps": FIT_STEPS,
        }
        options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
