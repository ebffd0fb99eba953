"""What can go wrong, by name: the model, the data, the fit, or a file."""

import sys


class ModelError(ValueError):
    """The model cannot be fitted as it is written: a site, a plate or a shape is wrong."""


class DataError(ValueError):
    """The data do not fit the model: rows, columns, types, labels or missing values."""


class FitError(RuntimeError):
    """A fit had to stop.

    Attributes:
        step: optimisation step or sampler iteration, counted from 0; None where there is none.
        site: name of the site concerned, or None.
    """

    def __init__(self, message: str, *, step: int | None = None, site: str | None = None):
        super().__init__(message)
        self.step = step
        self.site = site


class CheckpointError(RuntimeError):
    """A file does not hold what it should: damaged, foreign, or of another schema."""


class ResumeMismatch(CheckpointError):
    """A folder holds another fit than the one that was called.

    Attributes:
        field: what differs: "data", "model", "settings", "seed", "dtype" or "version".
    """

    def __init__(self, message: str, *, field: str):
        super().__init__(message)
        self.field = field


class ConvergenceWarning(UserWarning):
    """The answer is doubtful: the method has not reached what it approximates."""


class ApproximationWarning(UserWarning):
    """The answer is of another kind than one might think, and the message says which."""


class PerformanceWarning(UserWarning):
    """The answer is right and takes longer than it could, and the message says why."""


class CheckpointWarning(UserWarning):
    """The fit is right and goes on, and something about keeping it is not."""


class DataWarning(UserWarning):
    """The data can be used, and something about them probably was not meant."""


def outside() -> int:
    """The `stacklevel` at which a warning points at the code that called the package."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "bnn":
        frame, level = frame.f_back, level + 1
    return level
