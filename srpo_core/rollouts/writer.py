"""Rollouts to a file: what any trainer has of a batch becomes one line per response."""

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from srpo_core.roles import Role
from srpo_core.rollouts.record import DIVERGENCES, LOG_PROBS, ROLE_LETTERS, is_whole, load_json
from srpo_core.tags import DEFAULT_TAGS, BrokenReason, RoleTags
from srpo_core.token_text import text_decoder, token_spans
from srpo_core.typechecking import typechecked

__all__ = ["RolloutWriter"]

_DECIMALS = 5  # of numbers per token: far below the noise between two passes
_BLOCK_BYTES = 2**16  # of one read, when the end of a file is read backward


class RolloutWriter:
    """Writes rollouts to a file, a batch at a time, for any trainer.

    Each call of :meth:`write` appends whole lines and flushes them. A run that is killed leaves at most its last line
    torn, and a run that goes on with `resume_at` removes it.

    Args:
        path: The file; missing folders are made. One process writes one file: give each rank its own.
        tokenizer: Turns token ids into texts; anything with ``decode(list_of_ids) -> str``. None: pass texts.
        tags: Opening and closing tags; written where they differ from the default ones.
        eos_token_id: Id or ids that end a response; None for the tokenizer's.
        resume_at: None starts a new file: what the file held is lost. A resumed run passes the step that it will write
            first: lines at the end of the file that belong to this step or a later one are removed, because the run
            writes them again, and so is a torn last line. Everything before stays, as do lines without a step. The file
            is read backward from its end, so that resuming costs no more than what it removes.

    Raises:
        ValueError: If `resume_at` is below 0, or there is a tokenizer but no end-of-sequence id.

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
    ) -> None:
        self.path = Path(path)
        self._tags = tags
        if resume_at is not None and resume_at < 0:
            raise ValueError(f"resume_at must be a step, at least 0, got {resume_at}; pass None to start a new file")
        eos_token_id = eos_token_id if eos_token_id is not None else getattr(tokenizer, "eos_token_id", None)
        if tokenizer is not None and eos_token_id is None:
            raise ValueError("eos_token_id must be given, because the tokenizer has none; pass () if no response ends")
        self._eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        self._decode = None if tokenizer is None else text_decoder(tokenizer)
        self._pieces: dict[Any, Any] = {}
        self._images: set[Path] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_at is not None and self.path.exists():
            _remove_from(self.path, resume_at)
        # A decoder may yield lone surrogates, which are no UTF-8: they are replaced.
        mode = "w" if resume_at is None else "a"
        self._file = self.path.open(mode, encoding="utf-8", errors="replace", newline="\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
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
        scores: Float[Tensor, "batch time"] | None = None,
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
        """Append one line for each response.

        Everything but `tokens` is optional: the more is given, the more the commands can show. The call waits for the
        device and copies what it is given to the host. To write some rows of a batch, slice the arguments.

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
            correct: Whether each answer is right; without it a reward above 0 counts as right.
            perception_correct: Whether each perception is right, where that is known.
            group_ids: Equal for responses of this step to one prompt.
            donors: From :func:`~srpo_core.counterfactual_responses`.
            finished: Whether the model ended each response itself. Where `tokens` are ids, the end-of-sequence id
                tells; else responses count as finished.
            prompts: The questions.
            references: The right answers.
            images: For each response a path, or an image: PIL's, or a [channel, height, width] tensor of 1 or 3
                channels (floats in [0, 1] or bytes). Images are saved once each in a folder beside the file. None: no
                image.
            ids: Names of the responses.
            step: Training step.
            extra: Anything else about each response, as values that JSON can hold.

        Raises:
            ValueError: If token ids come without a tokenizer or a mask, a number is NaN or out of range, the sizes
                disagree, or one of the two divergences is missing. Then no line is written.
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

        if (down_divergence is None) != (up_divergence is None):
            raise ValueError("down_divergence and up_divergence are written together: pass both or neither")
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
            letters = "".join(ROLE_LETTERS[role] for role in sorted(Role))
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
            if line.get("finished"):  # the reader's default
                del line["finished"]
            lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
        self._file.write("".join(lines))
        self._file.flush()

    def _texts(
        self, tokens: Tensor | Sequence[Sequence[str]], mask: Tensor | None
    ) -> tuple[list[dict[str, Any]], list[bool] | None]:
        """The fields ``tokens``, or ``text`` and ``offsets``, of each response; of ids also whether it was finished."""
        if not isinstance(tokens, Tensor):
            return [{"tokens": list(texts)} for texts in tokens], None
        if self._decode is None or mask is None:
            missing = "the mask" if mask is None else "RolloutWriter(path, tokenizer=...)"
            raise ValueError(f"tokens are ids, which need {missing}; or pass the texts of the tokens")
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
        """The path that the line will hold; an image that is not a file yet is saved."""
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


def _json_numbers(name: str, row: int, values: NDArray[np.float64]) -> list[float | None]:
    finite = np.isfinite(values)
    numbers: list[float | None]
    if name in DIVERGENCES:  # one small step moves a distribution by less than a decimal: keep digits instead
        numbers = [float(f"{value:.5g}") for value in np.where(finite, values, 0.0).tolist()]
    else:
        numbers = (np.round(np.where(finite, values, 0.0), _DECIMALS) + 0.0).tolist()  # + 0.0: -0.0 is 0.0
    for token in np.flatnonzero(~finite).tolist():
        if name not in LOG_PROBS or values[token] != -np.inf:
            raise ValueError(f"{name} is {values[token]} at response {row} token {token}, which JSON cannot hold")
        numbers[token] = None
    if name not in LOG_PROBS and name != "scores" and len(values) and values.min() < 0:
        token = int(values.argmin())
        raise ValueError(f"{name} is {values[token]} at response {row} token {token}; it is at least 0")
    return numbers


def _json_values(name: str, values: Tensor | np.ndarray | Sequence[Any]) -> list[Any]:
    listed = values.tolist() if isinstance(values, Tensor) else [getattr(v, "item", lambda v=v: v)() for v in values]
    for row, value in enumerate(listed):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value} at response {row}, which JSON cannot hold")
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
    scanlines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # each begins with the number of its filter: 0, none

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")
