"""Warm starts and training runs, one process per core. Each leaves a result that a later call finds again."""

import dataclasses
import json
import multiprocessing
import queue
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from benchmarks.grounding.arms import Oracle, Weighted, interference_of
from benchmarks.grounding.model import TinyVLM
from benchmarks.grounding.train import SRPO, Batch, Method, TrainConfig, roll_out, train
from benchmarks.grounding.warm_start import WarmStartConfig, evaluate, new_model, warm_start
from benchmarks.grounding.world import FIRST_COLOR, MAX_COUNT, P_CLOSE, ZERO, PriorClash, Split, World, evidence, read
from srpo_core import Role

HELD_OUT = 1_000_000  # seeds from here on are for evaluation: training seeds are small

Event = dict[str, Any]  # who ("grpo", "srpo", "warm start"), seed, step, steps, and what was measured
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Study:
    """What is run, and where the results go. A result counts as found if everything but ``out`` is the same."""

    out: Path
    world: World = field(default_factory=PriorClash)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    device: str = "cpu"
    evaluation_size: int = 512
    evaluate_every: int = 10

    def identity(self, seed: int, method: Method | None = None) -> dict[str, Any]:
        settings = dataclasses.asdict(self)
        del settings["out"]
        return settings | {"seed": seed, "method": repr(method), "torch": torch.__version__}


@dataclass(frozen=True)
class Job:
    """One run: a method from one seed's warm start."""

    study: Study
    name: str
    method: Method
    seed: int


def run_all(
    study: Study, methods: Mapping[str, Method], seeds: Sequence[int], *, workers: int = 1, on_event: Listener
) -> list[dict[str, Any]]:
    """The result of every method from every seed's warm start, as :func:`run` gives it."""
    jobs = [Job(study, name, method, seed) for seed in seeds for name, method in methods.items()]
    return run_jobs(jobs, workers=workers, on_event=on_event)


def run_jobs(jobs: Sequence[Job], *, workers: int = 1, on_event: Listener) -> list[dict[str, Any]]:
    """The result of every job, in their order, as :func:`run` gives it.

    With several workers, methods must be picklable: instances of a dataclass such as
    :class:`~benchmarks.grounding.train.SRPO`, or functions of a module.
    """
    after: dict[tuple[Path, int], list[int]] = {}  # jobs that wait for one warm start
    for index, job in enumerate(jobs):
        after.setdefault((job.study.out, job.seed), []).append(index)
    if workers == 1:
        for indices in after.values():
            prepare(jobs[indices[0]].study, jobs[indices[0]].seed, on_event)
        return [run(job, on_event) for job in jobs]
    # Forking a process that has used torch can hang, hence "spawn".
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    results: dict[int, dict[str, Any]] = {}
    with ProcessPoolExecutor(workers, context, _start_worker, (events,)) as pool:
        preparing = {
            pool.submit(_work, prepare, jobs[indices[0]].study, jobs[indices[0]].seed): indices
            for indices in after.values()
        }
        running: dict[Future, int] = {}
        while preparing or running:
            done, _ = wait([*preparing, *running], timeout=0.1, return_when=FIRST_COMPLETED)
            _pass_on(events, on_event)
            for future in done:
                if future in running:
                    results[running.pop(future)] = future.result()
                else:
                    future.result()
                    running |= {pool.submit(_work, run, jobs[index]): index for index in preparing.pop(future)}
        _pass_on(events, on_event)
    return [results[index] for index in range(len(jobs))]


def prepare(study: Study, seed: int, on_event: Listener) -> dict[str, Any]:
    """The rates of a seed's warm start on each split; its weights are in the file of :func:`load`."""
    path = study.out / "warm_start" / f"seed{seed}.json"
    identity = study.identity(seed)
    del identity["train"]  # any training may start from it
    if (found := _find(path, identity)) is not None:
        on_event({"who": "warm start", "seed": seed, "step": 1, "steps": 1, "found": True})
        return found
    started = time.process_time()
    steps = study.warm_start.max_steps

    def tell(step: int, perception: float) -> None:
        on_event({"who": "warm start", "seed": seed, "step": step, "steps": steps, "perception": perception})

    model = warm_start(study.world, study.warm_start, seed=seed, device=study.device, on_progress=tell)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    batch = fresh_batch(study, model)
    result = {
        "rates": rates(study, model),
        "interference": interference_of(model, batch, Oracle().weights(model, batch)),
        "cpu_seconds": time.process_time() - started,
    }
    on_event({"who": "warm start", "seed": seed, "step": steps, "steps": steps})
    return _keep(path, identity, result)


def run(job: Job, on_event: Listener) -> dict[str, Any]:
    """The rates of each split before and after training, the learning curve, mean weights and CPU seconds."""
    study, name, method, seed = job.study, job.name, job.method, job.seed
    path = result_path(job)
    identity = study.identity(seed, method)
    steps = study.train.steps
    if (found := _find(path, identity)) is not None:
        on_event({"who": name, "seed": seed, "step": steps, "steps": steps, "found": True, **found["curve"][-1]})
        return found
    started = time.process_time()
    before = prepare(study, seed, lambda event: None)
    model = load(study, study.out / "warm_start" / f"seed{seed}.pt")
    conflict = before["rates"]["conflict"]
    curve: list[dict[str, float]] = [{"step": 0, "conflict": conflict["answer"], "grounded": conflict["grounded"]}]
    mean_weights_before = mean_weights(study, model, method)
    rewards, aside = [], 0.0

    def tell(step: int, metrics: dict[str, float]) -> None:
        nonlocal aside
        since = time.process_time()
        rewards.append(metrics["reward"])
        reward = sum(rewards[-10:]) / len(rewards[-10:])
        event = {"who": name, "seed": seed, "step": step, "steps": steps, "reward": reward}
        if step % study.evaluate_every == 0 or step == steps:
            size = study.evaluation_size // 2
            conflict = evaluate(model, study.world, "conflict", n=size, seed=HELD_OUT + 1)
            event["conflict"] = conflict["answer"]
            curve.append(
                {"step": step, "reward": reward, "conflict": conflict["answer"], "grounded": conflict["grounded"]}
            )
        on_event(event)
        aside += time.process_time() - since

    since = time.process_time()
    train(model, study.world, method, study.train, seed=seed, on_step=tell)
    step_seconds = (time.process_time() - since - aside) / steps
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    result = {
        "method": name,
        "seed": seed,
        "learning_rate": study.train.learning_rate,
        "interference": before["interference"],
        "rewards": rewards,
        "rates": {"before": before["rates"], "after": rates(study, model)},
        "curve": curve,
        "mean_weights": {"before": mean_weights_before, "after": mean_weights(study, model, method)},
        "step_seconds": step_seconds,
        "cpu_seconds": time.process_time() - started,
    }
    return _keep(path, identity, result)


def result_path(job: Job) -> Path:
    """Where a run leaves its result, and beside it the weights."""
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower())
    return job.study.out / "runs" / f"{name}-lr{job.study.train.learning_rate:g}-seed{job.seed}.json"


def rates(study: Study, model: TinyVLM) -> dict[str, dict[str, float]]:
    """The exact rates on the training mixture and on each split, on the same problems for every model."""
    splits: tuple[Split, ...] = ("train", *study.world.splits)
    size = study.evaluation_size
    rates = {split: evaluate(model, study.world, split, n=size, seed=HELD_OUT) for split in splits}
    rates["conflict"]["follows"] = follows(model, study.world, n=size, seed=HELD_OUT)
    return rates


def follows(model: TinyVLM, world: World, *, n: int, seed: int) -> float:
    """The share of conflicts whose answer is the sum of the two counts that a hand wrote into the perception.

    A causal probe: the model continues from its own perception, in which other counts stand for those asked for.
    """
    generator = Generator().manual_seed(seed)
    problems = world.sample(n, "conflict", generator).to(model.device)
    token_ids = model.generate(problems.images, problems.questions, max_tokens=world.response_length + 2).token_ids
    stated = read(token_ids, problems.colors).counts
    close = (token_ids == P_CLOSE).int().argmax(1)
    # One length for all: responses that perceive at greater or less length than most are left out, as are bad ones.
    rows = ((close == close.mode().values) & (close > 0) & (stated >= 0).all(1)).nonzero()[:, 0]
    if len(rows) == 0:
        return 0.0
    problems, token_ids, stated = problems.rows(rows), token_ids[rows, : close[rows[0]] + 1], stated[rows]
    shift = torch.randint(1, MAX_COUNT + 1, stated.shape, generator=generator).to(model.device)
    written = (stated + shift) % (MAX_COUNT + 1)
    for place, label in enumerate(problems.colors.unbind(1)):
        at = (token_ids == FIRST_COLOR + label[:, None]).int().argmax(1, keepdim=True) + 1
        token_ids = token_ids.scatter(1, at, ZERO + written[:, place : place + 1])
    prompts = torch.cat([problems.questions, token_ids], 1)
    rest = model.generate(problems.images, prompts, max_tokens=world.response_length + 2 - token_ids.shape[1])
    answers = read(torch.cat([token_ids, rest.token_ids], 1), problems.colors).answer
    return (answers == written.sum(1)).double().mean().item()


def mean_weights(study: Study, model: TinyVLM, method: Method) -> dict[str, float]:
    """A method's mean weight on each kind of token, over fresh live groups."""
    if not isinstance(method, SRPO | Weighted):  # its credit is not a weight
        return {}
    batch = fresh_batch(study, model)
    weights, token_ids = method.weights(model, batch), batch.token_ids
    perceived = batch.segmentation.roles == int(Role.PERCEPTION)
    digits, carrying = (token_ids >= ZERO) & (token_ids < ZERO + 10), evidence(token_ids, batch.problems)
    kinds = {
        "digits": perceived & digits,
        "filler": perceived & (token_ids >= study.world.first_filler),
        "asked": perceived & carrying,
        "not asked": perceived & digits & ~carrying,
        "reasoning": carrying & ~perceived,
    }
    return {kind: weights[tokens].mean().item() for kind, tokens in kinds.items() if tokens.any()}


def fresh_batch(study: Study, model: TinyVLM) -> Batch:
    """Live groups of many prompts, the same for every model."""
    config = dataclasses.replace(study.train, prompts=4 * study.train.prompts)
    return roll_out(model, study.world, config, Generator().manual_seed(HELD_OUT), step=0)[0]


def load(study: Study, path: Path) -> TinyVLM:
    model = new_model(study.world).to(study.device)
    model.load_state_dict(torch.load(path, map_location=study.device))
    return model


def _find(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return kept["result"] if kept["identity"] == json.loads(json.dumps(identity)) else None


def _keep(path: Path, identity: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    # Renamed when complete, so that an interrupted run leaves no half of a result.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"identity": identity, "result": result}, indent=1))
    partial.rename(path)
    return result


_events: Any = None  # in a worker: the queue to the parent


def _start_worker(events: Any) -> None:
    global _events
    _events = events
    torch.set_num_threads(1)


def _work(task: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    return task(*args, _events.put)


def _pass_on(events: Any, on_event: Listener) -> None:
    while True:
        try:
            on_event(events.get_nowait())
        except queue.Empty:
            return
