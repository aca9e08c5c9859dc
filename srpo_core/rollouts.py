"""Rollouts on disk: one response a line, written by any trainer, read by the ``srpo`` command.

A line is a JSON object; ``rollouts.schema.json`` beside this file describes it. It stands on its own: files can be
joined, split and filtered with everyday tools.
"""

import hashlib
import importlib
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from srpo_core.roles import DEFAULT_TAGS, BrokenReason, Role, RoleTags, text_decoder, token_spans
from srpo_core.typechecking import choose, typechecked

__all__ = ["SCHEMA_PATH", "Rollout", "RolloutError", "RolloutWriter", "parse_rollout", "read_rollouts"]

#: The JSON Schema of a line.
SCHEMA_PATH = Path(__file__).with_name("rollouts.schema.json")

_ROLE_LETTERS = {Role.OTHER: "O", Role.PERCEPTION: "P", Role.REASONING: "R"}
_BROKEN = {reason.name.lower(): reason for reason in BrokenReason}
_LOG_PROBS = ("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs", "repeated_log_probs")
_DIVERGENCES = ("down_divergence", "up_divergence")
_MAX_LOG_PROB = 1e-3  # what rounding may make of log 1
_LARGEST = float(np.finfo(np.float32).max)
_DECIMALS = 5  # of numbers per token: far below the noise between two passes


class RolloutError(ValueError):
    """A line that is not a rollout: ``line`` (from 1), ``reason`` and ``path``, if these are known."""

    def __init__(self, reason: str, *, line: int | None = None, path: str | os.PathLike[str] | None = None) -> None:
        place = [str(path)] if path is not None else []
        place += [f"line {line}"] if line is not None else []
        super().__init__(": ".join([", ".join(place), reason] if place else [reason]))
        self.reason, self.line, self.path = reason, line, path


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One response as recorded. Arrays have one entry a token; None is "not recorded".

    Attributes:
        text: The response.
        starts: First character of each token; None where no tokens are known.
        ends: The character after its last.
        old_log_probs: Each token in its own context, nats.
        corrupted_log_probs: With the image corrupted.
        counterfactual_log_probs: With the perception replaced.
        repeated_log_probs: The first pass once more.
        roles: :class:`~srpo_core.Role` of each token, as the trainer saw it.
        broken: Why the response is malformed, as the trainer saw it.
        scores: Score of each token under its role, nats.
        weights: Weight of each token in training.
        down_divergence: How far a step on the tokens with a weight below 1 alone moved each distribution, nats.
        up_divergence: The same of a step on those above 1; the two are known together.
        reward: Any unit.
        advantage: As the trainer computed it.
        correct: Whether the answer is right.
        perception_correct: Whether the perception is.
        group: Responses of one step with equal groups answer one prompt.
        step: Of the training.
        id: A name.
        finished: Whether the model ended the response itself.
        swapped: Whether another perception was found to replace this one.
        prompt: What was asked.
        reference: The right answer.
        image: Path of the image, as recorded.
        tags: Opening and closing tags.
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
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Tokens of the response; 0 where none are known."""
        return 0 if self.starts is None else len(self.starts)

    @property
    def pieces(self) -> list[str]:
        """The text of each token. A character that several tokens share is shown with the first of them."""
        if self.starts is None or self.ends is None:
            return []
        shown = np.maximum.accumulate(np.concatenate([self.ends[:1] * 0, self.ends[:-1]]))
        starts = np.maximum(self.starts, shown)
        return [self.text[start:end] for start, end in zip(starts, self.ends, strict=True)]

    @property
    def is_right(self) -> bool | None:
        """Whether the answer is right, or rewarded where that alone is known."""
        if self.correct is not None or self.reward is None:
            return self.correct
        return self.reward > 0


# Reading


def read_rollouts(
    path: str | os.PathLike[str], *, on_error: Callable[[RolloutError], None] | None = None
) -> Iterator[Rollout]:
    """Rollouts of a file, one at a time; blank lines are nothing.

    Args:
        path: The file.
        on_error: Told of each malformed line, which is then left out. None: the first one raises.

    Raises:
        RolloutError: At a malformed line, with its number and the reason.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "rollouts.jsonl"
        ...     _ = path.write_text('{"tokens": ["a", "b"], "reward": 1}' + chr(10) + '{"token": []}' + chr(10))
        ...     for rollout in read_rollouts(path, on_error=lambda error: print("line", error.line, error.reason)):
        ...         print(rollout.text, rollout.reward)
        ab 1.0
        line 2 'token' is no field of a rollout; did you mean 'tokens'?
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
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


def parse_rollout(line: bytes | str) -> Rollout:
    """The rollout of one line, checked as strictly as the schema does, and lengths besides.

    Raises:
        RolloutError: With the reason, if it is not one.

    Example:
        >>> rollout = parse_rollout('{"tokens": ["<think>", "two"], "roles": "OR", "old_log_probs": [-0.5, null]}')
        >>> rollout.text, rollout.starts, rollout.old_log_probs
        ('<think>two', array([0, 7]), array([-0.5, -inf], dtype=float32))
    """
    try:
        fields = _loads(line.strip())
    except json.JSONDecodeError as error:
        raise RolloutError(f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise RolloutError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RolloutError(f"a rollout is a JSON object, got {_kind(fields)}")
    return _rollout(fields)


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_stdlib_loads = json.JSONDecoder(parse_constant=_no_constant).decode


def _load_with_stdlib(line: bytes | str) -> Any:
    return _stdlib_loads(line.decode() if isinstance(line, bytes) else line)


try:  # three times as fast, and optional
    _loads: Callable[[bytes | str], Any] = importlib.import_module("orjson").loads
except ImportError:
    _loads = _load_with_stdlib


def _rollout(fields: dict[str, Any]) -> Rollout:
    for name in fields.keys() - _READERS.keys():
        near = get_close_matches(name, _READERS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "put what is your own under 'extra'"
        raise RolloutError(f"{name!r} is no field of a rollout; {remedy}")
    values = {name: _READERS[name](name, value) for name, value in fields.items()}
    if len(lacking := [name for name in _DIVERGENCES if name not in values]) == 1:
        raise RolloutError(f"{lacking[0]} is missing; {' and '.join(_DIVERGENCES)} come together")

    tokens, text, offsets = (values.pop(name, None) for name in ("tokens", "text", "offsets"))
    if (tokens is None) == (text is None):
        raise RolloutError("a rollout needs 'tokens' or 'text', " + ("not both" if tokens is not None else "got none"))
    if tokens is not None and offsets is not None:
        raise RolloutError("offsets are those of 'text'; 'tokens' need none")
    if tokens is not None:
        text = "".join(tokens)
        ends = np.fromiter(accumulate(map(len, tokens)), np.int64, len(tokens))
        starts = np.concatenate([ends[:1] * 0, ends[:-1]])
    elif offsets is not None:
        starts, ends = offsets.T
        wrong = np.flatnonzero((starts > ends) | (ends > len(text)))
        if len(wrong):
            token = wrong[0]
            raise RolloutError(
                f"offsets[{token}] is [{starts[token]}, {ends[token]}], which is no span of the {len(text)} characters"
            )
    else:
        starts = ends = None
    length = None if starts is None else len(starts)
    for name in (*_LOG_PROBS, "scores", "weights", *_DIVERGENCES, "roles"):
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


# Checks of arrays look at the set of types: a loop in Python over every token would take as long as all else.


def _tokens(name: str, value: Any) -> list[str]:
    tokens = _array(name, value, "strings")
    if not set(map(type, tokens)) <= {str}:
        index, token = next((index, token) for index, token in enumerate(tokens) if type(token) is not str)
        _wrong(f"{name}[{index}]", "a string", token)
    return tokens


def _offsets(name: str, value: Any) -> NDArray[np.int64]:
    for index, pair in enumerate(_array(name, value, "pairs")):
        if type(pair) is not list or len(pair) != 2 or not all(_is_whole(edge) and 0 <= edge < 2**63 for edge in pair):
            raise RolloutError(f"{name}[{index}] must be two whole numbers, at least 0")
    return np.array(value, dtype=np.int64).reshape(-1, 2)


def _is_whole(value: Any) -> bool:
    # JSON has one kind of number: 1.0 is a whole one, as the schema says too.
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
    except OverflowError:  # an integer beyond every float
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
    if len(numbers) and numbers.max() > _MAX_LOG_PROB:
        index = int(numbers.argmax())
        raise RolloutError(f"{name}[{index}] is {numbers[index]:g}; a log-probability is at most 0")
    return numbers


_LETTER_ROLES = np.full(256, -1, dtype=np.int64)
for _role, _letter in _ROLE_LETTERS.items():
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
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        _wrong(name, "a finite number", value)
    return float(value)


def _string(name: str, value: Any) -> str:
    return value if type(value) is str else _wrong(name, "a string", value)


def _boolean(name: str, value: Any) -> bool:
    return value if type(value) is bool else _wrong(name, "true or false", value)


def _step(name: str, value: Any) -> int:
    return int(value) if _is_whole(value) and value >= 0 else _wrong(name, "a whole number, at least 0", value)


def _group(name: str, value: Any) -> int | str:
    if type(value) is str:
        return value
    return int(value) if _is_whole(value) else _wrong(name, "a whole number or a string", value)


def _object(name: str, value: Any) -> dict[str, Any]:
    return value if type(value) is dict else _wrong(name, "an object", value)


def _tags(name: str, value: Any) -> RoleTags:
    if _object(name, value).keys() != {"perception", "reasoning", "answer"}:
        raise RolloutError(f"{name} must have perception, reasoning and answer, got {', '.join(value) or 'none'}")
    try:
        return RoleTags(**value)
    except ValueError as error:
        raise RolloutError(f"{name}: {error}") from None


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "tokens": _tokens,
    "text": _string,
    "offsets": _offsets,
    **dict.fromkeys(_LOG_PROBS, _log_prob_array),
    "roles": _roles,
    "broken": _broken,
    "scores": _numbers,
    **dict.fromkeys(("weights", *_DIVERGENCES), _not_negative),
    **dict.fromkeys(("reward", "advantage"), _number),
    **dict.fromkeys(("correct", "perception_correct", "finished", "swapped"), _boolean),
    "group": _group,
    "step": _step,
    **dict.fromkeys(("id", "prompt", "reference", "image"), _string),
    "tags": _tags,
    "extra": _object,
}


# Writing


class RolloutWriter:
    """Writes rollouts, a batch at a time; of use to any trainer.

    Args:
        path: The file; folders are made. One process, one file: give each rank its own.
        tokenizer: Turns token ids into texts; anything with ``decode(list_of_ids) -> str``. None: pass texts.
        tags: Opening and closing tags; written where they are not the default ones.
        eos_token_id: Id or ids that end a response; None for the tokenizer's.
        mode: Whether to ``replace`` what the file holds or to ``append`` to it, as after resuming.

    Raises:
        ValueError: If `mode` is unknown, or there is a tokenizer but no end-of-sequence id.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "rollouts.jsonl"
        ...     with RolloutWriter(path) as writer:
        ...         writer.write([["<think>", "2"]], old_log_probs=torch.tensor([[-0.5, -0.25]]), rewards=[1.0])
        ...     print(path.read_text(), end="")
        {"tokens":["<think>","2"],"old_log_probs":[-0.5,-0.25],"reward":1.0}
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        tags: RoleTags = DEFAULT_TAGS,
        eos_token_id: int | Sequence[int] | None = None,
        mode: Literal["replace", "append"] = "replace",
    ) -> None:
        self.path = Path(path)
        self._tags = tags
        eos_token_id = eos_token_id if eos_token_id is not None else getattr(tokenizer, "eos_token_id", None)
        if tokenizer is not None and eos_token_id is None:
            raise ValueError("eos_token_id must be given, because the tokenizer has none; pass () if no response ends")
        self._eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        self._decode = None if tokenizer is None else text_decoder(tokenizer)
        self._pieces: dict[Any, Any] = {}
        self._images: set[Path] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open(
            choose("mode", mode, {"replace": "w", "append": "a"}),
            encoding="utf-8",
            errors="replace",  # of lone surrogates, which a decoder may yield
            newline="\n",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @typechecked
    def write(
        self,
        tokens: Int[Tensor, "batch time"] | Sequence[Sequence[str]],
        mask: Bool[Tensor, "batch time"] | None = None,
        *,
        old_log_probs: Float[Tensor, "batch time"] | None = None,
        corrupted_log_probs: Float[Tensor, "batch time"] | None = None,
        counterfactual_log_probs: Float[Tensor, "batch time"] | None = None,
        repeated_log_probs: Float[Tensor, "batch time"] | None = None,
        roles: Int[Tensor, "batch time"] | None = None,
        broken: Int[Tensor, " batch"] | None = None,
        visual_dependency: Float[Tensor, "batch time"] | None = None,
        perception_consistency: Float[Tensor, "batch time"] | None = None,
        weights: Float[Tensor, "batch time"] | None = None,
        down_divergence: Float[Tensor, "batch time"] | None = None,
        up_divergence: Float[Tensor, "batch time"] | None = None,
        rewards: Float[Tensor, " batch"] | np.ndarray | Sequence[float] | None = None,
        advantages: Float[Tensor, " batch"] | np.ndarray | Sequence[float] | None = None,
        correct: Bool[Tensor, " batch"] | np.ndarray | Sequence[bool] | None = None,
        perception_correct: Bool[Tensor, " batch"] | np.ndarray | Sequence[bool] | None = None,
        group_ids: Int[Tensor, " batch"] | np.ndarray | Sequence[int] | Sequence[str] | None = None,
        donors: Int[Tensor, " batch"] | None = None,
        finished: Bool[Tensor, " batch"] | np.ndarray | Sequence[bool] | None = None,
        prompts: Sequence[str] | None = None,
        references: Sequence[str] | None = None,
        images: Sequence[Any] | None = None,
        ids: Sequence[str] | None = None,
        step: int | None = None,
        extra: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Append one line for each response. All but `tokens` is optional; the more there is, the more can be seen.

        Runs on the host: it waits for the device and copies what it is given. Write some rows of a batch by slicing.

        Args:
            tokens: Sampled token ids (needs the writer's `tokenizer`), or the texts of each response's real tokens.
            mask: True at real tokens. May be left out where texts are given, whose log-probs then lie at the left.
            old_log_probs: Each token in its own context, nats.
            corrupted_log_probs: With the image corrupted.
            counterfactual_log_probs: With the perception replaced, carried back.
            repeated_log_probs: The first pass once more, for the noise floor.
            roles: From :func:`~srpo_core.segment_responses`; else the reader takes them from the text.
            broken: From there too.
            visual_dependency: Scores, nats, where they cannot be had from the log-probs (another kind, a divergence).
            perception_consistency: Likewise; the two come together, and with `roles`.
            weights: As used in training.
            down_divergence: As :func:`~srpo_core.diagnostics.interference` takes it, nats.
            up_divergence: Likewise; the two come together.
            rewards: One per response, any unit.
            advantages: One per response.
            correct: Whether each answer is right; else a reward above 0 counts as right.
            perception_correct: Whether each perception is right, where that is known.
            group_ids: Equal for responses of this step to one prompt.
            donors: From :func:`~srpo_core.counterfactual_responses`.
            finished: Whether the model ended each response itself; known where `tokens` are ids.
            prompts: What was asked.
            references: The right answers.
            images: For each response a path, or an image: PIL's, or a [channel, height, width] tensor of 1 or 3
                channels (floats in [0, 1] or bytes). Images are saved once each in a folder beside the file. None: no
                image.
            ids: Names of the responses.
            step: Of the training.
            extra: Anything else about each response that JSON can say.

        Raises:
            ValueError: If token ids come without a tokenizer or a mask, a number is NaN or out of range, the sizes
                disagree, or one of the two scores or divergences is missing. Nothing is written then.
        """
        texts, finished_by_id = self._texts(tokens, mask)
        where = None if mask is None else list(mask.cpu().numpy())
        lengths = [len(text.get("tokens", text.get("offsets", ()))) for text in texts]
        if where is not None and lengths != [int(row.sum()) for row in where]:
            raise ValueError("tokens must be the texts of exactly the tokens at which the mask is True")

        def rows(name: str, values: Tensor) -> list[NDArray[Any]]:
            if len(values) != len(texts) or (where is None and values.shape[1] < max(lengths, default=0)):
                raise ValueError(f"{name} has shape {tuple(values.shape)}, too small for {len(texts)} responses")
            host = list(values.detach().cpu().to(torch.float64 if values.is_floating_point() else torch.int64).numpy())
            return [row[real] for row, real in zip(host, where or map(slice, lengths), strict=True)]

        scores = _joined_scores(visual_dependency, perception_consistency, roles)
        if (down_divergence is None) != (up_divergence is None):
            raise ValueError("down_divergence and up_divergence are written together: pass both")
        per_token = {
            "old_log_probs": old_log_probs,
            "corrupted_log_probs": corrupted_log_probs,
            "counterfactual_log_probs": counterfactual_log_probs,
            "repeated_log_probs": repeated_log_probs,
            "scores": scores,
            "weights": weights,
            "down_divergence": down_divergence,
            "up_divergence": up_divergence,
        }
        columns: dict[str, Sequence[Any]] = {
            name: [_json_numbers(name, row, numbers) for row, numbers in enumerate(rows(name, values))]
            for name, values in per_token.items()
            if values is not None
        }
        if roles is not None:
            letters = "".join(_ROLE_LETTERS[role] for role in sorted(Role))
            columns["roles"] = ["".join(letters[role] for role in row) for row in rows("roles", roles)]
        per_response = {
            "broken": None if broken is None else [BrokenReason(reason).name.lower() for reason in broken.tolist()],
            "reward": rewards,
            "advantage": advantages,
            "correct": correct,
            "perception_correct": perception_correct,
            "group": group_ids,
            "step": None if step is None else [step] * len(texts),
            "id": ids,
            "finished": finished_by_id if finished is None else finished,
            "swapped": None if donors is None else donors >= 0,
            "prompt": prompts,
            "reference": references,
            "image": None if images is None else [self._image_path(image) for image in images],
            "tags": None if self._tags == DEFAULT_TAGS else [{"answer": None} | self._tags.pairs] * len(texts),
            "extra": extra,
        }
        columns |= {name: _json_values(name, values) for name, values in per_response.items() if values is not None}
        for name, values in columns.items():
            if len(values) != len(texts):
                raise ValueError(f"{name}: {len(values)} values for {len(texts)} responses")
        lines = []
        for row, text in enumerate(texts):
            line = text | {name: values[row] for name, values in columns.items() if values[row] is not None}
            if line.get("finished"):  # the common case goes without saying
                del line["finished"]
            lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
        self._file.write("".join(lines))
        self._file.flush()  # a run that dies leaves whole lines

    def _texts(
        self, tokens: Tensor | Sequence[Sequence[str]], mask: Tensor | None
    ) -> tuple[list[dict[str, Any]], list[bool] | None]:
        """Each response's ``tokens``, or ``text`` and ``offsets``; and, if it can be known, whether it was finished."""
        if not isinstance(tokens, Tensor):
            return [{"tokens": list(texts)} for texts in tokens], None
        if self._decode is None or mask is None:
            missing = "the mask" if mask is None else "RolloutWriter(path, tokenizer=...)"
            raise ValueError(f"tokens are ids, which needs {missing}; or pass the texts of the tokens")
        texts, finished = [], []
        for row, real in zip(tokens.cpu(), mask.cpu(), strict=True):
            ids = row[real].tolist()
            finished.append(bool(ids) and ids[-1] in self._eos)
            text, starts, ends = token_spans(ids, self._decode, self._pieces)
            if [*starts, len(text)] == [0, *ends]:
                texts.append({"tokens": [text[start:end] for start, end in zip(starts, ends, strict=True)]})
            else:
                texts.append({"text": text, "offsets": [list(span) for span in zip(starts, ends, strict=True)]})
        return texts, finished

    def _image_path(self, image: Any) -> str | None:
        """Path of an image as the line shall hold it; one that has none yet is saved."""
        if image is None or isinstance(image, str | os.PathLike):
            return None if image is None else os.fspath(image)
        if isinstance(image, Tensor):
            content, save = _png(image), Path.write_bytes
        else:  # PIL's
            content, save = image.tobytes() + repr((image.mode, image.size)).encode(), lambda path, _: image.save(path)
        folder = self.path.with_name(f"{self.path.stem}_images")
        path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.png"
        if path not in self._images:
            folder.mkdir(exist_ok=True)
            save(path, content)
            self._images.add(path)
        return path.relative_to(self.path.parent).as_posix()


def _joined_scores(visual: Tensor | None, consistency: Tensor | None, roles: Tensor | None) -> Tensor | None:
    if visual is None and consistency is None:
        return None
    if visual is None or consistency is None or roles is None:
        raise ValueError("visual_dependency, perception_consistency and roles are written together: pass all three")
    scores = torch.where(roles == int(Role.PERCEPTION), visual, 0.0)
    return torch.where(roles == int(Role.REASONING), consistency, scores)


def _json_numbers(name: str, row: int, values: NDArray[np.float64]) -> list[float | None]:
    finite = np.isfinite(values)
    numbers: list[float | None]
    if name in _DIVERGENCES:  # of one small step: digits count, not decimals
        numbers = [float(f"{value:.5g}") for value in np.where(finite, values, 0.0).tolist()]
    else:
        numbers = (np.round(np.where(finite, values, 0.0), _DECIMALS) + 0.0).tolist()  # + 0.0: -0.0 is 0.0
    for token in np.flatnonzero(~finite).tolist():
        if name not in _LOG_PROBS or values[token] != -np.inf:
            raise ValueError(f"{name} is {values[token]} at response {row} token {token}, which no JSON number is")
        numbers[token] = None
    if name not in _LOG_PROBS and name != "scores" and len(values) and values.min() < 0:
        token = int(values.argmin())
        raise ValueError(f"{name} is {values[token]} at response {row} token {token}; it is at least 0")
    return numbers


def _json_values(name: str, values: Tensor | np.ndarray | Sequence[Any]) -> list[Any]:
    listed = values.tolist() if isinstance(values, Tensor) else [getattr(v, "item", lambda v=v: v)() for v in values]
    for row, value in enumerate(listed):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value} at response {row}, which no JSON number is")
    return listed


def _png(image: Tensor) -> bytes:
    """A [channel, height, width] image of 1 or 3 channels as a PNG file."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image must be [1 or 3 channels, height, width], got shape {tuple(image.shape)}")
    image = image.detach().cpu()
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    channels, height, width = image.shape
    pixels = image.permute(1, 2, 0).reshape(height, width * channels).numpy()
    scanlines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # each begins with its filter: 0, none

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")
