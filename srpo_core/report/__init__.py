"""Scored rollouts to one self-contained page: what happened to the credit, and where in each response."""

from srpo_core.report.page import Written, report_files, report_rollouts
from srpo_core.report.words import REASONS, Answer, answers, fault, interference_in_words, right_in_words

__all__ = [
    "REASONS",
    "Answer",
    "Written",
    "answers",
    "fault",
    "interference_in_words",
    "report_files",
    "report_rollouts",
    "right_in_words",
]
