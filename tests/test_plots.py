"""Plots draw on the Axes given, label them, show correct values, and change nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log, nan, sqrt
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from implicitvi import plots
from implicitvi.diagnostics.report import Check
from implicitvi.errors import OptionError, ShapeError
from implicitvi.training import History


def found(name: str, value: float | None, state: str, limit: float | None = None) -> Check:
    """Return a check of a diagnosis."""
    return Check(name, state, value, limit, "a figure")


class Run:
    """A run with a history of forty steps, the first ten tempered, one skipped."""

    def __init__(self) -> None:
        self.history = History()
        for step in range(40):
            loss = nan if step == 20 else 10.0 - step
            beta = 0.1 if step < 10 else 1.0
            self.history.append(beta=beta, adversary=1.4, sampler=loss, elbo=-loss, dropped=0.0)


def gaussian(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(-1)


CHECKS = [found("error", 0.5, "ok", 1.0), found("size", 10.0, "failed", 40.0), found("x", None, "left out")]
POINTS = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))

# Add each new plot to this list, as a function of Axes or None.
PICTURES: dict[str, Callable[[Any], Any]] = {
    "loss": lambda ax: plots.loss(Run(), ax=ax),
    "draws_on_density": lambda ax: plots.draws_on_density(POINTS, gaussian, ax=ax),
    "codes": lambda ax: plots.codes(POINTS, torch.arange(50) % 3, ax=ax),
    "images": lambda ax: plots.images(torch.rand(6, 1, 4, 4), rows=["a", "b"], ax=ax),
    "diagnosis": lambda ax: plots.diagnosis(CHECKS, ax=ax),
}
SEVERAL: dict[str, tuple[int, Callable[[Any], Any]]] = {"training": (2, lambda axes: plots.training(Run(), axes=axes))}
WITHOUT_UNITS = {"images", "diagnosis"}  # one axis of each has names in place of numbers


@pytest.fixture(autouse=True)
def unchanged_matplotlib() -> Iterator[None]:
    """No setting changes; figures that a test has made are closed."""
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


@pytest.fixture
def ax() -> Axes:
    """Return Axes outside pyplot."""
    made: Axes = Figure().subplots()
    return made


def open_figures() -> list[int]:
    import matplotlib.pyplot as plt

    return plt.get_fignums()


def test_every_picture_is_in_a_list() -> None:
    public = {n for n, f in vars(plots).items() if callable(f) and f.__module__ == plots.__name__}
    functions = {name for name in public if name.islower() and not name.startswith("_")}
    assert functions == PICTURES.keys() | SEVERAL.keys()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_on_the_axes_given_and_no_others(name: str) -> None:
    figure = Figure()
    given, other = figure.subplots(1, 2)
    before = len(other.get_children())
    assert PICTURES[name](given) is given
    assert given.has_data() and len(other.get_children()) == before
    assert len(figure.axes) == 2 and open_figures() == []
    figure.canvas.draw()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_without_axes_makes_one_figure(name: str) -> None:
    ax = PICTURES[name](None)
    assert isinstance(ax, Axes) and len(open_figures()) == 1


@pytest.mark.parametrize("name", PICTURES)
def test_both_axes_are_labelled(name: str, ax: Axes) -> None:
    PICTURES[name](ax)
    labels = [ax.get_xlabel(), ax.get_ylabel()]
    assert all(labels) or name in WITHOUT_UNITS
    if name in WITHOUT_UNITS:
        assert all(tick.get_text() for tick in ax.get_yticklabels()) and ax.get_yticklabels()


@pytest.mark.parametrize("name", SEVERAL)
def test_several_pictures_fill_the_axes_given(name: str) -> None:
    count, draw = SEVERAL[name]
    given = Figure().subplots(1, count)
    assert list(draw(given)) == list(given) and all(ax.has_data() for ax in given)
    assert open_figures() == []
    assert len(draw(None)) == count and len(open_figures()) == 1
    with pytest.raises(OptionError, match=f"axes must be {count} Axes.*got 3"):
        draw(Figure().subplots(1, 3))


@pytest.mark.parametrize("name", PICTURES)
def test_an_array_of_axes_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"ax must be one Axes.*got ndarray.*axes\[0\]"):
        PICTURES[name](Figure().subplots(1, 2))
    assert open_figures() == []


# training curves


def test_a_loss_is_drawn_with_its_tempered_steps_and_its_skipped_steps(ax: Axes) -> None:
    plots.loss(Run(), ax=ax)
    (line,) = ax.lines
    steps = np.delete(np.arange(1, 41), 20)
    np.testing.assert_array_equal(line.get_xdata(), steps)
    np.testing.assert_array_equal(line.get_ydata(), 11.0 - steps)
    found = {artist.get_label(): artist for artist in [*ax.patches, *ax.collections]}
    assert found["tempered"].get_x() + found["tempered"].get_width() == 10
    assert found["step skipped"].get_offsets()[:, 0].tolist() == [21]
    assert ax.get_ylabel() == "sampler's loss (nats)"


def test_many_steps_are_shown_by_their_median_and_spread(ax: Axes) -> None:
    run = Run()
    run.history = History()
    for step in range(1000):
        run.history.append(sampler=float(step % 10))
    plots.loss(run, ax=ax)
    assert len(ax.lines[0].get_ydata()) == 100
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 4.5)
    (band,) = ax.collections
    np.testing.assert_allclose(band.get_datalim(ax.transData).extents[[1, 3]], [0.45, 8.55])


def test_a_first_step_far_off_does_not_flatten_the_rest(ax: Axes) -> None:
    run = Run()
    run.history = History()
    for step in range(1000):
        run.history.append(sampler=1e6 if step == 0 else 1.0 + step / 1000)
    plots.loss(run, ax=ax)
    assert ax.get_ylim()[1] < 3


def test_training_shows_losses_before_other_metrics_and_no_counts() -> None:
    run = Run()
    run.history = History()
    run.history.append(squared_error=0.1, model=1.0, beta=1.0, dropped=0.0)
    axes = plots.training(run, axes=Figure().subplots(1, 2))
    labels = [ax.get_ylabel() for ax in axes]
    assert labels == ["model's loss (nats)", "squared error"]


# draws on a density


def contours(ax: Axes) -> list[np.ndarray]:
    """Return the points ``[N, 2]`` of each contour."""
    (lines,) = (c for c in ax.collections if type(c).__name__ == "QuadContourSet")
    return [path.vertices for path in lines.get_paths()]


def test_contours_hold_their_share_of_a_gaussian(ax: Axes) -> None:
    """The region of mass ``m`` is a disc of radius ``√(-2 log(1 - m))``, whatever constant is added."""
    plots.draws_on_density(POINTS, lambda z: gaussian(z) + 123.0, extent=(-5, 5, -5, 5), ax=ax)
    radii = [np.linalg.norm(points, axis=1) for points in contours(ax)]
    for mass, radius in zip((0.99, 0.9, 0.5), radii, strict=True):
        np.testing.assert_allclose(radius, sqrt(-2 * log(1 - mass)), rtol=0.01)


def test_the_window_grows_until_the_truth_is_inside(ax: Axes) -> None:
    """For collapsed draws the plot must show the missing mass."""
    plots.draws_on_density(1 + 0.01 * POINTS, gaussian, ax=ax)
    for points in contours(ax):
        assert np.ptp(points, axis=0).min() > 2.3  # the disc of one half: whole, not cut off
    left, right = ax.get_xlim()
    assert left < -3 and right > 3


def test_a_mode_that_was_missed_is_shown_where_the_window_is_given(ax: Axes) -> None:
    def two(z: Tensor) -> Tensor:
        away = z - torch.tensor([20.0, 0.0])
        return torch.logaddexp(gaussian(z), gaussian(away))

    plots.draws_on_density(POINTS, two, extent=(-5, 25, -5, 5), grid=300, ax=ax)
    outer = contours(ax)[0]
    assert outer[:, 0].min() < -2.5 and outer[:, 0].max() > 22.5 and ax.get_xlim() == (-5, 25)


def test_a_density_with_edges_is_drawn(ax: Axes) -> None:
    """Infinite logs mean zero mass: the median of a triangle is at the right distance from its edges."""

    def wedge(z: Tensor) -> Tensor:
        return torch.where((z > 0).all(-1), -z.sum(-1), -torch.inf)

    plots.draws_on_density(POINTS.abs(), wedge, extent=(-1, 9, -1, 9), masses=[0.5], ax=ax)
    (points,) = contours(ax)
    assert points.sum(1).max() == pytest.approx(1.678, abs=0.1)  # 1 - (1 + s) e⁻ˢ = 1/2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"draws": torch.zeros(5, 3)}, r"draws' shape must be \(number, 2\), got \(5, 3\).*draws\[:, \[0, 1\]\]"),
        ({"draws": torch.zeros(0, 2)}, "draws' shape must be"),
        ({"log_density": lambda z: -z.square()}, "density's shape must be.*Sum over the last axis"),
        ({"log_density": lambda z: z.sum(-1) * nan}, "not finite anywhere"),
        ({"extent": (1, 0, 0, 1)}, "extent must be"),
        ({"masses": (50, 90)}, "masses must be"),
        ({"grid": 1}, "grid must be"),
    ],
)
def test_misuse_of_a_density_is_explained(change: dict[str, Any], complaint: str, ax: Axes) -> None:
    with pytest.raises((OptionError, ShapeError), match=complaint):
        plots.draws_on_density(**{"draws": POINTS, "log_density": gaussian, "ax": ax} | change)


# codes and images


def test_classes_have_a_colour_and_a_name_each(ax: Axes) -> None:
    labels = np.arange(50) % 12
    plots.codes(POINTS, labels, ax=ax)
    assert [text.get_text() for text in ax.texts] == [str(i) for i in range(12)]
    colours = {tuple(dots.get_facecolor()[0]) for dots in ax.collections}
    assert len(colours) == 12
    for kind, dots in enumerate(ax.collections):
        np.testing.assert_allclose(dots.get_offsets(), POINTS[labels == kind], rtol=1e-6)


def test_panels_of_codes_may_share_their_axes() -> None:
    figure = Figure()
    for ax in figure.subplots(1, 2, sharex=True, sharey=True):
        plots.codes(POINTS, ax=ax)
    figure.canvas.draw()


def test_numbers_get_a_colour_bar() -> None:
    figure = Figure()
    ax = figure.subplots()
    plots.codes(POINTS, POINTS.sum(1), ax=ax)
    assert len(figure.axes) == 2 and not ax.texts


def picture(ax: Axes) -> np.ndarray:
    (shown,) = ax.images
    return np.asarray(shown.get_array())


def test_images_stand_in_rows_with_a_line_between(ax: Axes) -> None:
    x = torch.arange(5)[:, None, None].expand(5, 2, 3) / 10
    plots.images(x, columns=3, ax=ax)
    whole = picture(ax)
    assert whole.shape == (2 + 1 + 2, 3 * 3 + 2)
    assert whole[0, [0, 4, 8]].tolist() == pytest.approx([0, 0.1, 0.2])
    assert whole[4, [2, 6, 10]].tolist() == pytest.approx([0.3, 0.4, 0])  # the last place is empty
    assert (whole[2] == 0.5).all() and (whole[:, 3] == 0.5).all()


def test_colours_stay_colours_and_captions_stand_at_their_rows(ax: Axes) -> None:
    x = torch.rand(4, 3, 8, 8)
    plots.images(x, columns=2, rows=["above", "below"], ax=ax)
    np.testing.assert_allclose(picture(ax)[:8, :8], x[0].permute(1, 2, 0))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["above", "below"]
    assert ax.get_yticks()[0] < 8 < ax.get_yticks()[1]


@pytest.mark.parametrize(
    ("draw", "complaint"),
    [
        (lambda: plots.codes(torch.zeros(5, 3)), "codes' shape must be"),
        (lambda: plots.codes(POINTS, [1, 2]), r"labels' shape must be \(50,\), got \(2,\)"),
        (lambda: plots.images(torch.zeros(5, 64)), r"images' shape must be.*reshape\(-1, H, W\)"),
        (lambda: plots.images(torch.zeros(5, 2, 8, 8)), "images' shape must be"),
        (lambda: plots.images(torch.zeros(4, 8, 8), columns=4, rows=["a", "b"]), "captions"),
        (lambda: plots.images(torch.zeros(4, 8, 8), columns=0), "columns must be"),
    ],
)
def test_misuse_of_images_is_explained_and_leaves_no_figure(draw: Callable[[], Any], complaint: str) -> None:
    with pytest.raises((OptionError, ShapeError), match=complaint):
        draw()
    assert open_figures() == []


# diagnosis


@pytest.mark.parametrize(
    ("value", "limit", "state", "octaves"),
    [
        (0.5, 1.0, "ok", -1.0),
        (800.0, 400.0, "ok", None),  # excused
        (2.0, 1.0, "failed", 1.0),
        (-2.0, 1.0, "failed", 1.0),
        (100.0, 400.0, "failed", None),  # for another reason
        (0.0, 1.0, "ok", -3.0),
        (1e9, 1.0, "failed", 3.0),
        (nan, 1.0, "failed", None),
        (3.0, 0.0, "failed", None),
        (3.0, None, "ok", None),
        (0.5, None, "noted", None),
        (None, None, "left out", None),
    ],
)
def test_good_values_are_on_the_left(
    value: float | None, limit: float | None, state: str, octaves: float | None, ax: Axes
) -> None:
    plots.diagnosis([found("one", value, state, limit)], ax=ax)
    mark = ax.lines[0]
    assert mark.get_xdata()[0] == (octaves or 0.0)
    hollow = mark.get_markerfacecolor() == "white"
    assert hollow == (octaves is None)
    assert state in [text.get_text() for text in ax.texts]


def test_good_and_bad_differ_by_more_than_colour(ax: Axes) -> None:
    plots.diagnosis([found(s, 1.0, s, 2.0) for s in ("ok", "failed")], ax=ax)
    assert len({line.get_marker() for line in ax.lines[:2]}) == 2


def test_anything_but_checks_is_refused() -> None:
    with pytest.raises(OptionError, match=r"checks must be .*, got History.*fit\.diagnose"):
        plots.diagnosis([History(), found("x", 1.0, "ok")])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="got none"):
        plots.diagnosis([])
    assert open_figures() == []


def test_misuse_of_a_fit_is_explained() -> None:
    with pytest.raises(OptionError, match="Did you mean 'sampler'"):
        plots.loss(Run(), "samplr")
    assert open_figures() == []


def test_a_loss_that_was_never_finite_is_refused() -> None:
    run = Run()
    run.history = History()
    run.history.append(sampler=nan)
    with pytest.raises(OptionError, match="'sampler' must have a finite value, got none in 1 steps"):
        plots.loss(run)
