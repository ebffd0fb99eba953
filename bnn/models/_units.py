"""Units: what standardises inside a model, so that f and densities stay in the user's units."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Units:
    """Centre and unit of each column, (column,) each, float64.

    Attributes:
        mean: mean over the rows.
        sd: standard deviation over the rows (divided by the number of rows); 1 where it is 0.
    """

    mean: Tensor
    sd: Tensor

    @classmethod
    def of(cls, data: Any, name: str, columns: int) -> "Units":
        """Units of an array, (row, column), or (row,) for a single column.

        Args:
            data: tensor, NumPy array, pandas object or list.
            name: what to call it in messages.
            columns: how many columns there must be.

        Raises:
            TypeError: not numbers.
            ValueError: no rows, another number of columns, or values that are not finite.
        """
        table = _numbers(data, name)
        if table.ndim == 1:
            table = table[:, None]
        if table.ndim != 2 or table.shape[1] != columns or not len(table):
            raise ValueError(
                f"standardize: {name} has shape {tuple(table.shape)}, and the model has {columns} "
                f"columns there. Pass shape (row, {columns}), with at least one row."
            )
        if not table.isfinite().all():
            raise ValueError(
                f"standardize: {name} holds NaN or infinite values. Drop or fill those rows."
            )
        constant = table.amax(0) == table.amin(0)  # a mean is rounded, so sd need not be 0
        if len(table) > 1 and constant.any():
            labels = list(getattr(data, "columns", range(columns)))
            names = ", ".join(repr(labels[i]) for i in range(columns) if constant[i])
            warnings.warn(
                f"standardize: column {names} of {name} is constant. It is centred and not "
                "scaled, and says nothing about the rows.",
                UserWarning,
                stacklevel=4,
            )
        return cls(table.mean(0), table.std(0, correction=0).masked_fill(constant, 1.0))

    def standardized(self, x: Tensor) -> Tensor:
        """(x - mean) / sd, in the dtype of x, or torch's default one for whole numbers."""
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return ((x - self.mean.to(x.device)) / self.sd.to(x.device)).to(dtype)


def _numbers(data: Any, name: str) -> Tensor:
    """An array as float64 on the CPU, in memory of its own."""
    try:
        if hasattr(data, "to_numpy"):  # pandas
            data = data.to_numpy(dtype=float)
        if hasattr(data, "copy"):  # NumPy's read-only and reversed arrays
            data = data.copy()
        return torch.as_tensor(data, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"standardize: {name} cannot become numbers: {error}") from error
