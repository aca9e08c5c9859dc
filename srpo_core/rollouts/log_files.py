"""The files of completion logs in any format, as tables of records."""

import gzip
import importlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from srpo_core.rollouts.lines import NotJSON, is_blank, is_columnar, load_lenient
from srpo_core.rollouts.record import RolloutError

__all__ = ["Table", "UnreadableLog", "log_files", "read_tables"]

_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_NO_OBJECT = "a record of a log is a JSON object"
_ROWS = 1024  # of a file of single records that are read together


class UnreadableLog(RolloutError):
    """A file that cannot be imported as a whole."""


class Table(NamedTuple):
    """Records that are read together.

    Attributes:
        records: One for each response, with the number of its line, or of its row in a table. For a line that is not a
            record, a sentence that says what is wrong with it.
        done: Number of bytes of the file that have been read.
        whole: Whether they were also written together: the file, or the line, is one table.
    """

    records: list[tuple[int, dict[str, Any] | str]]
    done: int
    whole: bool = True


def log_files(paths: list[Path]) -> list[Path]:
    """The files, and the logs in the folders in the order of the numbers in their names.

    Raises:
        UnreadableLog: If a folder holds no log.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = [each for each in path.iterdir() if each.is_file() and each.name.endswith(_SUFFIXES)]
        if not inside:
            raise UnreadableLog(f"there is no log in this folder (files that end in {', '.join(_SUFFIXES)})", path=path)
        files += sorted(inside, key=lambda each: [int(part) if part.isdecimal() else part for part in _parts(each)])
    return files


def _parts(path: Path) -> list[str]:
    # Text and digits take turns, so that numbers are compared with numbers.
    return re.split(r"(\d+)", path.name)


def read_tables(path: str | os.PathLike[str]) -> Iterator[Table]:
    """The tables of a file, which may be Parquet, JSON Lines or one JSON value, compressed with gzip or in UTF-16.

    Args:
        path: The file.

    Raises:
        UnreadableLog: If the file is none of these.
    """
    with open(path, "rb") as file:
        beginning = file.read(4)
    if beginning == b"PAR1":
        yield Table(_parquet_records(path), os.path.getsize(path))
        return
    packed = beginning[:2] == b"\x1f\x8b"
    with gzip.open(path, "rb") if packed else open(path, "rb") as file:
        try:
            first = next((line for line in file if not is_blank(line)), b"")
            if not first:
                return
            if first[:2] in _UTF_16 or not _is_record(first):
                file.seek(0)
                yield from _whole_file(path, file.read())
                return
            file.seek(0)
            done, records = 0, []
            for number, line in enumerate(file, start=1):
                done += len(line)
                records_of_line = _line_records(number, line)
                if len(records_of_line) > 1 or len(records) >= _ROWS:
                    yield Table(records, 0 if packed else done, whole=False)
                    records = []
                if len(records_of_line) > 1:
                    yield Table(records_of_line, 0 if packed else done)
                else:
                    records += records_of_line
            yield Table(records, os.path.getsize(path), whole=False)
        except (EOFError, gzip.BadGzipFile) as error:
            raise UnreadableLog(f"the compressed file is torn: {error}", path=path) from None


def _is_record(line: bytes) -> bool:
    """Whether a line is complete; else the file may be one JSON value over several lines."""
    if not line.strip().removeprefix(b"\xef\xbb\xbf").startswith(b"{"):
        return False
    try:
        value = load_lenient(line)
    except NotJSON:
        return b":" in line  # torn
    return isinstance(value, dict) and not value.keys() >= {"columns", "data"}


def _line_records(number: int, line: bytes) -> list[tuple[int, dict[str, Any] | str]]:
    if is_blank(line):
        return []
    try:
        value = load_lenient(line)
        if not isinstance(value, dict):
            raise NotJSON(_NO_OBJECT)
        records = _rows(value) if is_columnar(value) else [value]
    except NotJSON as error:
        return [(number, str(error))]
    return [(number, record) for record in records]


def _whole_file(path: str | os.PathLike[str], content: bytes) -> Iterator[Table]:
    """The tables of a file in UTF-16, or that is one JSON value: an array of records, a table, or columns."""
    if content[:2] in _UTF_16:
        try:
            content = content.decode("utf-16").encode()
        except UnicodeError as error:
            raise UnreadableLog(f"this is neither UTF-8 nor UTF-16 text: {error}", path=path) from None
    size = os.path.getsize(path)
    try:
        value = load_lenient(content)
    except NotJSON as error:
        lines = content.split(b"\n")
        first = next((line for line in lines if not is_blank(line)), b"")
        if not _is_record(first):
            raise UnreadableLog(f"this is neither JSON Lines, nor JSON, nor Parquet ({error})", path=path) from None
        found = [_line_records(number, line) for number, line in enumerate(lines, start=1)]
        for records in found:
            if len(records) > 1:
                yield Table(records, size)
        yield Table([records[0] for records in found if len(records) == 1], size, whole=False)
        return
    if isinstance(value, dict) and value.keys() >= {"columns", "data"}:  # of Weights & Biases, and of pandas
        value = [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    elif isinstance(value, dict):
        try:
            value = _rows(value) if is_columnar(value) else [value]
        except NotJSON as error:
            raise UnreadableLog(str(error), path=path) from None
    if not isinstance(value, list):
        raise UnreadableLog("this JSON file holds neither an array of records nor a table", path=path)
    yield Table(
        [(number, row if isinstance(row, dict) else _NO_OBJECT) for number, row in enumerate(value, start=1)], size
    )


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of a table whose columns are lists; a value that is no list belongs to every row."""
    lists = {name: values for name, values in columns.items() if isinstance(values, list)}
    main = "completion" if "completion" in lists else next(iter(lists))
    count = len(lists[main])
    for name, values in lists.items():
        if len(values) != count:
            raise NotJSON(f"{name} has {len(values)} entries, and {main} has {count}")
    return [
        {name: lists[name][row] if name in lists else value for name, value in columns.items()} for row in range(count)
    ]


def _parquet_records(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, Any] | str]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UnreadableLog(
            "reading a Parquet file needs pyarrow, which is not installed: pip install 'srpo-core[import]'", path=path
        ) from None
    try:
        table = parquet.read_table(path)
        names = [name for name in table.column_names if not name.startswith("__index_level_")]  # added by pandas
        rows = table.select(names).to_pylist()
    except (ValueError, OSError) as error:  # what pyarrow raises is either
        raise UnreadableLog(f"the Parquet file cannot be read: {error}", path=path) from None
    return list(enumerate(rows, start=1))
