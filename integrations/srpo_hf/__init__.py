"""Every view of a rollout batch (SRPO, arXiv:2605.07274) scored by a vision-language model of transformers."""

from srpo_hf.prompts import EncodedPrompt
from srpo_hf.scorer import Scored, Scorer, Work

__all__ = ["EncodedPrompt", "Scored", "Scorer", "Work"]
