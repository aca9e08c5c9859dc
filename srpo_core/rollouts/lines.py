"""JSON as files hold it: byte-order marks, NaN, nulls, and files that are no rollout files."""

import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NoReturn

__all__ = ["TOOLS", "NotJSON", "is_blank", "is_columnar", "load_json", "load_lenient", "load_strictly"]
__all__ += ["MAX_LINE_BYTES", "lines_of", "load_with_stdlib", "not_a_rollout_file", "other_tool"]

_MARK = b"\xef\xbb\xbf"  # of UTF-8: editors and spreadsheets of Windows begin files with it
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_FIRST_BYTES = 2**20  # of a file, which tell what it is

#: A longer line is malformed: a response of a million tokens has about 50 MB, and parsing takes several times as much.
MAX_LINE_BYTES = 2**26

#: Other tools' names, as they are passed and as they are written.
TOOLS = {"trl": "TRL", "verl": "verl", "swift": "ms-swift", "openrlhf": "OpenRLHF"}
# The columns that tell their logs; the first set that a record has decides.
_COLUMNS = (
    ("verl", {"input", "output", "score"}),
    ("openrlhf", {"input", "output", "reward"}),
    ("openrlhf", {"global_step", "text", "reward"}),
    ("swift", {"prompt", "completion", "advantages"}),
    ("swift", {"prompt", "completion", "gen_step"}),
    ("swift", {"messages", "completion"}),
    ("trl", {"prompt", "completion"}),
)


def lines_of(file: BinaryIO, end: int | None = None) -> Iterator[tuple[bytes, int]]:
    """The lines from where a file is, and how many bytes each takes in the file, up to a place in it or to its end.

    Of a line of more than :data:`MAX_LINE_BYTES` only the first bytes come, one more than allowed, so that whoever
    parses it refuses it, and a file that is one endless line takes no memory.
    """
    while end is None or file.tell() < end:
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        length, rest = len(line), line
        while not rest.endswith(b"\n") and (rest := file.readline(_FIRST_BYTES)):
            length += len(rest)
        yield line, length


class NotJSON(ValueError):
    """A text is not JSON, in one sentence that says where."""


class _Constant(float):
    """A NaN or an Infinity that a text holds though JSON has none."""


def is_blank(line: bytes) -> bool:
    """Whether a line is empty or holds only white space."""
    return not line.removeprefix(_MARK).strip()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_strict = json.JSONDecoder(parse_constant=_refuse).decode
_lenient = json.JSONDecoder(parse_constant=_Constant).decode


def load_with_stdlib(line: bytes | str) -> Any:
    """What `load_json` does where orjson is not installed."""
    return _strict(line.decode() if isinstance(line, bytes) else line)


try:  # optional, and three times as fast
    load_json: Callable[[bytes | str], Any] = importlib.import_module("orjson").loads
except ImportError:
    load_json = load_with_stdlib


def load_lenient(line: bytes | str) -> Any:
    """The value of a JSON text in which numbers may also be NaN or Infinity; a byte-order mark is no part of it.

    Raises:
        NotJSON: If it is none, with the column.
    """
    try:
        text = line.removeprefix(_MARK).decode() if isinstance(line, bytes) else line.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if isinstance(line, bytes) and b"\0" in line:
            raise NotJSON("not JSON: there are zero bytes in it; is it UTF-16? A rollout file is UTF-8") from None
        raise NotJSON(f"not JSON: the byte at column {error.start + 1} is not UTF-8") from None
    try:
        return _lenient(text.strip())
    except json.JSONDecodeError as error:
        raise NotJSON(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise NotJSON("not JSON: it is nested too deeply") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise NotJSON(f"not JSON: {error}") from None


def load_strictly(line: bytes | str, load: Callable[[bytes | str], Any]) -> Any:
    """The value of a JSON text. What `load` refuses is parsed a second time, so that all loaders agree.

    Raises:
        NotJSON: If the text is not JSON. A NaN or an Infinity is named with its field.
    """
    mark: Any = _MARK if isinstance(line, bytes) else "\ufeff"
    if len(line) > MAX_LINE_BYTES:
        raise NotJSON(f"the line is longer than {MAX_LINE_BYTES:,} bytes; is it several responses without line breaks?")
    try:
        return load(line.removeprefix(mark).strip())
    except (ValueError, RecursionError):
        value = load_lenient(line)
    for path, constant in _constants(value):
        name = path.partition("[")[0].partition(".")[0]
        remedy = "write null where there is none"
        if name.endswith("log_probs") and constant == -math.inf:
            remedy = "write null for minus infinity"
        elif "[" in path:
            remedy = f"leave {name} out of lines where it is not known"
        word = "NaN" if math.isnan(constant) else "Infinity" if constant > 0 else "-Infinity"
        raise NotJSON(f"not JSON: {path or 'the line'} is {word}, which JSON does not have; {remedy}")
    return value


def _constants(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Where a value holds NaN or Infinity, from the first to the last."""
    if isinstance(value, _Constant):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _constants(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _constants(item, f"{path}[{index}]")


def other_tool(record: Mapping[str, Any]) -> str | None:
    """Whose log a record comes from, by its columns: a key of `TOOLS`; None where they do not tell."""
    if is_columnar(record) and {"prompt", "completion"} <= record.keys():
        return "swift"  # which writes one line a step, TRL one row a response
    return next((tool for tool, columns in _COLUMNS if columns <= record.keys()), None)


def is_columnar(record: Mapping[str, Any]) -> bool:
    """Whether a record holds a list for each column instead of a value. A conversation is a list, too, of objects."""
    lists = [record[name] for name in ("step", "gen_step", "completion") if isinstance(record.get(name), list)]
    return any(not all(isinstance(item, dict) for item in items) for items in lists)


def not_a_rollout_file(path: str | os.PathLike[str]) -> str | None:
    """What a file is instead of a rollout file, and what to do with it; None if it may be a rollout file.

    One sentence is about the whole file. Otherwise each of its lines would be named as malformed.
    """
    with open(path, "rb") as file:
        beginning = file.read(4)
        file.seek(0)
        convert = f"srpo import {os.fspath(path)} -o rollouts.jsonl"
        if beginning == b"PAR1":
            return f"a Parquet file, as TRL logs completions; {convert}"
        if beginning[:2] == b"\x1f\x8b":
            return "compressed; unpack it with gunzip"
        if beginning[:2] in _UTF_16 or b"\0" in beginning:
            return f"UTF-16 text, and a rollout file is UTF-8; {convert}"
        first = b""
        while not first.removeprefix(_MARK).strip():
            first = file.readline(_FIRST_BYTES)
            if not first:
                return None
        following = file.readline(_FIRST_BYTES)
    first = first.removeprefix(_MARK).strip()
    try:
        record = load_lenient(first)
    except NotJSON:
        record = None
    if first.startswith(b"[") and (not isinstance(record, list) or isinstance(next(iter(record), None), dict)):
        return f"one JSON array, and a rollout file has one object a line; {convert}"
    if record is None and first.startswith(b"{") and following.startswith((b" ", b"\t", b'"')):
        return f"JSON over several lines, and a rollout file has one object a line; {convert}"
    if isinstance(record, dict):
        if record.keys() >= {"columns", "data"}:
            return f"a table, as Weights & Biases saves it; {convert}"
        if (tool := other_tool(record)) is not None and "tokens" not in record:
            return f"a log of {TOOLS[tool]} by its columns ({', '.join(list(record)[:6])}); {convert}"
    return None
