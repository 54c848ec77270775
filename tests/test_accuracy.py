"""The accuracy suite runs every method, judges what it draws, and says what it found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import accuracy
from accuracy import EXACT, Results, behind, faults, row_of, table
from suite.measure import FIGURES, measure, of_method, of_truth
from suite.methods import METHODS
from suite.target import Target
from suite.targets import TARGETS

GOOD = {
    "c2st": 0.51,
    "mean_error": 0.02,
    "sd_low": 0.97,
    "sd_high": 1.02,
    "kl_qp": 0.01,
    "kl_pq": 0.02,
    "sliced_w2": 0.05,
    "mode_error": None,
}


@cache
def two_modes() -> Target:
    return replace(TARGETS["mixture_2_modes_2d"](), num_draws=1000, num_reference=4000)


# methods


@pytest.mark.uses_param_store
@pytest.mark.parametrize("method", [m for m in METHODS if not m.endswith("resample")])
def test_every_method_draws(method: str) -> None:
    """As many finite draws as were asked for, in the target's coordinates; the model has a plate and proper priors."""
    target = replace(TARGETS["eight_schools_paper"](), num_draws=60)  # as NUTS gives in a hurry
    x = target.compare(METHODS[method](target, seed=0, quick=True))
    assert x.shape == (60, 10) and x.dtype == torch.float64 and x.isfinite().all()


@pytest.mark.parametrize("method", [m for m in METHODS if m.endswith("resample")])
def test_weights_after_twenty_steps_are_refused(method: str) -> None:
    """As a row that says so; `tests/test_refine.py` has those that can be relied on."""
    target = replace(TARGETS["eight_schools_paper"](), num_draws=60)
    row = row_of(target, method, 0, quick=True)
    assert "most of the weight" in row["failed"] and "figures" not in row


# figures


def lost_mode(x: Tensor) -> Tensor:
    """All draws in the heavier of the two modes."""
    weak = two_modes().modes
    assert weak is not None
    return torch.where(weak(x)[:, None] == 0, -x, x)


SPOILT: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "nothing": (lambda x: x, set()),
    "a mode lost": (lost_mode, {"modes", "mean", "sd", "C2ST"}),
    "shifted by 0.3 sd": (lambda x: x + 0.3 * x.std(0), {"mean", "C2ST"}),
    "narrower by a fifth": (lambda x: x.mean(0) + 0.8 * (x - x.mean(0)), {"sd", "C2ST"}),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_is_spoilt_is_seen(fault: str) -> None:
    """The limits that exact draws miss when spoilt, and none when not; modes lost to a shift may come on top."""
    spoil, missed = SPOILT[fault]
    draws = TARGETS["mixture_2_modes_2d"]().draw(1000, torch.Generator().manual_seed(5))
    figures = measure(of_method(two_modes(), spoil(draws)))
    assert figures.keys() == FIGURES.keys()
    assert missed == set(faults([{"figures": figures}]))


def test_truth_is_judged_by_other_draws_of_it() -> None:
    draws = of_truth(two_modes())
    assert len(draws.found) == len(draws.near) == 1000
    assert not torch.isclose(draws.found[:, None, 0], draws.near[:, 0]).all(1).any()


def test_a_chain_that_stood_still_has_no_divergence() -> None:
    stuck = two_modes().reference[:10].repeat(100, 1)
    figures = measure(of_method(two_modes(), stuck))
    assert figures["kl_qp"] is None and figures["kl_pq"] is None
    assert figures["c2st"] is not None


# results


def row(target: str, method: str, seed: int = 0, **figures: Any) -> dict[str, Any]:
    return {"target": target, "method": method, "seed": seed, "seconds": 1.0, "figures": {**GOOD, **figures}}


def test_rows_are_kept_one_by_one(tmp_path: Path) -> None:
    """What was there stays, what is measured again is replaced, and the order is that of the lists."""
    path = tmp_path / "accuracy.json"
    Results(path).add(row("kidiq", "implicit"))
    Results(path).add(row("banana", "iaf"))
    Results(path).add(row("kidiq", "implicit", c2st=0.6))
    results = Results(path)
    assert [(r["target"], r["method"]) for r in results.rows] == [("banana", "iaf"), ("kidiq", "implicit")]
    assert results.rows[1]["figures"]["c2st"] == 0.6
    assert results.has("banana", "iaf", 0) and not results.has("banana", "iaf", 1)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == results.rows


@pytest.mark.parametrize(
    ("figures", "missed"),
    [
        ({}, []),
        ({"c2st": 0.56}, ["C2ST"]),
        ({"mean_error": 0.11}, ["mean"]),
        ({"sd_low": 0.89}, ["sd"]),
        ({"sd_high": 1.11}, ["sd"]),
        ({"mode_error": 0.11}, ["modes"]),
    ],
)
def test_limits(figures: dict[str, float], missed: list[str]) -> None:
    assert faults([row("banana", "implicit", **figures)]) == missed


def test_modes_are_judged_by_the_worst_seed_the_rest_by_the_median() -> None:
    seeds = [row("banana", "implicit", seed, mode_error=0.01) for seed in (0, 1)]
    worst = row("banana", "implicit", 2, mode_error=0.3, c2st=0.9)
    assert faults([*seeds, worst]) == ["modes"]
    assert faults([{"failed": "no density"}]) == ["no draws"]
    assert faults([*seeds, {"failed": "no density"}]) == ["no draws"]


def test_peers_are_the_best_of_each_figure() -> None:
    """Behind means by more than noise, of an estimate that is never better than zero; NUTS is not variational."""
    ours, iaf = [row("banana", "implicit")], [row("banana", "iaf", kl_qp=-0.1)]
    assert behind({"implicit": ours}, "implicit") is None
    assert behind({"implicit": ours, "nuts": [row("banana", "nuts", c2st=0.4)]}, "implicit") is None
    assert behind({"implicit": ours, "iaf": iaf}, "implicit") == []
    slow = [row("banana", "implicit", kl_pq=0.2)]
    assert behind({"implicit": slow, "iaf": iaf}, "implicit") == ["KL(p‖q)"]


def test_the_table_says_what_holds_and_what_was_not_to_be_had() -> None:
    rows = [
        row("banana", EXACT),
        row("banana", "implicit", c2st=0.7),
        {"target": "banana", "method": "nuts", "seed": 0, "failed": "ValueError: stuck"},
        row("kidiq", "implicit"),
    ]
    whole = {"rows": rows, "date": "2024-01-01", "python": "3.11", "versions": {"torch": "2"}}
    shown = table(whole)
    assert "| banana | implicit | 1 | 0.700 |" in shown
    assert "- implicit: 1 of 2; not on banana (C2ST)." in shown
    assert "- banana, nuts, seed 0: ValueError: stuck" in shown


def test_a_method_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setitem(accuracy.METHODS, "iaf", fails)
    made = accuracy.row_of(two_modes(), "iaf", 0, quick=True)
    assert made["failed"] == "ValueError: no such thing" and "figures" not in made
