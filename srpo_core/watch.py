"""A look at every rollout batch of a run: what the weights did in one line of words, and what makes SRPO do nothing.

What makes SRPO do nothing is an error in the first batch and later a warning.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from srpo_core.batch import RolloutBatch, logged
from srpo_core.options import SRPOConfig
from srpo_core.srpo import Credit
from srpo_core.tags import BrokenReason, open_block
from srpo_core.token_text import TokenizerLike, text_decoder

__all__ = ["FEW", "RunWatch", "batch_in_words"]

logger = logging.getLogger("srpo_core")

#: Below this share of well-formed responses a batch is warned of: the others are trained with weight 1.
FEW = 0.25
_SHOWN = 300  # characters of the response that a warning shows


class RunWatch:
    """Looks at the rollout batches of one run, in their order.

    A first batch of which nothing can be learned is an error. After that nothing that a model does stops its training:
    while fewer than a quarter of the responses are well-formed there is a warning, at the first such batch and then
    after twice as many of them each time.

    Args:
        options: Which format is expected, and how images are corrupted.
        tokenizer: Anything with ``decode(list_of_ids) -> str``, to show a response.
        named: How the user writes an option's name, with ``{}`` where the name goes: ``"srpo_{}"``.
        warns: Whether this process warns: of several that see the same batches, one does.

    Example:
        >>> from srpo_core.watch import RunWatch
        >>> class Characters:
        ...     eos_token_id = 0
        ...     def decode(self, ids): return "".join(map(chr, ids))
        >>> ids = torch.tensor([[ord(character) for character in "two cats"]])
        >>> batch = RolloutBatch.of(ids, ids > 0, Characters(), SRPOConfig(), group_ids=torch.tensor([0]))
        >>> RunWatch(SRPOConfig(), Characters()).look(batch, prompts=["How many?"])
        Traceback (most recent call last):
            ...
        ValueError: no response of the first batch has the structure <perception>...</perception>... (1 no_perception...
    """

    def __init__(self, options: SRPOConfig, tokenizer: TokenizerLike, *, named: str = "{}", warns: bool = True) -> None:
        self._options, self._tokenizer, self._named, self._warns = options, tokenizer, named, warns
        self._is_first = True
        self._compares = warns
        self._few, self._warn_at = 0, 1  # batches with few well-formed responses, and at which of them to warn

    def look(
        self,
        batch: RolloutBatch,
        *,
        prompts: Sequence[str],
        image_counts: Int[Tensor, "batch 2"] | None = None,
    ) -> None:
        """Look at the next batch.

        Args:
            batch: The responses.
            prompts: Some prompts as text, special tokens and all.
            image_counts: Of each response its images, and how many the corruption left as they were.

        Raises:
            ValueError: On the first batch: if no response is well-formed although no prompt asks for the format, if the
                corruption changed no image, or if a prompt ends inside a block and the batch was not told so.
        """
        if self._is_first:
            self._check(batch, prompts, image_counts)
        self._is_first = False
        self._warn_of_few(batch)

    def look_at_engine(self, metrics: Mapping[str, Tensor]) -> bool:
        """Whether the inference engine's log-probs are further from the trainer's than scores are from 0.

        The first such batch of a run is warned of. It waits for the device.

        Args:
            metrics: Of a :class:`~srpo_core.Credit`. Where the gap was not measured, the answer is no.
        """
        if "engine/gap/mean" not in metrics:
            return False
        gap, score = float(metrics["engine/gap/mean"]), float(metrics["engine/score/mean"])
        is_larger = gap > score
        if is_larger and self._compares:
            self._compares = False
            logger.warning(
                "SRPO: the inference engine's log-probs differ from the trainer's own by %.2f nats a token on average, "
                "and the scores are %.2f nats on average: take every log-prob that SRPO compares from the trainer's "
                "forward pass, and bring the engine closer to it (the same dtype and the same image sizes)",
                gap,
                score,
            )
        return is_larger

    def _written(self, name: str) -> str:
        return self._named.replace("{}", name)

    def _warning(self, message: str, *values: object) -> None:
        if self._warns:
            logger.warning(message, *values)

    def _check(self, batch: RolloutBatch, prompts: Sequence[str], image_counts: Tensor | None) -> None:
        options, tags = self._options, self._options.tags
        if batch.open_at_start is None:
            for prompt in prompts:
                if (kind := open_block(prompt, tags)) is not None:
                    raise ValueError(
                        f"a prompt ends in {tags.pairs[kind][0]!r}, so that its responses begin inside the {kind} and "
                        "would all count as broken: pass the prompts as prompt_ends to RolloutBatch.of"
                    )
        if image_counts is not None:
            images, unchanged = image_counts.sum(0).tolist()
            if images == 0:
                self._warning("SRPO: no prompt of the first batch has an image, so no token can depend on one")
            elif images == unchanged:
                raise ValueError(
                    f"{self._written('corruption')}={options.corruption!r} left all {images} images of the first "
                    f"batch as they were, so no token can depend on them: raise {self._written('corruption_amount')}, "
                    "or choose another kind"
                )
        reasons = Counter(BrokenReason(reason) for reason in batch.segmentation.broken.tolist())
        if options.changes_nothing or not reasons or reasons[BrokenReason.NONE]:
            return
        if not any(tags.perception[0] in prompt for prompt in prompts):
            counts = ", ".join(f"{count} {reason.name.lower()}" for reason, count in reasons.most_common())
            own = ", ".join(self._written(f"{kind}_tags") for kind in ("perception", "reasoning", "answer"))
            raise ValueError(
                f"no response of the first batch has the structure {self._structure()} ({counts}), and the prompts do "
                "not ask for it: put srpo_core.system_prompt(tags) in a system message, train on demonstrations first, "
                f"or set {own}, or {self._written('response_format')}, to your own"
            )

    def _warn_of_few(self, batch: RolloutBatch) -> None:
        if self._options.changes_nothing:
            return
        broken = [BrokenReason(reason) for reason in batch.segmentation.broken.tolist()]
        well_formed = broken.count(BrokenReason.NONE)
        if not broken or well_formed >= FEW * len(broken):
            self._few, self._warn_at = 0, 1
            return
        self._few += 1
        if self._few < self._warn_at:
            return
        self._warn_at = 2 * self._few
        reason, count = Counter(each for each in broken if each != BrokenReason.NONE).most_common(1)[0]
        row = broken.index(reason)
        response = text_decoder(self._tokenizer)(batch.token_ids[row][batch.mask[row]].tolist())
        shown = response if len(response) <= _SHOWN else f"{response[:_SHOWN]}..."
        self._warning(
            "SRPO: %d of %d responses have the structure %s, so the others are trained with weight 1; most often the "
            "fault is %s (%d), as in %r",
            well_formed,
            len(broken),
            self._structure(),
            reason.name.lower(),
            count,
            shown,
        )

    def _structure(self) -> str:
        pairs = self._options.tags.pairs.values()
        return "".join(f"{opening}...{closing}" for opening, closing in pairs)


def batch_in_words(
    batch: RolloutBatch, credited: Credit, *, advantages: Float[Tensor, " batch"], step: int | None = None
) -> str:
    """What the weights did with a rollout batch, in one line of words for a log.

    It has, as far as each is known: how many responses are well-formed, and the faults of the others; the mean scores,
    in nats a token; the share of the tokens and of the weight that the perception has; the share of right answers; and
    the groups of which no response has an advantage other than 0. Responses without a token in the mask do not count.
    It reads the tensors on the host.

    Args:
        batch: The responses, with the mask that was given to :func:`~srpo_core.credit`.
        credited: From :func:`~srpo_core.credit`.
        advantages: One per response, as :func:`~srpo_core.credit` was given them.
        step: The step that the line begins with; None: it begins without one.

    Example:
        >>> from srpo_core import Segmentation
        >>> from srpo_core.watch import batch_in_words
        >>> roles, real = torch.tensor([[1, 2, 0], [0, 0, 0]]), torch.ones(2, 3).bool()
        >>> segmentation = Segmentation(roles, torch.tensor([0, 2]), torch.zeros(2, 3).bool())
        >>> batch = RolloutBatch(roles, real, segmentation, torch.tensor([7, 7]))
        >>> metrics = {"tokens/perception/fraction": torch.tensor(1 / 6), "weight/perception/mass": torch.tensor(0.3)}
        >>> ones = torch.ones(2, 3)
        >>> credited = Credit(ones, ones, ones, None, metrics, ones)
        >>> batch_in_words(batch, credited, advantages=torch.tensor([0.0, 0.0]), step=3)
        'step 3: 1 of 2 responses is well-formed (1 unclosed); perception has 17 % of the tokens and 30 % of the weight;
        1 of 1 group teaches nothing'
    """
    start = "" if step is None else f"step {step}: "
    real = batch.mask.any(1)
    reasons = Counter(BrokenReason(reason) for reason in batch.segmentation.broken[real].tolist())
    if not reasons:
        return f"{start}no response has a token to train on"
    numbers = logged(credited.metrics, which="all")

    def value(name: str) -> float | None:
        return numbers.get(f"srpo/{name}")

    well_formed = reasons.pop(BrokenReason.NONE, 0)
    parts = [f"{_counted(well_formed, sum(reasons.values()) + well_formed, 'response', 'is', 'are')} well-formed"]
    if reasons:
        parts[0] += f" ({', '.join(f'{count} {reason.name.lower()}' for reason, count in reasons.most_common())})"
    depends = []
    if credited.corrupted_log_probs is not None and (score := value("score/perception/mean")) is not None:
        depends.append(f"a perception token depends on the image by {score:.2f} nats")
    if credited.counterfactual_log_probs is not None and (score := value("score/reasoning/mean")) is not None:
        verb = "" if depends else "depends "
        depends.append(f"a reasoning token {verb}on the perception by {score:.2f} nats")
    parts += [" and ".join(depends)] if depends else []
    tokens, weight = value("tokens/perception/fraction"), value("weight/perception/mass")
    if tokens is not None and weight is not None:
        parts.append(f"perception has {100 * tokens:.0f} % of the tokens and {100 * weight:.0f} % of the weight")
    if (right := value("right/fraction")) is not None:
        parts.append(f"{100 * right:.0f} % of the answers are right")
    groups, teaching = (set(batch.group_ids[rows].tolist()) for rows in (real, real & (advantages != 0)))
    if idle := len(groups - teaching):
        parts.append(f"{_counted(idle, len(groups), 'group', 'teaches', 'teach')} nothing")
    return start + "; ".join(parts)


def _counted(count: int, of: int, noun: str, one: str, many: str) -> str:
    return f"{count} of {of} {noun}{'s' if of != 1 else ''} {one if 1 in (count, of) else many}"
