"""Turns: Pyro's effects and torch's settings are the process's, and threads take turns at them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import Any, ParamSpec, TypeVar

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


PYRO_CHECKS = ("validate_infer", "validate_poutine", "validate_distributions_pyro")


class _Turns:
    """A lock that its thread may take again, and that no child has of a thread that it has not.

    A child forked meanwhile has the dtype, threads and checks that were there when the lock was
    taken, and no effects. Generators and Pyro's parameter store are as the fork found them.
    """

    def __init__(self) -> None:
        self._lock, self._depth = RLock(), 0
        self._before: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self._lock.acquire()
        if not self._depth:
            checks = vars(torch.distributions.Distribution)["_validate_args"]
            pyros = {name: pyro.settings.get(name) for name in PYRO_CHECKS}
            self._before = (torch.get_default_dtype(), torch.get_num_threads(), checks, pyros)
        self._depth += 1

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        self._lock.release()

    def forked(self) -> None:
        """In a child: where another thread held the lock, what it ran does not go on here."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
            return
        dtype, threads, checks, pyros = self._before
        self.__init__()
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        pyro.settings.set(**pyros)
        torch.distributions.Distribution.set_default_validate_args(checks)
        _PYRO_STACK.clear()


ALONE = _Turns()
"""Held where a model runs: Pyro's effects, generators and torch's settings are the process's."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ALONE.forked)


def alone(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """The function, while other threads wait."""

    @wraps(function)
    def within(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        with ALONE:
            return function(*args, **kwargs)

    return within


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another default dtype, for this thread alone."""
    with ALONE:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
