"""Role-aware token credit (SRPO, arXiv:2605.07274) for TRL: `SRPOTrainer` is a drop-in for `GRPOTrainer`."""

from srpo_trl.config import SRPOConfig
from srpo_trl.trainer import SRPOMixin, SRPOTrainer

__all__ = ["SRPOConfig", "SRPOMixin", "SRPOTrainer"]
