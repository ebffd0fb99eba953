"""Jobs whose results are appended to a file as they end: what is there is not run again."""

import json
import os
from pathlib import Path
from typing import Any


def finished(path: Path) -> list[dict[str, Any]]:
    """The results in a file; a line that was cut off as it was written counts as not there."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except ValueError:
            continue
        if isinstance(result, dict):
            found.append(result)
    return found


def append(path: Path, result: dict[str, Any]) -> None:
    """Adds a line, on a line of its own whatever ended the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        ended = file.read() in (b"", b"\n")
        file.write(b"" if ended else b"\n")
        file.write(json.dumps(result).encode() + b"\n")
