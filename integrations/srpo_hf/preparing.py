"""A recorded response -> what a model needs to score it: an encoded prompt and token ids, or why there are none."""

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from PIL import Image

from srpo_core.rollouts import Rollout
from srpo_core.token_text import text_decoder, token_spans
from srpo_hf.prompts import EncodedPrompt

__all__ = ["Encode", "ImageReader", "PromptReader", "TokenReader", "Tokens", "Unscored"]

#: Turns a templated text and its images into a prompt as the model takes it.
Encode = Callable[[str, list[Image.Image]], EncodedPrompt]

K = TypeVar("K")
V = TypeVar("V")

_REMEMBERED = 64  # prompts and images: those of the groups that are being read
_WORD = "SRPO-QUESTION"  # stands for the question where a chat template is looked at


class Unscored(Exception):
    """A response cannot be scored.

    Attributes:
        reason: Of which kind the fault is, the same for all responses that have it.
        detail: What it is here.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Tokens(NamedTuple):
    """The tokens of a response.

    Attributes:
        ids: Of this tokenizer.
        starts: The first character of each in the text.
        ends: The character after its last.
        as_recorded: Whether these are the tokens that the file has, or the file has none. Else the text was encoded.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]
    as_recorded: bool


class TokenReader:
    """The tokens of a response: the recorded ones if they are this tokenizer's, else those that it makes of the text.

    A sampled response is often not the encoding that the tokenizer would choose for its text, so the recorded tokens
    are looked up one by one where the whole text gives others. What is found is used only if it decodes to the text
    with a token where the file has one.

    Args:
        tokenizer: Of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._decode = tokenizer, text_decoder(tokenizer)
        self._known: dict[Any, Any] = {}
        self._pieces: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; special tokens that it spells are tokens, and none is added."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, rollout: Rollout) -> Tokens:
        """The tokens of a rollout.

        Raises:
            Unscored: If there is no text, or the tokenizer does not give it back.
        """
        if not rollout.text:
            raise Unscored("the response has no text")
        ids = self.encode(rollout.text)
        text, starts, ends = token_spans(ids, self._decode, self._known)
        has_tokens = rollout.starts is not None
        if text == rollout.text and (not has_tokens or _recorded(rollout) == (starts, ends)):
            return Tokens(ids, starts, ends, True)
        if has_tokens and (found := self._one_by_one(rollout)) is not None:
            spelled, *spans = token_spans(found, self._decode, self._known)
            if spelled == rollout.text and _recorded(rollout) == tuple(spans):
                return Tokens(found, *_recorded(rollout), True)
        if text != rollout.text:
            at = next((at for at, (a, b) in enumerate(zip(text, rollout.text, strict=False)) if a != b), len(text))
            raise Unscored(
                "the tokenizer does not give the text back when it encodes and decodes it",
                f"from {rollout.text[at : at + 20]!r} on it gives {text[at : at + 20]!r}",
            )
        return Tokens(ids, starts, ends, False)

    def _one_by_one(self, rollout: Rollout) -> list[int] | None:
        """The ids of the recorded tokens, looked up by their texts; None where a text is not one token."""
        ids: list[int] = []
        runs: list[list[int]] = []  # first character, last character, tokens: of tokens that share characters
        for start, end in zip(*_recorded(rollout), strict=True):
            if runs and (start < runs[-1][1] or start == end):
                runs[-1][1:] = [max(end, runs[-1][1]), runs[-1][2] + 1]
            else:
                runs.append([start, end, 1])
        for start, end, count in runs:
            piece = rollout.text[start:end]
            if piece not in self._pieces:
                self._pieces[piece] = self.encode(piece)
            if len(self._pieces[piece]) != count:
                return None
            ids += self._pieces[piece]
        return ids


def _recorded(rollout: Rollout) -> tuple[list[int], list[int]]:
    """Where the recorded tokens start and end; of a rollout without tokens nothing."""
    if rollout.starts is None or rollout.ends is None:
        return [], []
    return rollout.starts.tolist(), rollout.ends.tolist()


class ImageReader:
    """The image of a response, read from the file's folder.

    Args:
        folder: The folder that paths in the file start from.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._images = folder, _Recent[str, Image.Image]()

    def __call__(self, rollout: Rollout) -> list[Image.Image]:
        """No image, or the one that the line names.

        Raises:
            Unscored: If it is not there or cannot be read.
        """
        return [] if rollout.image is None else [self._images.get(rollout.image, self._read)]

    def _read(self, path: str) -> Image.Image:
        try:
            with Image.open(self._folder / path) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise Unscored("the image is not there", path) from None
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise Unscored("the image cannot be read", f"{path}: {error}") from None


class PromptReader:
    """The prompt of a response, as the model takes it.

    A recorded prompt is taken as it stands if it has a special token of the chat template or ends as the template ends,
    and is else put into the template as the user's message, after the image.

    Args:
        processor: Of transformers.
        encode: Makes the prompt of the text.
        template: True puts every prompt into the chat template, False none; None decides for each prompt.
        system: The system message of prompts that are put into the template; None: no such message.

    Raises:
        ValueError: If prompts are to be put into a template and the processor has none, or its template refuses the
            messages.
    """

    def __init__(
        self, processor: Any, encode: Encode, *, template: bool | None = None, system: str | None = None
    ) -> None:
        self._processor, self._encode, self._template, self._system = processor, encode, template, system
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._image = getattr(processor, "image_token", None) or "<image>"
        full, self._place = getattr(processor, "full_image_sequence", None), self._image
        if full and getattr(processor, "boi_token", None):  # Gemma: one token in the text becomes a whole sequence
            self._image, self._place = full, processor.boi_token
        self._recent = _Recent[tuple[str, str | None], tuple[str, EncodedPrompt]]()
        self._marks: list[str] = []
        self._end = self._bare_end = ""
        if template is not False:
            self._look_at_template()

    def _look_at_template(self) -> None:
        around = self._templated(_WORD, images=0)
        if _WORD not in around:
            raise ValueError("the chat template leaves the user's message out: pass --no-template")
        named = {*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()}
        self._marks = [token for token in named if token.strip() and token in around and token not in self._place]
        self._end = around.rpartition(_WORD)[2].strip()
        bare = self._end
        for mark in self._marks:
            bare = bare.replace(mark, "")
        self._bare_end = bare.strip()

    def _templated(self, question: str, *, images: int) -> str:
        def message(role: str, text: str, images: int = 0) -> dict[str, Any]:
            return {"role": role, "content": [*({"type": "image"},) * images, {"type": "text", "text": text}]}

        system = [] if self._system is None else [message("system", self._system)]
        messages = [*system, message("user", question, images)]
        try:
            return self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # of jinja, and of processors without a template
            kind = "system message" if system else "prompt"
            raise ValueError(
                f"the processor's chat template does not take the {kind} ({error}): pass --no-template for prompts "
                "that are templated already"
            ) from None

    def __call__(self, rollout: Rollout, images: list[Image.Image]) -> tuple[str, EncodedPrompt]:
        """The prompt of a rollout, as templated text and encoded.

        Raises:
            Unscored: If none is recorded, or its placeholders do not fit the image, or the processor refuses it.
        """
        if rollout.prompt is None:
            raise Unscored("no prompt is recorded")
        return self._recent.get((rollout.prompt, rollout.image), lambda key: self._read(key[0], images))

    def _read(self, prompt: str, images: list[Image.Image]) -> tuple[str, EncodedPrompt]:
        as_it_stands = not self._template if self._template is not None else self._is_templated(prompt)
        if as_it_stands:
            text = self._with_one_place(prompt, len(images))
        else:
            for place in {self._place, self._image, "<image>"}:  # data sets write them into questions
                prompt = prompt.replace(place, "")
            text = self._templated(prompt.strip(), images=len(images))
        try:
            encoded = self._encode(text, images)
        except Exception as error:  # whatever a processor raises
            raise Unscored("the processor refuses the prompt or its image", f"{error}") from None
        if as_it_stands and text != prompt and encoded.token_ids.tolist() != self._ids(prompt):
            raise Unscored("the image in the recorded prompt has other tokens than this processor gives it")
        return text, encoded

    def _ids(self, prompt: str) -> list[int]:
        begin = self._tokenizer.bos_token
        return self._tokenizer(prompt, add_special_tokens=not (begin and prompt.startswith(begin)))["input_ids"]

    def _is_templated(self, prompt: str) -> bool:
        if any(mark in prompt for mark in self._marks):
            return True
        end = prompt.rstrip()
        if self._end and end.endswith(self._end):
            return True
        if self._bare_end and self._bare_end != self._end and end.endswith(f"\n{self._bare_end}"):
            raise Unscored("the prompt was put into a template and lost its special tokens", f"...{end[-30:]!r}")
        return False

    def _with_one_place(self, prompt: str, images: int) -> str:
        """A templated prompt with one placeholder for each image, where it may have one for each of their tokens."""
        text = prompt
        if prompt.count(self._place) != images or self._image != self._place:
            text = re.sub(f"(?:{re.escape(self._image)})+", lambda _: self._place, prompt)
        if (places := text.count(self._place)) != images:
            raise Unscored("the templated prompt and the image do not fit", f"{places} places for {images} images")
        return text


class _Recent(Generic[K, V]):
    """What was made of the last few keys, faults included."""

    def __init__(self) -> None:
        self._made: OrderedDict[K, V | Unscored] = OrderedDict()

    def get(self, key: K, make: Callable[[K], V]) -> V:
        if key not in self._made:
            try:
                self._made[key] = make(key)
            except Unscored as fault:
                self._made[key] = fault
            if len(self._made) > _REMEMBERED:
                self._made.popitem(last=False)
        made = self._made[key]
        if isinstance(made, Unscored):
            raise made
        return made
