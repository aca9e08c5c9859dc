"""A file that becomes whole over several runs: each goes on after the last line of the one before."""

import json
import os
from pathlib import Path
from typing import Any, Self

__all__ = ["PartFile"]


class PartFile:
    """The unfinished output, and beside it what it is made with.

    Args:
        output: What the file is called when it is finished.
        settings: What it is made with, in values that JSON has. A file that was made with others is begun anew.

    Attributes:
        path: Of the unfinished file.
        lines: How many whole lines an earlier run has left in it.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self._output = output
        self.path = output.with_name(f"{output.name}.part")
        self._about = output.with_name(f"{output.name}.part.json")
        self._settings = json.dumps(settings, sort_keys=True, default=str) + "\n"
        output.parent.mkdir(parents=True, exist_ok=True)
        is_known = self._about.exists() and self._about.read_text(encoding="utf-8") == self._settings
        if not (is_known and self.path.exists()):
            self.path.write_bytes(b"")
            self._about.write_text(self._settings, encoding="utf-8")
        self.lines = self._whole_lines()

    def _whole_lines(self) -> int:
        """The number of whole lines; a torn last one is cut off."""
        lines = end = 0
        with self.path.open("r+b") as file:
            for line in file:
                if line.endswith(b"\n"):
                    lines, end = lines + 1, end + len(line)
            file.truncate(end)
        return lines

    def __enter__(self) -> Self:
        # Without a buffer: what a killed run has written is there.
        self._file = self.path.open("ab", buffering=0)
        return self

    def append(self, lines: bytes) -> None:
        """Write whole lines at the end."""
        rest = memoryview(lines)
        while rest:
            rest = rest[self._file.write(rest) or 0 :]

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def finish(self) -> None:
        """Give the file its name."""
        os.replace(self.path, self._output)
        self._about.unlink()
