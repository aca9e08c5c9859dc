"""Completion logs of other tools: what their columns mean. A record holds the values of one response by column."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from srpo_core.rollouts.lines import TOOLS, not_a_rollout_file, other_tool
from srpo_core.rollouts.log_files import UnreadableLog
from srpo_core.rollouts.record import is_whole

__all__ = ["ROLLOUTS", "Logged", "logged", "tool_of"]

#: Instead of a tool: rollouts in a file that is no rollout file, such as a JSON array.
ROLLOUTS = "rollouts"

# Numbers that tools log beside the rewards.
_NO_REWARDS = {"entropy", "entropies", "num_turns", "index", "id", "seed", "epoch", "timestamp"}
_REFERENCES = ("solution", "ground_truth", "reference", "answer")
_ADVANTAGES = ("advantage", "advantages")


@dataclass(kw_only=True)
class Logged:
    """One response as a log holds it; None for what the log does not hold.

    Attributes:
        text: The response.
        prompt: The question, as text.
        whole_prompt: Whether `prompt` is exactly what the model read before the response.
        step: Training step.
        rewards: Numbers by the column that may be a reward function; NaN where a function gave no reward.
        summed: Whether the whole reward is a sum of `rewards`; else the tool logs the whole reward.
        total: The whole reward, where the tool logs it.
        advantage: As the trainer computed it.
        reference: The right answer.
        image: Path of the image.
        id: The tool's name for the response.
        sample: The tool's name for the prompt.
        extra: Everything else that JSON can hold.
        dropped: What was left out: images that are no paths, messages of tools.
    """

    text: str
    prompt: str | None = None
    whole_prompt: bool = False
    step: int | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    summed: bool = False
    total: float | None = None
    advantage: float | None = None
    reference: str | None = None
    image: str | None = None
    id: str | None = None
    sample: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def tool_of(path: str | os.PathLike[str], record: Mapping[str, Any]) -> str:
    """The tool that wrote a log, by the columns of a record: a key of `TOOLS`, or `ROLLOUTS`.

    Raises:
        UnreadableLog: If the columns do not show it, or the file holds rollouts already.
    """
    tool = other_tool(record)
    if tool is not None:
        return tool
    columns = ", ".join(map(repr, list(record)[:12])) or "none"
    if "tokens" in record or "text" in record:
        if not_a_rollout_file(path) is None:
            raise UnreadableLog("this holds rollouts already: srpo report reads it", path=path)
        return ROLLOUTS
    raise UnreadableLog(
        f"the columns ({columns}) do not show which tool wrote this log; name the tool with --from {'|'.join(TOOLS)}",
        path=path,
    )


def logged(tool: str, record: Mapping[str, Any]) -> Logged:
    """The response of a record.

    Args:
        tool: A key of `TOOLS`.
        record: Its values by column.

    Raises:
        ValueError: If a column is missing or holds something unexpected.

    Example:
        >>> logged("verl", {"input": "how many?", "output": "3", "gts": "3", "score": 1.0, "step": 7}).total
        1.0
    """
    rest = dict(record)
    found = _READERS[tool](rest)
    if found.reference is None:
        name = next((name for name in _REFERENCES if isinstance(rest.get(name), str)), None)
        found.reference = None if name is None else rest.pop(name)
    for name in ("image", "images"):
        if (value := rest.pop(name, None)) is not None:
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            value = value.get("path") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                found.image = value
            elif value is None or value != []:
                found.dropped.append("images")
    for name, value in rest.items():
        if name not in _NO_REWARDS and (number := _number_in(name, value, written=tool == "verl")) is not None:
            found.rewards[name] = number
        if (kept := _plain(value)) is not None:
            found.extra[name] = kept
        elif isinstance(value, (bytes, bytearray)):
            found.dropped.append("binary values")
    return found


def _trl(rest: dict[str, Any]) -> Logged:
    prompt, completion = _take(rest, "prompt", "TRL"), _take(rest, "completion", "TRL")
    text, of_tools = _response(completion)
    return Logged(
        text=text,
        prompt=_prompt("prompt", prompt),
        whole_prompt=isinstance(prompt, str),
        step=_step(rest),
        summed=True,
        advantage=_advantage(rest),
        dropped=["messages of tools"] if of_tools else [],
    )


def _swift(rest: dict[str, Any]) -> Logged:
    prompt = rest.pop("messages") if "prompt" not in rest and "messages" in rest else _take(rest, "prompt", "ms-swift")
    text, of_tools = _response(_take(rest, "completion", "ms-swift"))
    return Logged(
        text=text,
        prompt=_prompt("prompt", prompt),
        whole_prompt=isinstance(prompt, str),
        step=_step(rest),
        summed="reward" not in rest,
        total=_number(rest, "reward"),
        advantage=_advantage(rest),
        dropped=["messages of tools"] if of_tools else [],
    )


def _verl(rest: dict[str, Any]) -> Logged:
    prompt, text = _text(rest, "input", "verl"), _text(rest, "output", "verl")
    reference, score = rest.pop("gts", None), _number(rest, "score")
    identity = rest.pop("uid", rest.pop("request_id", None))
    parts = re.fullmatch(r"(.+)_\d+_\d+", identity) if isinstance(identity, str) else None  # {prompt}_{rollout}_{turn}
    return Logged(
        text=text,
        prompt=prompt,
        whole_prompt=True,
        step=_step(rest),
        rewards={"score": math.nan if score is None else score},
        total=score,
        reference=None if reference is None else reference if isinstance(reference, str) else _dumped(reference),
        id=None if identity is None else str(identity),
        sample=None if parts is None else parts[1],
    )


def _openrlhf(rest: dict[str, Any]) -> Logged:
    if "text" not in rest:  # of batch inference
        prompt, text = _text(rest, "input", "OpenRLHF"), _text(rest, "output", "OpenRLHF")
        return Logged(text=text, prompt=prompt, whole_prompt=True, step=_step(rest), total=_number(rest, "reward"))
    whole = _text(rest, "text", "OpenRLHF")
    # Prompt and response in one, without special tokens: a chat template leaves the name of the role on a line.
    prompt, line, text = re.split(r"(\n(?:assistant|model)\n|\Z)", whole, maxsplit=1)
    if not line:
        prompt, text = "", whole
    rest_of = Logged(text=text, prompt=prompt or None, step=_step(rest), total=_number(rest, "reward"))
    rest_of.dropped += [] if line else ["where the response begins"]
    return rest_of


_READERS: dict[str, Callable[[dict[str, Any]], Logged]] = {
    "trl": _trl,
    "verl": _verl,
    "swift": _swift,
    "openrlhf": _openrlhf,
}


def _take(rest: dict[str, Any], name: str, tool: str) -> Any:
    if name not in rest:
        others = ", ".join(map(repr, list(rest)[:12])) or "none"
        near = other_tool(rest)
        hint = f"; this looks like a log of {TOOLS[near]}: --from {near}" if near else ""
        raise ValueError(f"a log of {tool} has a column {name!r}, got {others}{hint}")
    return rest.pop(name)


def _text(rest: dict[str, Any], name: str, tool: str) -> str:
    value = _take(rest, name, tool)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {_named(value)}")
    return value


def _response(value: Any) -> tuple[str, bool]:
    """The text that the model wrote, and whether messages of tools stand between its parts."""
    if isinstance(value, str):
        return value, False
    if not _is_conversation(value):
        raise ValueError(f"completion must be a string or a list of messages, got {_named(value)}")
    own = [message for message in value if message.get("role", "assistant") == "assistant"]
    texts = []
    for message in own:
        thinking = message.get("reasoning_content")
        texts += [f"<think>{thinking}</think>"] if isinstance(thinking, str) and thinking else []
        texts += [_content(message)]
    return "\n".join(texts), len(own) < len(value)


def _prompt(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not _is_conversation(value):
        raise ValueError(f"{name} must be a string or a list of messages, got {_named(value)}")
    if len(value) == 1:
        return _content(value[0])
    return "\n".join(f"{message.get('role', 'user')}: {_content(message)}" for message in value)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message; an image in it is shown as its kind."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    if not _is_conversation(content):
        raise ValueError(f"content of a message must be a string or a list of parts, got {_named(content)}")
    return "".join(part.get("text") or f"<{part.get('type', 'part')}>" for part in content)


def _step(rest: dict[str, Any]) -> int | None:
    for name in ("step", "gen_step", "global_step"):
        if (value := rest.pop(name, None)) is not None:
            step: Any = int(value) if isinstance(value, str) and value.isdecimal() else value
            if not is_whole(step) or step < 0:
                raise ValueError(f"{name} must be a whole number, at least 0, got {value!r}")
            return int(step)
    return None


def _advantage(rest: dict[str, Any]) -> float | None:
    for name in _ADVANTAGES:
        if isinstance(rest.get(name), list):  # one for each token: kept as it is
            return None
        if name in rest:
            return _number(rest, name)
    return None


def _number(rest: dict[str, Any], name: str) -> float | None:
    """A number, taken out of the record; None where it is null or NaN."""
    value = rest.pop(name, None)
    number = _number_in(name, value, written=True)
    if number is None:
        raise ValueError(f"{name} must be a number or null, got {_named(value)}")
    return None if math.isnan(number) else number


def _number_in(name: str, value: Any, *, written: bool) -> float | None:
    """The value as a number, NaN if it is null; None if it is something else.

    With `written` strings and booleans also count, because verl writes NumPy's numbers as strings.
    """
    if value is None:
        return math.nan
    if written and isinstance(value, str):
        try:
            value = {"True": True, "False": False}[value] if value in ("True", "False") else float(value)
        except ValueError:
            return None
    if not isinstance(value, (int, float)) or (isinstance(value, bool) and not written):
        return None
    if math.isinf(value):
        raise ValueError(f"{name} is {'Infinity' if value > 0 else '-Infinity'}; a reward is finite, or null")
    return float(value)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, without NaN and bytes; None if nothing remains."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (bytes, bytearray)):
        return None
    if isinstance(value, Mapping):
        kept = {str(key): _plain(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None} or None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _dumped(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)


def _named(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
