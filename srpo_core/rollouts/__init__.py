"""Rollouts on disk, one response per line: any trainer writes them, and the ``srpo`` command summarizes them.

A line is a JSON object that ``rollouts.schema.json`` in this folder describes. Each line stands on its own, so files
can be joined, split and filtered with everyday tools.
"""

from srpo_core.rollouts.correct import CorrectRule
from srpo_core.rollouts.importing import Imported, import_logs
from srpo_core.rollouts.record import SCHEMA_PATH, Rollout, RolloutError, parse_rollout, read_rollouts
from srpo_core.rollouts.recording import RecordingOptions
from srpo_core.rollouts.retag import Retag
from srpo_core.rollouts.scoring import ScoredRollout, ScoringOptions, score_rollouts
from srpo_core.rollouts.summary import Place, Summary, load, summarize_files, summarize_rollouts
from srpo_core.rollouts.writer import RolloutWriter

__all__ = [
    "SCHEMA_PATH",
    "CorrectRule",
    "Imported",
    "Place",
    "RecordingOptions",
    "Retag",
    "Rollout",
    "RolloutError",
    "RolloutWriter",
    "ScoredRollout",
    "ScoringOptions",
    "Summary",
    "import_logs",
    "load",
    "parse_rollout",
    "read_rollouts",
    "score_rollouts",
    "summarize_files",
    "summarize_rollouts",
]
