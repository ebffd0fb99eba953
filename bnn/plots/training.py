"""Training: the objective from step to step, and an ensemble's functions on their way."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bnn.arrays import tensor
from bnn.errors import DataError
from bnn.plots import _style as style
from bnn.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation
    from matplotlib.axes import Axes

_EARLY = 0.1  # share of the steps whose objective may leave the picture at the bottom


def history(
    posteriors: Any,
    *,
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Objective at each step, faint, and its median over a twentieth of the steps.

    The first tenth of the steps may lie below the picture: it would flatten the rest.

    Args:
        posteriors: one, or several by name, of methods that optimise; or the values, (step,),
            alike. Objectives of other methods (an ELBO, a log joint) are not comparable.
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: a posterior has no history.

    Example:
        >>> ax = history({"Adam": [-9.0, -4.0, -2.0, -1.5, -1.4], "SGD": [-9.0, -8.0, -7.0]})
    """
    found = {name: _history(name, given) for name, given in style.named(posteriors).items()}
    ax = style.axes(ax)
    seen = []
    for i, (name, values) in enumerate(found.items()):
        colour = style.SERIES[i % len(style.SERIES)]
        steps, middle = np.arange(1, len(values) + 1), _running_median(values)
        if np.ptp(values - middle) > 0:
            ax.plot(steps, values, color=colour, lw=0.5, alpha=0.3)
        ax.plot(steps, middle, color=colour, lw=1.8, label=name or "objective")
        late = values[int(_EARLY * len(values)) :]
        seen += [late.min(), late.max(), middle.max()]
    low, high = min(seen), max(seen)
    room = 0.05 * (high - low) or 1.0
    ax.set(
        xlabel="step",
        ylabel="objective, larger is better (nats)",
        title=title,
        ylim=(low - room, high + room),
    )
    ax.margins(x=0.01)
    if len(found) > 1 or "" not in found:
        style.legend_below(ax, min(len(found), 3))
    return ax


def _history(name: str, given: Any) -> np.ndarray:
    if not isinstance(given, Posterior):
        values = tensor(given, "history").flatten().double().cpu().numpy()
    elif given.history is None:
        told = f'"{name}" ' if name else ""
        raise DataError(
            f"The posterior {told}by {type(given.method).__name__} has no history: its method does "
            "not optimise. For draws use plots.trace."
        )
    else:
        values = given.history.double().cpu().numpy()
    kept = values[np.isfinite(values)]
    if not len(kept):
        raise DataError("The history has no finite value.")
    return kept


def _running_median(values: np.ndarray) -> np.ndarray:
    half = max(len(values) // 40, 0)
    padded = np.concatenate([values[:1].repeat(half), values, values[-1:].repeat(half)])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def members(
    posterior: Posterior,
    *inputs: Any,
    data: Sequence[Any] | None = None,
    copies: int = 4,
    column: int = 0,
    unit: str = "",
    label: str = "x",
    title: str = "",
    ax: "Axes | Sequence[Axes] | None" = None,
) -> "Axes | list[Axes]":
    """An ensemble's functions on their way through training: small multiples, the last the end.

    Args:
        posterior: of an ensemble fitted with snapshots, such as `DeepEnsemble(snapshots=50)`;
            without, or with `copies=1`, its end alone.
        *inputs: rows to predict at, a grid of the first input.
        data: (x, y) to draw as points.
        copies: how many of the snapshots, evenly spread over their steps.
        column: of the first input, to draw along.
        unit: of f.
        label: of the input, its unit included.
        title: above the axes; default the step of each.
        ax: one axes for the end alone, or as many as `copies`; default a new figure.

    Returns:
        The axes drawn in: one, or a list.

    Raises:
        DataError: f has several outputs; the axes given are not as many as are drawn.

    Example:
        >>> import bnn, torch, warnings
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> method = bnn.DeepEnsemble(members=3, steps=50, snapshots=4)
        >>> with warnings.catch_warnings(action="ignore"):  # so few steps do not suffice
        ...     fitted = bnn.fit(bnn.models.mlp_regression(1, (5,)), x, x[:, 0], method=method)
        >>> panels = members(fitted, x, data=(x, x[:, 0]), copies=2)
    """
    frames = _frames(posterior, "members")
    alone = ax is not None and not isinstance(ax, Sequence | np.ndarray)
    count = 1 if alone else min(copies, len(frames))
    if count < 1:
        raise DataError(f"copies is {copies}. Pass at least 1.")
    last = len(frames) - 1
    places = np.linspace(last if count == 1 else 0, last, count).round().astype(int)
    curves = [_curves(frames[i], inputs, column) for i in places]
    points = style.points(data, column, "members")
    given: Any = ax
    where: list[Any] = [ax] if alone else list(given) if ax is not None else _grid(count)
    if len(where) != count:
        raise DataError(f"{count} copies are drawn, and {len(where)} axes were given.")
    limits = _limits(curves[-1][1], points)
    for i, (x, f), each in zip(places, curves, where, strict=True):
        _member_lines(each, x, f)
        _dots(each, points)
        each.set(ylim=limits, title=title or _step(frames[i]))
        each.margins(x=0.01)
        left = ax is not None or each.get_subplotspec().is_first_col()
        each.set_ylabel(style.within("f", unit) if left else "")
        below = ax is not None or each.xaxis.get_tick_params()["labelbottom"]
        each.set_xlabel(label if below else "")
    if count == 1:
        style.legend_below(where[0], 3)
        return where[0]
    if ax is None:
        _legend_of_all(where[0])
    return where


def members_film(
    posteriors: "Posterior | Mapping[str, Posterior]",
    *inputs: Any,
    data: Sequence[Any] | None = None,
    column: int = 0,
    unit: str = "",
    label: str = "x",
    interval: float = 100.0,
    ax: "Axes | Sequence[Axes] | None" = None,
) -> "FuncAnimation":
    """The same as a film: a matplotlib animation, one picture for each snapshot.

    Keep what is returned until it is shown or saved: `film.save("ensemble.gif")`, in a notebook
    `IPython.display.HTML(film.to_jshtml())`.

    Args:
        posteriors: of an ensemble fitted with snapshots, or several by name, side by side; one that
            has fewer of them stays at its end.
        *inputs: rows to predict at, a grid of the first input.
        data: (x, y) to draw as points.
        column: of the first input, to draw along.
        unit: of f.
        label: of the input, its unit included.
        interval: between pictures, milliseconds.
        ax: where to draw, one axes for each posterior; default a new figure.

    Raises:
        DataError: a posterior has no snapshots; f has several outputs; another number of axes.

    Example:
        >>> import bnn, torch, warnings
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> method = bnn.DeepEnsemble(members=3, steps=50, snapshots=4)
        >>> with warnings.catch_warnings(action="ignore"):  # so few steps do not suffice
        ...     fitted = bnn.fit(bnn.models.mlp_regression(1, (5,)), x, x[:, 0], method=method)
        >>> film = members_film(fitted, x)  # film.save("ensemble.gif")
    """
    from matplotlib.animation import FuncAnimation

    named = style.named(posteriors)
    reels = {name: _reel(posterior) for name, posterior in named.items()}
    points = style.points(data, column, "members_film")
    given: Any = ax
    if isinstance(ax, Iterable):
        where = list(given)
    else:
        where = [style.axes(given)] if len(reels) == 1 else _grid(len(reels))
    if len(where) != len(reels):
        raise DataError(f"{len(reels)} films are drawn, and {len(where)} axes were given.")
    draws, limits = [], []
    for each, (name, frames) in zip(where, reels.items(), strict=True):
        curves = [_curves(frame, inputs, column) for frame in frames]
        draws.append(_moving(each, [f"{name}, {_step(f)}".lstrip(", ") for f in frames], curves))
        _dots(each, points)
        limits.append(_limits(curves[-1][1], points))
        each.set(xlabel=label, ylabel=style.within("f", unit), ylim=limits[-1])
        each.margins(x=0.01)
        if len(where) == 1:
            style.legend_below(each, 3)
    if ax is None and len(where) > 1:
        where[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        for each in where:
            each.label_outer()
        _legend_of_all(where[0])
    figure: Any = where[0].figure
    return FuncAnimation(
        figure,
        lambda i: [artist for draw in draws for artist in draw(i)],
        frames=max(map(len, reels.values())),
        interval=interval,
        blit=False,
    )


def _reel(posterior: Any) -> list[Posterior]:
    style.require(posterior, Posterior, "members_film", "a posterior")
    if not posterior.frames:
        raise DataError(
            "The posterior has no snapshots. Fit it with some: bnn.DeepEnsemble(snapshots=50)."
        )
    return posterior.frames


def _moving(
    ax: Any, titles: list[str], curves: "list[tuple[np.ndarray, np.ndarray]]"
) -> Callable[[int], list[Any]]:
    """Draws the first picture; what is returned puts the i-th, or the last, in its place."""
    lines, middle = _member_lines(ax, *curves[0])
    head = ax.set_title(titles[0])

    def draw(i: int) -> list[Any]:
        i = min(i, len(curves) - 1)
        f = curves[i][1]
        for line, values in zip(lines, f, strict=True):
            line.set_ydata(values)
        middle.set_ydata(f.mean(0))
        head.set_text(titles[i])
        return [*lines, middle, head]

    return draw


def _legend_of_all(ax: Any) -> None:
    handles, told = ax.get_legend_handles_labels()
    ax.figure.legend(
        handles, told, loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )


def _frames(posterior: Posterior, plot: str) -> list[Posterior]:
    style.require(posterior, Posterior, plot, "a posterior")
    return posterior.frames or [posterior]


def _step(frame: Posterior) -> str:
    steps = None if frame.history is None else len(frame.history)
    return "end" if steps is None else f"step {steps}"


def _grid(count: int) -> list[Any]:
    from matplotlib import pyplot

    across = 2 if count == 4 else min(count, 3)
    down = math.ceil(count / across)
    size = style.SIZE if count == 1 else (3.2 * across, 2.3 * down + 0.4)
    _, grid = pyplot.subplots(
        down, across, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for empty in grid.flat[count:]:
        empty.set_visible(False)
    for lowest in grid.flat[max(count - across, 0) : count]:
        lowest.tick_params(labelbottom=True)
    return list(grid.flat[:count])


def _curves(frame: Posterior, inputs: tuple, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, sorted, (row,), and f of each member, (member, row)."""
    prediction = frame.predict(*inputs)
    x, order = style.column_of(prediction, column, "members")
    f = style.f_draws(prediction, None, "members")
    return x[order], f.reshape(-1, f.shape[-1])[:, order]


def _member_lines(ax: Any, x: np.ndarray, f: np.ndarray) -> tuple[list[Any], Any]:
    faint = max(0.3, min(0.9, 8 / len(f)))
    lines = ax.plot(x, f.T, color=style.SERIES[5], lw=0.8, alpha=faint)
    ax.plot([], [], color=style.SERIES[5], lw=1, label=f"{len(f)} members")
    (middle,) = ax.plot(x, f.mean(0), color=style.EPISTEMIC, lw=2, label="their mean")
    return lines, middle


def _dots(ax: Any, points: "tuple[np.ndarray, np.ndarray] | None") -> None:
    if points is not None:
        ax.plot(*points, ".", color=style.DATA, ms=3, label="data")


def _limits(f: np.ndarray, points: "tuple[np.ndarray, np.ndarray] | None") -> tuple[float, float]:
    """Of the end, so that it fills the picture; wild beginnings are cut off."""
    low, high = float(f.min()), float(f.max())
    if points is not None:
        low, high = min(low, float(points[1].min())), max(high, float(points[1].max()))
    room = 0.1 * (high - low) or 1.0
    return low - room, high + room
