"""`srpo score`: anyone's rollouts, scored as by hand, killed and gone on with, and whatever cannot be scored named."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer
from PIL import Image
from rollout_folder import read, save_checkpoint, write, write_rollouts
from srpo_hf import Scorer
from srpo_hf.cli import score
from srpo_hf.loading import encoder, longest
from srpo_hf.part_file import PartFile
from srpo_hf.preparing import PromptReader, TokenReader, Unscored
from srpo_hf.score import ScoreOptions, score_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from srpo_core import SRPOConfig, corrupt_pixel_values
from srpo_core.batch import prompt_id
from srpo_core.cli.app import app
from srpo_core.cli.reading import TagCommand
from srpo_core.pixel_values import image_facts
from srpo_core.report.words import answers
from srpo_core.rollouts import Rollout, ScoringOptions, parse_rollout, read_rollouts, score_rollouts, summarize_files

NEW = {"old_log_probs", "corrupted_log_probs", "counterfactual_log_probs", "scores", "weights", "roles", "broken"}
#: Two exact sums in float32, and the five decimals that a file has.
NEAR = {"atol": 1.6e-5, "rtol": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, *save_checkpoint(folder)


@pytest.fixture
def scored_file(checkpoint, tmp_path):
    """Scores a file in this process; gives the lines and what became of them."""
    _, model, processor = checkpoint

    def run(path, options=None, config=None, **more):
        config = config or SRPOConfig()
        scorer = Scorer(model, processor, config, batch_size=4)
        output = tmp_path / f"{path.stem}.scored.jsonl"
        output.unlink(missing_ok=True)
        encode = encoder(model, processor)
        found = score_file(
            path, output, scorer, processor, encode, config, options or ScoreOptions(), made_with={}, **more
        )
        return read(output), found

    return run


@pytest.fixture
def file(checkpoint, tmp_path):
    return write_rollouts(tmp_path / "rollouts.jsonl", checkpoint[2].tokenizer)


def command(*arguments, code=0):
    """The command in this process."""
    made = typer.Typer()
    made.command(cls=TagCommand)(score)
    result = CliRunner().invoke(made, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def process(*arguments):
    """The command in a process of its own."""
    code = "from srpo_core.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, "score", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )


# What one would get by hand


def by_hand(model, processor, question, image, ids, *, corrupt=False, step=0):
    """Log-probs of a response: one sequence, no padding, no cache, all logits."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = dict(processor(text=[text], images=[[image]], return_tensors="pt"))
    prompt, response_ids = inputs["input_ids"], torch.tensor([ids])
    if corrupt:
        seen = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        inputs["pixel_values"] = corrupt_pixel_values(
            inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            prompt_ids=torch.tensor([prompt_id(prompt[0], seen)]),
            step=step,
            **image_facts(processor)._asdict(),
        )
    inputs["input_ids"] = torch.cat([prompt, response_ids], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(response_ids)], 1)
    with torch.no_grad():
        logits = model(**inputs).logits[0, prompt.shape[1] - 1 : -1].double()
    return logits.log_softmax(-1)[torch.arange(len(ids)), ids]


def test_score_file_gives_the_log_probs_of_one_response_at_a_time(checkpoint, file, scored_file):
    _, model, processor = checkpoint
    lines, found = scored_file(file)
    assert (found.responses, found.scored, found.unscored, found.encoded) == (64, 64, {}, 0)
    originals = read(file)
    ids = [processor.tokenizer("".join(line["tokens"]), add_special_tokens=False)["input_ids"] for line in originals]
    largest = 0.0
    for at, (line, original) in enumerate(zip(lines, originals, strict=True)):
        assert {name: line[name] for name in original} == original
        image = Image.open(file.parent / line["image"])
        about = (line["prompt"], image)
        old = by_hand(model, processor, *about, ids[at])
        corrupted = by_hand(model, processor, *about, ids[at], corrupt=True, step=line["step"])
        largest = max(largest, (corrupted - old).abs().max().item())
        torch.testing.assert_close(torch.tensor(line["old_log_probs"]).double(), old, **NEAR)
        torch.testing.assert_close(torch.tensor(line["corrupted_log_probs"]).double(), corrupted, **NEAR)

        # The next response of the group that perceives something else lends its perception.
        first = at - at % 8
        mates = [first + (at - first + n) % 8 for n in range(1, 8)]
        own, donor = (
            originals[row]["tokens"][1 : originals[row]["tokens"].index("</perception>")]
            for row in (at, next(mate for mate in mates if perceived(originals[mate]) != perceived(originals[at])))
        )
        changed = "<perception>" + "".join(donor) + "".join(original["tokens"][1 + len(own) :])
        changed_ids = processor.tokenizer(changed, add_special_tokens=False)["input_ids"]
        after = by_hand(model, processor, *about, changed_ids)[1 + len(donor) :]
        counterfactual = torch.tensor(line["counterfactual_log_probs"]).double()
        torch.testing.assert_close(counterfactual[1 + len(own) :], after, **NEAR)
        torch.testing.assert_close(counterfactual[: 1 + len(own)], old[: 1 + len(own)], **NEAR)
    assert largest > 0.1  # there is something to be got wrong


def perceived(line):
    return "".join(line["tokens"]).partition("</perception>")[0]


def test_weights_and_roles_are_those_that_the_report_computes(file, scored_file, tmp_path):
    lines, _ = scored_file(file)
    stripped = [
        {name: line[name] for name in line if name not in ("weights", "scores", "roles", "broken")} for line in lines
    ]
    again = write(tmp_path / "stripped.jsonl", stripped)
    for line, row in zip(lines, score_rollouts(read_rollouts(again), ScoringOptions()), strict=True):
        torch.testing.assert_close(torch.tensor(line["weights"]), torch.tensor(row.weights).float(), atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(line["scores"]), torch.tensor(row.scores).float(), atol=3e-5, rtol=0)
        assert [" PR".index(role) if role != "O" else 0 for role in line["roles"]] == row.roles.tolist()


# Stopped and started again


def test_a_killed_run_that_is_started_again_gives_the_file_of_an_undisturbed_one(checkpoint, file, tmp_path):
    folder = checkpoint[0]
    arguments = ["--model", folder, "--trust-remote-code", "--device", "cpu", "--batch-size", "4"]
    whole = tmp_path / "whole.jsonl"
    assert "responses  64" in command(file, *arguments, "-o", whole)

    output, part = tmp_path / "rollouts.scored.jsonl", tmp_path / "rollouts.scored.jsonl.part"
    killed = process(file, *arguments)
    while killed.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= 16):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it was done before it could be killed"
    before = part.read_bytes().count(b"\n")
    assert 16 <= before < 64
    assert not output.exists()
    part.write_bytes(part.read_bytes() + b'{"tokens":["torn')

    resumed = process(file, *arguments)
    assert resumed.wait() == 0, resumed.stdout.read()
    said = resumed.stdout.read()
    assert f"of an earlier run  {before}" in said
    assert "scored             64" in said
    assert output.read_bytes() == whole.read_bytes()
    assert not part.exists()
    assert not part.with_name(f"{part.name}.json").exists()


def test_a_part_of_other_settings_is_begun_anew(tmp_path):
    output = tmp_path / "out.jsonl"
    with PartFile(output, {"model": "one"}) as part:
        part.append(b"a\nb\n")
    assert PartFile(output, {"model": "one"}).lines == 2
    (tmp_path / "out.jsonl.part").write_bytes(b"a\nb\ntorn")
    again = PartFile(output, {"model": "one"})
    assert again.lines == 2
    assert again.path.read_bytes() == b"a\nb\n"
    assert PartFile(output, {"model": "two"}).lines == 0
    assert again.path.read_bytes() == b""


def test_groups_that_are_written_in_turn_stay_in_their_order(file, scored_file, tmp_path):
    lines = read(file)
    mixed = write(tmp_path / "mixed.jsonl", [lines[8 * (n % 8) + n // 8] for n in range(64)])
    found, _ = scored_file(mixed)
    assert [line["tokens"] for line in found] == [line["tokens"] for line in read(mixed)]
    straight, _ = scored_file(file)
    for at, line in enumerate(found):
        torch.testing.assert_close(
            torch.tensor(line["corrupted_log_probs"]),
            torch.tensor(straight[8 * (at % 8) + at // 8]["corrupted_log_probs"]),
            **NEAR,
        )


# Nothing is left out in silence


@pytest.fixture
def odd(file, tmp_path):
    """Lines that cannot be scored, each beside good ones."""
    lines = read(file)[:16]
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for at, change in {
        1: {"image": "nowhere.png"},
        2: {"image": "broken.png"},
        3: {"prompt": None},
        4: {"tokens": ["<perception>", *["a"] * 5000, "</perception>"]},
        5: {"tokens": []},
        6: {"image": "elsewhere.png"},
        7: {"prompt": "user\nhow many?\nassistant\n"},
        9: {"prompt": "<|im_start|>user\nno place for it<|im_end|>\n<|im_start|>assistant\n"},
    }.items():
        lines[at] |= change
    return write(tmp_path / "odd.jsonl", [*lines, '{"token": ["a"]}', ""])


def test_what_cannot_be_scored_is_named_counted_and_written_as_it_was(checkpoint, odd, tmp_path):
    said = command(odd, "--model", checkpoint[0], "--trust-remote-code", "--device", "cpu", code=1)
    for sentence in (
        "2 left unscored, because the image is not there: line 2 (nowhere.png), line 7 (elsewhere.png)",
        "1 left unscored, because the image cannot be read: line 3 (broken.png: ",
        "1 left unscored, because no prompt is recorded: line 4",
        "1 left unscored, because prompt and response are longer than 4,096 tokens: line 5 (5,0",
        "1 left unscored, because the response has no text: line 6",
        "1 left unscored, because the prompt was put into a template and lost its special tokens: line 8",
        "1 left unscored, because the templated prompt and the image do not fit: line 10 (0 places for 1 images)",
        "1 malformed line left out",
        "line 17: 'token' is not a field of a rollout; did you mean 'tokens'?",
    ):
        assert sentence in said
    assert "scored     8" in said
    before = odd.read_text(encoding="utf-8").splitlines()[:16]
    after = (tmp_path / "odd.scored.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(after) == 16
    for at, (old, new) in enumerate(zip(before, after, strict=True)):
        if at in (1, 2, 3, 4, 5, 6, 7, 9):
            assert new == old
        else:
            assert json.loads(new).keys() >= NEW


def test_nothing_to_score_is_an_error(checkpoint, file, tmp_path):
    lines = [line | {"image": "nowhere.png"} for line in read(file)[:3]]
    path = write(tmp_path / "lost.jsonl", lines)
    said = command(path, "--model", checkpoint[0], "--trust-remote-code", "--device", "cpu", code=1)
    assert "3 left unscored, because the image is not there" in said
    assert "Error: no response could be scored" in said


def test_no_file_is_written_over(checkpoint, file, tmp_path):
    model = ["--model", checkpoint[0]]
    said = command(file, *model, "-o", file, code=1)
    assert "is the file that is read; write to another" in said
    (tmp_path / "rollouts.scored.jsonl").write_text("kept")
    said = command(file, *model, code=1)
    assert "rollouts.scored.jsonl is there already: remove it, or name another file with -o" in said
    assert (tmp_path / "rollouts.scored.jsonl").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "nowhere"], "--model 'nowhere' cannot be loaded"),
        (["--model", "x", "--temperature", "0"], "--temperature must be above 0, got 0.0"),
        (["--model", "x", "--corruption-amount", "7"], "--corruption-amount of kind 'patch_mask' must be in (0, 1]"),
    ],
)
def test_bad_options_get_one_sentence(file, arguments, sentence):
    said = command(file, *arguments, code=1)
    assert sentence in said
    assert "Traceback" not in said


def test_a_response_without_an_image_has_no_log_probs_without_it(file, scored_file, tmp_path):
    lines = [line | {"image": None} if at in (2, 5) else line for at, line in enumerate(read(file)[:8])]
    found, about = scored_file(write(tmp_path / "mixed.jsonl", lines))
    assert about.without_image == 2
    for at, line in enumerate(found):
        assert ("corrupted_log_probs" in line) == (at not in (2, 5))
        perception = [score for score, role in zip(line["scores"], line["roles"], strict=True) if role == "P"]
        assert any(perception) == (at not in (2, 5))
        assert line["counterfactual_log_probs"] != line["old_log_probs"]


# Tokens


def bytes_tokenizer(*merges, normalizer=None):
    """Bytes, and what merges make of them."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for one, two in merges:
        vocabulary[one + two] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def rollout_of(**fields):
    return parse_rollout(json.dumps(fields))


def test_recorded_tokens_are_used_even_if_the_tokenizer_would_encode_the_text_otherwise():
    tokenizer = bytes_tokenizer(("c", "a"), ("ca", "t"))
    read_tokens = TokenReader(tokenizer)
    to_ids = tokenizer.convert_tokens_to_ids
    canonical = read_tokens(rollout_of(tokens=["cat"]))
    assert (canonical.ids, canonical.as_recorded) == (to_ids(["cat"]), True)
    sampled = read_tokens(rollout_of(tokens=["c", "a", "t", "ca"]))
    assert (sampled.ids, sampled.as_recorded) == (to_ids(["c", "a", "t", "ca"]), True)
    other = read_tokens(rollout_of(tokens=["ca", "tc", "at"]))  # no token is spelled "tc"
    assert (other.ids, other.as_recorded) == (to_ids(["cat", "cat"]), False)
    assert (other.starts, other.ends) == ([0, 3], [3, 6])
    text = read_tokens(rollout_of(text="cat"))
    assert (text.ids, text.as_recorded) == (to_ids(["cat"]), True)
    # Two bytes of one character are two tokens.
    accent = rollout_of(text="é", offsets=[[0, 1], [0, 1]])
    assert read_tokens(accent).ids == to_ids(["Ã", "©"])


def test_a_text_that_the_tokenizer_does_not_give_back_is_left_unscored():
    read_tokens = TokenReader(bytes_tokenizer(normalizer=normalizers.Lowercase()))
    assert read_tokens(Rollout(text="cat")).as_recorded
    with pytest.raises(Unscored, match=r"does not give the text back .*: from 'Cat' on it gives 'cat'"):
        read_tokens(Rollout(text="a Cat"))


def test_text_and_foreign_tokens_are_encoded_and_their_old_values_go(file, scored_file, tmp_path):
    lines = read(file)[:8]
    texts = ["".join(line["tokens"]) for line in lines]
    plain = {name: value for name, value in lines[0].items() if name != "tokens"} | {"text": texts[0]}
    of_words = texts[1].replace("<", "\0<").split("\0")[1:]
    foreign = lines[1] | {"tokens": of_words, "weights": [1.0] * len(of_words)}
    found, about = scored_file(write(tmp_path / "others.jsonl", [plain, foreign, *lines[2:]]))
    expected, _ = scored_file(write(tmp_path / "same.jsonl", lines))
    assert about.encoded == 1
    assert about.scored == 8
    for new, same in zip(found, expected, strict=True):
        assert new["old_log_probs"] == pytest.approx(same["old_log_probs"], abs=2e-5)
        assert new["weights"] == pytest.approx(same["weights"], abs=1e-4)
    for at in (0, 1):
        assert "tokens" not in found[at]
        assert "".join(found[at]["text"][start:end] for start, end in found[at]["offsets"]) == texts[at]


# Prompts


def test_a_prompt_may_be_a_question_or_what_a_template_made_of_it(checkpoint, file, scored_file, tmp_path):
    _, _, processor = checkpoint
    lines = read(file)[:4]
    question = lines[0]["prompt"]
    image = Image.open(file.parent / lines[0]["image"])
    content = [{"type": "image"}, {"type": "text", "text": question}]
    templated = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    # With a placeholder for each token of the image, as trainers decode what the model was given.
    ids = processor(text=[templated], images=[[image]])["input_ids"][0]
    expanded = processor.tokenizer.decode(ids)
    assert expanded.count("<|image_pad|>") > 1
    found = {}
    for name, prompt in {
        "plain": question,
        "templated": templated,
        "expanded": expanded,
        "marked": f"<image>{question}",
    }.items():
        path = write(tmp_path / f"{name}.jsonl", [line | {"prompt": prompt} for line in lines])
        found[name], about = scored_file(path)
        assert about.scored == 4, about
    for lines_of in found.values():
        for line, plain in zip(lines_of, found["plain"], strict=True):
            for name in ("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs"):
                assert line[name] == pytest.approx(plain[name], abs=2e-5)


def test_template_and_system_message_are_as_asked(checkpoint):
    _, model, processor = checkpoint
    encode = encoder(model, processor)
    rollout = Rollout(text="x", prompt="how many?")
    around = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert PromptReader(processor, encode)(rollout, [])[0] == around.format("how many?")
    system = "<|im_start|>system\nLook.<|im_end|>\n"
    assert PromptReader(processor, encode, system="Look.")(rollout, [])[0] == system + around.format("how many?")
    assert PromptReader(processor, encode, template=False)(rollout, [])[0] == "how many?"
    twice = Rollout(text="x", prompt=around.format("how many?"))
    assert PromptReader(processor, encode)(twice, [])[0] == twice.prompt
    assert PromptReader(processor, encode, template=True)(twice, [])[0] == around.format(twice.prompt.strip())


def test_a_prompt_that_ends_inside_a_block_is_scored_inside_it(checkpoint, file, scored_file, tmp_path):
    inside = "<|im_start|>user\n<|image_pad|>how many?<|im_end|>\n<|im_start|>assistant\n<perception>"
    lines = [line | {"prompt": inside, "tokens": line["tokens"][1:]} for line in read(file)[:8]]
    found, _ = scored_file(write(tmp_path / "inside.jsonl", lines))
    assert {line["open_at_start"] for line in found} == {"perception"}
    assert all(line["roles"].startswith("P") for line in found)


def test_the_bound_of_a_model_is_found(checkpoint):
    assert longest(checkpoint[1]) == 4096


# What it is for


def test_other_tags_are_read_and_written(file, checkpoint, tmp_path):
    lines = read(file)[:8]
    renamed = [
        {name: value for name, value in line.items() if name != "tokens"}
        | {"text": "".join(line["tokens"]).replace("perception>", "see>")}
        for line in lines
    ]
    path = write(tmp_path / "see.jsonl", renamed)
    arguments = ["--model", checkpoint[0], "--trust-remote-code", "--device", "cpu"]
    command(path, *arguments, "--perception", "<see>", "</see>")
    found = read(tmp_path / "see.scored.jsonl")
    assert all(line["tags"]["perception"] == ["<see>", "</see>"] and "P" in line["roles"] for line in found)


def test_log_probs_of_another_model_are_noticed_and_replaced(file, checkpoint, scored_file, tmp_path):
    right, _ = scored_file(file)
    lines = [line | {"old_log_probs": [min(0.0, value - 3.0) for value in line["old_log_probs"]]} for line in right]
    for line in lines:
        line["down_divergence"] = line["up_divergence"] = [0.1] * len(line["weights"])
    path = write(tmp_path / "engine.jsonl", lines[:8])
    said = command(path, "--model", checkpoint[0], "--trust-remote-code", "--device", "cpu")
    assert "The log-probs that the file held differ from this model's by 3.00 nats a token" in said
    for line, same in zip(read(tmp_path / "engine.scored.jsonl"), right, strict=False):
        assert line["old_log_probs"] == pytest.approx(same["old_log_probs"], abs=2e-5)
        assert "down_divergence" not in line


def test_the_report_then_says_whether_the_model_looks_at_the_image(file, scored_file, tmp_path):
    _, lines = scored_file(file)[0], read(tmp_path / "rollouts.scored.jsonl")
    lost = [
        old - corrupted
        for line in lines
        for old, corrupted, role in zip(line["old_log_probs"], line["corrupted_log_probs"], line["roles"], strict=True)
        if role == "P"
    ]
    answered = {each.question: each for each in answers(summarize_files([tmp_path / "rollouts.scored.jsonl"]))}
    about = answered["Does the model look at the image?"]
    assert about.measured
    assert f"{sum(lost) / len(lost):.2f} nats" in about.sentence
    assert answered["Does the reasoning follow the perception?"].measured
    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "rollouts.scored.jsonl"), "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert about.sentence in page.read_text(encoding="utf-8")
    # Before, it could not tell, and says which command does.
    before = {each.question: each for each in answers(summarize_files([file]))}
    assert not any(each.measured for question, each in before.items() if "image" in question)


def test_the_file_is_as_the_schema_has_it(file, scored_file):
    lines, _ = scored_file(file)
    for line in lines:
        parse_rollout(json.dumps(line))
        assert line.keys() >= NEW


def test_an_empty_file_is_an_error(checkpoint, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    said = command(empty, "--model", checkpoint[0], "--trust-remote-code", "--device", "cpu", code=1)
    assert "Error: no response could be scored" in said
