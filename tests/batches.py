"""Ragged batches for hypothesis: real sizes, holes in the mask, NaN wherever nothing may be read."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from srpo_core import Role


@dataclass
class Batch:
    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    corrupted_log_probs: torch.Tensor
    counterfactual_log_probs: torch.Tensor
    ref_log_probs: torch.Tensor
    scores: torch.Tensor
    roles: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor

    @property
    def token_advantages(self):
        return self.advantages[:, None].expand_as(self.log_probs)

    @property
    def scored(self):
        return self.mask & (self.roles != Role.OTHER)


@st.composite
def batches(draw, dtype=torch.float64, max_batch=5, max_time=9):
    """A batch of random responses. Everything is drawn from one generator: one number to shrink."""
    batch, time = draw(st.integers(1, max_batch)), draw(st.integers(1, max_time))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 1e-3, 1.0, 6.0]))
    mask = torch.rand(batch, time, generator=g) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    roles = torch.randint(0, 3, (batch, time), generator=g)
    # Under the mask a role may be out of range, or look like a role that counts.
    roles = torch.where(mask, roles, draw(st.sampled_from([99, int(Role.PERCEPTION), int(Role.REASONING)])))

    def padded(values, where=mask):
        return torch.where(where, values, torch.nan).to(dtype)

    def log_probs_near(base, spread):
        return base + spread * torch.randn(batch, time, generator=g, dtype=torch.float64)

    old = -3.0 * torch.rand(batch, time, generator=g, dtype=torch.float64)
    return Batch(
        log_probs=padded(log_probs_near(old, 0.3)),
        old_log_probs=padded(old),
        corrupted_log_probs=padded(log_probs_near(old, spread)),
        counterfactual_log_probs=padded(log_probs_near(old, spread)),
        ref_log_probs=padded(log_probs_near(old, 0.3)),
        # Scores are NaN also at real tokens that have none.
        scores=padded(log_probs_near(0.0, spread), mask & (roles != Role.OTHER)),
        roles=roles,
        mask=mask,
        advantages=torch.randn(batch, generator=g, dtype=torch.float64).to(dtype)
        * (torch.rand(batch, generator=g) < 0.8),
    )
