"""What the runs of run.sh must show, from their logs and records. Prints a line per fact; fails at the first that does
not hold."""

import json
import pathlib
import re
import sys

import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from verl.utils.tokenizer import hf_processor
from verl_harness import rollouts, tiny_vlm
from verl_harness.alone import changed_alone, padded, reliance_alone, score_alone, spans_alone

from srpo_core import SRPOConfig, srpo_advantages
from srpo_core.batch import prompt_id
from srpo_core.pixel_values import corrupt_rows, image_facts

LOSS_AND_NORM = ("actor/pg_loss", "actor/loss", "actor/grad_norm")
DRIVER_MAY_SEE = {
    "prompts",
    "responses",
    "response_mask",
    "uid",
    "srpo_counterfactual_responses",
    "srpo_counterfactual_sources",
    "old_log_probs",
    "srpo_original_log_probs",
    "srpo_corrupted_log_probs",
    "srpo_counterfactual_log_probs",
    "srpo_images",
    "srpo_prompt_ids",
    "rm_scores",
    "advantages",
    *(f"srpo_span_{k}_{name}" for k in range(2) for name in ("responses", "sources", "log_probs")),
}
# To write a rollout file: rewards.
ROLLOUT_FILE = {"rm_scores"}


def steps(work, name):
    return [json.loads(line)["data"] for line in (work / "srpo" / f"{name}.jsonl").read_text().splitlines()]


def check_parity(work, ours, verls):
    """Loss and gradient norm, two epochs of two steps, to the last printed digit."""
    for key in LOSS_AND_NORM:
        left, right = ([repr(step[key]) for step in steps(work, name)] for name in (ours, verls))
        assert left == right, f"{key}: {ours} {left}, {verls} {right}"
    print(
        f"held: {ours} equals {verls} in {', '.join(LOSS_AND_NORM)}, two steps, every digit: {left[0]}, {left[1]} ..."
    )


def check_difference(work, ours, verls):
    for key in ("actor/loss", "actor/grad_norm"):
        left, right = ([step[key] for step in steps(work, name)] for name in (ours, verls))
        assert left != right, f"{key} is the same in {ours} and {verls}"
    print(f"held: {ours} differs from {verls}")


def load_record(folder, step):
    columns = torch.load(folder / f"step_{step}.pt", weights_only=False)
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def check_weights(folder, step, config, tokenizer, old_key):
    """The run's weights are the core's on the same rollouts."""
    rows = load_record(folder, step)
    final = padded([row["response_mask"] for row in rows]).bool()
    sampled = [row["response_mask"] if row["is_padding"] else torch.ones_like(row["responses"]) for row in rows]
    segmentation, changed = changed_alone(rows, tokenizer, config, sampled)
    old, corrupted, counterfactual, weighted, plain = (
        padded([row[key] for row in rows])
        for key in (
            old_key,
            "srpo_corrupted_log_probs",
            "srpo_counterfactual_log_probs",
            "advantages",
            "plain_advantages",
        )
    )
    has_image = torch.tensor([bool(row["multi_modal_inputs"]) for row in rows])
    reliance = None
    if config.reliance_spans > 0:
        passes = [padded([row[f"srpo_span_{k}_log_probs"] for row in rows]) for k in range(config.reliance_spans)]
        spans = spans_alone(segmentation, rows, config.reliance_spans)
        reliance = reliance_alone(old, passes, spans, segmentation.roles, final, config)
    expected = srpo_advantages(
        old,
        plain.gather(1, final.int().argmax(1, keepdim=True))[:, 0],
        segmentation.roles,
        final,
        config.at_step(step - 1),
        corrupted_log_probs=torch.where(has_image[:, None], corrupted, old),
        counterfactual_log_probs=changed.carry_back(counterfactual, original_log_probs=old),
        reliance=reliance,
    )
    moves = final & (plain != 0)
    weights = weighted[moves] / plain[moves]
    error = (weights - expected.weights[moves]).abs().max().item()
    assert error < 1e-6, error
    spread = weights.max() - weights.min()
    assert spread > 0.1, spread
    span = f"{int(moves.sum())} weights in [{weights.min():.3f}, {weights.max():.3f}]"
    print(f"held: {folder.name} step {step}: {span} are srpo_core's to {error:.1e}")


def check_log_probs(folder, config, model, processor, old_key):
    """The first step's log-probs are those of each row alone, unpadded, positions computed anew."""
    rows = load_record(folder, 1)
    segmentation, changed = changed_alone(rows, processor.tokenizer, config)
    spans = spans_alone(segmentation, rows, max(config.reliance_spans, 1))
    images = [row["multi_modal_inputs"] for row in rows]
    facts = image_facts(processor)
    numbers = [prompt_id(row["prompts"], pixels) for row, pixels in zip(rows, images, strict=True)]
    corrupted, _ = corrupt_rows(images, numbers, config, facts, step=1)
    span_keys = [f"srpo_span_{k}" for k in range(config.reliance_spans)]
    keys = (old_key, "srpo_corrupted_log_probs", "srpo_counterfactual_log_probs")
    worst = dict.fromkeys((*keys, *(f"{key}_log_probs" for key in span_keys)), 0.0)
    for number, row in enumerate(rows):
        response = changed.token_ids[number][changed.attention_mask[number]]
        assert torch.equal(response, row["srpo_counterfactual_responses"])
        views = [{}, {"pixels": corrupted[number]}, {"response": response}]
        for k, key in enumerate(span_keys):
            sampled = len(row["responses"]) * (not row["is_padding"])
            without = row["responses"][:sampled][spans[number, :sampled] != k]
            assert torch.equal(without, row[f"{key}_responses"])
            views.append({"response": without})
        for key, view in zip(worst, views, strict=True):
            alone = score_alone(model, processor, row, **view)
            if len(alone):
                worst[key] = max(worst[key], (alone - row[key]).abs().max().item())
    assert max(worst.values()) < 1e-5, worst
    padding = sum(row["is_padding"] for row in rows)
    kinds = {len(row["multi_modal_inputs"].get("image_grid_thw", ())) for row in rows}
    print(
        f"held: {folder.name}: log-probs of {len(rows)} rows ({padding} padding, images a row {sorted(kinds)}) ", worst
    )
    return padding


def check_update(folder, model, processor):
    """By the second step the policy is another one than the model on disk."""
    rows = [row for row in load_record(folder, 2) if not row["is_padding"]]
    moved = max((score_alone(model, processor, row) - row["old_log_probs"]).abs().max().item() for row in rows)
    assert moved > 1e-2, moved
    print(f"held: {folder.name}: the actor was updated, log-probs moved by up to {moved:.2f} nats")


def check_traffic(folder, allowed):
    entries = [json.loads(line) for line in (folder / "driver_traffic.jsonl").read_text().splitlines()]
    seen = {field for entry in entries for field in entry["fields"]}
    assert seen <= allowed, seen - allowed
    images = [row["multi_modal_inputs"] for row in load_record(folder, 1)]
    pixels = sum(inputs["pixel_values"].nbytes for inputs in images if inputs)
    moved = sum(entry["bytes"] for entry in entries) / 2
    assert moved < pixels / 10
    print(f"held: {folder.name}: no pixels through the driver: {moved:.0f} bytes a step, the pixels are {pixels}")


def check_proof(work, name):
    """The run said once that its weights reached the update, and not before they had."""
    log = (work / f"{name}.log").read_text()
    said = re.findall(r"SRPO is active: its weights reached the actor's update in step (\d+) \(verl", log)
    assert said == ["1"], (name, said)
    assert log.index("SRPO is active") < log.index("step:1 ")
    print(f"held: {name} proved in step 1 that its weights reached the update")


def check_failure(work, name, cause):
    """The run failed, and the cause stands in the first line of the error's message."""
    log = (work / f"{name}.log").read_text()
    assert re.search(r"^exit status [1-9]", log, re.MULTILINE), f"{name} did not fail"
    message = re.search(r"^(?:ValueError|RuntimeError): (.*)$", log[log.index("Error executing job") :], re.MULTILINE)
    assert message, f"{name} has no error of ours"
    assert cause in message[1], f"{name}: {message[1]}"
    print(f"held: {name} ends with: {message[1][:140]}")


def main(work):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(work / "model").eval()
    import transformers

    transformers.AutoProcessor.from_pretrained = tiny_vlm.load_processor
    processor = hf_processor(str(work / "model"))
    assert rollouts.images_of(1), "the scripted rollouts hold images"

    one, two = work / "record_one", work / "record_two"
    for name in ("srpo_one", "srpo_two"):
        assert len(steps(work, name)) == 2
        assert {"srpo/weight/perception/mass", "srpo/corruption/unchanged"} <= set(steps(work, name)[-1])
    for name in ("srpo_one", "srpo_two", "zero_one", "zero_two"):
        check_proof(work, name)
    check_parity(work, "zero_one", "grpo_one")
    check_parity(work, "zero_two", "grpo_two")
    check_difference(work, "srpo_one", "grpo_one")
    swap, drop = SRPOConfig(), SRPOConfig(counterfactual="drop", reliance_spans=2)
    for step in (1, 2):
        check_weights(one, step, swap, processor.tokenizer, "old_log_probs")
        check_weights(two, step, drop, processor.tokenizer, "srpo_original_log_probs")
    check_log_probs(one, swap, model, processor, "old_log_probs")
    assert check_log_probs(two, drop, model, processor, "srpo_original_log_probs") > 0
    check_update(one, model, processor)
    check_traffic(one, DRIVER_MAY_SEE | ROLLOUT_FILE)
    check_traffic(two, DRIVER_MAY_SEE)
    check_failure(work, "wrong_option", "algorithm.srpo.strenght is unknown; did you mean algorithm.srpo.strength?")
    check_failure(work, "failing_worker", "in a worker: ValueError('the images of this test are square')")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
