"""The weights that a new run starts from, besides random numbers."""

from pathlib import Path

from solq.models.backbones.weights import load_backbone_weights
from solq.models.base import InstanceSegmenter
from solq.training.checkpoint import load_checkpoint
from solq.training.config import TrainConfig


def load_start_weights(model: InstanceSegmenter, config: TrainConfig) -> None:
    """Fill the model with the weights of `init_weights`, or its backbone with `backbone_weights`.

    Raises:
        OSError, ValueError: if a file cannot be read, or its weights do not fit the model.
    """
    if config.init_weights is not None:
        load_init_weights(model, config.init_weights)
    elif config.backbone_weights != "none":
        load_backbone_weights(model.get_submodule("backbone"), config.model.backbone, config.backbone_weights)


def load_init_weights(model: InstanceSegmenter, path: Path) -> None:
    """Copy the weights of a checkpoint into a model; their mask branches may differ, and then the model's starts anew.

    Raises:
        ValueError: if any other weights are missing or of another shape.
    """
    weights, wanted = load_checkpoint(path)["model"], model.state_dict()
    model.rename_former_keys(weights)
    fitting = {key for key in weights.keys() & wanted.keys() if weights[key].shape == wanted[key].shape}
    different = [key for key in (weights.keys() | wanted.keys()) - fitting if not key.startswith("masks.")]
    if different:
        raise ValueError(
            f"{path} does not fit this model: {len(different)} tensors are missing or of another shape, "
            f"for example {min(different)}: use the --model settings and the classes that it was trained with"
        )
    model.load_state_dict({key: weights[key] for key in fitting}, strict=False)
