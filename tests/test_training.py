"""The trainer: players in order, schedules, guard, state, random numbers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from implicitvi import StopTraining
from implicitvi.errors import CheckpointError, NonFiniteError, OptionError
from implicitvi.rng import RandomStream, derived_seed
from implicitvi.training import History, Player, Schedule, Stage, Trainer
from implicitvi.training.clipping import Clip
from implicitvi.training.player import Metrics


class Weight(nn.Module):
    def __init__(self, value: float = 1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value))


def player(loss: Callable[[Weight], Tensor | None], name: str = "one", turns: int = 1, value: float = 1.0) -> Player:
    module = Weight(value)

    def losses(stage: Stage) -> Iterator[tuple[Tensor | None, Metrics]]:
        for _ in range(turns):
            yield loss(module), {}

    return Player(name, module, losses, lambda stage: stage.lr)


def trainer(*players: Player, max_skips: int = 3, num_steps: int = 100, clip_norm: float | None = None) -> Trainer:
    return Trainer(
        players,
        schedule=Schedule(num_steps=num_steps, lr=0.1, tempering=None),
        stream=RandomStream(0),
        max_skips=max_skips,
        clip_norm=clip_norm,
    )


def noisy_square(module: Weight) -> Tensor:
    return (module.w + 0.1 * torch.randn(())).square()


def test_players_step_in_order_and_as_often_as_they_want() -> None:
    order: list[str] = []

    def watch(name: str) -> Callable[[Weight], Tensor]:
        def loss(module: Weight) -> Tensor:
            order.append(name)
            return noisy_square(module)

        return loss

    trainer(player(watch("a"), "a", turns=2), player(watch("b"), "b")).run(2)
    assert order == ["a", "a", "b", "a", "a", "b"]


def test_a_minimum_is_found() -> None:
    made = trainer(player(noisy_square))
    assert made.run(100) == "finished"
    assert abs(made.players[0].module.w.item()) < 0.2  # type: ignore[union-attr, operator]
    assert made.history["one"].shape == (100,)


def test_stop_and_resume_is_never_stopped() -> None:
    whole = trainer(player(noisy_square))
    whole.run(20)
    first = trainer(player(noisy_square))
    first.run(10)
    second = trainer(player(noisy_square, value=-3.0))
    second.load_state_dict(first.state_dict())
    second.run(10)
    assert np.array_equal(whole.history["one"], second.history["one"])
    assert whole.step_count == second.step_count == 20


def test_watching_changes_nothing() -> None:
    seen: list[int] = []
    quiet, watched = trainer(player(noisy_square)), trainer(player(noisy_square))
    quiet.run(5)
    watched.run(5, [lambda t: seen.append(t.step_count)])
    assert seen == [1, 2, 3, 4, 5]
    assert np.array_equal(quiet.history["one"], watched.history["one"])


def test_a_callback_may_stop_and_an_interrupt_keeps_the_state() -> None:
    def stop(t: Trainer) -> None:
        if t.step_count == 3:
            raise StopTraining("good enough")

    def interrupt(t: Trainer) -> None:
        raise KeyboardInterrupt

    made = trainer(player(noisy_square))
    assert made.run(10, [stop]) == "good enough"
    assert made.run(10, [interrupt]) == "interrupted"
    assert made.step_count == 4


def interrupted_at(call: int, real: bool) -> tuple[Trainer, str]:
    """A run of ten steps of two players that is interrupted in a turn of the sixth, and why it stopped."""
    calls = iter(range(1, 100))

    def loss(module: Weight) -> Tensor:
        if next(calls) == call:
            if real:
                signal.raise_signal(signal.SIGINT)
            else:
                raise KeyboardInterrupt
        return noisy_square(module)

    made = trainer(player(loss, "a", turns=2), player(loss, "b"), num_steps=10)
    return made, made.run(10)


@pytest.mark.parametrize("real", [True, False])
def test_an_interrupt_between_two_turns_keeps_whole_steps(real: bool) -> None:
    """Ctrl-C waits for the end of the step; an interrupt that is raised inside undoes it. Either way the fit that goes
    on is the one that was never interrupted."""
    never, _ = interrupted_at(0, real)
    for call in (16, 17, 18):
        made, reason = interrupted_at(call, real)
        assert (reason, made.step_count) == ("interrupted", 6 if real else 5)
        made.run(10 - made.step_count)
        assert str(made.state_dict()) == str(never.state_dict())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_of_a_single_step_comes_after_it() -> None:
    made = trainer(player(lambda m: (signal.raise_signal(signal.SIGINT), noisy_square(m))[1]))
    with pytest.raises(KeyboardInterrupt):
        made.step()
    assert made.step_count == 1


def test_a_second_interrupt_does_not_wait() -> None:
    def twice(module: Weight) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    made = trainer(player(twice))
    assert made.run(3) == "interrupted" and made.step_count == 0


def test_another_handler_of_interrupts_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        made = trainer(player(lambda m: (signal.raise_signal(signal.SIGINT), noisy_square(m))[1]))
        assert made.run(2) == "finished" and len(seen) == 2
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("cause", ["factorisation", "argument"])
def test_a_step_that_numbers_break_is_undone_and_named(cause: str) -> None:
    """A factorisation that fails, or an error of any kind beside weights that are not finite."""
    calls = iter(range(100))

    def loss(module: Weight) -> Tensor:
        if next(calls) == 5:
            if cause == "factorisation":
                torch.linalg.cholesky(-torch.eye(2))
            module.w.data.fill_(torch.nan)
            raise ValueError("no such scale")
        return noisy_square(module)

    made = trainer(player(loss, "sampler"), num_steps=50)  # remembers every step
    with pytest.raises(
        NonFiniteError, match=r"turn of the sampler failed at step 5: .* The state of step 5 has"
    ) as got:
        made.run(10)
    assert (got.value.player, got.value.step, made.step_count) == ("sampler", 5, 5)
    assert made.players[0].module.w.isfinite()  # type: ignore[union-attr, operator]
    assert made.run(3) == "finished"


def test_another_error_in_a_step_undoes_it_and_is_left_as_it_is() -> None:
    calls = iter(range(100))

    def loss(module: Weight) -> Tensor:
        assert next(calls) != 5, "the model's own"
        return noisy_square(module)

    made, never = trainer(player(loss, "a", turns=2), num_steps=10), trainer(player(noisy_square, "a", turns=2))
    with pytest.raises(AssertionError, match="the model's own"):
        made.run(4)
    made.run(2)
    never.run(4)
    assert made.history["a"].tolist() == never.history["a"].tolist()


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "empty": (dict.clear, "got no 'step'"),
    "no optimisers": (lambda state: state.pop("optimisers"), "got no 'optimisers'"),
    "of another player": (lambda state: state["players"].update(one={"modules": {}}), "Missing key"),
    "a word for a step": (lambda state: state.update(step="x"), "step 'x' with a history of 4 steps"),
    "before the first step": (lambda state: state.update(step=-5), "step -5 with a history of 4 steps"),
    "beyond the last step": (lambda state: state.update(step=10**18), "step 1000000000000000000 with"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_cannot_be_is_refused_and_nothing_has_changed(case: str) -> None:
    change, words = STATES[case]
    made = trainer(player(noisy_square))
    made.run(4)
    before, state = str(made.state_dict()), made.state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=rf"The state must be one of this fit, with players one, .*{words}"):
        made.load_state_dict(state)
    assert str(made.state_dict()) == before


def test_a_non_finite_turn_is_skipped_and_counted() -> None:
    calls = iter(range(100))

    def loss(module: Weight) -> Tensor | None:
        call = next(calls)
        return None if call == 1 else noisy_square(module) * (torch.nan if call == 2 else 1.0)

    made = trainer(player(loss))
    made.run(5)
    assert made.skipped == 2
    assert np.isnan(made.history["one"]).tolist() == [False, True, True, False, False]
    assert made.players[0].module.w.isfinite()  # type: ignore[union-attr, operator]


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    made = trainer(player(lambda m: (m.w * 0).sqrt() + 1))  # finite, its gradient 0 · ∞
    made.step()
    assert made.skipped == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_turn_changes_not_one_bit(dtype: torch.dtype) -> None:
    """Neither the parameters nor Adam's moments and step count move, whether value or gradient is at fault."""
    faults = {3: lambda w: w * torch.nan, 5: lambda w: (w * 0).sqrt() + 1, 6: lambda w: w / 0}
    calls = iter(range(100))

    def loss(module: Weight) -> Tensor:
        fault = faults.get(next(calls))
        return noisy_square(module) if fault is None else fault(module.w)

    one = player(loss)
    one.module.to(dtype)
    made = trainer(one, max_skips=100)
    for step in range(8):
        before = made.state_dict()
        made.step()
        after = made.state_dict()
        same = [
            torch.equal(before["players"]["one"]["modules"]["module.w"], one.module.w),  # type: ignore[arg-type]
            str(before["optimisers"]) == str(after["optimisers"]),
        ]
        assert same == [step in faults] * 2, step
    assert made.skipped == after["skipped"] == 3


def test_the_count_of_an_accelerator_is_looked_at_now_and_then() -> None:
    """The error comes late, and the parameters have not moved meanwhile."""
    made = trainer(player(lambda m: m.w * torch.nan), max_skips=3)
    made._look_every = 10
    with pytest.raises(NonFiniteError, match="11 times in a row, up to step 10"):
        made.run(20)
    assert made.players[0].module.w == 1.0


def test_too_many_non_finite_turns_raise_and_restore() -> None:
    good = [True]

    def loss(module: Weight) -> Tensor:
        return noisy_square(module) * (1.0 if good[0] else torch.nan)

    made = trainer(player(loss, "sampler"), num_steps=50)  # remembers every step
    made.run(5)
    before = made.state_dict()
    good[0] = False
    with pytest.raises(NonFiniteError, match="the sampler was not finite 3 times in a row, up to step 7") as caught:
        made.run(10)
    assert (caught.value.player, caught.value.step) == ("sampler", 7)
    assert made.step_count == 5
    assert torch.equal(
        made.state_dict()["players"]["sampler"]["modules"]["module.w"],
        before["players"]["sampler"]["modules"]["module.w"],
    )
    good[0] = True
    made.run(1)
    assert made.step_count == 6


def test_gradients_are_clipped_by_their_global_norm() -> None:
    """Adam is blind to the size of one gradient, not to a large one among small ones."""
    sizes = []

    class Spy(torch.optim.Adam):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            sizes.append(self.param_groups[0]["params"][0].grad.abs().item())

    made = trainer(player(lambda m: 1e6 * m.w), clip_norm=10.0)
    made._optimisers["one"] = Spy(made.players[0].module.parameters())
    made.step()
    assert sizes == [pytest.approx(10.0)]


def test_gradients_of_another_memory_layout_are_taken_as_they_are() -> None:
    """A fused Adam on the CPU pairs entries by where they lie, so a transposed gradient moves the wrong weights."""

    class Matrix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 3))

    class Transposed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            return w.sum()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * torch.tensor([[1.0, -1.0], [0.0, 1.0], [0.0, -1.0]]).T

    module = Matrix()
    losses = lambda stage: iter([(Transposed.apply(module.w), {})])  # noqa: E731
    trainer(Player("one", module, losses, lambda stage: stage.lr)).run(1)
    assert torch.equal(module.w.detach().sign(), -torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, -1.0]]))


def test_an_unusual_gradient_is_cut_to_a_multiple_of_the_usual_one() -> None:
    """A gradient 10,000 times the usual one moves a weight no further than four usual ones would have."""
    slopes = iter([1.0] * 50 + [1e4] + [1.0] * 49)
    moved = unusual(lambda: next(slopes), None)
    calm = iter([1.0] * 50 + [4.0] + [1.0] * 49)
    assert moved == pytest.approx(unusual(lambda: next(calm), 10.0), rel=1e-5)
    slopes = iter([1.0] * 50 + [1e4] + [1.0] * 49)
    assert abs(unusual(lambda: next(slopes), 1e9) - moved) > 0.2  # it leaps, then Adam stands still


def test_what_is_usual_has_no_units_and_can_grow() -> None:
    small, large = Clip(None), Clip(None)
    norms = torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.1
    cut = [small.shrink(norm) for norm in norms]
    assert cut == [large.shrink(1024 * norm) for norm in norms]
    for _ in range(200):  # a new level is usual in the end
        last = small.shrink(torch.tensor(50.0))
    assert last == 1


def test_norms_that_say_nothing_are_not_remembered() -> None:
    clip = Clip(None)
    for norm in (0.0, 2.0, torch.nan, torch.inf):
        clip.shrink(torch.tensor(norm))
    assert clip.usual is not None and clip.usual.isfinite() and clip.usual > 0
    again = Clip(None)
    again.load_state_dict(clip.state_dict(), torch.zeros(()))
    assert again.shrink(torch.tensor(9.0)) == clip.shrink(torch.tensor(9.0)) < 1


def unusual(slope: Callable[[], float], clip_norm: float | None) -> float:
    """How far a weight moves down slopes of its loss."""
    made = Trainer(
        [player(lambda module: slope() * module.w)],
        schedule=Schedule(num_steps=100, lr=0.01, tempering=None),
        stream=RandomStream(0),
        clip_norm=clip_norm,
    )
    made.run(100)
    return 1.0 - made.players[0].module.w.item()  # type: ignore[union-attr, operator]


def test_a_stream_is_private_and_reproducible() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with RandomStream(0):
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    a = RandomStream()
    torch.manual_seed(5)
    b = RandomStream()
    with a:
        first = torch.rand(2)
    with b:
        assert torch.equal(torch.rand(2), first)


def test_a_block_that_fails_draws_nothing() -> None:
    stream = RandomStream(0)
    with pytest.raises(KeyboardInterrupt), stream:
        torch.rand(3)
        raise KeyboardInterrupt
    with stream, RandomStream(0):
        expected = torch.rand(2)
    with stream:
        assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_any_kind_are_seeds(seed: Any) -> None:
    with RandomStream(seed):
        found = torch.rand(2)
    with RandomStream(3):
        assert torch.equal(torch.rand(2), found)
    assert derived_seed(seed, 1) == derived_seed(3, 1)


def test_a_negative_seed_has_seeds_of_its_own() -> None:
    assert derived_seed(-1, 1) == derived_seed(2**64 - 1, 1) != derived_seed(1, 1)


def test_schedule_follows_its_words() -> None:
    schedule = Schedule(
        num_steps=100,
        num_particles=(10, 40),
        adversary_steps=(1, 3),
        lr=(1e-2, 1e-4),
        adversary_lr=1e-3,
        tempering=0.01,
        tempered=0.5,
        cool=0.4,
    )
    start, middle, late, end = (schedule.at(step) for step in (0, 25, 80, 100))
    assert (start.num_particles, start.adversary_steps, start.lr) == (10, 1, 1e-2)
    assert (start.beta, middle.beta, late.beta) == pytest.approx((0.01, 0.1, 1.0))
    assert (late.num_particles, late.adversary_steps) == (20, 2)
    assert (end.num_particles, end.adversary_steps) == (40, 3)
    assert late.lr == pytest.approx(1e-3) and end.lr == pytest.approx(1e-4)
    assert {stage.adversary_lr for stage in (start, middle, late, end)} == {1e-3}
    assert schedule.at(10_000) == end
    constant = Schedule(num_particles=5, adversary_steps=2, lr=0.1, adversary_lr=0.2, tempering=None)
    assert constant.at(0) == constant.at(constant.num_steps)
    rising = replace(schedule, warm_up=0.1)
    assert [rising.at(step).lr for step in (0, 4, 9, 30)] == pytest.approx([1e-3, 5e-3, 1e-2, 1e-2])
    assert rising.at(4).adversary_lr == pytest.approx(5e-4)
    assert rising.at(80) == late


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_steps", 0),
        ("num_particles", 0),
        ("num_particles", (10, 0)),
        ("num_particles", (1, 2, 3)),
        ("num_particles", True),
        ("adversary_steps", -1),
        ("lr", 0.0),
        ("adversary_lr", (1e-3, -1.0)),
        ("tempering", 2.0),
        ("cool", -0.1),
        ("warm_up", 1.5),
    ],
)
def test_schedules_that_cannot_be_are_refused(option: str, value: object) -> None:
    with pytest.raises(OptionError, match=option):
        Schedule(**{option: value})  # type: ignore[arg-type]


def test_history_keeps_tensors_until_it_is_read() -> None:
    """A metric may change after it was appended; floats and tensors of two dtypes mix; the state is a tensor each."""
    history, moving = History(), torch.tensor(1.0)
    history.append(loss=moving)
    moving += 1
    history.append(loss=torch.tensor(2.5, dtype=torch.float64))
    history.append(loss=3)
    assert history.last("loss", 2) == 2.75
    history.append(loss=moving, gain=moving)
    state = {name: values.tolist() for name, values in history.state_dict().items()}
    assert state == {"loss": [1.0, 2.5, 3.0, 2.0], "gain": [2.0]}
    other = History()
    other.load_state_dict(history.state_dict())
    other.append(loss=4.0)
    assert other["loss"].tolist() == [1.0, 2.5, 3.0, 2.0, 4.0] and len(history["loss"]) == 4


def test_history_names_what_it_has() -> None:
    history = History()
    history.append(loss=1.0)
    history.append(loss=float("nan"))
    assert history.last("loss", 5) == 1.0
    assert np.isnan(history.last("gain"))
    with pytest.raises(KeyError, match="there are"):
        history["gain"]


def test_a_stream_from_a_machine_with_more_devices_goes_on() -> None:
    stream = RandomStream(0)
    state = stream.state_dict()
    state["generators"] += 2 * state["generators"]
    stream.load_state_dict(state)
    with stream:
        first = torch.rand(2)
    with RandomStream(0):
        assert torch.equal(torch.rand(2), first)
