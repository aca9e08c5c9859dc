"""Rollouts to a file: the batches of any trainer become one line per response. Writing never stops the training."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from srpo_core.roles import ending_ids
from srpo_core.rollouts import values as of
from srpo_core.rollouts.line_file import LineFile
from srpo_core.rollouts.pictures import Picture, picture, save
from srpo_core.rollouts.record import DIVERGENCES, is_whole
from srpo_core.rollouts.retag import tags_as_json
from srpo_core.rollouts.values import Unwritable, reason_of
from srpo_core.tags import DEFAULT_TAGS, RoleTags
from srpo_core.token_text import text_decoder, token_spans

__all__ = ["RolloutWriter"]

logger = logging.getLogger("srpo_core")

_UNKNOWN_TEXT = "\N{REPLACEMENT CHARACTER}"  # of a token that cannot be decoded


class _Misuse(ValueError):
    """A call that is wrong whatever the data: it raises when the first batch is written, never later."""


class RolloutWriter:
    """Writes rollouts to a file, a batch at a time, for any trainer.

    Each call of :meth:`write` appends whole lines. If a run is killed, at most its last line is torn, and a run that is
    resumed with `resume_at` removes that line.

    Recording must not stop the training. A call that is wrong whatever the data are (sizes that disagree, no tokenizer)
    raises an error when the first batch is written. After that nothing raises an error, and faults of the data (NaN, an
    image that cannot be read, a full disk) never do: what cannot be written is left out of its line and counted in
    `left_out`, and there is one warning for each kind.

    Args:
        path: The file; missing folders are made. One process writes one file: give each rank its own.
        tokenizer: Turns token ids into texts; anything with ``decode(list_of_ids) -> str``. None: pass texts.
        tags: Opening and closing tags; written where they differ from the default ones.
        eos_token_id: Id or ids that end a response; None for those of the tokenizer.
        resume_at: None starts a new file, and the old content of the file is lost. A resumed run passes the step that
            it will write first. Lines at the end of the file that belong to this step or a later one are then removed,
            because the run writes them again, and so is a torn last line. Earlier lines stay. The file is read backward
            from its end, so that resuming a run takes no longer than the removed lines require.
        correct_by: The rule that decides `correct`, such as the ``str`` of a
            :class:`~srpo_core.rollouts.CorrectRule`. It is written beside `correct`, so that the report can name it.

    Attributes:
        left_out: How many values were not written, by field and reason; ``response`` stands for whole lines.

    Raises:
        ValueError: If `resume_at` is below 0, or there is a tokenizer but no end-of-sequence id.
        OSError: If the file cannot be opened for writing.

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
        resume_at: int | None = None,
        correct_by: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.left_out: Counter[tuple[str, str]] = Counter()
        self._tags = None if tags == DEFAULT_TAGS else tags_as_json(tags)
        self._correct_by = correct_by
        if resume_at is not None and resume_at < 0:
            raise ValueError(f"resume_at must be a step, at least 0, got {resume_at}; pass None to start a new file")
        if tokenizer is not None and eos_token_id is None:
            try:
                eos_token_id = ending_ids(tokenizer)
            except ValueError:
                raise ValueError(
                    "eos_token_id must be given, because the tokenizer has none; pass () if no response ends"
                ) from None
        self._eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        self._decode = None if tokenizer is None else text_decoder(tokenizer)
        self._pieces: dict[Any, Any] = {}
        self._images: dict[str, str] = {}
        self._has_written = False
        self._file = LineFile(self.path, resume_at=resume_at)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and say what was left out of it."""
        if self.left_out and not self._file.closed:
            counts = ", ".join(f"{field} {count:,} ({why})" for (field, why), count in self.left_out.most_common())
            logger.warning("%s lacks what could not be written: %s", self.path, counts)
        try:
            self._file.close()
        except OSError as error:
            logger.warning("%s could not be closed: %s", self.path, error)

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
        scores: Float[Tensor, "batch time"] | None = None,
        weights: Float[Tensor, "batch time"] | None = None,
        down_divergence: Float[Tensor, "batch time"] | None = None,
        up_divergence: Float[Tensor, "batch time"] | None = None,
        rewards: Num[Tensor, " batch"] | np.ndarray | Sequence[float | None] | None = None,
        advantages: Num[Tensor, " batch"] | np.ndarray | Sequence[float | None] | None = None,
        correct: Num[Tensor, " batch"] | Bool[Tensor, " batch"] | np.ndarray | Sequence[bool | None] | None = None,
        perception_correct: Bool[Tensor, " batch"] | np.ndarray | Sequence[bool | None] | None = None,
        group_ids: Int[Tensor, " batch"] | np.ndarray | Sequence[int | str | None] | None = None,
        donors: Int[Tensor, " batch"] | None = None,
        finished: Bool[Tensor, " batch"] | np.ndarray | Sequence[bool] | None = None,
        prompts: Sequence[str | None] | None = None,
        references: Sequence[str | None] | None = None,
        images: Sequence[Any] | None = None,
        ids: Sequence[str | None] | None = None,
        step: int | None = None,
        open_at_start: str | Sequence[str | None] | None = None,
        extra: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> None:
        """Append one line for each response.

        Everything except `tokens` is optional: the more is given, the more the commands can show. The call waits for
        the device and copies its arguments to the host. To write some rows of a batch, slice the arguments. None among
        the values of an argument means "not known".

        Args:
            tokens: Sampled token ids (needs the writer's `tokenizer`), or the texts of each response's real tokens.
            mask: True at real tokens. May be left out with texts, whose per-token values then start at the left.
            old_log_probs: Log-probability of each token in its own context, nats.
            corrupted_log_probs: The same with the image corrupted.
            counterfactual_log_probs: The same with the perception replaced, carried back to the original positions.
            repeated_log_probs: The pass of `old_log_probs`, run a second time, for the noise floor.
            roles: From :func:`~srpo_core.segment_responses`; without them the reader takes roles from the text.
            broken: From there too.
            scores: Score of each token under its role, nats: the sum of :func:`~srpo_core.visual_dependency` and
                :func:`~srpo_core.perception_consistency`. Needed where the log-probs do not determine it (a divergence,
                or scores that depend on the reliance); else the reader computes it.
            weights: As used in training.
            down_divergence: As :func:`~srpo_core.diagnostics.interference` takes it, nats.
            up_divergence: Likewise; give both or neither.
            rewards: One per response, in any unit.
            advantages: One per response.
            correct: Whether each answer is right: booleans, or 1, 0 and -1 for "not known".
            perception_correct: Whether each perception is right, where that is known.
            group_ids: Equal for responses of this step to one prompt.
            donors: From :func:`~srpo_core.counterfactual_responses`.
            finished: Whether the model ended each response itself. Where `tokens` are ids, the end-of-sequence id
                tells; else responses count as finished.
            prompts: The questions.
            references: The right answers.
            images: For each response a path, or an image: PIL's, an array of up to 4 channels ([channel, height, width]
                or channels last; floats in [0, 1] or up to 255, or whole numbers), encoded bytes, or a dict with one of
                these as ``bytes``, ``path`` or ``image``. Of several images of a response the first is written. Images
                are saved once each, as PNG, in a folder beside the file. None: no image.
            ids: Names of the responses.
            step: Training step.
            open_at_start: The kind of block that each prompt left open, or one kind for all; None: no block.
            extra: Anything else about each response, as values that JSON can hold.

        Raises:
            ValueError: For the first batch only: if token ids come without a tokenizer or a mask, the sizes disagree,
                or one of the two divergences is missing. No line is then written.
        """
        try:
            texts, finished_by_id = self._texts(tokens, mask)
            where = self._where(mask, texts)
            per_token = {
                "old_log_probs": old_log_probs,
                "corrupted_log_probs": corrupted_log_probs,
                "counterfactual_log_probs": counterfactual_log_probs,
                "repeated_log_probs": repeated_log_probs,
                "roles": roles,
                "scores": scores,
                "weights": weights,
                "down_divergence": down_divergence,
                "up_divergence": up_divergence,
            }
            if isinstance(open_at_start, str):
                open_at_start = [open_at_start] * len(texts)
            per_response = {
                "broken": (broken, of.reason_name),
                "reward": (rewards, of.number),
                "advantage": (advantages, of.number),
                "correct": (correct, of.flag),
                "perception_correct": (perception_correct, of.flag),
                "group": (group_ids, of.group),
                "step": (None if step is None else [step] * len(texts), _step),
                "id": (ids, of.text),
                "finished": (finished_by_id if finished is None else finished, of.flag),
                "swapped": (donors, of.is_donor),
                "prompt": (prompts, of.text),
                "reference": (references, of.text),
                "image": (images, self._image),
                "open_at_start": (open_at_start, of.kind_of_block),
                "extra": (extra, self._extra),
            }
            columns = self._token_columns(per_token, texts, where)
            for name, (values, convert) in per_response.items():
                if values is not None:
                    columns |= self._column(name, values, len(texts), convert)
            if "correct" in columns and self._correct_by is not None:
                columns["correct_by"] = [self._correct_by] * len(texts)
            if self._tags is not None:
                columns["tags"] = [self._tags] * len(texts)
            if finished is not None and "finished" in columns and finished_by_id is not None:
                told = zip(columns["finished"], finished_by_id, strict=True)
                columns["finished"] = [by_id if given is None else given for given, by_id in told]
            self._file.append(self._encoded(texts, columns))
            self._has_written = True
        except _Misuse as error:
            if not self._has_written:
                raise
            self._leave_out("response", "a call that is wrong", str(error), count=self._rows(tokens))
        except Exception as error:  # whatever it is, a record is not worth a run
            self._leave_out("response", reason_of(error), repr(error), count=self._rows(tokens))

    def _leave_out(self, field: str, reason: str, detail: str, *, count: int = 1) -> None:
        if (field, reason) not in self.left_out:
            logger.warning(
                "%s: %s cannot be written and is left out: %s. Others like it are only counted, in "
                "RolloutWriter.left_out",
                self.path,
                field,
                max((reason, detail), key=len)[:300]
                if reason in detail or detail in reason
                else f"{reason} ({detail[:300]})",
            )
        self.left_out[field, reason] += count

    @staticmethod
    def _rows(tokens: Any) -> int:
        return len(tokens) if hasattr(tokens, "__len__") else 1

    def _where(self, mask: Tensor | None, texts: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Which positions of each row are its tokens."""
        lengths = [len(text.get("tokens", text.get("offsets", ()))) for text in texts]
        if mask is None:
            return [slice(length) for length in lengths]
        where = list(mask.cpu().numpy())
        if lengths != [int(row.sum()) for row in where]:
            raise _Misuse("tokens must be the texts of exactly the tokens at which the mask is True")
        return where

    def _token_columns(
        self, given: Mapping[str, Tensor | None], texts: Sequence[Any], where: Sequence[Any]
    ) -> dict[str, list[Any]]:
        if (given["down_divergence"] is None) != (given["up_divergence"] is None):
            self._refuse(DIVERGENCES[1], f"{' and '.join(DIVERGENCES)} are written together: pass both or neither")
        columns: dict[str, list[Any]] = {}
        for name, values in given.items():
            if values is None:
                continue
            fault = _wrong_shape(name, values, where)
            if fault is not None:
                self._refuse(name, fault)
                continue
            host = values.detach().cpu()
            host = host.double() if host.is_floating_point() else host
            rows = [row[real] for row, real in zip(host.numpy(), where, strict=True)]
            convert = of.letters if name == "roles" else (lambda row, name=name: of.numbers(name, row))
            columns |= self._column(name, rows, len(texts), convert)
        pair = [columns.pop(name) for name in DIVERGENCES if name in columns]
        if len(pair) == 2:  # one of two says nothing, of a batch or of a response
            whole = [all(values is not None for values in both) for both in zip(*pair, strict=True)]
            for name, column in zip(DIVERGENCES, pair, strict=True):
                columns[name] = [values if both else None for values, both in zip(column, whole, strict=True)]
        return columns

    def _refuse(self, field: str, fault: str) -> None:
        if not self._has_written:
            raise _Misuse(fault)
        self._leave_out(field, "a call that is wrong", fault)

    def _column(self, name: str, values: Any, count: int, convert: Callable[[Any], Any]) -> dict[str, list[Any]]:
        """The values of a field, as lines hold them; None where there is none, and nothing if the call is wrong."""
        if (fault := _wrong_size(name, values, count)) is not None:
            self._refuse(name, fault)
            return {}
        if isinstance(values, Tensor | np.ndarray) and name != "image":
            values = values.tolist()
        column: list[Any] = []
        for value in values:
            try:
                column.append(None if value is None else convert(value))
            except Exception as error:  # whatever the value or its package raises
                column.append(None)
                self._leave_out(name, reason_of(error), str(error))
        return {name: column}

    def _encoded(self, texts: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[Any]]) -> bytes:
        lines = []
        for row, text in enumerate(texts):
            line = dict(text) | {name: values[row] for name, values in columns.items() if values[row] is not None}
            if line.get("finished"):  # the reader's default
                del line["finished"]
            lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
        # A decoder may yield lone surrogates, which are no UTF-8: they are replaced.
        return "".join(lines).encode("utf-8", "replace")

    def _texts(
        self, tokens: Tensor | Sequence[Sequence[str]], mask: Tensor | None
    ) -> tuple[list[dict[str, Any]], list[bool] | None]:
        """The fields ``tokens``, or ``text`` and ``offsets``, of each response; of ids also whether it was finished."""
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2):
            raise _Misuse(f"mask must be a boolean [batch, time] tensor, got {_described(mask)}")
        if not isinstance(tokens, Tensor):
            if isinstance(tokens, str) or any(isinstance(texts, str) for texts in tokens):
                raise _Misuse("tokens must be a list of the texts of tokens for each response, got a text")
            if mask is not None and len(mask) != len(tokens):
                raise _Misuse(f"mask has {len(mask)} rows for the tokens of {len(tokens)} responses")
            return [{"tokens": [self._text(text) for text in texts]} for texts in tokens], None
        if self._decode is None or mask is None:
            missing = "the mask" if mask is None else "RolloutWriter(path, tokenizer=...)"
            raise _Misuse(f"tokens are ids, which need {missing}; or pass the texts of the tokens")
        if tokens.shape != mask.shape:
            raise _Misuse(f"tokens have shape {tuple(tokens.shape)} and mask {tuple(mask.shape)}; they must be equal")
        texts, finished = [], []
        for row, real in zip(tokens.cpu(), mask.cpu(), strict=True):
            ids = row[real].tolist()
            finished.append(bool(ids) and ids[-1] in self._eos)
            try:
                text, starts, ends = token_spans(ids, self._decode, self._pieces)
            except Exception as error:  # an id of no token, as any tokenizer may say it
                self._leave_out("tokens", "ids that cannot be decoded", f"{type(error).__name__}: {error}")
                texts.append({"tokens": [self._decoded(token) for token in ids]})
                continue
            if [*starts, len(text)] == [0, *ends]:
                texts.append({"tokens": [text[start:end] for start, end in zip(starts, ends, strict=True)]})
            else:
                texts.append({"text": text, "offsets": [list(span) for span in zip(starts, ends, strict=True)]})
        return texts, finished

    def _text(self, text: Any) -> str:
        if isinstance(text, str):
            return str(text)
        self._leave_out("tokens", "not a text", repr(text))
        return _UNKNOWN_TEXT

    def _decoded(self, token: int) -> str:
        assert self._decode is not None
        try:
            text = self._decode([token])
        except Exception:  # this is the one
            return _UNKNOWN_TEXT
        return text if isinstance(text, str) else _UNKNOWN_TEXT

    def _image(self, image: Any) -> str | None:
        """The path that the line will hold; an image that is not a file yet is saved."""
        if isinstance(image, list | tuple):
            held = [each for each in image if each is not None]
            if len(held) > 1:
                self._leave_out("image", "all but the first of several", f"{len(held)} images", count=len(held) - 1)
            return self._image(held[0]) if held else None
        found = picture(image)
        if not isinstance(found, Picture):
            return found
        if found.name not in self._images:
            path = save(found, self.path.with_name(f"{self.path.stem}_images"))
            self._images[found.name] = path.relative_to(self.path.parent).as_posix()
        return self._images[found.name]

    def _extra(self, value: Any) -> dict[str, Any]:
        kept, faults = of.extra(value)
        for fault in faults:
            self._leave_out("extra", fault.reason, fault.reason)
        return kept


def _step(value: Any) -> int:
    if isinstance(value, bool) or not is_whole(value := of.number(value)) or value < 0:
        raise Unwritable("not a whole number, at least 0")
    return int(value)


def _described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a {type(value).__name__}"


def _wrong_shape(name: str, values: Any, where: Sequence[Any]) -> str | None:
    """What is wrong with the sizes of values per token; None if nothing is."""
    if not isinstance(values, Tensor) or values.ndim != 2:
        return f"{name} must be a [batch, time] tensor, got {_described(values)}"
    has_mask = bool(where) and not isinstance(where[0], slice)
    needed = max((each.stop if isinstance(each, slice) else len(each) for each in where), default=0)
    if len(values) != len(where) or values.shape[1] < needed or (has_mask and values.shape[1] != needed):
        wanted = f"{(len(where), needed)}" + (", as the mask" if has_mask else ", or wider")
        return f"{name} has shape {tuple(values.shape)}; it must be {wanted}"
    return None


def _wrong_size(name: str, values: Any, count: int) -> str | None:
    if isinstance(values, Tensor | np.ndarray) and values.ndim != 1 and name != "image":
        return f"{name} must have one value for each response, shape ({count},), got shape {tuple(values.shape)}"
    if isinstance(values, str | bytes | Mapping) or not (isinstance(values, Iterable) and isinstance(values, Sized)):
        return f"{name} must be a list of one value for each response, got {_described(values)}"
    if len(values) != count:
        return f"{name}: {len(values)} values for {count} responses"
    return None
