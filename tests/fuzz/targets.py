"""Coverage-guided fuzzing of what reads strings and tokens of a model: nothing but documented errors, and sane results.

    python3.11 -m venv .venv-fuzz && .venv-fuzz/bin/pip install atheris -e '.[cli]'
    .venv-fuzz/bin/python tests/fuzz/targets.py tags -max_total_time=300
    .venv-fuzz/bin/python tests/fuzz/targets.py counterfactuals -max_total_time=300
    .venv-fuzz/bin/python tests/fuzz/targets.py rollouts -max_total_time=300

libFuzzer's options follow the target. A case that fails is written to a file `crash-*`; put it into tests/fuzz/corpus/,
where tests/test_fuzz.py runs it from then on.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

try:
    import atheris
except ImportError:  # the cases of the corpus run without it
    from contextlib import nullcontext as instrumented
else:

    def instrumented():
        return atheris.instrument_imports(include=["srpo_core"])


with instrumented():
    from srpo_core.counterfactuals import counterfactual_responses
    from srpo_core.formats import read_format
    from srpo_core.prompting import extract_answer, format_reward, system_prompt
    from srpo_core.roles import segment_responses
    from srpo_core.rollouts import RolloutError, parse_rollout, record
    from srpo_core.tags import RoleTags, open_block, parse_response

CORPUS = Path(__file__).parent / "corpus"


class Data:
    """Choices from bytes, the first ones first; what is missing is 0. A case means the same without atheris."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def byte(self, below: int = 256) -> int:
        """A whole number."""
        value = self._content[self._at] if self._at < len(self._content) else 0
        self._at += 1
        return value % below

    def text(self, limit: int) -> str:
        """Some of what is left, as UTF-8 that may hold halves of characters."""
        size = min(self.byte(), limit)
        found = self._content[self._at : self._at + size]
        self._at += size
        return found.decode("utf-8", "surrogatepass" if self.byte(2) else "replace") if _decodes(found) else repr(found)

    def rest(self) -> bytes:
        """All that is left."""
        return self._content[self._at :]


def _decodes(content: bytes) -> bool:
    try:
        content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


WORDS = ["<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>", "\n", " ", "{", "}", '"a"']
KINDS = ["perception", "reasoning", "answer"]


def written(data: Data, own: list[str]) -> str:
    """A text of words that mean something and of anything else."""
    words, parts = [*own, *WORDS], []
    for _ in range(data.byte(24)):
        at = data.byte(len(words) + 3)
        parts.append(words[at] if at < len(words) else data.text(12))
    return "".join(parts)


def tags(content: bytes) -> None:
    """Formats, tags, parsing, answers, rewards, and roles of characters."""
    data = Data(content)
    chosen = RoleTags()
    how = data.byte(4)
    try:
        if how == 1:
            chosen = read_format(data.text(200))
        elif how == 2:
            pairs = [(data.text(6), data.text(6)) for _ in range(3)]
            chosen = RoleTags(*pairs[:2], answer=pairs[2] if data.byte(2) else None, nested=bool(data.byte(2)))
        elif how == 3:
            grammar = "\n".join(f"{kind} = {data.text(12)} ... {data.text(12)}" for kind in KINDS)
            chosen = RoleTags.of_grammar(grammar)
    except ValueError:
        return
    assert RoleTags.of_grammar(chosen.grammar) == chosen
    text = written(data, [tag for pair in chosen.pairs.values() for tag in pair])
    finished, opened = bool(data.byte(2)), [None, *chosen.pairs][data.byte(len(chosen.pairs) + 1)]
    parsed = parse_response(text, chosen, finished=finished, open_at_start=opened)
    for block in parsed.blocks:
        assert 0 <= block.start <= block.end <= len(text), (block, text)
    answer = extract_answer(text, chosen, finished=finished, open_at_start=opened)
    assert answer is None or answer in text
    assert 0.0 <= float(format_reward(text, chosen, finished=finished, open_at_start=opened)) <= 1.0
    assert isinstance(system_prompt(chosen), str)
    assert open_block(text, chosen) in (None, *chosen.pairs)
    if not text:
        return
    ids = torch.tensor([[ord(character) for character in text]])
    tokenizer = SimpleNamespace(eos_token_id=-1, decode=lambda ids: "".join(map(chr, ids)))
    found = segment_responses(ids, torch.ones_like(ids, dtype=torch.bool), tokenizer, tags=chosen, open_at_start=opened)
    assert found.roles.shape == ids.shape
    assert found.roles.min() >= 0
    assert found.roles.max() <= 2
    if int(found.broken[0]):
        assert not found.roles.any()


def counterfactuals(content: bytes) -> None:
    """Another perception in the place of each one, and the way back."""
    data = Data(content)
    batch, time = 1 + data.byte(4), data.byte(9)
    ids = torch.tensor([[data.byte(50) for _ in range(time)] for _ in range(batch)], dtype=torch.int64)
    roles = torch.tensor([[data.byte(3) for _ in range(time)] for _ in range(batch)], dtype=torch.int64)
    mask = torch.tensor([[data.byte(4) > 0 for _ in range(time)] for _ in range(batch)], dtype=torch.bool)
    ids, roles, mask = (values.reshape(batch, time) for values in (ids, roles, mask))
    others = {}
    if data.byte(2):
        others["group_ids"] = torch.tensor([data.byte(3) for _ in range(batch)])
    if data.byte(2):
        others["perception_keys"] = torch.tensor([data.byte(3) - 1 for _ in range(batch)])
    if data.byte(2):
        places = [[data.byte(5) == 0 for _ in range(time)] for _ in range(batch)]
        others["boundary"] = torch.tensor(places, dtype=torch.bool).reshape(batch, time)
    kind = ("swap", "drop", "mask")[data.byte(3)]
    made = counterfactual_responses(ids, roles, mask, kind=kind, pad_token_id=99, **others)
    rows, new_time = made.token_ids.shape
    assert rows == batch
    assert made.mask.shape == made.attention_mask.shape == (rows, new_time)
    assert not (made.mask & (made.token_ids == 99)).any()
    assert ((made.donors >= -1) & (made.donors < batch)).all()
    assert not any(row == donor for row, donor in enumerate(made.donors.tolist()))
    assert made.positions.shape == (batch, time)
    assert ((made.positions >= -1) & (made.positions < max(new_time, 1))).all()
    kept = made.positions >= 0
    if new_time:
        at_home = made.token_ids.gather(1, made.positions.clamp(min=0))
        assert (at_home[kept] == ids[kept]).all(), "a token that stays is the same token"
    numbers = torch.arange(rows * new_time, dtype=torch.float32).reshape(rows, new_time)
    back = made.carry_back(numbers, original_log_probs=torch.full((batch, time), -1.0))
    assert back.shape == (batch, time)
    for row in range(batch):
        for token in range(time):
            place = int(made.positions[row, token])
            assert back[row, token] in ((-1.0, numbers[row, place]) if place >= 0 else (-1.0,))


FIELDS = sorted(record._READERS)
VALUES = [
    "null",
    "true",
    "-1",
    "0",
    "1e400",
    "1e39",
    "-0.0",
    "9" * 25,
    '""',
    '"O"',
    "[]",
    "[0]",
    "[null]",
    "[[0,1]]",
    "{}",
]
VALUES += ['["a"]', '{"perception":["a","b"],"reasoning":["c","d"],"answer":null}', "NaN", "[-Infinity]", '"\\ud800"']
VALUES += ['["a","b"]', "[0.5,-1]", '"OP"', "[[0,1],[1,1]]", "[" * 120 + "]" * 120, '"perception"']


def rollouts(content: bytes) -> None:
    """A line of a rollout file: raw bytes, or an object of fields that may fit one another."""
    data = Data(content)
    line = data.rest()
    if data.byte(2) == 0:  # a line that begins with a brace stays as it is
        fields = ['"tokens": ["a", "b"]', '"text": "ab"', ""][data.byte(3)]
        parts = [fields] if fields else []
        for _ in range(data.byte(6)):
            name, at = FIELDS[data.byte(len(FIELDS))], data.byte(len(VALUES) + 1)
            value = VALUES[at] if at < len(VALUES) else json.dumps(data.text(30))
            parts.append(f'"{name}": {value}')
        line = ("{" + ", ".join(parts) + "}").encode("utf-8", "surrogatepass")
    results = []
    for load in (record.load_json, record.load_with_stdlib):
        before, record.load_json = record.load_json, load
        try:
            results.append(parse_rollout(line))
        except RolloutError as error:
            results.append(None)
            assert error.reason  # noqa: PT017
        finally:
            record.load_json = before
    assert (results[0] is None) == (results[1] is None), "both JSON readers agree"
    rollout = results[0]
    if rollout is None:
        return
    rollout.parsed  # noqa: B018
    if rollout.starts is not None and rollout.ends is not None:
        assert len(rollout.pieces) == len(rollout)
        for values in (rollout.old_log_probs, rollout.scores, rollout.weights):
            assert values is None or (len(values) == len(rollout) and not np.isnan(values).any())
    assert rollout.reward is None or math.isfinite(rollout.reward)


TARGETS = {each.__name__: each for each in (tags, counterfactuals, rollouts)}


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]
    given = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    corpus = CORPUS / target.__name__
    corpus.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    atheris.Setup(sys.argv if given else [*sys.argv, str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
