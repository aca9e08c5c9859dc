"""In which mode a model is scored: without dropout, and afterwards back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "has_dropout"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward pass in the present mode is random."""
    return any(
        isinstance(rate, float) and rate > 0 and ("drop" in name or isinstance(module, nn.modules.dropout._DropoutNd))
        for module in model.modules()
        if module.training
        for name, rate in vars(module).items()
    )
