"""The mode that a model is scored in."""

import pytest
from torch import nn

from srpo_core.modes import evaluating, has_dropout


class Attention(nn.Module):
    """Drops by a rate that it holds itself, as models of transformers do."""

    def __init__(self, rate):
        super().__init__()
        self.attention_dropout = rate


def test_evaluating_restores_the_mode_of_each_module_also_after_an_error():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1)))
    model[1][1].eval()  # frozen by its user
    before = [module.training for module in model.modules()]
    assert before == [True, True, True, True, False]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / 0  # noqa: B018
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("module", [nn.Dropout(0.1), Attention(0.1)], ids=["module", "rate"])
def test_has_dropout_looks_at_rates_above_0_of_modules_that_train(module):
    model = nn.Sequential(nn.Linear(1, 1), module)
    assert has_dropout(model)
    with evaluating(model):
        assert not has_dropout(model)
    assert not has_dropout(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.0), Attention(0.0)))
