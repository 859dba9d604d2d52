"""Learning rates over a run, and those of the parameter groups."""

from dataclasses import replace

import pytest
from torch import nn

from solq.training.config import TrainConfig
from solq.training.optimization import lr_factor, parameter_groups
from solq.training.presets import preset


def test_learning_rates_fall_to_a_tenth_after_every_drop() -> None:
    config = TrainConfig(lr_drop=(0.5, 0.75), warmup_steps=0)
    factors = [lr_factor(step, config, 8) for step in range(8)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert lr_factor(7, replace(config, lr_drop=()), 8) == 1


def test_warm_up_is_linear() -> None:
    config = TrainConfig(warmup_steps=4)
    assert [lr_factor(step, config, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


class Model(nn.Linear):
    def learning_rate_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"backbone": [self.weight], "others": [self.bias]}


@pytest.mark.parametrize(("batch_size", "scale"), [(16, 1), (2, 1 / 8), (32, 2)])
def test_learning_rates_follow_the_batch_size(batch_size: int, scale: float) -> None:
    config = replace(preset("queryinst-r50", cpu=True), batch_size=batch_size)
    rates = [group["lr"] for group in parameter_groups(Model(1, 1), config)]  # type: ignore[arg-type]
    assert rates == pytest.approx([1e-5 * scale, 1e-4 * scale])
    assert [group["lr"] for group in parameter_groups(Model(1, 1), replace(config, lr_batch_size=None))] == [1e-5, 1e-4]
