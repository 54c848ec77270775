"""Pictures that ArviZ has not: the course of a fit, draws on a known density, codes, restarts, a diagnosis.

Every function draws on the Axes that it is given, or on those of a new figure, and returns them. None shows or saves
anything, and none changes a setting of matplotlib. For traces, forests, pairs and predictive checks of a posterior:
`to_arviz`, then ArviZ.

Adding a picture: a function of plain arrays or tensors that ends in ``ax``, draws by methods of the Axes alone, labels
both axes with units, and tells groups apart by more than their colour; then join the list in ``tests/test_plots.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil, isnan, log2, sqrt
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from implicitvi.diagnostics.report import Check
from implicitvi.errors import OptionError, ShapeError, check_at_least, check_choice
from implicitvi.training import History, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Extent = tuple[float, float, float, float]

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, BLACK = "#E69F00", "#56B4E9", "#F0E442", "#000000"
#: Eight colours that the colour-blind can tell apart (Color Universal Design, Masataka Okabe, Kei Ito, 2008).
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK)

NO_LOSSES = ("beta", "dropped", "elbo")  # metrics of every step that no player minimises
PLAYERS = ("adversary", "contrast", "sampler", "model", "generator", "encoder", "decoder")
MARKS = {"ok": ("o", GREEN), "failed": ("X", VERMILION)}


class Recorded(Protocol):
    """What has kept the metrics of every step: a fit, an `AVBSVI`, a trainer."""

    @property
    def history(self) -> History:
        """The metrics."""


def loss(fit: Recorded, name: str = "sampler", *, unit: str = "nats", ax: Axes | None = None) -> Axes:
    """One player's loss over the steps: the median of every few steps, in a band that holds 90 % of them.

    Steps that are tempered (``β < 1``) have a grey ground, as their losses are those of another density; skipped turns
    have a mark at the foot. A loss that falls is no evidence of a good fit: while the adversary lags it is no bound.

    Args:
        fit: A `Fit`, a `VAEFit`, an `AVBSVI` or a trainer.
        name: A metric of its history: the name of a player, or any other.
        unit: Unit of a player's loss; only least squares has another than nats.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        OptionError: There is no such metric, or none of its values is finite.
    """
    history = fit.history
    check_choice("name", name, history.names())
    values, steps = history[name], np.arange(1, len(history[name]) + 1)
    finite = np.isfinite(values)
    if not finite.any():
        raise OptionError(f"no value of {name!r} is finite", got=f"{len(values)} steps", do="Look at the model.")
    ax = _one(ax)
    window = max(1, len(steps) // 100)
    parts = [part for part in np.split(steps, steps[window::window] - 1) if finite[part - 1].any()]
    centres = [part.mean() for part in parts]
    low, middle, high = np.array(
        [np.quantile(values[part - 1][finite[part - 1]], [0.05, 0.5, 0.95]) for part in parts]
    ).T
    if window > 1:
        ax.fill_between(centres, low, high, color=BLUE, alpha=0.25, lw=0, label="90 % of the steps")
    label = "each step" if window == 1 else f"median of {window} steps"
    ax.plot(centres, middle, color=BLUE, lw=1.2, label=label)
    # the first steps may be a thousand times as far off as all others: they may leave the picture
    bottom, top = np.quantile(low, 0.02), np.quantile(high, 0.98)
    if top > bottom:
        ax.set_ylim(bottom - 0.1 * (top - bottom), top + 0.1 * (top - bottom))
    if "beta" in history.names() and (history["beta"] < 1).any():
        ax.axvspan(0, (history["beta"] < 1).sum(), color="0.93", lw=0, zorder=0, label="tempered")
    if not finite.all():
        foot = ax.get_xaxis_transform()
        skipped: dict[str, Any] = {"marker": "|", "color": VERMILION, "label": "turn skipped"}
        ax.scatter(steps[~finite], np.full((~finite).sum(), 0.02), transform=foot, **skipped)
    ax.set_xlim(0, len(steps))
    ax.set_xlabel("step")
    ax.set_ylabel(f"{name}'s loss ({unit})" if name in PLAYERS else name.replace("_", " "))
    return ax


def schedule(plan: Schedule | Any, *, ax: Axes | None = None) -> Axes:
    """Both rates over the steps, and the share ``β`` of the log joint where the fit is tempered, on a logarithmic axis.

    Args:
        plan: A `Schedule`, or what has one: an `AVBSVI` or a trainer.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        OptionError: There is no schedule.

    >>> schedule(Schedule(tempering=0.1)).get_ylabel()
    'β and rates (no unit)'
    """
    plan = getattr(plan, "schedule", plan)
    if not isinstance(plan, Schedule):
        raise OptionError(
            "this has no schedule",
            got=type(plan).__name__,
            expected="a Schedule, or an AVBSVI",
            do="A Fit keeps the history only: pass svi.schedule.",
        )
    ax = _one(ax)
    steps = np.unique(np.linspace(0, plan.num_steps - 1, 400).round().astype(int))
    stages = [plan.at(step) for step in steps]
    lines = {
        "β, share of the log joint": ([stage.beta for stage in stages], BLACK, "-"),
        "adversary's rate": ([stage.adversary_lr for stage in stages], VERMILION, "--"),
        "sampler's rate": ([stage.lr for stage in stages], BLUE, "-."),
    }
    tempered = stages[0].beta < 1
    for label, (values, colour, style) in list(lines.items())[not tempered :]:
        ax.plot(steps + 1, values, ls=style, color=colour, label=_change(label, values))
    ax.set_yscale("log")
    ax.set_xlim(0, plan.num_steps)
    draws = _change("draws a step", [stage.num_particles for stage in stages])
    turns = _change("adversary's turns", [stage.adversary_steps for stage in stages])
    ax.set_title(f"{draws}; {turns}", fontsize="small")
    ax.set_xlabel("step")
    ax.set_ylabel("β and rates (no unit)" if tempered else "rates (no unit)")
    ax.legend(frameon=False, fontsize="small")
    return ax


def _change(label: str, values: Sequence[float]) -> str:
    start, end = f"{values[0]:.2g}", f"{values[-1]:.2g}"
    if isinstance(values[0], int):
        start, end = str(values[0]), str(values[-1])
    return f"{label} {start}" if start == end else f"{label} {start} → {end}"


def training(
    fit: Recorded,
    plan: Schedule | Any = None,
    *,
    names: Iterable[str] | None = None,
    axes: Sequence[Axes] | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """The course of a fit: a `loss` for every player, and the `schedule`.

    Args:
        fit: A `Fit`, a `VAEFit`, an `AVBSVI` or a trainer.
        plan: A `Schedule`, or what has one; ``None`` for that of ``fit``, and for no picture of it where ``fit`` has
            none.
        names: Metrics to show; ``None`` for all that are no counts.
        axes: Where to draw, one for each metric and one for the schedule; ``None`` for a new figure, in a row.

    Returns:
        The Axes, ``[number of pictures]``.

    Raises:
        OptionError: There are more or fewer Axes than pictures.
    """
    shown = _metrics(fit) if names is None else list(names)
    plan = getattr(fit, "schedule", None) if plan is None else plan
    count = len(shown) + (plan is not None)
    drawn = _several(axes, count)
    for ax, name in zip(drawn, shown, strict=False):
        loss(fit, name, ax=ax)
    if shown:
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
        drawn[0].legend(**above, frameon=False, fontsize="x-small", columnspacing=1.0)
    if plan is not None:
        schedule(plan, ax=drawn[-1])
    return drawn


def _metrics(fit: Recorded) -> list[str]:
    """Metrics worth a picture, the losses of players first."""
    names = [name for name in fit.history.names() if name not in NO_LOSSES]
    return sorted(names, key=lambda name: name not in PLAYERS)


def draws_on_density(
    draws: ArrayLike | Tensor,
    log_density: Callable[[Tensor], Tensor],
    *,
    extent: Extent | None = None,
    masses: Sequence[float] = (0.5, 0.9, 0.99),
    grid: int = 200,
    num_draws: int = 2000,
    legend: bool = True,
    color: str = BLUE,
    ax: Axes | None = None,
) -> Axes:
    """Draws in the plane on the contours of the density that they should have.

    A contour encloses the smallest region that holds so much of the mass of the density: of good draws half are
    inside of the first, 90 % inside of the second. The density need not be normalised; its mass is summed over the
    window.

    Args:
        draws: ``[S, 2]``.
        log_density: Log of the true density, up to a constant: points ``[grid, grid, 2]`` to ``[grid, grid]``.
        extent: Left, right, bottom and top of the window. ``None`` for one around the draws that grows until the
            outermost contour is inside; a mode that no draw is near may stay outside, so give it where it is known.
        masses: Shares of the mass that the contours hold, each between 0 and 1.
        grid: Points along each axis on which the density is evaluated.
        num_draws: Draws that are shown, the first ones.
        legend: Whether to say what dots and contours are.
        color: Colour of the draws.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        ShapeError: The draws or the log density do not have the shape above.
        OptionError: The density is nowhere in the window positive, or an option has a value that cannot work.

    >>> ax = draws_on_density(torch.randn(100, 2), lambda z: -0.5 * z.square().sum(-1))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('$z_1$', '$z_2$')
    """
    points = _plane(draws, "draws")
    check_at_least("grid", grid, 2)
    if not masses or not all(0 < mass < 1 for mass in masses):
        raise OptionError("masses are out of range", got=masses, expected="between 0 and 1")
    x, y, height = _window(points, log_density, extent, masses, grid)
    ax = _one(ax)
    levels = _levels(height, masses)
    shown = points[:num_draws]
    size = min(12.0, max(4.0, 4000 / len(shown)))
    ax.scatter(shown[:, 0], shown[:, 1], s=size, color=color, alpha=0.4, linewidths=0, label="draws")
    inside = ", ".join(f"{100 * mass:g}" for mass in sorted(masses))
    if levels:
        ax.contour(x, y, height, levels, colors="black", linewidths=0.9, linestyles="solid")
        ax.plot([], [], color="black", lw=0.9, label=f"truth: {inside} % inside")
    ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="$z_1$", ylabel="$z_2$")
    if legend:
        ax.legend(loc="best", fontsize="small", markerscale=2, framealpha=0.8)
    return ax


def _window(
    points: NDArray[Any],
    log_density: Callable[[Tensor], Tensor],
    extent: Extent | None,
    masses: Sequence[float],
    grid: int,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Axes ``[grid]`` and log density ``[grid, grid]`` of the window, a row for each ``y``, its maximum 0."""
    if extent is not None:
        left, right, bottom, top = extent
        if not (left < right and bottom < top):
            raise OptionError("extent is no window", got=extent, expected="(left, right, bottom, top)")
        return _heights(log_density, np.array([left, bottom]), np.array([right, top]), grid)
    low, high = np.quantile(points, [0.002, 0.998], axis=0)
    margin = 0.15 * (high - low) + 1e-6
    low, high = low - margin, high + margin
    for _ in range(12):
        _, _, height = _heights(log_density, low, high, min(grid, 64))
        reached = height >= min(_levels(height, masses), default=-np.inf)
        step = 0.5 * (high - low)
        below = np.array([reached[:, 0].any(), reached[0].any()])
        above = np.array([reached[:, -1].any(), reached[-1].any()])
        low, high = low - step * below, high + step * above
        if not (below | above).any():
            break
    return _heights(log_density, low, high, grid)


def _heights(
    log_density: Callable[[Tensor], Tensor], low: NDArray[Any], high: NDArray[Any], grid: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    x, y = (np.linspace(a, b, grid) for a, b in zip(low, high, strict=True))
    where = torch.tensor(np.stack(np.meshgrid(x, y), -1), dtype=torch.get_default_dtype())
    with torch.no_grad():
        height = _array(log_density(where)).astype(float)
    if height.shape != (grid, grid):
        raise ShapeError(
            "the log density has another shape than its points",
            got=f"{height.shape} for points {tuple(where.shape)}",
            expected=(grid, grid),
            do="It must sum over the last axis only, as in -0.5 * z.square().sum(-1).",
        )
    if not np.isfinite(height).any():
        raise OptionError(
            "the log density is finite nowhere in the window",
            got=f"{x[0]:.3g} to {x[-1]:.3g} by {y[0]:.3g} to {y[-1]:.3g}",
            do="Give the extent where its mass is.",
        )
    height = np.where(np.isfinite(height), height, -np.inf)
    return x, y, np.maximum(height - height.max(), -100.0)  # contours do not take infinities


def _levels(height: NDArray[Any], masses: Sequence[float]) -> list[float]:
    """Log heights, increasing, at which the regions above hold these shares of the mass."""
    ranked = np.sort(height, axis=None)[::-1]
    mass = np.cumsum(np.exp(ranked))
    within = np.searchsorted(mass, np.array(masses) * mass[-1])
    return sorted({float(level) for level in ranked[within] if level < 0})


def codes(z: ArrayLike | Tensor, labels: ArrayLike | Tensor | None = None, *, ax: Axes | None = None) -> Axes:
    """Codes of data in the latent plane, classes told apart by colour and by name, numbers by shade.

    Args:
        z: Codes ``[N, 2]``.
        labels: Class ``[N]`` of each, whole numbers or words; or numbers that are not whole, which get a colour bar.
            ``None`` for one colour.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        ShapeError: There are not two dimensions, or not as many labels as codes.
    """
    points = _plane(z, "codes")
    kinds = None if labels is None else _array(labels)
    if kinds is not None and kinds.shape != (len(points),):
        raise ShapeError("labels do not fit", got=kinds.shape, expected=(len(points),))
    ax = _one(ax)
    dots: dict[str, Any] = {"s": min(12.0, max(2.0, 8000 / len(points))), "linewidths": 0}
    if kinds is None:
        ax.scatter(points[:, 0], points[:, 1], color=BLUE, alpha=0.5, **dots)
    elif np.issubdtype(kinds.dtype, np.floating):
        shades = ax.scatter(points[:, 0], points[:, 1], c=kinds, cmap="viridis", **dots)
        ax.figure.colorbar(shades, ax=ax, label="label")
    else:
        _classes(ax, points, kinds, dots)
    ax.set_aspect("equal")  # by the box: panels may share both axes
    ax.set(xlabel="$z_1$ (prior sd)", ylabel="$z_2$ (prior sd)")
    return ax


def _classes(ax: Axes, points: NDArray[Any], kinds: NDArray[Any], dots: dict[str, Any]) -> None:
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    classes = np.unique(kinds)
    if len(classes) <= len(PALETTE):
        colours: Sequence[Any] = PALETTE
    elif len(classes) <= 10:
        colours = [colormaps["tab10"](i) for i in range(10)]
    else:
        colours = list(colormaps["turbo"](np.linspace(0.05, 0.95, len(classes))))
    for kind, colour in zip(classes, colours, strict=False):
        own = points[kinds == kind]
        ax.scatter(own[:, 0], own[:, 1], color=colour, alpha=0.6, label=str(kind), **dots)
        # the member nearest to the middle: a ring has no one at its centre
        middle = own[np.abs(own - np.median(own, 0)).sum(1).argmin()]
        ax.annotate(
            str(kind),
            middle,
            ha="center",
            va="center",
            weight="bold",
            color="black",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def decoded_plane(
    decode: Callable[[Tensor], Tensor],
    *,
    extent: Extent = (-2.5, 2.5, -2.5, 2.5),
    num: int = 15,
    ax: Axes | None = None,
) -> Axes:
    """What a decoder makes of the latent plane: an image at each place of a grid.

    Args:
        decode: Codes ``[num, num, 2]`` to images ``[num, num, (C,) H, W]``, intensities from 0 to 1:
            `LatentModel.decode` of two dimensions.
        extent: Left, right, bottom and top of the window.
        num: Images along each axis.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        ShapeError: What comes back are no images.
    """
    check_at_least("num", num, 1)
    left, right, bottom, top = extent
    x = left + (right - left) * (torch.arange(num) + 0.5) / num
    y = bottom + (top - bottom) * (torch.arange(num) + 0.5) / num
    with torch.no_grad():
        pictures = decode(torch.stack(torch.meshgrid(x, y.flip(0), indexing="xy"), -1))
    if len(pictures.shape) not in (4, 5) or tuple(pictures.shape[:2]) != (num, num):
        raise ShapeError(
            "the decoder does not make images of codes",
            got=f"{tuple(pictures.shape)} for codes {(num, num, 2)}",
            expected=f"({num}, {num}, H, W), or with channels before H",
            do="Reshape flat pixels: lambda z: model.decode(z).unflatten(-1, (H, W)).",
        )
    ax = _one(ax)
    _show(ax, _mosaic(_array(pictures.flatten(0, 1)), num, gap=0), extent=extent)
    ax.set(xlabel="$z_1$ (prior sd)", ylabel="$z_2$ (prior sd)")
    return ax


def images(
    x: ArrayLike | Tensor, *, columns: int | None = None, rows: Sequence[str] = (), ax: Axes | None = None
) -> Axes:
    """Images side by side, row after row: samples of a model, or reconstructions below what they are of.

    Args:
        x: ``[N, (C,) H, W]``, intensities from 0 to 1, channels 1 (shown as ink on paper) or 3 (colour).
        columns: Images in a row; ``None`` for a square.
        rows: A caption for each row, at its left; each may stand for several rows.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        ShapeError: These are no images, or the captions do not divide the rows.
    """
    pictures = _array(x)
    if pictures.ndim not in (3, 4) or (pictures.ndim == 4 and pictures.shape[1] not in (1, 3)):
        raise ShapeError(
            "these are no images",
            got=pictures.shape,
            expected="(N, H, W), (N, 1, H, W) or (N, 3, H, W)",
            do="Reshape flat pixels: x.reshape(-1, H, W).",
        )
    columns = ceil(sqrt(len(pictures))) if columns is None else columns
    check_at_least("columns", columns, 1)
    lines = ceil(len(pictures) / columns)
    if rows and lines % len(rows):
        raise ShapeError("the captions do not divide the rows", got=len(rows), expected=lines)
    ax = _one(ax)
    picture = _mosaic(pictures, columns, gap=1)
    _show(ax, picture)
    each = len(picture) / max(len(rows), 1)
    ax.set_yticks([each * (i + 0.5) - 0.5 for i in range(len(rows))], list(rows))
    ax.set_xticks([])
    ax.tick_params(length=0)
    return ax


def _mosaic(pictures: NDArray[Any], columns: int, *, gap: int) -> NDArray[Any]:
    """Images ``[N, (C,) H, W]`` as one ``[rows · H, columns · W, C]``, apart by lines of grey."""
    if pictures.ndim == 3:
        pictures = pictures[:, None]
    missing = -len(pictures) % columns
    pictures = np.pad(pictures, [(0, missing), (0, 0), (0, 0), (0, 0)])
    frame = [(0, 0), (0, 0), (gap, 0), (gap, 0)]
    framed = np.pad(pictures.clip(0, 1), frame, constant_values=0.5)
    _, channels, height, width = framed.shape
    lines = framed.reshape(-1, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return lines.reshape(-1, columns * width, channels)[gap:, gap:]


def _show(ax: Axes, picture: NDArray[Any], **options: Any) -> None:
    ink: dict[str, Any] = {"cmap": "gray_r", "vmin": 0, "vmax": 1} if picture.shape[-1] == 1 else {}
    ax.imshow(picture.squeeze(-1) if ink else picture, **ink, **options)


def mode_weights(
    weights: ArrayLike | Tensor,
    *,
    truth: ArrayLike | Tensor | None = None,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """How each of several restarts divides its draws between the modes; bars that agree are restarts that agree.

    Args:
        weights: Share of mode ``k`` among the draws of restart ``r``: ``[R, K]``, rows that sum to 1.
        truth: The true shares ``[K]``, drawn as a bar and as lines through all others; ``None`` where nobody knows.
        names: A name for each mode; ``None`` for their numbers, from 1.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        ShapeError: The shares are no matrix, or truth or names are not as many as modes.
        OptionError: Shares are negative or do not sum to 1.

    >>> ax = mode_weights([[0.5, 0.5], [1.0, 0.0]], truth=[0.5, 0.5])
    >>> [tick.get_text() for tick in ax.get_yticklabels()]
    ['restart 1', 'restart 2', 'truth']
    """
    shares = _array(weights).astype(float)
    if shares.ndim != 2:
        raise ShapeError("the weights are no matrix", got=shares.shape, expected="(restarts, modes)")
    labels = [f"restart {i + 1}" for i in range(len(shares))]
    if truth is not None:
        true = _array(truth).astype(float)
        if true.shape != shares.shape[1:]:
            raise ShapeError("the truth has other modes", got=true.shape, expected=shares.shape[1:])
        shares, labels = np.vstack([shares, true]), [*labels, "truth"]
    if (shares < 0).any() or not np.allclose(shares.sum(1), 1, atol=1e-3):
        raise OptionError(
            "these are no shares",
            got=f"rows that sum to {shares.sum(1).round(3).tolist()}",
            expected="numbers >= 0 that sum to 1",
            do="Divide counts by their sum.",
        )
    modes = [str(i + 1) for i in range(shares.shape[1])] if names is None else list(names)
    if len(modes) != shares.shape[1]:
        raise ShapeError("the names are not as many as modes", got=modes, expected=shares.shape[1])
    ax = _one(ax)
    ends = shares.cumsum(1)
    for k, mode in enumerate(modes):
        style: dict[str, Any] = {"color": PALETTE[k % 8], "hatch": ["", "//", "..", "xx"][k // 8 % 4]}
        bars = ax.barh(
            labels, shares[:, k], left=ends[:, k] - shares[:, k], height=0.65, edgecolor="white", label=mode, **style
        )
        texts = [f"{100 * share:.0f} %" if share >= 0.06 else "" for share in shares[:, k]]
        dark = PALETTE[k % 8] in (BLUE, VERMILION, GREEN, BLACK)
        ink = "white" if dark else "black"
        ax.bar_label(bars, texts, label_type="center", color=ink, fontsize="small")
    if truth is not None:
        for end in ends[-1, :-1]:
            ax.axvline(end, color="black", lw=1, zorder=0)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the draws")
    ax.set_ylabel("")
    ax.legend(title="mode", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(modes), 8), frameon=False)
    return ax


def diagnosis(checks: Iterable[Check], *, ax: Axes | None = None) -> Axes:
    """The checks of a diagnosis, a line each: how far its figure is inside of its limit, or beyond.

    Left of the line in the middle is good, and one step is a factor of two. A check without a figure, a positive limit
    or a verdict, or whose verdict had other reasons than its figure, is shown by its mark on the line, hollow.

    Args:
        checks: Such as the `Report` of ``fit.diagnose()``.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        OptionError: There are no checks, or they are something else.
    """
    found = list(checks)
    others = sorted({type(check).__name__ for check in found if not isinstance(check, Check)})
    if others or not found:
        raise OptionError(
            "these are no checks",
            got=", ".join(others) or "none",
            expected="at least one Check",
            do="Pass the report of fit.diagnose().",
        )
    ax = _one(ax, figsize=(7, 0.9 + 0.34 * len(found)))
    text: dict[str, Any] = {"va": "center", "fontsize": "small"}
    for line, check in enumerate(found):
        marker, colour = MARKS.get(check.state, ("o", "0.6"))
        beyond = _beyond(check)
        at = 0.0 if beyond is None else beyond
        ax.hlines(line, 0, at, color=colour, lw=3, alpha=0.5)
        face = colour if beyond is not None else "white"
        ax.plot(at, line, marker, color=colour, mfc=face, ms=9, clip_on=False, zorder=3)
        ax.text(REACH + 0.5, line, check.state, color=colour, weight="bold", **text)
        ax.text(REACH + 1.5, line, _figures(check), **text)
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


REACH = 3  # octaves to either side of a limit


def _beyond(check: Check) -> float | None:
    """Octaves by which a figure is beyond its limit, those inside negative; ``None`` where that has no meaning."""
    limit, value = check.limit, check.value
    if check.state not in MARKS or value is None or isnan(value) or not (limit and limit > 0):
        return None
    octaves = max(-REACH, min(REACH, log2(abs(value) / limit))) if value else -REACH
    return octaves if (octaves > 0) == (check.state == "failed") else None


def _figures(check: Check) -> str:
    value, limit = check.value, check.limit
    if value is None or isnan(value):
        return ""
    return f"{value:.3g}" if limit is None else f"{value:.3g}, limit {limit:.3g}"


def dashboard(
    checks: Iterable[Check],
    fit: Recorded,
    plan: Schedule | Any = None,
    *,
    axes: Sequence[Axes] | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """A fit at one look: its `diagnosis`, and below it the course of its `training`.

    Args:
        checks: As for `diagnosis`.
        fit: As for `training`.
        plan: As for `training`.
        axes: Where to draw: one for the diagnosis, then those of `training`; ``None`` for a new figure.

    Returns:
        The Axes, ``[1 + number of pictures of training]``.
    """
    found = list(checks)
    count = len(_metrics(fit)) + ((plan or getattr(fit, "schedule", None)) is not None)
    if axes is None:
        import matplotlib.pyplot as plt

        high = 0.7 + 0.34 * len(found)
        figure = plt.figure(figsize=(max(8.0, 3.8 * count), high + 3.2), layout="constrained")
        cells = figure.add_gridspec(2, count, height_ratios=[high, 3.2])
        below = [figure.add_subplot(cells[1, i]) for i in range(count)]
        axes = [figure.add_subplot(cells[0, :]), *below]
    drawn = _several(axes, 1 + count)
    diagnosis(found, ax=drawn[0])
    training(fit, plan, axes=drawn[1:])
    return drawn


def _one(ax: Axes | None, **figure: Any) -> Axes:
    """The Axes given, or those of a new figure, which is the caller's to show and to close."""
    if ax is None:
        import matplotlib.pyplot as plt

        return plt.figure(layout="constrained", **figure).add_subplot()
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        raise OptionError(
            "ax is not one Axes of matplotlib", got=type(ax).__name__, do="Of several, pass one: axes[0]."
        )
    return ax


def _several(axes: Any, count: int) -> NDArray[Any]:
    """As many Axes, in one row of an array."""
    if axes is None:
        import matplotlib.pyplot as plt

        size = (3.8 * count, 3.2)
        axes = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)[1]
    flat = np.array(axes, dtype=object).ravel()
    if len(flat) != count:
        raise OptionError("there are not as many Axes as pictures", got=len(flat), expected=count)
    for ax in flat:
        _one(ax)
    return flat


def _plane(points: ArrayLike | Tensor, what: str) -> NDArray[Any]:
    """Points ``[N, 2]`` as an array."""
    found = _array(points)
    if found.ndim != 2 or found.shape[1] != 2 or not len(found):
        raise ShapeError(
            f"the {what} are not in the plane",
            got=found.shape,
            expected="(number, 2)",
            do="Pick two columns: draws[:, [0, 1]]. For all pairs of many, az.plot_pair of to_arviz.",
        )
    return found


def _array(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
