"""What can go wrong, by name: the model, the data, the fit, or a file."""

import sys


class ModelError(ValueError):
    """The model cannot be fitted as it is written: a site, a plate or a shape is wrong.

    Example:
        >>> import bnn
        >>> bnn.fit(lambda x, y: None, [1.0, 2.0], [1.0, 2.0])
        Traceback (most recent call last):
        bnn.errors.ModelError: The model has no observed site ...
    """


class DataError(ValueError):
    """The data do not fit the model: rows, columns, types, labels or missing values.

    Example:
        >>> import bnn
        >>> bnn.fit(bnn.models.linear(1), [[1.0], [2.0]], [[1.0], [2.0]])
        Traceback (most recent call last):
        bnn.errors.DataError: ...
    """


class FitError(RuntimeError):
    """A fit had to stop.

    Attributes:
        step: optimisation step or sampler iteration, counted from 0; None where there is none.
        site: name of the site concerned, or None.

    Example:
        >>> error = FitError("The gradient is not finite.", step=3, site="sigma")
        >>> error.step, error.site
        (3, 'sigma')
    """

    def __init__(self, message: str, *, step: int | None = None, site: str | None = None):
        super().__init__(message)
        self.step = step
        self.site = site


class CheckpointError(RuntimeError):
    """A file does not hold what it should: damaged, foreign, or of another schema.

    Example:
        >>> import bnn
        >>> bnn.load("nowhere.bnn", bnn.models.linear(1))
        Traceback (most recent call last):
        bnn.errors.CheckpointError: ...
    """


class ResumeMismatch(CheckpointError):
    """A folder holds another fit than the one that was called.

    Attributes:
        field: what differs: "data", "model", "settings", "seed", "dtype" or "version".

    Example:
        >>> import bnn, tempfile, warnings
        >>> folder, x, y = tempfile.TemporaryDirectory(), [[0.0], [1.0]], [0.0, 1.0]
        >>> method = bnn.MAP(steps=30)
        >>> with warnings.catch_warnings(action="ignore"):  # so few steps do not suffice
        ...     fitted = bnn.fit(bnn.models.linear(1), x, y, method=method, checkpoint=folder.name)
        >>> bnn.fit(bnn.models.linear(1), x, y, method=method, seed=1, checkpoint=folder.name)
        Traceback (most recent call last):
        bnn.errors.ResumeMismatch: ...
    """

    def __init__(self, message: str, *, field: str = ""):  # a pickle calls it with the message
        super().__init__(message)
        self.field = field


class ConvergenceWarning(UserWarning):
    """The answer is doubtful: the method has not reached what it approximates.

    Example:
        >>> import bnn, warnings
        >>> with warnings.catch_warnings(action="error", category=ConvergenceWarning):
        ...     bnn.fit(bnn.models.linear(1), [[0.0], [1.0]], [0.0, 1.0], method=bnn.MAP(steps=30))
        Traceback (most recent call last):
        bnn.errors.ConvergenceWarning: MAP: the log joint was still rising ...
    """


class ApproximationWarning(UserWarning):
    """The answer is of another kind than one might think, and the message says which.

    Example:
        >>> import bnn, warnings
        >>> with warnings.catch_warnings(action="error", category=ApproximationWarning):
        ...     bnn.conformal.split([1.0, 2.0], [1.5, 1.5], level=0.9)
        Traceback (most recent call last):
        bnn.errors.ApproximationWarning: 2 held-out rows cannot tell a level of 0.9...
    """


class PerformanceWarning(UserWarning):
    """The answer is right and takes longer than it could, and the message says why.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore", PerformanceWarning)  # where one knows why
    """


class CheckpointWarning(UserWarning):
    """The fit is right and goes on, and something about keeping it is not.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(action="error", category=CheckpointWarning):
        ...     pass  # a fit here would end where it cannot be kept
    """


class DataWarning(UserWarning):
    """The data can be used, and something about them probably was not meant.

    Example:
        >>> import bnn, torch, warnings
        >>> x, y = torch.arange(1990.0, 2020.0)[:, None], torch.arange(30.0)
        >>> with warnings.catch_warnings(action="error", category=DataWarning):
        ...     bnn.fit(bnn.models.linear(1), x, y)
        Traceback (most recent call last):
        bnn.errors.DataWarning: "x", column "0", lies ... of its standard deviations from 0. ...
    """


def outside() -> int:
    """The `stacklevel` at which a warning points at the code that called the package."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "bnn":
        frame, level = frame.f_back, level + 1
    return level
