"""What all pictures share: colours, axes, legends, and how what they are given is read."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bnn.arrays import tensor
from bnn.errors import DataError
from bnn.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): told apart by colour-blind readers and in grey.
ALEATORIC, EPISTEMIC, TOTAL = "#E69F00", "#0072B2", "#000000"
TRUTH, IDEAL, DATA, CHANCE = "#D55E00", "#444444", "#222222", "0.88"
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
SIZE = (5.0, 4.0)  # inches: half the width of a notebook
_LONG = 38  # characters: two longer names side by side are wider than that

T = TypeVar("T")


def axes(ax: "Axes | None", size: tuple[float, float] = SIZE) -> "Axes":
    """The axes given, or those of a new figure."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def look(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series."""
    return {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]}


def tint(colour: str) -> tuple[float, float, float]:
    """A colour half way to white, for areas: opaque, so that it is the same over any other."""
    from matplotlib.colors import to_rgb

    red, green, blue = ((1 + part) / 2 for part in to_rgb(colour))
    return red, green, blue


def legend_below(ax: "Axes", columns: int = 2, drop: float = 0.16) -> None:
    """A legend under the axes, where it covers nothing; `drop` is a share of their height."""
    names = ax.get_legend_handles_labels()[1]
    columns = 1 if any(len(name) > _LONG for name in names) else columns
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -drop),
        ncols=columns,
        frameon=False,
        fontsize="small",
    )


def within(label: str, unit: str) -> str:
    """A label with its unit: "f (mg/dl)"."""
    return f"{label} ({unit})" if unit else label


def named(given: T | Mapping[str, T]) -> Mapping[str, T]:
    """One thing as a dictionary of one, without a name.

    Raises:
        DataError: an empty dictionary.
    """
    if not isinstance(given, Mapping):
        return {"": given}
    if not given:
        raise DataError('There is nothing to draw. Pass one, or {"name": one, ...}.')
    return given


def require(given: Any, kind: type, plot: str, example: str) -> None:
    """Refuses what is of another type.

    Raises:
        TypeError: names the plot and what to pass.
    """
    if not isinstance(given, kind):
        raise TypeError(f"plots.{plot} got a {type(given).__name__}. Pass {example}.")


def numbers_only(prediction: Prediction, plot: str, instead: str) -> None:
    """Refuses a prediction of labels.

    Raises:
        DataError: names the plot that draws them.
    """
    require(prediction, Prediction, plot, "posterior.predict(x)")
    if prediction.probs is not None:
        raise DataError(f"plots.{plot} draws numbers; for labels use plots.{instead}.")


def column_of(prediction: Prediction, column: int, plot: str) -> tuple[np.ndarray, np.ndarray]:
    """One column of the first input, (row,), and the order that sorts it.

    Raises:
        DataError: the prediction has no inputs, or the input has no such column.
    """
    if not prediction.inputs:
        raise DataError(f"plots.{plot} draws along an input, and the prediction has none.")
    x = values_along(prediction.inputs[0], column, plot)
    return x, np.argsort(x, kind="stable")


def values_along(x: Any, column: int, plot: str) -> np.ndarray:
    """One column of (row,) or (row, column).

    Raises:
        DataError: another shape, or no such column.
    """
    values = tensor(x, "x").cpu().numpy()
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or column not in range(-values.shape[1], values.shape[1]):
        raise DataError(
            f"x has shape {tuple(values.shape)} and plots.{plot} draws along column {column}. "
            "Pass the number of a column of (row, column)."
        )
    return values[:, column]


def points(
    data: Sequence[Any] | None, column: int, plot: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """A column of x and y, (row,) each, of data=(x, y).

    Raises:
        DataError: something else than a pair; y is not one number a row of x.
    """
    if data is None:
        return None
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise DataError("data is a pair of inputs and observations. Pass data=(x, y).")
    x, y = values_along(data[0], column, plot), tensor(data[1], "y").cpu().numpy()
    if x.shape != y.shape:
        raise DataError(f"data has x of {len(x)} rows and y of shape {y.shape}. Pass (row,).")
    return x, y


def one_number_a_row(prediction: Prediction, plot: str) -> None:
    """Refuses rows with several outputs.

    Raises:
        DataError: states the shape.
    """
    if prediction.mean.ndim != 1:
        raise DataError(
            f"The prediction has rows {tuple(prediction.mean.shape)}, and plots.{plot} draws one "
            "number of each, (row,)."
        )


def f_draws(prediction: Prediction, output: int | None, plot: str) -> np.ndarray:
    """Draws of f, (chain, draw, row); of several outputs, the one chosen.

    Raises:
        DataError: f has several outputs and none was chosen, or there is no such one.
    """
    require(prediction, Prediction, plot, "posterior.predict(x)")
    f = prediction.f.cpu()
    if f.ndim > 3 and output is None and f[0, 0, 0].numel() == 1:
        return f.flatten(2).numpy()
    if f.ndim > 3 and output is not None and f.ndim == 4 and output in range(f.shape[3]):
        return f[..., output].numpy()
    if f.ndim != 3 or output is not None:
        raise DataError(
            f"f has shape (chain, draw, row, *) = {tuple(f.shape)}. For plots.{plot} choose one of "
            "its outputs by output=0, 1, ..., or leave that out where a row has one."
        )
    return f.numpy()
