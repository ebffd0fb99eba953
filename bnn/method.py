"""Method: the settings of one way to approximate p(weights | data)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from bnn.data import Data
    from bnn.diagnostics import Finding
    from bnn.posterior import Posterior
    from bnn.sites import Sites

Model = Callable[..., Any]
Tensors = dict[str, Tensor]

RUNS = ("chains", "members", "restarts")
"""Settings that count independent runs. A method with `parts: int = 1` too divides them."""

METHODS: dict[str, type["Method"]] = {}
"""Every concrete method by its class name: what `bnn.load` looks a name up in."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Settings of one way to approximate p(weights | data): frozen, equal by value.

    A method is written in one file: a subclass with its settings as fields, `fit`, and, where the
    program that predicts is not the user's model itself, `program`. A setting that `program` needs
    and that may be code, which no file holds, has the field metadata {"predicts": True}.

    Attributes:
        adds_sites: True for a method whose program states latent sites of its own, so that there
            is something to infer in a model that has none.
        all_rows: True for a method that, whatever its `batch_size`, has work on all rows together.
        distributes: True for a method all of whose work on rows is steps on minibatches, which
            several processes can share.

    Example:
        >>> import bnn
        >>> method = bnn.NUTS(chains=4, draws=500)
        >>> isinstance(method, Method), method == bnn.NUTS(chains=4, draws=500)
        (True, True)
        >>> method.draws = 3
        Traceback (most recent call last):
        dataclasses.FrozenInstanceError: cannot assign to field 'draws'
    """

    adds_sites: ClassVar[bool] = False
    all_rows: ClassVar[bool] = False
    distributes: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not getattr(cls.fit, "__isabstractmethod__", False):
            METHODS[cls.__name__] = cls

    @property
    def abreast(self) -> int:
        """Runs of the model that are computed together: with many, a second thread pays.

        Default: its particles, or one.
        """
        return getattr(self, "particles", 1)

    def work(self, rows: int, size: int) -> int:
        """Multiplications of one call, about: rows x weights x runs computed together.

        Of a minibatch, unless the method goes over `all_rows` at once as well.
        """
        batch = None if self.all_rows else getattr(self, "batch_size", None)
        return min(rows, batch or rows) * size * self.abreast

    @abstractmethod
    def fit(
        self,
        model: Model,
        data: "Data",
        sites: "Sites",
        *,
        seed: np.random.SeedSequence,
        progress: bool,
    ) -> "Posterior":
        """Approximates the posterior. Called by `bnn.fit`, after the contract check.

        Args:
            model: the user's model.
            data: its arguments, checked.
            sites: what the contract check found in it.
            seed: root of every random number; spawn one child for each chain, member or phase.
            progress: whether to show a bar.
        """

    @property
    def runs(self) -> str:
        """The setting that counts independent runs, of a method that has `parts`; else ""."""
        return next((name for name in RUNS if hasattr(self, name) and hasattr(self, "parts")), "")

    def divided(self) -> "list[Method]":
        """The settings of each of its parts: itself, unless it is told to have more than one."""
        parts = getattr(self, "parts", 1)
        if parts == 1:
            return [self]
        each, more = divmod(getattr(self, self.runs), parts)
        counts = [each + (part < more) for part in range(parts)]
        return [replace(self, **{"parts": 1, self.runs: count}) for count in counts]

    def join(self, parts: "Sequence[Posterior]") -> "Posterior":
        """One posterior of those of its parts. Default: their runs are chains."""
        from bnn.parts import joined

        return joined(parts)

    def program(self, model: Model, params: Tensors) -> Model:
        """The callable that, run at one draw, samples the observations. Default: the model."""
        return model

    @property
    def is_point(self) -> bool:
        """True of settings whose answer is one value, so that no variance is nothing to warn of."""
        return False

    def findings(self, posterior: "Posterior") -> "Sequence[Finding]":
        """What only this method can tell of its fit, for `Posterior.diagnose`. Default: nothing."""
        return ()

    def at_fit(self, posterior: "Posterior") -> "Sequence[Finding]":
        """Those that `fit` warns of where they are doubtful. Default: all; leave out what costs."""
        return self.findings(posterior)


def name_of(model: Model) -> str:
    """What a model is called: its function's name, else its class's."""
    return getattr(model, "__name__", type(model).__name__)


def check_count(method: str, **counts: Any) -> None:
    """Refuses settings that are not whole numbers of at least 1.

    Raises:
        TypeError: one is not a whole number.
        ValueError: one is below 1.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{method}({name}={value!r}): {name} is a whole number, for example 4.")
        if value < 1:
            raise ValueError(f"{method}({name}={value!r}): {name} is at least 1.")


def check_parts(method: Method) -> None:
    """Refuses more parts than there are runs to divide.

    Raises:
        TypeError: `parts` is not a whole number.
        ValueError: it is below 1, or above the number of runs.
    """
    name, parts, count = type(method).__name__, method.parts, getattr(method, method.runs)  # type: ignore[attr-defined]
    check_count(name, parts=parts)
    if parts > count:
        told = f"{name}({method.runs}={count}, parts={parts})"
        raise ValueError(f"{told}: each part has at least one of them.")


def check_positive(method: str, **values: Any) -> None:
    """Refuses settings that are not finite numbers above 0.

    Raises:
        TypeError: one is not a number.
        ValueError: one is not above 0, or not finite.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise TypeError(f"{method}({name}={value!r}): {name} is a number above 0.")
        if not 0 < value < float("inf"):
            raise ValueError(f"{method}({name}={value!r}): {name} is a finite number above 0.")
