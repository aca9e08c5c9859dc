"""A file to which lines are appended, each batch of them whole or not at all, so that a crashed run can resume it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from srpo_core.rollouts.record import is_whole, load_json

_BLOCK_BYTES = 2**16  # of one read, when the end of a file is read backward


class LineFile:
    """A file to which lines are appended without a buffer.

    With a buffer, what a full disk refused would be written later, into another line.

    Args:
        path: The file; missing folders are made.
        resume_at: The step from which on lines at the end are removed; None empties the file.

    Raises:
        OSError: If the file cannot be opened for writing.
    """

    def __init__(self, path: Path, *, resume_at: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_at is not None and path.exists():
            _remove_from(path, resume_at)
        self._file = path.open("wb" if resume_at is None else "ab", buffering=0)
        self._is_torn = False  # whether the file ends in a part of a line

    @property
    def closed(self) -> bool:
        """Whether nothing can be appended any more."""
        return self._file.closed

    def append(self, lines: bytes) -> None:
        """Append whole lines or nothing.

        Raises:
            OSError: If they could not be written.
        """
        rest = memoryview(b"\n" + lines if self._is_torn else lines)
        start = self._file.seek(0, os.SEEK_END) if self._file.seekable() else None
        try:
            while rest:  # without a buffer a write may take only a part
                rest = rest[self._file.write(rest) or 0 :]
            self._is_torn = False
        except OSError:
            if start is None or self._file.seek(0, os.SEEK_END) > start:
                was_torn, self._is_torn = self._is_torn, True
                if start is not None:
                    self._file.truncate(start)
                    self._is_torn = was_torn
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _remove_from(path: Path, step: int) -> None:
    """Cut off the end of a file: lines of `step` and later steps, and a last line that is torn."""
    with path.open("r+b") as file:
        end, last = file.seek(0, os.SEEK_END), b"\n"  # of what stays
        for start, line in _lines_backward(file):
            if _stays(line, step):
                last = line
                break
            end = start
        file.truncate(end)
        if not last.endswith(b"\n"):  # a whole line all the same
            file.seek(end)
            file.write(b"\n")


def _stays(line: bytes, step: int) -> bool:
    if line.isspace():
        return False
    try:
        fields = load_json(line)
    except ValueError:
        # Without its newline it is torn. With one it is malformed for another reason, which is not ours to judge.
        return line.endswith(b"\n")
    at = fields.get("step") if isinstance(fields, dict) else None
    return at is None or not is_whole(at) or at < step


def _lines_backward(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from the last to the first, each with the position at which it begins."""
    position = file.seek(0, os.SEEK_END)
    pieces: list[bytes] = []  # of the line whose beginning has not been read yet, its last piece first
    while position:
        size = min(_BLOCK_BYTES, position)
        position -= size
        file.seek(position)
        block, end = file.read(size), size
        while start := block.rfind(b"\n", 0, end) + 1:
            pieces.append(block[start:end])
            if line := b"".join(reversed(pieces)):
                yield position + start, line
            pieces, end = [b"\n"], start - 1
        pieces.append(block[:end])
    if line := b"".join(reversed(pieces)):
        yield 0, line
