"""One object that scores every view of a rollout batch with a vision-language model of transformers."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from srpo_core import OutputLayer, Role, RolloutBatch, SRPOConfig
from srpo_core.batch import Plan
from srpo_hf.policy import Policy, Task, evaluating, same_layout
from srpo_hf.prefixes import Store, continued, encoded, merged, problem_of_model, problem_of_prompt
from srpo_hf.prompts import Chat, EncodedPrompt, Prompts, corrupt_prompts, encode_prompts
from srpo_hf.tasks import filled, tasks_of, tasks_of_changed

__all__ = ["Scored", "Scorer", "Work"]

_LOG = logging.getLogger("srpo_hf")

#: How far shared and plain scoring of one response may be apart, in mean nats, before the first is given up: a cache
#: that is not exact, or positions that are counted otherwise, move log-probs by far more than rounding does.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2, torch.bfloat16: 0.25, torch.float16: 0.25}
_CHECKED_TOKENS = 64


class Work(NamedTuple):
    """What one view took.

    Attributes:
        model_tokens: Tokens that went through the layers of the language model, without padding.
        output_tokens: Tokens that went through the output layer.
    """

    model_tokens: int = 0
    output_tokens: int = 0


class Scored(NamedTuple):
    """The log-probs of every view of a rollout batch.

    Attributes:
        log_probs: By the name of the view, nats, on the device of the batch: ``original`` [batch, time], the old
            log-probs, and each view of the plan [batch, new_time], as :func:`srpo_core.credit` takes them. In
            ``original`` what was not sampled is 0. In the other views a token that the view tells nothing about has its
            original log-prob, so that its contrast is exactly 0; a token that no response of the batch has at that
            place, such as a donor's perception, is NaN, and padding 0.
        image_counts: Of each response its images and how many of them the corruption left as they were, [batch, 2];
            None where no prompt has an image or the plan asks for no corruption.
        work: By the name of the view, what it took.
    """

    log_probs: dict[str, Tensor]
    image_counts: Tensor | None
    work: dict[str, Work]


class Scorer:
    """Scores the views of SRPO with any vision-language model of transformers that is causal over its responses.

    It knows what is easily left out in silence: token types, positions of M-RoPE, padding, tiles, rows without images,
    soft-caps, an output layer with LoRA. Every module is in eval mode while it scores and then back in its own.

    With shared prefixes each distinct prompt is encoded once for each of its images, the original and the corrupted
    one, and its keys and values serve all of its responses; of these only the tokens that a view needs are read again.
    The log-probs are those of plain passes up to rounding. Where that is not so with a model, plain passes are made,
    and a warning says why.

    Args:
        model: From ``AutoModelForImageTextToText``; in PEFT, DDP, torch.compile or not. What it computes in, it scores
            in.
        processor: Its processor.
        options: Which corruption; the same object that :func:`srpo_core.plan` was given.
        temperature: The one that the rollouts were sampled with, above 0.
        batch_size: Responses in one pass, at least 1.
        share_prefixes: ``"auto"``: where it is exact. True: everywhere, and an error where it is not. False: nowhere.

    Raises:
        ValueError: If an argument is out of range, or the model has no output layer.

    Example:
        ::

            scorer = Scorer(model, processor, options, temperature=1.0)
            scored = scorer.score(prompts, images, batch, planned, step=step)
            credited = credit(
                batch, planned, scored.log_probs, options,
                old_log_probs=scored.log_probs["original"], advantages=advantages, step=step,
                image_counts=scored.image_counts,
            )
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        options: SRPOConfig,
        *,
        temperature: float = 1.0,
        batch_size: int = 8,
        share_prefixes: bool | Literal["auto"] = "auto",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not temperature > 0.0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if share_prefixes not in (True, False, "auto"):
            raise ValueError(f"share_prefixes must be True, False or 'auto', got {share_prefixes!r}")
        self.model, self.processor, self.options = model, processor, options
        self.temperature, self.batch_size, self.share_prefixes = temperature, batch_size, share_prefixes
        self._said: set[str] = set()
        self._exact: dict[bool, str | None] = {}  # with images and without: what the comparison with a plain pass found
        self._policy()  # a model that cannot be scored is refused here

    def encode(
        self, prompts: Sequence[Chat | str | EncodedPrompt], images: Sequence[Sequence[Any] | None] | None
    ) -> list[EncodedPrompt]:
        """The prompts as the model takes them, one per response, to be passed in their place with ``images=None``.

        Call it once per rollout batch where :meth:`log_probs` or :meth:`hidden` follow in several micro-batches:
        otherwise each call processes its images again. Equal prompts are one object.

        Args:
            prompts: As in :meth:`score`.
            images: As in :meth:`score`.

        Raises:
            ValueError: If prompts and images do not belong together.
        """
        made = self._encoded(prompts, images, len(prompts), self._policy())
        return [made.distinct[place] for place in made.of_row]

    def score(
        self,
        prompts: Sequence[Chat | str | EncodedPrompt],
        images: Sequence[Sequence[Any] | None] | None,
        batch: RolloutBatch,
        planned: Plan,
        *,
        step: int = 0,
        rows: Sequence[int] | Tensor | None = None,
        every_token: bool = False,
        corrupted: Sequence[EncodedPrompt] | None = None,
        image_counts: Tensor | None = None,
    ) -> Scored:
        """The log-probs of the responses in their own context and in every view of the plan. No gradient.

        Call it once per rollout batch. It draws nothing from the global random state.

        Args:
            prompts: One per response: a chat (a list of messages), a text that a chat template made, or what
                :meth:`encode` made of these. Responses of one group repeat theirs.
            images: One list of PIL images per response, in the order of the placeholders; None or an empty list where a
                prompt has none. Not read for a prompt that is encoded already.
            batch: The responses.
            planned: What :func:`srpo_core.plan` made of it.
            step: Of the optimizer; a new one, a new draw of the corruption.
            rows: Of which responses the views of the plan are scored, as indices or booleans; None: of all. The others
                get their original log-probs, hence contrast 0 and weight 1: leave out the responses of groups whose
                advantages are all 0. Metrics count them as responses without a contrast. Where weights are sharded
                over processes, leave out equally many on each, or none.
            every_token: Whether the view with the corrupted image has the log-prob of each token rather than of
                perception alone. No weight depends on the others, but a file of rollouts that may be read with other
                tags does.
            corrupted: The prompts with the image corrupted, one per response, where that was done already; None: made
                here.
            image_counts: Of these, as in the result.

        Raises:
            ValueError: If arguments do not belong together, or a prompt cannot be encoded.
        """
        policy = self._policy()
        own = self._encoded(prompts, images, len(batch.token_ids), policy)
        shown = {"original": own.distinct}
        if any(view.image == "corrupted" for view in planned.views):
            if corrupted is None:
                made, counts = corrupt_prompts(
                    own.distinct, self.options, processor=self.processor, config=policy.config, step=step
                )
                image_counts = counts[own.of_row].to(batch.token_ids.device)
            else:
                made = _of_distinct(corrupted, own)
            shown["corrupted"] = made
        if not any(prompt.images for prompt in own.distinct):
            image_counts = None
        tasks = self._tasks(batch, planned, own, _chosen(rows, len(batch.token_ids)), every_token=every_token)
        with evaluating(policy.model):
            values, work = self._run(policy, shown, tasks, planned)
        return Scored(filled(values, tasks, batch, planned), image_counts, work)

    def log_probs(
        self,
        prompts: Sequence[Chat | str | EncodedPrompt],
        images: Sequence[Sequence[Any] | None] | None,
        token_ids: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Log-probs of responses in their own context, nats, [batch, time], with their gradient; 0 where mask is False.

        One pass over the rows that are given, in the mode that the model is in: give it as many as fit into memory. It
        makes no use of shared prefixes, because these have no gradient.

        Args:
            prompts: As in :meth:`score`.
            images: As in :meth:`score`.
            token_ids: Sampled tokens, right-padded, [batch, time].
            mask: True at the tokens the policy sampled, [batch, time].
        """
        policy = self._policy(trains=True)
        prompts_, tasks = self._rows(prompts, images, token_ids, mask, policy)
        places, values = [], []
        for group in same_layout(tasks, prompts_.distinct):
            found, _ = policy.plain(prompts_.distinct, group)
            places += [task.row * token_ids.shape[1] + task.columns for task in group]
            values += found
        flat = torch.cat(values) if values else torch.zeros(0, device=token_ids.device)
        flat = flat.to(token_ids.device)
        empty = torch.zeros(token_ids.numel(), dtype=flat.dtype, device=flat.device)
        return empty.index_copy(0, torch.cat(places).to(flat.device), flat).view(token_ids.shape)

    def hidden(
        self,
        prompts: Sequence[Chat | str | EncodedPrompt],
        images: Sequence[Sequence[Any] | None] | None,
        token_ids: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, OutputLayer]:
        """Hidden states that predict the tokens of responses, and the output layer, with their gradient.

        For :func:`srpo_core.fused_linear_grpo_loss`, which needs no logits in memory. Otherwise as :meth:`log_probs`.

        Args:
            prompts: As in :meth:`score`.
            images: As in :meth:`score`.
            token_ids: Sampled tokens, right-padded, [batch, time].
            mask: True at the tokens the policy sampled, [batch, time].

        Returns:
            ``hidden[b, t]`` predicts ``token_ids[b, t]``, [batch, time, hidden_dim], 0 where `mask` is False; and the
            layer that makes logits of it.

        Raises:
            ValueError: If the output layer is not a plain one (LoRA on it, quantized, sharded): use
                :meth:`log_probs`, which lets the model make its own logits.
        """
        policy = self._policy(trains=True)
        if policy.output is None:
            raise ValueError(f"{policy.no_output}. Scorer.log_probs works with any output layer")
        prompts_, tasks = self._rows(prompts, images, token_ids, mask, policy)
        places, values = [], []
        for group in same_layout(tasks, prompts_.distinct):
            found = policy.plain_hidden(prompts_.distinct, group)
            places += [task.row * token_ids.shape[1] + task.columns for task in group]
            values.append(found)
        flat = torch.cat(values)
        empty = torch.zeros(token_ids.numel(), flat.shape[1], dtype=flat.dtype, device=flat.device)
        states = empty.index_copy(0, torch.cat(places).to(flat.device), flat).view(*token_ids.shape, -1)
        return states, policy.output_for(states)

    def _policy(self, *, trains: bool = False) -> Policy:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        pads = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
        pad = next((each for each in pads if isinstance(each, int)), 0)
        return Policy(self.model, temperature=self.temperature, pad_token_id=pad, trains=trains)

    def _encoded(self, prompts: Any, images: Any, rows: int, policy: Policy) -> Prompts:
        if len(prompts) != rows:
            raise ValueError(f"prompts must have one prompt per response, {rows}, got {len(prompts)}")
        return encode_prompts(prompts, images, processor=self.processor, config=policy.config, takes=policy.takes)

    def _rows(
        self, prompts: Any, images: Any, token_ids: Tensor, mask: Tensor, policy: Policy
    ) -> tuple[Prompts, list[Task]]:
        if mask.shape != token_ids.shape:
            raise ValueError(
                f"mask must have the shape of token_ids, {tuple(token_ids.shape)}, got {tuple(mask.shape)}"
            )
        encoded_ = self._encoded(prompts, images, len(token_ids), policy)
        tasks = tasks_of(token_ids.cpu(), mask.bool().cpu(), encoded_.of_row)
        if not tasks:
            raise ValueError("mask is False everywhere: there is no token to score. Leave these rows out")
        return encoded_, tasks

    def _tasks(
        self, batch: RolloutBatch, planned: Plan, own: Prompts, chosen: Tensor, *, every_token: bool
    ) -> dict[str, list[Task]]:
        if batch.attended is not None:
            raise ValueError("batch.attended is set, so token_ids hold prompts too: Scorer takes the responses alone")
        token_ids, mask = batch.token_ids.cpu(), batch.mask.cpu()
        without_image = mask if every_token else mask & (batch.segmentation.roles.cpu() == int(Role.PERCEPTION))
        tasks = {"original": tasks_of(token_ids, mask, own.of_row)}
        has_images = torch.tensor([own.distinct[place].images > 0 for place in own.of_row])
        for view in planned.views:
            if view.responses is None:
                tasks[view.name] = tasks_of(token_ids, without_image, own.of_row, chosen & has_images)
            else:
                tasks[view.name] = tasks_of_changed(view.responses, mask, own.of_row, chosen)
        return tasks

    def _run(
        self, policy: Policy, shown: dict[str, list[EncodedPrompt]], tasks: dict[str, list[Task]], planned: Plan
    ) -> tuple[dict[str, list[Tensor]], dict[str, Work]]:
        """The log-probs of all tasks, in their order, and what each view took."""
        image_of = {"original": "original"} | {view.name: view.image for view in planned.views}
        runner = _Runner(policy, self.batch_size)
        left: dict[str, list[Task]] = {name: [] for name in tasks}
        shares = self._shares(policy, shown["original"], tasks["original"])
        for place, prompt in enumerate(shown["original"]):
            own = {name: [task for task in some if task.prompt == place] for name, some in tasks.items()}
            problem = problem_of_prompt(policy, prompt) if shares else "plain"
            if problem is not None:
                if shares:
                    self._say(problem, "its views take")
                for name, some in own.items():
                    left[name] += some
                continue
            for image, prompts in shown.items():
                # The responses as they are come first: what they share with changed ones is then there.
                names = sorted((name for name in tasks if image_of[name] == image), key=lambda name: name != image)
                runner.shared(prompts[place], {name: own[name] for name in names if own[name]}, base=image)
        for name, some in left.items():
            runner.plain(name, shown[image_of[name]], some)
        values = {name: [runner.values[name, task.row] for task in some] for name, some in tasks.items()}
        return values, {name: Work(*runner.work.get(name, (0, 0))) for name in tasks}

    def _shares(self, policy: Policy, prompts: list[EncodedPrompt], tasks: list[Task]) -> bool:
        """Whether prefixes are shared, found out once for prompts with images and once for those without."""
        if self.share_prefixes is False or not tasks:
            return False
        problem = problem_of_model(policy)
        for has_images in (True, False):
            task = next((each for each in tasks if (prompts[each.prompt].images > 0) == has_images), None)
            if problem is None and task is not None and problem_of_prompt(policy, prompts[task.prompt]) is None:
                if has_images not in self._exact:
                    self._exact[has_images] = _compare(policy, prompts, task)
                problem = self._exact[has_images]
        if problem is not None:
            self._say(problem)
        return problem is None

    def _say(self, problem: str, whose: str = "every view takes") -> None:
        sentence = f"prefixes are not shared: {problem}"
        if self.share_prefixes is True:
            raise ValueError(f"share_prefixes=True, but {sentence}. Pass share_prefixes='auto' for plain passes there")
        if sentence not in self._said:
            self._said.add(sentence)
            _LOG.warning("%s; %s plain passes", sentence, whose)


class _Runner:
    """Collects the log-probs of tasks, and what they took."""

    def __init__(self, policy: Policy, batch_size: int):
        self.policy, self.batch_size = policy, batch_size
        self.values: dict[tuple[str, int], Tensor] = {}
        self.work: dict[str, tuple[int, int]] = {}

    def plain(self, name: str, prompts: list[EncodedPrompt], tasks: list[Task]) -> None:
        for group in same_layout(tasks, prompts):
            for part in _chunks(group, self.batch_size):
                found, read = self.policy.plain(prompts, part)
                self._keep(name, part, found, read)

    def shared(self, prompt: EncodedPrompt, tasks: dict[str, list[Task]], *, base: str) -> None:
        """All tasks of one prompt with one image, by their views; those of the base view come first."""
        if not tasks:
            return
        prefix = encoded(self.policy, prompt)
        assert prefix is not None  # the comparison has shown what the model keeps
        read, stores, store = prefix.length, [], None
        for name, some in tasks.items():
            keeps = name == base and len(tasks) > 1
            # Rows that reuse about as much go into one pass.
            ordered = some if name == base else sorted(some, key=lambda task: int(task.needed.nonzero().min()))
            for part in _chunks(ordered, self.batch_size):
                found, made, more = continued(self.policy, prefix, part, store=store, keeps=keeps)
                self._keep(name, part, found, read + more)
                read = 0  # the prompt was read for the first of them
                stores += [made] if made is not None else []
            if name == base:
                store: Store | None = merged(stores)

    def _keep(self, name: str, tasks: list[Task], found: list[Tensor], read: int) -> None:
        self.values |= {(name, task.row): values for task, values in zip(tasks, found, strict=True)}
        model, output = self.work.get(name, (0, 0))
        self.work[name] = (model + read, output + sum(len(values) for values in found))


def _compare(policy: Policy, prompts: list[EncodedPrompt], task: Task) -> str | None:
    """Score the beginning of one response both ways; why prefixes cannot be shared, or None."""
    most = int(task.needed.nonzero().min()) + _CHECKED_TOKENS
    task = _part(task, 0, most)
    prefix = encoded(policy, prompts[task.prompt])
    if prefix is None:
        return "its cache keeps something else than all keys and values"
    (shared,), store, _ = continued(policy, prefix, [task], keeps=True)
    (counted,), _, _ = continued(policy, prefix, [task], own_positions=True)
    if not torch.equal(shared, counted):
        return "it does not count positions from 0, one a token"
    # The same from the middle on, and from a later place: between what the first reuses and what it adds is a gap.
    count = len(task.columns)
    ends = [_part(task, int(task.columns[at]), most) for at in (count // 3, count // 2)]
    again, _, _ = continued(policy, prefix, ends, store=store)
    (plain,), _ = policy.plain(prompts, [task])
    pairs = [(shared, plain), *((values, plain[-len(values) :]) for values in again)]
    apart = max((one - two).abs().double().mean().item() for one, two in pairs)
    keys = prefix.layers[0][0]
    dtype = torch.bfloat16 if torch.is_autocast_enabled(keys.device.type) else keys.dtype
    if not apart <= _TOLERANCE.get(dtype, 0.25):
        return f"log-probs of a response differ by {apart:.2g} nats on average from those of a plain pass"
    return None


def _part(task: Task, start: int, end: int) -> Task:
    """The task with only those of its tokens needed that lie in a range."""
    needed = task.needed.clone()
    needed[:start], needed[end:] = False, False
    return task._replace(needed=needed, columns=needed.nonzero().flatten())


def _of_distinct(prompts: Sequence[EncodedPrompt], own: Prompts) -> list[EncodedPrompt]:
    if len(prompts) != len(own.of_row):
        raise ValueError(f"corrupted must have one prompt per response, {len(own.of_row)}, got {len(prompts)}")
    return [prompts[own.of_row.index(place)] for place in range(len(own.distinct))]


def _chosen(rows: Sequence[int] | Tensor | None, count: int) -> Tensor:
    if rows is None:
        return torch.ones(count, dtype=torch.bool)
    given = torch.as_tensor(rows).cpu()
    if given.dtype == torch.bool:
        if given.shape != (count,):
            raise ValueError(f"rows as booleans must be one per response, {count}, got shape {tuple(given.shape)}")
        return given
    if given.numel() and not (int(given.min()) >= 0 and int(given.max()) < count):
        raise ValueError(f"rows must be places of responses, from 0 to {count - 1}, got {given.tolist()}")
    return torch.zeros(count, dtype=torch.bool).index_fill(0, given.long(), True)


def _chunks(tasks: list[Task], size: int) -> Iterator[list[Task]]:
    for start in range(0, len(tasks), size):
        yield tasks[start : start + size]
