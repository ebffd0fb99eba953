"""Markup: the HTML by which notebooks show a value. All text is escaped: names are the user's."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any


def paragraph(*lines: str) -> str:
    """Lines of text, one under the other."""
    return f"<p>{'<br>'.join(html.escape(line) for line in lines)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text under their heads."""
    return (
        f"<table><thead>{_row('th', head)}</thead>"
        f"<tbody>{''.join(_row('td', row) for row in rows)}</tbody></table>"
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def runs(chains: int, draws: int, times: str = "x") -> str:
    """`1 chain x 200 draws`."""
    each = [f"{n:,} {noun}{'s' * (n != 1)}" for n, noun in ((chains, "chain"), (draws, "draw"))]
    return f" {times} ".join(each)


def items(lines: Iterable[str]) -> str:
    """A list of lines of text."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def settings(method: Any) -> str:
    """A dataclass as one would write it: the fields that are not at their defaults."""
    told = [
        f"{each.name}={getattr(method, each.name)!r}"
        for each in fields(method)
        if each.default is MISSING or getattr(method, each.name) != each.default
    ]
    return f"{type(method).__name__}({', '.join(told)})"
