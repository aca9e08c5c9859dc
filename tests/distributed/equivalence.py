"""Loss, gradients and metrics of one batch on 1, 2 and 4 processes, which have to be the same numbers.

    python tests/distributed/equivalence.py            # all cases
    python tests/distributed/equivalence.py --quick    # the cases of tests/test_distributed.py

The whole batch is computed by one call, in float64. Then real processes of gloo share it in float32: each has some of
the responses, ragged and unevenly many, and of four processes the last has none; each accumulates over 1 to 4
micro-batches, some of which are empty; its model is wrapped in DDP or FSDP2, which average gradients, or its output
layer holds a part of the vocabulary. The normalizer is that of docs/how-to/several_gpus.md. A difference is relative to
the largest number of its tensor, and 1e-6 is allowed, about 8 units in the last place of float32.
"""

import argparse
import itertools
import json
import math
import socket
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from srpo_core import (
    LossOptions,
    OutputLayer,
    fused_linear_grpo_loss,
    group_advantages,
    grpo_loss,
    srpo_advantages,
    token_log_probs,
)
from srpo_core.output_layer import VocabShard
from srpo_core.surrogates import Surrogate

BATCH, TIME, WIDTH, VOCABULARY = 12, 9, 16, 24
CONSTANT = 50.0
TOLERANCE = 1e-6
REDUCTIONS = ("token_mean", "sequence_mean", "constant", "sum")
WAYS = ("ddp", "fsdp", "vocabulary")
ACCUMULATIONS = (1, 2, 3, 4)
#: What a trainer adds up over processes: sums, and the smallest and the largest.
EXTREMES = {"ratio/min": dist.ReduceOp.MIN, "ratio/max": dist.ReduceOp.MAX}


class Case(NamedTuple):
    """One configuration."""

    way: str
    surrogate: str
    reduction: str
    accumulation: int
    fused: bool


class Policy(nn.Module):
    """Token embeddings, a layer and an output layer: log-probs, or the hidden states that they come from."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def init(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.3 * torch.randn(*shape, generator=generator))

        self.embeddings, self.layer, self.head = init(VOCABULARY, WIDTH), init(WIDTH, WIDTH), init(VOCABULARY, WIDTH)

    def forward(self, token_ids: Tensor, hidden_only: bool = False) -> Any:
        before = torch.cat([torch.zeros_like(token_ids[:, :1]), token_ids[:, :-1]], 1)
        hidden = torch.tanh(self.embeddings[before] @ self.layer)
        return (hidden, self.head) if hidden_only else token_log_probs(hidden @ self.head.T, token_ids)


def make_batch() -> dict[str, Tensor]:
    """Ragged responses; one has a single token, and one none. Padding holds NaN."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, TIME + 1, (BATCH,), generator=generator)
    lengths[3], lengths[7] = 1, 0
    mask = torch.arange(TIME) < lengths[:, None]
    token_ids = torch.randint(VOCABULARY, (BATCH, TIME), generator=generator)
    roles = torch.randint(0, 3, (BATCH, TIME), generator=generator)
    with torch.no_grad():
        old = Policy()(token_ids) + 0.2 * torch.randn(BATCH, TIME, generator=generator)
    rewards = torch.randint(0, 2, (BATCH,), generator=generator).float()
    advantages = group_advantages(rewards, torch.arange(BATCH) // 4)
    corrupted = old - torch.rand(BATCH, TIME, generator=generator)
    credited = srpo_advantages(old, advantages, roles, mask, corrupted_log_probs=corrupted)
    ref = old + 0.1 * torch.randn(BATCH, TIME, generator=generator)
    nan = torch.where(mask, 0.0, torch.nan)
    return {
        "token_ids": token_ids,
        "mask": mask,
        "plain": advantages[:, None].expand(BATCH, TIME) + nan,
        "weighted": credited.advantages + nan,
        "old": old + nan,
        "ref": ref + nan,
    }


def rows_of(rank: int, world: int) -> list[int]:
    """Unevenly many, dealt out; of four processes the last has none."""
    if world == 1:
        return list(range(BATCH))
    sharers = world - 1 if world > 2 else world
    cut = [0, 5, BATCH] if sharers == 2 else [0, 2, 7, BATCH]
    return list(range(cut[rank], cut[rank + 1])) if rank < sharers else []


def micro_batches(rows: list[int], count: int) -> list[list[int]]:
    """As many for each process, or the collectives of FSDP would not match; some may be empty."""
    size = math.ceil(len(rows) / count) if rows else 0
    return [rows[i * size : (i + 1) * size] for i in range(count)]


def options_of(case: Case) -> LossOptions:
    return LossOptions(surrogate=case.surrogate, reduction=case.reduction, kl_coef=0.05)  # type: ignore[arg-type]


def normalizer_of(case: Case, mask: Tensor, sharers: int) -> Tensor | None:
    """What the how-to page says; `mask` is that of this process, `sharers` how many share the responses."""
    if case.reduction == "sum":
        return None
    if case.reduction == "constant":
        return torch.tensor(CONSTANT / sharers)
    total = (mask.sum() if case.reduction == "token_mean" else mask.any(1).sum()).float()
    if sharers > 1:
        dist.all_reduce(total)
    return total / sharers  # because DDP and FSDP average the gradients


def step(case: Case, batch: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """The loss, the gradients and the metrics of one optimizer step, gathered on every process."""
    model: Any = Policy()
    by_vocabulary = case.way == "vocabulary"
    averages = world > 1 and not by_vocabulary
    rows = rows_of(0, 1) if by_vocabulary else rows_of(rank, world)
    # Processes that share the vocabulary have the same responses, and count them once.
    normalizer = normalizer_of(case, batch["mask"][rows], 1 if by_vocabulary else world)
    wrapped = model
    if world > 1 and case.way == "ddp":
        wrapped = DistributedDataParallel(model)
    if world > 1 and case.way == "fsdp":
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(model)
    shard = slice(VOCABULARY * rank // world, VOCABULARY * (rank + 1) // world) if by_vocabulary else slice(None)
    part = nn.Parameter(model.head.detach()[shard].clone()) if by_vocabulary else None
    sums: dict[str, Tensor] = {}
    options, credit = options_of(case), "plain" if Surrogate.known()[case.surrogate].is_one_ratio else "weighted"
    for chosen in micro_batches(rows, case.accumulation):
        of = {name: value[chosen] for name, value in batch.items()}
        others = {"old_log_probs": of["old"], "ref_log_probs": of["ref"], "normalizer": normalizer}
        if case.fused or by_vocabulary:
            hidden, head = wrapped(of["token_ids"], hidden_only=True)
            output = OutputLayer(head)
            if part is not None:
                output = OutputLayer(part, shard=VocabShard(shard.start, summed_over(world)))
            loss, metrics = fused_linear_grpo_loss(
                hidden, output, of["token_ids"], of[credit], of["mask"], options, **others
            )
        else:
            log_probs = wrapped(of["token_ids"])
            loss, metrics = grpo_loss(log_probs, of[credit], of["mask"], options, **others)
        loss.backward()
        add_up(sums, loss, metrics, of["mask"], case)
    return gathered(case, model, part, sums, world, averages)


def summed_over(world: int) -> Any:
    def reduce(value: Tensor, operation: str) -> Tensor:
        if world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM)
        return value

    return reduce


def add_up(sums: dict[str, Tensor], loss: Tensor, metrics: dict[str, Tensor], mask: Tensor, case: Case) -> None:
    """Losses add up; a mean over tokens is a sum with its tokens as weight; extremes are those of all parts."""
    tokens = mask.sum().float()
    for name, value in {"loss": loss.detach(), **metrics}.items():
        if name in EXTREMES:
            if tokens:
                before = sums.get(name, value)
                sums[name] = torch.minimum(before, value) if name == "ratio/min" else torch.maximum(before, value)
        else:
            weight = 1.0 if name in ("loss", "loss/policy") else tokens
            sums[name] = sums.get(name, torch.zeros(())) + value * weight
    sums["tokens"] = sums.get("tokens", torch.zeros(())) + tokens


def gathered(
    case: Case, model: nn.Module, part: nn.Parameter | None, sums: dict[str, Tensor], world: int, averages: bool
) -> dict[str, Tensor]:
    if world > 1 and part is None:
        names = ["loss", "loss/policy", *sorted({"kl/old", "kl/reference", *metric_names(case)}), "tokens"]
        for name in names:
            sums[name] = sums.get(name, torch.zeros(())).clone()
            dist.all_reduce(sums[name])
        for name, operation in EXTREMES.items():
            neutral = math.inf if name == "ratio/min" else -math.inf
            sums[name] = sums.get(name, torch.tensor(neutral)).clone()
            dist.all_reduce(sums[name], op=operation)
    tokens = sums.pop("tokens")
    found = {
        name: value if name in (*EXTREMES, "loss", "loss/policy") else value / tokens for name, value in sums.items()
    }
    if averages and case.reduction != "sum":  # each process divided by a share of the normalizer
        found |= {name: found[name] / world for name in ("loss", "loss/policy")}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name == "head" and part is not None:
            whole = torch.zeros(VOCABULARY, WIDTH)
            rank = dist.get_rank() if world > 1 else 0
            whole[VOCABULARY * rank // world : VOCABULARY * (rank + 1) // world] = part.grad
            if world > 1:
                dist.all_reduce(whole)
            gradient = whole
        elif hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()  # type: ignore[union-attr]
        assert gradient is not None
        if part is None and averages and case.reduction == "sum":
            gradient = gradient * world  # a sum has no normalizer that could undo the average
        found[f"gradient/{name}"] = gradient
    return found


def metric_names(case: Case) -> list[str]:
    surrogate = Surrogate.known()[case.surrogate]()
    zeros = torch.zeros(1, 1)
    return [*surrogate.metrics(zeros, zeros, zeros == 0), "ratio/mean"]


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative one, and where it is."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    each = {
        name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-3))
        for name in expected
    }
    worst = max(each, key=lambda name: math.inf if math.isnan(each[name]) else each[name])
    return each[worst], worst


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("ddp", "clip", "token_mean", 3, False),
            Case("ddp", "gspo_token", "sequence_mean", 2, True),
            Case("fsdp", "cispo", "token_mean", 2, True),
            Case("fsdp", "sapo", "sum", 4, False),
            Case("vocabulary", "clip", "constant", 2, True),
            Case("vocabulary", "gspo", "sequence_mean", 1, True),
        ]
    return [
        Case(way, surrogate, reduction, accumulation, fused)
        for way, surrogate, reduction, accumulation, fused in itertools.product(
            WAYS, Surrogate.known(), REDUCTIONS, ACCUMULATIONS, (False, True)
        )
        if fused or way != "vocabulary"
    ]


def work(rank: int, world: int, port: int, out: Path, chosen: list[Case]) -> None:
    """One process: every case against the whole batch in this process alone."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    batch, rows = make_batch(), []
    for case in chosen:
        alone = Case("alone", case.surrogate, case.reduction, 1, False)
        expected = alone_of(alone, batch)
        worst, where = difference(step(case, batch, rank, world), expected)
        rows.append([*case, worst, where])
    out.write_text(json.dumps(rows))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def alone_of(case: Case, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole batch in one call, in float64: what every run has to agree with, in float32."""
    model = Policy().double()
    wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    credit = "plain" if Surrogate.known()[case.surrogate].is_one_ratio else "weighted"
    normalizer = CONSTANT if case.reduction == "constant" else None
    loss, metrics = grpo_loss(
        model(wide["token_ids"]), wide[credit], wide["mask"], options_of(case),
        old_log_probs=wide["old"], ref_log_probs=wide["ref"], normalizer=normalizer,
    )  # fmt: skip
    loss.backward()
    gradients = {f"gradient/{name}": each.grad for name, each in model.named_parameters()}
    return {name: value.detach().float() for name, value in {"loss": loss, **metrics, **gradients}.items()}  # type: ignore[union-attr]


def run(world: int, chosen: list[Case]) -> list[list[Any]]:
    """Cases on so many processes; the differences that each of them found."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        outs = [Path(folder) / f"{rank}.json" for rank in range(world)]
        # Forked, which costs no import; nothing has computed in this process, so no thread of torch can be lost.
        context = get_context("fork")
        processes = [
            context.Process(target=work, args=(rank, world, port, out, chosen)) for rank, out in enumerate(outs)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        assert not any(codes), codes
        return [row for out in outs for row in json.loads(out.read_text())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="six cases")
    parser.add_argument("--way", choices=WAYS, help="one of the ways only")
    arguments = parser.parse_args()
    failed, compared, worst = [], 0, 0.0
    chosen = [case for case in cases(arguments.quick) if arguments.way in (None, case.way)]
    for world in (1, 2, 4):
        rows = run(world, chosen)
        compared += len(rows)
        worst = max([worst, *(row[-2] for row in rows)])
        failed += [(world, *row) for row in rows if not row[-2] <= TOLERANCE]
        print(f"{world} process(es): {len(rows)} comparisons, largest difference {max(row[-2] for row in rows):.1e}")
    for row in failed:
        print("differs:", *row)
    if not failed:
        print(f"held: {compared} comparisons on 1, 2 and 4 processes within {TOLERANCE:.0e}, at most {worst:.1e}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
