"""One recorded response, and how a line of a rollout file is read and checked."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from srpo_core.roles import Role
from srpo_core.rollouts.lines import (
    NotJSON,
    is_blank,
    lines_of,
    load_json,
    load_strictly,
    load_with_stdlib,
    not_a_rollout_file,
)
from srpo_core.tags import DEFAULT_TAGS, BrokenReason, Kind, Parsed, RoleTags, parse_response

__all__ = ["SCHEMA_PATH", "Rollout", "RolloutError", "check_file", "load_json", "load_with_stdlib", "parse_rollout"]
__all__ += ["read_rollouts"]

#: The JSON Schema of a line.
SCHEMA_PATH = Path(__file__).with_name("rollouts.schema.json")

# What the modules of this package share.
ROLE_LETTERS = {Role.OTHER: "O", Role.PERCEPTION: "P", Role.REASONING: "R"}
LOG_PROBS = ("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs", "repeated_log_probs")
DIVERGENCES = ("down_divergence", "up_divergence")
KINDS = ("perception", "reasoning", "answer")  # of blocks

_BROKEN = {reason.name.lower(): reason for reason in BrokenReason}
MAX_LOG_PROB = 1e-3  # rounding may turn log 1 into this much
_LARGEST = 3.402823467e38  # of float32, whose shortest text in other writers may lie above it
_MAX_DEPTH = 100  # of what is free: readers and writers of JSON give up at some depth, each at its own


class RolloutError(ValueError):
    """A line is not a rollout.

    Attributes:
        reason: What is wrong with it.
        line: Its number, from 1; None if that is not known.
        path: The file; None if that is not known.
    """

    def __init__(self, reason: str, *, line: int | None = None, path: str | os.PathLike[str] | None = None) -> None:
        place = [str(path)] if path is not None else []
        place += [f"line {line}"] if line is not None else []
        super().__init__(": ".join([", ".join(place), reason] if place else [reason]))
        self.reason, self.line, self.path = reason, line, path


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One response as it was recorded.

    Arrays have one entry per token. None means "not recorded".

    Attributes:
        text: The response.
        starts: Index in `text` of each token's first character; None where the tokens are not known.
        ends: Index after each token's last character.
        old_log_probs: Log-probability of each token in its own context, nats.
        corrupted_log_probs: The same with the image corrupted.
        counterfactual_log_probs: The same with the perception replaced.
        repeated_log_probs: The pass of `old_log_probs`, run a second time.
        roles: :class:`~srpo_core.Role` of each token, as the trainer segmented the response.
        broken: Why the response is malformed, according to the trainer.
        scores: Score of each token under its role, nats.
        weights: Weight of each token in training.
        down_divergence: How far a step on the tokens with a weight below 1 alone moved each next-token distribution,
            nats.
        up_divergence: The same for a step on the tokens with a weight above 1. Both are recorded, or neither.
        reward: In any unit.
        advantage: As the trainer computed it.
        correct: Whether the answer is right.
        correct_by: The rule that says so, in words.
        perception_correct: Whether the perception is right.
        group: Responses of one step with equal groups answer the same prompt.
        step: Training step.
        id: A name for the response.
        finished: Whether the model ended the response itself.
        swapped: Whether another response's perception was found to replace this one.
        prompt: The question.
        reference: The right answer.
        image: Path of the image, as recorded.
        tags: Opening and closing tags.
        open_at_start: The kind of block that the prompt left open, so that the response begins inside it:
            ``perception``, ``reasoning`` or ``answer``; None: no block.
        extra: Anything else.
    """

    text: str
    starts: NDArray[np.int64] | None = None
    ends: NDArray[np.int64] | None = None
    old_log_probs: NDArray[np.float32] | None = None
    corrupted_log_probs: NDArray[np.float32] | None = None
    counterfactual_log_probs: NDArray[np.float32] | None = None
    repeated_log_probs: NDArray[np.float32] | None = None
    roles: NDArray[np.int64] | None = None
    broken: BrokenReason | None = None
    scores: NDArray[np.float32] | None = None
    weights: NDArray[np.float32] | None = None
    down_divergence: NDArray[np.float32] | None = None
    up_divergence: NDArray[np.float32] | None = None
    reward: float | None = None
    advantage: float | None = None
    correct: bool | None = None
    correct_by: str | None = None
    perception_correct: bool | None = None
    group: int | str | None = None
    step: int | None = None
    id: str | None = None
    finished: bool = True
    swapped: bool | None = None
    prompt: str | None = None
    reference: str | None = None
    image: str | None = None
    tags: RoleTags = DEFAULT_TAGS
    open_at_start: Kind | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of tokens; 0 where the tokens are not known."""
        return 0 if self.starts is None else len(self.starts)

    @property
    def parsed(self) -> Parsed:
        """The text taken apart by the tags. A kind of block that these do not have cannot have been open."""
        opened = self.open_at_start if self.open_at_start in self.tags.pairs else None
        return parse_response(self.text, self.tags, finished=self.finished, open_at_start=opened)

    @property
    def pieces(self) -> list[str]:
        """The text of each token. A character that several tokens share belongs to the first of them."""
        if self.starts is None or self.ends is None:
            return []
        shown = np.maximum.accumulate(np.concatenate([self.ends[:1] * 0, self.ends[:-1]]))
        starts = np.maximum(self.starts, shown)
        return [self.text[start:end] for start, end in zip(starts, self.ends, strict=True)]

    @property
    def is_right(self) -> bool | None:
        """Whether the answer is right, as recorded. A reward alone does not tell: see :class:`CorrectRule`."""
        return self.correct


def read_rollouts(
    path: str | os.PathLike[str], *, on_error: Callable[[RolloutError], None] | None = None
) -> Iterator[Rollout]:
    """The rollouts of a file, one at a time. Blank lines are skipped, and so is a byte-order mark.

    Args:
        path: The file.
        on_error: Called with the error of each malformed line, which is then left out. None: the first malformed line
            raises its error.

    Raises:
        RolloutError: If a line is malformed and there is no `on_error`; it holds the number of the line and the reason.
            Also if the file as a whole is something else, such as the log of another tool.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "rollouts.jsonl"
        ...     _ = path.write_text('{"tokens": ["a", "b"], "reward": 1}' + chr(10) + '{"token": []}' + chr(10))
        ...     for rollout in read_rollouts(path, on_error=lambda error: print("line", error.line, error.reason)):
        ...         print(rollout.text, rollout.reward)
        ab 1.0
        line 2 'token' is not a field of a rollout; did you mean 'tokens'?
    """
    check_file(path)
    with open(path, "rb") as file:
        for number, (line, _) in enumerate(lines_of(file), start=1):
            if is_blank(line):
                continue
            try:
                rollout = parse_rollout(line)
            except RolloutError as error:
                located = RolloutError(error.reason, line=number, path=path)
                if on_error is None:
                    raise located from None
                on_error(located)
            else:
                yield rollout


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise a :class:`RolloutError` that says what a file is, if its beginning shows that it holds no rollouts."""
    if (instead := not_a_rollout_file(path)) is not None:
        raise RolloutError(f"this is {instead}", path=path)


def parse_rollout(line: bytes | str) -> Rollout:
    """The rollout of one line.

    The line must satisfy the JSON Schema at :data:`SCHEMA_PATH`. In addition, all arrays must have one entry per token,
    and offsets must lie within the text. A field that is null counts as not recorded.

    Raises:
        RolloutError: If the line is not a rollout, with the reason.

    Example:
        >>> rollout = parse_rollout('{"tokens": ["<think>", "two"], "roles": "OR", "old_log_probs": [-0.5, null]}')
        >>> rollout.text, rollout.starts, rollout.old_log_probs
        ('<think>two', array([0, 7]), array([-0.5, -inf], dtype=float32))
    """
    try:
        fields = load_strictly(line, load_json)
    except NotJSON as error:
        raise RolloutError(str(error)) from None
    if not isinstance(fields, dict):
        raise RolloutError(f"a rollout is a JSON object, got {_kind(fields)}")
    return _rollout(fields)


def _rollout(fields: dict[str, Any]) -> Rollout:
    for name in fields.keys() - _READERS.keys():
        near = get_close_matches(name, _READERS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "put what is your own under 'extra'"
        raise RolloutError(f"{name!r} is not a field of a rollout; {remedy}")
    values = {name: _READERS[name](name, value) for name, value in fields.items() if value is not None}
    if len(lacking := [name for name in DIVERGENCES if name not in values]) == 1:
        raise RolloutError(f"{lacking[0]} is missing; {' and '.join(DIVERGENCES)} come together")

    tokens, text, offsets = (values.pop(name, None) for name in ("tokens", "text", "offsets"))
    if (tokens is None) == (text is None):
        raise RolloutError("a rollout needs 'tokens' or 'text', " + ("not both" if tokens is not None else "got none"))
    if tokens is not None and offsets is not None:
        raise RolloutError("offsets belong to 'text'; leave them out with 'tokens'")
    if tokens is not None:
        text = "".join(tokens)
        ends = np.fromiter(accumulate(map(len, tokens)), np.int64, len(tokens))
        starts = np.concatenate([ends[:1] * 0, ends[:-1]])
    elif offsets is not None:
        starts, ends = offsets.T
        wrong = np.flatnonzero((starts > ends) | (ends > len(text)))
        if len(wrong):
            token = wrong[0]
            span = f"[{starts[token]}, {ends[token]}]"
            raise RolloutError(f"offsets[{token}] is {span}, which is not a span of the {len(text)} characters")
    else:
        starts = ends = None
    length = None if starts is None else len(starts)
    for name in (*LOG_PROBS, "scores", "weights", *DIVERGENCES, "roles"):
        if name in values and len(values[name]) != length:
            of = "no tokens (give 'tokens' or 'offsets')" if length is None else f"{length} tokens"
            raise RolloutError(f"{name} has {len(values[name])} entries for {of}")
    return Rollout(text=text, starts=starts, ends=ends, **values)


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return "null" if value is None else names.get(type(value), "an object")


def _wrong(name: str, expected: str, value: Any) -> NoReturn:
    raise RolloutError(f"{name} must be {expected}, got {_kind(value)}")


def _array(name: str, value: Any, expected: str) -> list[Any]:
    return value if type(value) is list else _wrong(name, f"an array of {expected}", value)


# Checks of arrays look at the set of types, because a Python loop over every token would double the time of reading.


def _tokens(name: str, value: Any) -> list[str]:
    tokens = _array(name, value, "strings")
    if not set(map(type, tokens)) <= {str}:
        index, token = next((index, token) for index, token in enumerate(tokens) if type(token) is not str)
        _wrong(f"{name}[{index}]", "a string", token)
    return tokens


def _offsets(name: str, value: Any) -> NDArray[np.int64]:
    for index, pair in enumerate(_array(name, value, "pairs")):
        if type(pair) is not list or len(pair) != 2 or not all(is_whole(edge) and 0 <= edge < 2**63 for edge in pair):
            raise RolloutError(f"{name}[{index}] must be two whole numbers, at least 0")
    return np.array(value, dtype=np.int64).reshape(-1, 2)


def is_whole(value: Any) -> bool:
    """Whether a JSON value is a whole number. JSON has one kind of number, so 1.0 is whole, also by the schema."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _numbers(name: str, value: Any, *, null: float | None = None) -> NDArray[np.float32]:
    types = set(map(type, _array(name, value, "numbers")))
    excluded: list[int] = []
    if null is not None and type(None) in types:
        excluded = [index for index, item in enumerate(value) if item is None]
        value = [0.0 if item is None else item for item in value]
        types.remove(type(None))
    if not types <= {int, float}:
        index, item = next((index, item) for index, item in enumerate(value) if type(item) not in (int, float))
        _wrong(f"{name}[{index}]", "a number", item)
    try:
        numbers = np.fromiter(value, np.float64, len(value))
    except OverflowError:  # an integer larger than any float
        numbers = np.array([item if abs(item) <= _LARGEST else np.inf for item in value], np.float64)
    if len(numbers) and not max(numbers.max(), -numbers.min()) <= _LARGEST:
        raise RolloutError(f"{name}[{int(np.argmax(np.abs(numbers)))}] is not a finite number")
    if excluded:
        numbers[excluded] = null
    return numbers.astype(np.float32)


def _not_negative(name: str, value: Any) -> NDArray[np.float32]:
    numbers = _numbers(name, value)
    if len(numbers) and numbers.min() < 0:
        index = int(numbers.argmin())
        kind = "a weight" if name == "weights" else "a divergence"
        raise RolloutError(f"{name}[{index}] is {numbers[index]:g}; {kind} is at least 0")
    return numbers


def _log_prob_array(name: str, value: Any) -> NDArray[np.float32]:
    numbers = _numbers(name, value, null=-np.inf)
    if len(numbers) and numbers.max() > MAX_LOG_PROB:
        index = int(numbers.argmax())
        raise RolloutError(f"{name}[{index}] is {numbers[index]:g}; a log-probability is at most 0")
    return numbers


_LETTER_ROLES = np.full(256, -1, dtype=np.int64)
for _role, _letter in ROLE_LETTERS.items():
    _LETTER_ROLES[ord(_letter)] = int(_role)


def _roles(name: str, value: Any) -> NDArray[np.int64]:
    if type(value) is not str:
        _wrong(name, "a string of the letters O, P and R", value)
    roles = _LETTER_ROLES[np.frombuffer(value.encode("latin-1", "replace"), np.uint8)]
    if len(roles) and roles.min() < 0:
        raise RolloutError(f"{name} has {value[int(roles.argmin())]!r} at token {int(roles.argmin())}; use O, P and R")
    return roles


def _broken(name: str, value: Any) -> BrokenReason:
    if type(value) is not str or value not in _BROKEN:
        raise RolloutError(f"{name} must be one of {', '.join(_BROKEN)}, got {value!r}")
    return _BROKEN[value]


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:
        _wrong(name, "a finite number", value)
    return float(value)


def _string(name: str, value: Any) -> str:
    return value if type(value) is str else _wrong(name, "a string", value)


def _boolean(name: str, value: Any) -> bool:
    return value if type(value) is bool else _wrong(name, "true or false", value)


def _step(name: str, value: Any) -> int:
    if is_whole(value) and 0 <= value < 2**63:
        return int(value)
    return _wrong(name, "a whole number, at least 0 and below 2^63", value)


def _group(name: str, value: Any) -> int | str:
    if type(value) is str:
        return value
    return int(value) if is_whole(value) else _wrong(name, "a whole number or a string", value)


def _object(name: str, value: Any) -> dict[str, Any]:
    return value if type(value) is dict else _wrong(name, "an object", value)


def _extra(name: str, value: Any) -> dict[str, Any]:
    inner: list[Any] = [_object(name, value)]
    for _ in range(_MAX_DEPTH):
        inner = [
            item
            for each in inner
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, dict | list)
        ]
        if not inner:
            return value
    raise RolloutError(f"{name} is nested deeper than {_MAX_DEPTH} levels")


def _tags(name: str, value: Any) -> RoleTags:
    if _object(name, value).keys() - {"nested"} != set(KINDS):
        raise RolloutError(f"{name} must have perception, reasoning and answer, got {', '.join(value) or 'none'}")
    for kind in KINDS:
        tags = value[kind]
        if kind == "answer" and tags is None:
            continue
        if type(tags) is not list or len(tags) not in (1, 2) or not all(type(tag) is str and tag for tag in tags):
            raise RolloutError(f"{name}.{kind} must be an opening and a closing tag, or one heading, in an array")
    fields: dict[str, Any] = {kind: None if value[kind] is None else tuple(value[kind]) for kind in KINDS}
    if "nested" in value and _boolean(f"{name}.nested", value["nested"]):
        fields["nested"] = True
    try:
        return RoleTags(**fields)
    except ValueError as error:
        raise RolloutError(f"{name}: {error}") from None


def _kind_of_block(name: str, value: Any) -> Kind:
    if type(value) is not str or value not in KINDS:
        raise RolloutError(f"{name} must be one of {', '.join(KINDS)}, got {value!r}")
    return value


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "tokens": _tokens,
    "text": _string,
    "offsets": _offsets,
    **dict.fromkeys(LOG_PROBS, _log_prob_array),
    "roles": _roles,
    "broken": _broken,
    "scores": _numbers,
    **dict.fromkeys(("weights", *DIVERGENCES), _not_negative),
    **dict.fromkeys(("reward", "advantage"), _number),
    **dict.fromkeys(("correct", "perception_correct", "finished", "swapped"), _boolean),
    "group": _group,
    "step": _step,
    **dict.fromkeys(("id", "prompt", "reference", "image", "correct_by"), _string),
    "tags": _tags,
    "open_at_start": _kind_of_block,
    "extra": _extra,
}
