"""Callbacks watch a fit and change nothing; early stopping is held to its rule and its rate."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import models
from implicitvi import AVBSVI, Checkpoint, EarlyStop, ImplicitGuide, StopTraining, TensorBoard, Tracker
from implicitvi.errors import CheckpointError, SetupError
from implicitvi.rng import RandomStream
from implicitvi.training import Schedule, Trainer
from implicitvi.training.checkpoint import read_state
from test_vae_fit import data, fit, same, vae

Y = torch.tensor([0.5, -0.3, 1.0])
SMALL: dict[str, Any] = {"num_steps": 6, "num_particles": 16, "warm_start": 5, "seed": 0, "progress": False}


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """What TensorBoard is told, which need not be installed."""
    told: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str):
            self.folder = folder

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    return told


def test_watching_changes_nothing(tmp_path: Path, writer: list[Any]) -> None:
    """All callbacks at once, their functions drawing from the guide: the same numbers as without, in the fit and in
    the process's own generator."""
    plain = AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), **SMALL).run(Y)
    guide = ImplicitGuide(models.normal_normal)

    def mean(trainer: Trainer) -> torch.Tensor:
        return guide.sample(50)["mu"].mean()

    tracker = Tracker(mean, every=2)
    callbacks = [
        tracker,
        EarlyStop(lambda trainer: float(mean(trainer)), every=1, window=5),
        Checkpoint(tmp_path, every=2, best=lambda trainer: float(mean(trainer))),
        TensorBoard(tmp_path, every=3),
    ]
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    watched = AVBSVI(models.normal_normal, guide, **SMALL, callbacks=callbacks).run(Y)
    assert torch.equal(torch.rand(2), expected)
    assert np.array_equal(plain.losses, watched.losses)
    assert tracker.steps == [2, 4, 6] and len({float(v) for v in tracker.values}) == 3
    with RandomStream(6):
        assert torch.equal(tracker.values[-1], guide.sample(50)["mu"].mean())


def test_a_tracked_tensor_is_a_copy() -> None:
    guide = ImplicitGuide(models.normal_normal)
    tracker = Tracker(lambda trainer: next(iter(guide.sampler.parameters())), every=1)
    AVBSVI(models.normal_normal, guide, **SMALL, callbacks=[tracker]).run(Y)
    assert not torch.equal(tracker.values[0], tracker.values[-1])
    assert not tracker.values[0].requires_grad


def test_tensorboard_is_told_the_means_since_the_last_look(
    tmp_path: Path, writer: list[tuple[str, float, int]]
) -> None:
    board = TensorBoard(tmp_path, every=3)
    svi = AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), **SMALL, callbacks=[board])
    losses = svi.run(Y).losses
    board.close()
    told = {step: value for name, value, step in writer if name == "sampler"}
    assert told == pytest.approx({3: losses[:3].mean(), 6: losses[3:].mean()})
    assert {name for name, _, _ in writer} == set(svi.history.names())


def test_tensorboard_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SetupError, match=r"not installed.*pip install 'implicitvi\[tensorboard\]'"):
        TensorBoard(tmp_path)


def stopped_at(values: list[float], **options: Any) -> int | None:
    """The step at which a stop with these values of its diagnostic comes, ``None`` for never."""
    watcher = EarlyStop(lambda trainer: values[trainer.step_count - 1], every=1, **options)
    for step in range(1, len(values) + 1):
        try:
            watcher(SimpleNamespace(step_count=step))  # type: ignore[arg-type]
        except StopTraining:
            return step
    return None


def test_the_rule_of_early_stopping() -> None:
    """By hand: before (3, 1), recent (1, 2) gain 0.5 with standard error sqrt((2 + 0.5) / 2) = 1.118."""
    assert stopped_at([3.0, 1.0, 1.0, 2.0], window=2, num_se=0.45) == 4
    assert stopped_at([3.0, 1.0, 1.0, 2.0], window=2, num_se=0.44) is None
    assert stopped_at([3.0, 1.0, 1.0, 2.0], window=2) is None
    assert stopped_at([1.0, 1.0, 1.0, 1.1], window=2) == 4
    assert stopped_at([5.0] * 9, window=3) == 6  # nothing changes: after two windows
    assert stopped_at([9.0 - i for i in range(9)], window=3) is None
    assert stopped_at([5.0] * 9, window=3, start=3) == 8
    assert stopped_at([float("nan")] * 4 + [5.0] * 6, window=3) == 10


def test_how_often_noise_is_taken_for_progress_and_progress_for_noise() -> None:
    """A diagnostic that falls by 5 over 100 looks and then stays, with noise of sd 0.1. With windows of 10 and one
    standard error none stops before the floor (measured over 200 seeds: 0 %, and 100 % within 30 looks of it); a rule
    that compares windows of 2 stops all of them in the first half of the descent."""

    def stops(seed: int, window: int) -> int:
        noise = 0.1 * np.random.default_rng(seed).standard_normal(500)
        trend = np.maximum(5.0 - 0.05 * np.arange(500), 0.0)
        return stopped_at(list(trend + noise), window=window, num_se=1.0) or 500

    found = np.array([stops(seed, 10) for seed in range(40)])
    assert ((100 < found) & (found < 130)).all()
    assert np.mean([stops(seed, 2) < 50 for seed in range(20)]) > 0.9


def test_early_stopping_ends_a_fit() -> None:
    stop = EarlyStop(lambda trainer: 1.0, every=1, window=2)
    svi = AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), **SMALL, callbacks=[stop])
    fit = svi.run(Y)
    assert fit.num_steps == 4 and fit.stop_reason.startswith("the diagnostic no longer falls: 1")


def test_callbacks_watch_a_latent_variable_model(tmp_path: Path) -> None:
    """The same objects; the best weights are read with load_state_dict, and no fit goes on from amid an epoch."""
    plain, model = vae(), vae()
    whole = fit(plain, data())
    tracker = Tracker(lambda trainer: trainer.history.last("model"), every=2)
    scores = {2: 3.0, 4: 1.0, 6: 2.0}
    keep = Checkpoint(tmp_path, every=2, best=lambda trainer: scores.get(trainer.step_count, 9.0))
    watched = fit(model, data(), callbacks=[tracker, keep])
    assert same(plain, model)
    assert tracker.values == [whole.history["model"][step - 1] for step in tracker.steps]
    config, state = read_state(tmp_path / "best")
    notes = config["notes"]
    assert (notes["score"], notes["step"]) == (1.0, 4)
    other = vae(seed=5)
    other.load_state_dict(state["model"])
    assert not same(other, model) and watched.stop_reason == "finished"
    with pytest.raises(CheckpointError, match="in the middle of an epoch"):
        fit(vae(), data(), checkpoint=tmp_path)


def test_a_trainer_by_itself_saves_its_state(tmp_path: Path) -> None:
    trainer = Trainer([], schedule=Schedule(), stream=RandomStream(0))
    trainer.save(tmp_path, why="to see")
    config, state = read_state(tmp_path)
    assert config["notes"] == {"why": "to see"} and state["step"] == 0
