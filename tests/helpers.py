"""What several test files compare, convert and differentiate in the same way."""

from dataclasses import fields
from typing import Any, get_origin, get_type_hints

import torch

from srpo_core import SRPOConfig
from srpo_core.checked import kinds_of, names_of
from srpo_core.surrogates import CISPO, GSPO, SAPO, VESPO, Clip, GSPOToken, Surrogate


def close(actual, expected, **tolerance):
    """Within float64 rounding of numbers, nested lists of them, or a tensor."""
    expected = torch.as_tensor(expected, dtype=actual.dtype).reshape(actual.shape)
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-9, "atol": 1e-12} | tolerance))


def as_lists(*tensors):
    """What the reference takes."""
    return [tensor.tolist() for tensor in tensors]


def loss_and_gradient(function, batch, *args, **options):
    """The loss of a function that takes the log-probs of a batch first, and its gradient by them."""
    log_probs = batch.log_probs.clone().requires_grad_()
    loss = function(log_probs, *args, **options).loss
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def random_images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Pixels away from black, white and gray, so that every painted pixel shows."""
    grays = torch.randint(20, 110, shape, generator=torch.Generator().manual_seed(seed))
    return grays.to(torch.uint8) if dtype == torch.uint8 else (grays / 255).to(dtype)


_TUNED = {
    surrogate.name: surrogate
    for surrogate in (
        Clip(low=0.1, high=0.3, dual=1.5),
        CISPO(max_ratio=1.1, min_ratio=0.9),
        SAPO(temperature_positive=0.8, temperature_negative=1.3),
        VESPO(shape_positive=1.0, rate_positive=2.0, shape_negative=1.5, rate_negative=0.5),
        GSPOToken(low=0.05, high=0.1),
        GSPO(low=0.05, high=0.1),
    )
}
#: Every surrogate of the package, with parameters that random batches reach; a new one with its defaults.
SURROGATES = {name: cls() for name, cls in Surrogate.known().items()} | _TUNED


_FIELDS = {each.name: each for each in fields(SRPOConfig)}
_HINTS = get_type_hints(SRPOConfig)


def another_value(name: str) -> dict[str, Any]:
    """A value of an option of the core that is not its default, and beside it what has to be set to have it read."""
    each, hint = _FIELDS[name], _HINTS[name]
    kinds = kinds_of(hint)
    if names := names_of(hint):
        value = next(other for other in names if other != each.default)
    elif any(get_origin(kind) is tuple for kind in kinds):
        value = (f"<{name}>", f"</{name}>")
    elif name == "response_format":
        value = "vision-sr1"
    else:
        value = each.default + 2 if int in kinds else 0.5 * (each.default or 0.6)
    beside: dict[str, Any] = {"reliance_spans": 2} if name == "reliance_mode" else {}
    if (read_by := each.metadata["read_by"]) is not None and _FIELDS[read_by.option].default not in read_by.values:
        beside[read_by.option] = read_by.values[0]
    return {name: value} | beside
