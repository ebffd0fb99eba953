"""Progress bars: tqdm where somebody watches, nothing elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


def bar(total: int, what: str, show: bool, *, initial: int = 0) -> Any:
    """A bar on standard error, for whoever watches a terminal or a notebook.

    Silent where `show` is False, where standard error goes to a file, and where the environment
    said TQDM_DISABLE=1 when tqdm was imported.
    """
    hidden: dict[str, Any] = {} if show and _watched() else {"disable": True}
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        mininterval=0.5,
        dynamic_ncols=True,
        leave=True,
        **hidden,
    )


def _watched() -> bool:
    """A terminal, or the stream of a notebook's kernel, which is none."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")
