"""The options of an adapter that only record: the file of a run, which answers count as right, and what is logged."""

from dataclasses import dataclass

from srpo_core.batch import MetricSet
from srpo_core.checked import CheckedOptions, OptionError, option
from srpo_core.rollouts.correct import CorrectRule

__all__ = ["RecordingOptions"]


@dataclass(frozen=True, kw_only=True)
class RecordingOptions(CheckedOptions):
    """What every adapter offers beside the options of the method. Training is the same whatever they are."""

    rollouts: str | None = option(
        None,
        "File (JSON Lines) to which every training batch is written, for `srpo report` and the other commands; a "
        "resumed run continues it, a new one replaces it. None: no file.",
    )
    correct: str | None = option(
        None,
        "What counts as a right answer, for the metrics and the file: the name of a reward function, which is right "
        "above 0; a name with a threshold, `accuracy_reward>=0.5`; or a threshold on the whole reward, `>=1`. None: "
        "not known.",
    )
    metrics: MetricSet = option(
        "main",
        "Which metrics are logged under `srpo/`: `main`, about ten that are worth a look in every run, or `all`.",
    )
    summary: bool = option(True, "Whether what a step did is also printed in words, in one line.")

    @property
    def correct_rule(self) -> CorrectRule | None:
        """What counts as a right answer; None: that is not known."""
        return None if self.correct is None else CorrectRule.read(self.correct)

    def _check_together(self) -> None:
        super()._check_together()
        try:
            _ = self.correct_rule
        except ValueError as error:
            problem = str(error)
            raise OptionError(lambda named: f"{named('correct')}: {problem}") from None
