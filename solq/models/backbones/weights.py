"""ImageNet weights of the backbones."""

from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from solq.errors import first_line
from solq.models.backbones import SWINS


def load_backbone_weights(backbone: nn.Module, name: str, source: str) -> None:
    """Fill a backbone with ImageNet weights, in place.

    Args:
        backbone: built by :func:`solq.models.backbones.build_backbone`.
        name: its name.
        source: ``"imagenet"`` to download them (torchvision for ResNets, timm for Swin), or the path of a state dict
            of the whole classifier (``.pth`` or ``.safetensors``).

    Raises:
        OSError: if they cannot be downloaded, or there is no such file.
        ValueError: if they do not fit, or the file is damaged.
    """
    state = _download(name) if source == "imagenet" else _read(Path(source))
    body = backbone.get_submodule("body")
    if name in SWINS:  # features_only joins `layers.0` to `layers_0`
        state = {key.replace("layers.", "layers_", 1): tensor for key, tensor in state.items()}
    wanted = body.state_dict()
    missing = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    if missing:
        raise ValueError(
            f"backbone weights {source} do not fit {name}: {len(missing)} of {len(wanted)} tensors are missing "
            f"or of another shape, the first is {missing[0]}: give weights of {name}, or 'none'"
        )
    body.load_state_dict({key: state[key] for key in wanted})


def _read(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file; training scripts keep it under "model" or "state_dict"."""
    if not path.is_file():
        raise FileNotFoundError(f"backbone weights {path}: no such file (give a path, 'imagenet' or 'none')")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor readers each raise their own
        raise ValueError(
            f"backbone weights {path} are damaged or no state dict ({first_line(error)}): use another file"
        ) from error
    for entry in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"backbone weights {path} hold no state dict: use another file")
    return state


def _download(name: str) -> dict[str, Tensor]:
    if name == "resnet10":
        raise ValueError("resnet10 has no ImageNet weights: give --backbone-weights none, or the PATH of your own")
    try:
        if name in SWINS:
            import timm

            from solq.models.backbones.swin import TIMM_NAMES

            return timm.create_model(TIMM_NAMES[name], pretrained=True).state_dict()
        # IMAGENET1K_V1 are the weights that the published model started from.
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise OSError(
            f"the ImageNet weights of {name} cannot be downloaded ({first_line(error)}): give "
            "--backbone-weights PATH with a file fetched elsewhere, or --backbone-weights none to train from scratch"
        ) from error
