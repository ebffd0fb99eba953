"""Journal: results of a long run, a line of JSON each, so that it goes on where it was ended."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnn.errors import CheckpointError


class Journal:
    """A file of results. Its first line says of what run; another run's is refused.

    A line that was cut off as it was written counts as not there. One run at a time may write.

    Attributes:
        results: what was found in the file, then what was added, in this order.
    """

    def __init__(self, path: "str | os.PathLike[str]", settings: Mapping[str, Any]):
        """Opens a journal, or begins one.

        Args:
            path: the file; made, with its folder, by the first result.
            settings: everything that decides a result, as JSON takes it.

        Raises:
            CheckpointError: the file is none, or of other settings; names the first that differs.
        """
        self.path = Path(path)
        self.settings = json.loads(json.dumps(dict(settings)))
        text = json.dumps(self.settings, sort_keys=True)
        self.run = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.results: list[dict[str, Any]] = []
        try:
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error}.") from error
        found = [each for each in map(_read, lines) if each is not None]
        self.begun = bool(found)
        head = json.dumps({"settings": self.settings}).encode()
        if not self.begun and not head.startswith(b"".join(lines)):
            raise CheckpointError(f"{path} is no file of results. Pass a path of its own.")
        for each in found:
            if "run" not in each:
                self._check(each.get("settings"))
            elif each["run"] != self.run:
                raise CheckpointError(
                    f"{path} has a line of another run. Pass another path, or delete the file."
                )
            else:
                self.results.append(each)

    def _check(self, other: Any) -> None:
        if other == self.settings:
            return
        if not isinstance(other, dict):
            raise CheckpointError(f"{self.path} is no file of results. Pass a path of its own.")
        names = [*self.settings, *other]
        name = next(n for n in names if self.settings.get(n) != other.get(n))
        raise CheckpointError(
            f"{self.path} holds results of another run: its {name} is {other.get(name)!r} and now "
            f"it is {self.settings.get(name)!r}. Pass another path, or delete the file."
        )

    def add(self, result: Mapping[str, Any]) -> None:
        """Writes a result down before it returns.

        Raises:
            CheckpointError: the file cannot be written.
        """
        line = {"run": self.run} | dict(result)
        lines = [line] if self.begun else [{"settings": self.settings}, line]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
                if file.read() not in (b"", b"\n"):  # what ended the run cut its last line off
                    file.write(b"\n")
                for each in lines:
                    file.write(json.dumps(each).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"Cannot write {self.path}: {error}.") from error
        self.begun = True
        self.results.append(line)


def _read(line: bytes) -> dict[str, Any] | None:
    try:
        made = json.loads(line)
    except ValueError:
        return None
    return made if isinstance(made, dict) else None
