"""Progress bars: tqdm on a terminal, nothing elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


def bar(total: int, what: str, show: bool) -> Any:
    """A bar on standard error; silent when that is not a terminal or `show` is False."""
    return tqdm(
        total=total,
        desc=what,
        disable=not (show and sys.stderr.isatty()),
        mininterval=0.5,
        dynamic_ncols=True,
        leave=True,
    )
