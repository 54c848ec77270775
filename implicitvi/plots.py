"""Plot what ArviZ does not: training curves, draws on a known density, codes, images and a diagnosis.

Each function draws on the Axes given, or on those of a new figure, and returns them; an option or shape that cannot
work raises `OptionError` or `ShapeError`. It does not show or save anything and does not change matplotlib's settings.
For traces, forests, pairs and predictive checks use `to_arviz`, then ArviZ.

To add a plot, write a function of plain arrays or tensors that ends in ``ax``, draws with methods of the Axes only,
labels both axes with units, and tells groups apart by more than colour. Then add it to ``tests/test_plots.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil, inf, isnan, log2, sqrt
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from implicitvi.diagnostics.posterior import as_array
from implicitvi.diagnostics.report import Check
from implicitvi.errors import OptionError, ShapeError, check_choice, check_flag, check_whole
from implicitvi.training import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[Any]
Extent = tuple[float, float, float, float]
LogDensity = Callable[[Tensor], Tensor]

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, BLACK = "#E69F00", "#56B4E9", "#F0E442", "#000000"
#: Eight colours that colour-blind readers can distinguish (Color Universal Design, Masataka Okabe, Kei Ito, 2008).
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK)

NO_LOSSES = ("beta", "dropped", "elbo")  # metrics of every step that no player minimises
PLAYERS = ("adversary", "contrast", "sampler", "model", "generator", "encoder", "decoder")
MARKS = {"ok": ("o", GREEN), "failed": ("X", VERMILION)}
REACH = 3  # octaves shown on either side of a limit


class HasHistory(Protocol):
    """A `Fit`, a `VAEFit`, an `AVBSVI` or a trainer: an object with the metrics of every step."""

    @property
    def history(self) -> History:
        """The metrics."""


def loss(fit: HasHistory, name: str = "sampler", *, unit: str = "nats", ax: Axes | None = None) -> Axes:
    """Plot a player's loss: the median over windows of steps, in a band that holds 90 % of the steps.

    Tempered steps (``β < 1``) have a grey background: their losses belong to another density. Marks at the bottom show
    skipped steps. A falling loss is not evidence of a good fit: while the adversary lags, it is not a bound.

    Args:
        fit: A fit or a trainer.
        name: A metric of its history: the name of a player, or any other.
        unit: Unit of a player's loss; nats except for least squares.
        ax: Axes to draw on; ``None`` for a new figure.
    """
    history = _history(fit)
    check_choice("name", name, history.names())
    values, steps = history[name], np.arange(1, len(history[name]) + 1)
    finite = np.isfinite(values)
    if not finite.any():
        raise OptionError(f"{name!r} must have a finite value, got none in {len(values)} steps. Check the model.")
    ax = _one(ax)
    _draw_quantiles(ax, steps, values, finite)
    if "beta" in history.names() and (history["beta"] < 1).any():
        ax.axvspan(0, (history["beta"] < 1).sum(), color="0.93", lw=0, zorder=0, label="tempered")
    if not finite.all():
        at: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "marker": "|"}
        ax.scatter(steps[~finite], np.full((~finite).sum(), 0.02), color=VERMILION, label="step skipped", **at)
    label = f"{name}'s loss ({unit})" if name in PLAYERS else name.replace("_", " ")
    ax.set(xlim=(0, len(steps)), xlabel="step", ylabel=label)
    return ax


def _draw_quantiles(ax: Axes, steps: Array, values: Array, finite: Array) -> None:
    """Draw the median and the central 90 % of the finite values in about a hundred windows."""
    window = max(1, len(steps) // 100)
    parts = [part for part in np.split(steps, steps[window::window] - 1) if finite[part - 1].any()]
    centres = [part.mean() for part in parts]
    quantiles = [np.quantile(values[part - 1][finite[part - 1]], [0.05, 0.5, 0.95]) for part in parts]
    low, middle, high = np.array(quantiles).T
    if window > 1:
        ax.fill_between(centres, low, high, color=BLUE, alpha=0.25, lw=0, label="90 % of the steps")
    ax.plot(centres, middle, color=BLUE, lw=1.2, label="each step" if window == 1 else f"median of {window} steps")
    # the first losses may be a thousand times larger than the rest: they may leave the window
    bottom, top = np.quantile(low, 0.02), np.quantile(high, 0.98)
    if top > bottom:
        ax.set_ylim(bottom - 0.1 * (top - bottom), top + 0.1 * (top - bottom))


def training(
    fit: HasHistory, *, names: Iterable[str] | None = None, axes: Sequence[Axes] | Array | None = None
) -> Array:
    """Plot the training curves: a `loss` for every player.

    Args:
        fit: A fit or a trainer.
        names: Metrics to show; ``None`` for all except counts.
        axes: Axes to draw on, one for each metric; ``None`` for a row in a new figure.
    """
    metrics = [name for name in _history(fit).names() if name not in NO_LOSSES]
    given = sorted(metrics, key=lambda name: name not in PLAYERS) if names is None else names
    shown = _listed("names", given, "one metric of the history or more")
    for name in shown:
        check_choice("names", name, _history(fit).names())
    drawn = _several(axes, len(shown))
    for ax, name in zip(drawn, shown, strict=True):
        loss(fit, name, ax=ax)
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
    drawn[0].legend(**above, frameon=False, fontsize="x-small", columnspacing=1.0)
    return drawn


def draws_on_density(
    draws: ArrayLike | Tensor,
    log_density: LogDensity,
    *,
    extent: Extent | None = None,
    masses: Sequence[float] = (0.5, 0.9, 0.99),
    grid: int = 200,
    num_draws: int = 2000,
    legend: bool = True,
    color: str = BLUE,
    ax: Axes | None = None,
) -> Axes:
    """Plot draws in the plane over contours of the density that they should follow.

    Each contour encloses the smallest region with that share of the density's mass: of good draws, half lie inside the
    first contour and 90 % inside the second. The density need not be normalised; its mass is summed over the window.

    Args:
        draws: ``[S, 2]``.
        log_density: Log of the true density, up to a constant: points ``[grid, grid, 2]`` to ``[grid, grid]``.
        extent: Left, right, bottom and top of the window. ``None`` for a window around the draws that grows until it
            holds the outermost contour. It can leave out a mode without draws nearby; pass the extent if you know one.
        masses: Shares of the mass that the contours enclose, each between 0 and 1.
        grid: Number of points along each axis at which the density is evaluated.
        num_draws: Number of draws to show, the first ones.
        legend: Whether to add a legend.
        color: Colour of the draws.
        ax: Axes to draw on; ``None`` for a new figure.

    >>> ax = draws_on_density(torch.randn(100, 2), lambda z: -0.5 * z.square().sum(-1))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('$z_1$', '$z_2$')
    """
    points = _plane(draws, "draws")
    check_whole("grid", grid, 2)
    check_whole("num_draws", num_draws)
    check_flag("legend", legend)
    _check_density(log_density, masses, extent, color)
    x, y, height = _window(points, log_density, extent, masses, grid)
    ax = _one(ax)
    shown = points[:num_draws]
    size = min(12.0, max(4.0, 4000 / len(shown)))
    ax.scatter(shown[:, 0], shown[:, 1], s=size, color=color, alpha=0.4, linewidths=0, label="draws")
    if levels := _levels(height, masses):
        ax.contour(x, y, height, levels, colors="black", linewidths=0.9, linestyles="solid")
        inside = ", ".join(f"{100 * mass:g}" for mass in sorted(masses))
        ax.plot([], [], color="black", lw=0.9, label=f"truth: {inside} % inside")
    ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="$z_1$", ylabel="$z_2$")
    if legend:
        ax.legend(loc="best", fontsize="small", markerscale=2, framealpha=0.8)
    return ax


def _check_density(log_density: object, masses: Any, extent: Any, color: Any) -> None:
    """Raise `OptionError` unless the options of `draws_on_density` can be drawn."""
    from matplotlib.colors import is_color_like

    if not callable(log_density):
        raise OptionError.must_be("log_density", "a function of points", repr(log_density))
    if not _are_numbers(masses) or not all(0 < mass < 1 for mass in masses):
        raise OptionError.must_be("masses", "numbers between 0 and 1", masses)
    ends = extent if _are_numbers(extent) and len(extent) == 4 else (0, 0, 0, 0)
    if extent is not None and not (ends[0] < ends[1] and ends[2] < ends[3]):
        raise OptionError.must_be("extent", "(left, right, bottom, top), finite and increasing", extent)
    if not is_color_like(color):
        raise OptionError.must_be("color", "a colour of matplotlib", repr(color))


def _are_numbers(values: Any) -> bool:
    """Return whether values are a sequence of finite numbers, one or more."""
    if not isinstance(values, list | tuple | np.ndarray | Tensor) or getattr(values, "ndim", 1) != 1:
        return False
    numbers: Any = values if isinstance(values, list | tuple) else values.tolist()
    return bool(numbers) and all(isinstance(v, int | float | np.number) and abs(float(v)) < inf for v in numbers)


def _listed(option: str, values: Any, expected: str) -> list[Any]:
    """Return values as a list; raise `OptionError` unless there are some."""
    listed = [] if isinstance(values, str | Tensor) or not isinstance(values, Iterable) else list(values)
    if not listed:
        raise OptionError.must_be(option, expected, repr(values))
    return listed


def _window(
    points: Array, log_density: LogDensity, extent: Extent | None, masses: Sequence[float], grid: int
) -> tuple[Array, Array, Array]:
    """Return axes ``[grid]`` and log density ``[grid, grid]`` of the window, a row for each ``y``, its maximum 0."""
    if extent is not None:
        left, right, bottom, top = extent
        return _heights(log_density, np.array([left, bottom]), np.array([right, top]), grid)
    low, high = np.quantile(points, [0.002, 0.998], axis=0)
    margin = 0.15 * (high - low) + 1e-6
    low, high = low - margin, high + margin
    for _ in range(12):
        _, _, height = _heights(log_density, low, high, min(grid, 64))
        reached = height >= min(_levels(height, masses), default=-np.inf)
        step = 0.5 * (high - low)
        below, above = (np.array([reached[:, side].any(), reached[side].any()]) for side in (0, -1))
        low, high = low - step * below, high + step * above
        if not (below | above).any():
            break
    return _heights(log_density, low, high, grid)


def _heights(log_density: LogDensity, low: Array, high: Array, grid: int) -> tuple[Array, Array, Array]:
    x, y = (np.linspace(a, b, grid) for a, b in zip(low, high, strict=True))
    where = torch.tensor(np.stack(np.meshgrid(x, y), -1), dtype=torch.get_default_dtype())
    with torch.no_grad():
        height = as_array(log_density(where)).astype(float)
    if height.shape != (grid, grid):
        got, do = f"{height.shape} for points {tuple(where.shape)}", "Sum over the last axis only, as in z.sum(-1)."
        raise ShapeError.must_be("The log density's shape", (grid, grid), got, do)
    if not np.isfinite(height).any():
        window = f"{x[0]:.3g} to {x[-1]:.3g} by {y[0]:.3g} to {y[-1]:.3g}"
        raise OptionError(f"The log density is not finite anywhere in the window {window}. Pass its extent.")
    height = np.where(np.isfinite(height), height, -np.inf)
    return x, y, np.maximum(height - height.max(), -100.0)  # contours do not accept infinities


def _levels(height: Array, masses: Sequence[float]) -> list[float]:
    """Return the log heights, increasing, above which the density has these shares of its mass."""
    ranked = np.sort(height, axis=None)[::-1]
    mass = np.cumsum(np.exp(ranked))
    within = np.searchsorted(mass, np.array(masses) * mass[-1])
    return sorted({float(level) for level in ranked[within] if level < 0})


def codes(z: ArrayLike | Tensor, labels: ArrayLike | Tensor | None = None, *, ax: Axes | None = None) -> Axes:
    """Plot codes of data in the latent plane, with a colour and a name for each class or a colour scale for numbers.

    Args:
        z: Codes ``[N, 2]``.
        labels: Class ``[N]`` of each, integers or strings; or floats, which get a colour bar. ``None`` for one colour.
        ax: Axes to draw on; ``None`` for a new figure.
    """
    points = _plane(z, "codes")
    kinds = None if labels is None else as_array(labels)
    if kinds is not None and kinds.shape != (len(points),):
        raise ShapeError.must_be("The labels' shape", (len(points),), kinds.shape)
    ax = _one(ax)
    dots: dict[str, Any] = {"s": min(12.0, max(2.0, 8000 / len(points))), "linewidths": 0}
    if kinds is None:
        ax.scatter(points[:, 0], points[:, 1], color=BLUE, alpha=0.5, **dots)
    elif np.issubdtype(kinds.dtype, np.floating):
        shades = ax.scatter(points[:, 0], points[:, 1], c=kinds, cmap="viridis", **dots)
        ax.figure.colorbar(shades, ax=ax, label="label")
    else:
        _classes(ax, points, kinds, dots)
    ax.set_aspect("equal")  # adjusts the box, so that panels may share both axes
    ax.set(xlabel="$z_1$ (prior sd)", ylabel="$z_2$ (prior sd)")
    return ax


def _classes(ax: Axes, points: Array, kinds: Array, dots: dict[str, Any]) -> None:
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    classes = np.unique(kinds)
    if len(classes) <= len(PALETTE):
        colours: Sequence[Any] = PALETTE
    elif len(classes) <= 10:
        colours = [colormaps["tab10"](i) for i in range(10)]
    else:
        colours = list(colormaps["turbo"](np.linspace(0.05, 0.95, len(classes))))
    name: dict[str, Any] = {"ha": "center", "va": "center", "weight": "bold", "color": "black"}
    for kind, colour in zip(classes, colours, strict=False):
        own = points[kinds == kind]
        ax.scatter(own[:, 0], own[:, 1], color=colour, alpha=0.6, label=str(kind), **dots)
        # at the member nearest to the median: a ring has no members at its centre
        middle = own[np.abs(own - np.median(own, 0)).sum(1).argmin()]
        ax.annotate(str(kind), middle, path_effects=[withStroke(linewidth=3, foreground="white")], **name)


def images(
    x: ArrayLike | Tensor, *, columns: int | None = None, rows: Sequence[str] = (), ax: Axes | None = None
) -> Axes:
    """Plot images in rows: samples of a model, or originals above their reconstructions.

    Args:
        x: ``[N, (C,) H, W]``, intensities from 0 to 1, channels 1 (shown as ink on paper) or 3 (colour).
        columns: Number of images in a row; ``None`` for a square.
        rows: Captions at the left, which divide the rows evenly: one for each row, or one for several.
        ax: Axes to draw on; ``None`` for a new figure.
    """
    pictures = as_array(x)
    if pictures.ndim not in (3, 4) or (pictures.ndim == 4 and pictures.shape[1] not in (1, 3)):
        expected, do = "(N, H, W), (N, 1, H, W) or (N, 3, H, W)", "Reshape flat pixels: x.reshape(-1, H, W)."
        raise ShapeError.must_be("The images' shape", expected, pictures.shape, do)
    columns = ceil(sqrt(len(pictures))) if columns is None else columns
    check_whole("columns", columns)
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise OptionError.must_be("rows", "a list of captions", repr(rows))
    lines = ceil(len(pictures) / columns)
    if rows and lines % len(rows):
        raise ShapeError.must_be("The number of captions", f"a divisor of the {lines} rows", len(rows))
    ax = _one(ax)
    picture = _mosaic(pictures, columns)
    ink: dict[str, Any] = {"cmap": "gray_r", "vmin": 0, "vmax": 1} if picture.shape[-1] == 1 else {}
    ax.imshow(picture.squeeze(-1) if ink else picture, **ink)
    each = len(picture) / max(len(rows), 1)
    ax.set_yticks([each * (i + 0.5) - 0.5 for i in range(len(rows))], list(rows))
    ax.set_xticks([])
    ax.tick_params(length=0)
    return ax


def _mosaic(pictures: Array, columns: int) -> Array:
    """Join images ``[N, (C,) H, W]`` into one ``[pixels, pixels, C]``, with a grey line between neighbours."""
    if pictures.ndim == 3:
        pictures = pictures[:, None]
    missing = -len(pictures) % columns
    pictures = np.pad(pictures, [(0, missing), (0, 0), (0, 0), (0, 0)])
    framed = np.pad(pictures.clip(0, 1), [(0, 0), (0, 0), (1, 0), (1, 0)], constant_values=0.5)
    lines = framed.reshape(-1, columns, *framed.shape[1:]).transpose(0, 3, 1, 4, 2)
    return lines.reshape(-1, columns * framed.shape[3], framed.shape[1])[1:, 1:]


def diagnosis(checks: Iterable[Check], *, ax: Axes | None = None) -> Axes:
    """Plot the checks of a diagnosis, one line each: how far each value is inside or beyond its limit.

    Values left of the middle line are good; each step is a factor of two. A hollow mark on the line stands for a check
    without a value, a positive limit or a verdict, and for one whose verdict had other reasons than its value.

    Args:
        checks: Such as the `Report` of ``fit.diagnose()``.
        ax: Axes to draw on; ``None`` for a new figure.
    """
    found: list[Any] = list(checks) if isinstance(checks, Iterable) and not isinstance(checks, Tensor) else [checks]
    others = sorted({type(check).__name__ for check in found if not isinstance(check, Check)})
    if others or not found:
        do = "Pass the report of fit.diagnose()."
        raise OptionError.must_be("checks", "one Check or more", ", ".join(others) or "none", do)
    ax = _one(ax, figsize=(7, 0.9 + 0.34 * len(found)))
    for line, check in enumerate(found):
        _draw_check(ax, line, check)
    ax.axvline(0, color="black", lw=1)
    ax.axvspan(-REACH, 0, color=GREEN, alpha=0.06, lw=0)
    ax.set_yticks(range(len(found)), [check.name for check in found])
    ax.set(xlim=(-REACH - 0.3, REACH + 3.7), ylim=(len(found) - 0.5, -0.5))
    ticks = np.arange(-REACH, REACH + 1)
    ax.set_xticks(ticks, [f"{2.0 ** abs(t):g}×" if t else "limit" for t in ticks])
    ax.set_xlabel("inside of its limit  ◂    ▸  beyond its limit (factor)", x=(REACH + 0.3) / 10)
    ax.hlines(range(len(found)), -REACH, REACH, color="0.9", lw=0.8, zorder=0)
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.spines.bottom.set_bounds(-REACH, REACH)
    ax.tick_params(axis="y", length=0)
    return ax


def _draw_check(ax: Axes, line: int, check: Check) -> None:
    marker, colour = MARKS.get(check.state, ("o", "0.6"))
    beyond = _beyond(check)
    at, face = (0.0, "white") if beyond is None else (beyond, colour)
    ax.hlines(line, 0, at, color=colour, lw=3, alpha=0.5)
    ax.plot(at, line, marker, color=colour, mfc=face, ms=9, clip_on=False, zorder=3)
    value, limit = check.value, check.limit
    figures = "" if value is None or isnan(value) else f"{value:.3g}"
    figures += f", limit {limit:.3g}" if figures and limit is not None else ""
    text: dict[str, Any] = {"va": "center", "fontsize": "small"}
    ax.text(REACH + 0.5, line, check.state, color=colour, weight="bold", **text)
    ax.text(REACH + 1.5, line, figures, **text)


def _beyond(check: Check) -> float | None:
    """Return the octaves by which a value exceeds its limit, negative inside; ``None`` where this has no meaning."""
    limit, value = check.limit, check.value
    if check.state not in MARKS or value is None or isnan(value) or not (limit and limit > 0):
        return None
    octaves = max(-REACH, min(REACH, log2(abs(value) / limit))) if value else -REACH
    return octaves if (octaves > 0) == (check.state == "failed") else None


def _history(fit: HasHistory) -> History:
    history = getattr(fit, "history", None)
    if not isinstance(history, History):
        raise OptionError.must_be("fit", "a fit or a trainer", type(fit).__name__, "Write fit = AVBSVI(...).run(...).")
    return history


def _one(ax: Axes | None, **figure: Any) -> Axes:
    """Return the Axes given, or those of a new figure, which the caller shows and closes."""
    if ax is None:
        import matplotlib.pyplot as plt

        return plt.figure(layout="constrained", **figure).add_subplot()
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        raise OptionError.must_be("ax", "one Axes of matplotlib", type(ax).__name__, "Of several, pass one: axes[0].")
    return ax


def _several(axes: Any, count: int) -> Array:
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, count, figsize=(3.8 * count, 3.2), layout="constrained", squeeze=False)[1]
    flat = np.array([repr(axes)] if isinstance(axes, Tensor) else axes, dtype=object).ravel()
    if len(flat) != count:
        raise OptionError.must_be("axes", f"{count} Axes, one for each plot", len(flat))
    for ax in flat:
        _one(ax)
    return flat


def _plane(points: ArrayLike | Tensor, what: str) -> Array:
    found = as_array(points)
    if found.ndim != 2 or found.shape[1] != 2 or not len(found):
        do = "Pick two columns: draws[:, [0, 1]]. For all pairs of many, use az.plot_pair of to_arviz."
        raise ShapeError.must_be(f"The {what}' shape", "(number, 2)", found.shape, do)
    return found
