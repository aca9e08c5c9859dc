"""Batches in which some policies and some contexts bar some tokens: log-probabilities of minus infinity."""

from dataclasses import replace

import torch
from batches import batches
from hypothesis import strategies as st

LOG_PROBS = [f"{name}log_probs" for name in ("", "old_", "corrupted_", "counterfactual_", "ref_")]


@st.composite
def barred_batches(draw, value=-torch.inf, **how):
    """Each tensor of log-probs bars tokens of its own, so that both sides of a ratio meet in every combination."""
    batch = draw(batches(**how))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.2, 0.5, 1.0]))
    barred = {}
    for name in LOG_PROBS:
        where = batch.mask & (torch.rand(batch.mask.shape, generator=g) < share)
        barred[name] = getattr(batch, name).masked_fill(where, value)
    return replace(batch, **barred)
