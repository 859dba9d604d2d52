"""Learning rates and averaged weights of a training run."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from solq.models.base import InstanceSegmenter
from solq.training.config import TrainConfig


def parameter_groups(model: InstanceSegmenter, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, each with its learning rate.

    The rate of group `x` is the setting `lr_x` of the run or of the model; that of "others" is `lr`. All are scaled
    from `lr_batch_size` to the batch size of the run.
    """
    scale = config.batch_size / (config.lr_batch_size or config.batch_size)
    rates = {"others": config.lr, "backbone": config.lr_backbone}
    groups = []
    for name, parameters in model.learning_rate_groups().items():
        rate = scale * (rates[name] if name in rates else getattr(config.model, f"lr_{name}"))
        if parameters:
            groups.append({"params": parameters, "base_lr": rate, "lr": rate, "weight_decay": config.weight_decay})
    return groups


def lr_factor(step: int, config: TrainConfig, steps: int) -> float:
    """Return the factor of all learning rates: a linear warm-up, then 1, then a tenth of it after each drop."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * 0.1 ** sum(step >= share * steps for share in config.lr_drop)


def averaged_model(model: nn.Module, decay: float) -> AveragedModel | None:
    """Return a moving average of the model's weights, or None without a decay.

    Buffers are copied: an average of Swin's integer ones would round them down.
    """
    return AveragedModel(model, use_buffers=False) if decay > 0 else None


def update_average(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards those of the model.

    `AveragedModel.update_parameters` copies a counter to the device and waits for that, in every step.
    """
    update = get_ema_multi_avg_fn(decay if average.n_averaged else 0.0)  # the first time a copy
    update(list(average.parameters()), list(model.parameters()), average.n_averaged)
    for averaged, buffer in zip(average.module.buffers(), model.buffers(), strict=True):
        averaged.copy_(buffer)
    average.n_averaged += 1
