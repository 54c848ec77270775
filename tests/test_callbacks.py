"""Callbacks watch a fit and change nothing; early stopping is held to its rule and its rate."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import models
from implicitvi import AVBSVI, Checkpoint, EarlyStop, ImplicitGuide, StopTraining, TensorBoard, Tracker
from implicitvi.errors import CheckpointError, OptionError, SetupError
from implicitvi.rng import RandomStream
from implicitvi.training import Progress, Schedule, Trainer
from implicitvi.training.checkpoint import STATE, read_state
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


def test_each_run_has_windows_of_its_own() -> None:
    """A run after the stop, and another fit with the same object, are judged by their own values."""
    stop = EarlyStop(lambda trainer: 1.0, every=1, window=2)
    svi = AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), **SMALL, callbacks=[stop])
    assert [svi.run(Y).num_steps for _ in range(2)] == [4, 6]  # the second run has two steps left
    assert svi.run(Y).num_steps == 8 and stop.steps == [1, 2, 3, 4, 5, 6, 7, 8]
    other = AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), **SMALL, callbacks=[stop])
    assert other.run(Y).num_steps == 4 and stop.steps == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:2 fits DISAGREE:UserWarning")  # after so few steps they do
def test_each_restart_has_callbacks_of_its_own(tmp_path: Path, writer: list[Any]) -> None:
    """Its own windows, records and folders, and the guide that it trains."""
    drawn: list[Any] = []
    stop = EarlyStop(lambda trainer: drawn.append(trainer.guide) or 1.0, every=1, window=2)  # type: ignore[func-returns-value]
    tracker = Tracker(lambda trainer: trainer.guide.sample(5)["mu"].mean(), every=1)
    keep, board = Checkpoint(tmp_path / "kept", every=1), TensorBoard(tmp_path / "board", every=1)
    guide = ImplicitGuide(models.normal_normal)
    callbacks = [tracker, keep, board, stop]
    fit = AVBSVI(models.normal_normal, guide, restarts=2, callbacks=callbacks, **SMALL).run(Y)
    assert [each.num_steps for each in fit.fits] == [4, 4]
    assert [id(each.guide) for each in fit.fits for _ in range(4)] == [id(each) for each in drawn]
    assert stop.steps == tracker.steps == [1, 2, 3, 4]  # those of the first fit
    again = AVBSVI.load(tmp_path / "kept", models.normal_normal, progress=False).setup(Y).fit
    assert [each.losses.tolist() for each in again.fits] == [each.losses.tolist() for each in fit.fits]
    assert (tmp_path / "board" / "restart-1").is_dir()


def test_a_callback_that_would_watch_the_wrong_guide_is_refused() -> None:
    guide = ImplicitGuide(models.normal_normal)
    mean = lambda trainer: float(guide.sample(5)["mu"].mean())  # noqa: E731
    for callback in (EarlyStop(mean), Tracker(mean)):
        with pytest.raises(
            OptionError, match="got 'guide', the guide of the first fit alone. With restarts, use trainer"
        ):
            AVBSVI(models.normal_normal, guide, restarts=2, callbacks=[callback])
        AVBSVI(models.normal_normal, guide, callbacks=[callback])


@pytest.mark.parametrize("kind", ["stop", "keep"])
def test_a_diagnostic_without_a_number_is_named(kind: str, tmp_path: Path) -> None:
    nothing: Any = lambda trainer: None  # noqa: E731
    callback = EarlyStop(nothing, every=1) if kind == "stop" else Checkpoint(tmp_path, every=1, best=nothing)
    trainer: Any = SimpleNamespace(step_count=1, save=lambda folder: None, players=[])
    with pytest.raises(OptionError, match="must be a number, got None. Return a float"):
        callback(trainer)


@pytest.mark.parametrize("stream", ["none", "closed", "closed in the middle"])
def test_a_fit_goes_on_without_a_stream_for_its_bar(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", None if stream == "none" else file)
    if stream == "closed":
        file.close()
    bar = Progress(3, {})
    trainer: Any = SimpleNamespace(step_count=1)
    bar(trainer)
    file.close()
    bar(trainer)
    bar(trainer)
    bar.close()


def test_folders_of_callbacks_stay_where_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: list[Any]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    keep, board = Checkpoint("runs", every=1), TensorBoard("board")
    monkeypatch.chdir(tmp_path / "elsewhere")
    Trainer([], schedule=Schedule(), stream=RandomStream(0)).run(1, [keep])
    assert (tmp_path / "runs" / STATE).exists() and board.writer.folder == str(tmp_path / "board")
    with pytest.raises(OptionError, match="folder '/proc/nowhere' must be a folder that can be written"):
        Checkpoint("/proc/nowhere")
    with pytest.raises(OptionError, match="folder '/proc/nowhere' must be a folder that can be written"):
        TensorBoard("/proc/nowhere")


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


def test_a_bar_stands_for_the_set_up_until_the_steps_begin() -> None:
    bar = Progress(0, {})
    assert bar.bar.desc.startswith("set-up") and not bar.bar.total
    bar.begin(40)
    assert not bar.bar.desc and bar.bar.total == 40 and bar.every == 2
    bar.close()
