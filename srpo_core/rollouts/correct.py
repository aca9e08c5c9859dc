"""Which responses count as right: a rule on rewards that is short enough for an option."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Self

import numpy as np
import torch
from jaxtyping import Int, Num
from torch import Tensor

from srpo_core.typechecking import typechecked

__all__ = ["CorrectRule"]

_RULE = re.compile(r"(?P<function>[^<>=]*)((?P<sign>>=?)(?P<threshold>[^<>=]*))?")


@dataclass(frozen=True)
class CorrectRule:
    """A response is right where a reward reaches a threshold.

    The sum of several rewards rarely shows which answers are right: with a format bonus of 0.1, a wrong answer earns
    0.1. Name the function that judges the answer, or a threshold that only right answers reach.

    Attributes:
        function: Name of the reward function that decides; None: the whole reward decides.
        threshold: The reward that is required; any number.
        inclusive: Whether a reward equal to the threshold is enough.

    Example:
        >>> rule = CorrectRule.read("accuracy_reward")
        >>> rewards = torch.tensor([1.1, 0.1, 0.1])
        >>> rule(rewards, {"accuracy_reward": torch.tensor([1.0, 0.0, torch.nan])})
        tensor([ 1,  0, -1])
        >>> str(rule), CorrectRule.read(">=1")(rewards, {}).tolist()
        ('accuracy_reward > 0', [1, 0, 0])
    """

    function: str | None
    threshold: float = 0.0
    inclusive: bool = False

    @classmethod
    def read(cls, text: str) -> Self:
        """The rule that an option describes.

        Args:
            text: The name of a reward function, whose reward must be above 0 (``accuracy_reward``); a name with a
                threshold (``accuracy_reward>=0.5``, ``accuracy_reward>0.5``); or a threshold on the whole reward
                (``>=1.0``).

        Raises:
            ValueError: If the text is none of these.
        """
        found = _RULE.fullmatch(text) if isinstance(text, str) else None
        if found is not None:
            function = found["function"].strip()
            threshold = _number(found["threshold"]) if found["sign"] else 0.0
            if threshold is not None and (found["sign"] or (function and _number(function) is None)):
                return cls(function or None, threshold, found["sign"] == ">=")
        raise ValueError(
            "what counts as right must be the name of a reward function ('accuracy_reward', whose reward is then above "
            "0), a name with a threshold ('accuracy_reward>=0.5') or a threshold on the whole reward ('>=1.0'), got "
            f"{text!r}"
        )

    @typechecked
    def __call__(self, rewards: Num[Tensor, " batch"], by_function: Mapping[str, Tensor]) -> Int[Tensor, " batch"]:
        """Which responses are right: 1, 0, or -1 where the reward that decides is NaN, because none was given.

        Args:
            rewards: The whole reward of each response.
            by_function: The rewards of each reward function, by its name; may be empty for a rule on the whole reward.

        Raises:
            ValueError: If there is no reward function of that name, or it gave another number of rewards.
        """
        # What str() makes of a rule on the whole reward is read again as that.
        whole = self.function is None or (self.function == "reward" and "reward" not in by_function)
        if not whole and self.function not in by_function:
            assert self.function is not None
            near = get_close_matches(self.function, by_function, n=1)
            known = ", ".join(map(repr, by_function))
            raise ValueError(
                f"{self.function!r}, which should decide what counts as right, is none of the reward functions"
                + (f" {known}" if known else ": only the whole reward is known; pass a threshold on it: '>=1.0'")
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        values = rewards if whole else by_function[self.function or ""]
        if values.shape != rewards.shape:
            raise ValueError(
                f"by_function[{self.function!r}] has shape {tuple(values.shape)}; pass one reward for each of the "
                f"{len(rewards)} responses"
            )
        reached = values >= self.threshold if self.inclusive else values > self.threshold
        return torch.where(torch.isnan(values), -1, reached.long())

    def of_reward(self, reward: float | None) -> bool | None:
        """Whether one reward is right, by a rule on the whole reward; None where it is not known."""
        if reward is None or math.isnan(reward):
            return None
        # In single precision, in which trainers hold rewards: 0.9 reaches 0.9.
        one, other = np.float32(reward), np.float32(self.threshold)
        return bool(one >= other if self.inclusive else one > other)

    def __str__(self) -> str:
        """The rule as the report shows it: ``accuracy_reward > 0``, ``reward >= 1``."""
        return f"{self.function or 'reward'} {'>=' if self.inclusive else '>'} {self.threshold:.12g}"


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
