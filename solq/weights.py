"""Files of trained weights: written as safetensors; read from there, from training checkpoints, from official SOLQ.

No reader here runs code from a file.
"""

import argparse
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from solq.models.solq.model import SOLQ
from solq.training.config import Backbone, ModelConfig, ModelMeta

# What an official file's settings may say beside the sizes of its tensors, and the values that this model has.
REQUIRED_SETTINGS = {"activation": "relu", "position_embedding": "sine", "dilation": False}

WRAPPED = "module."  # what modules that wrap a model, for several devices or an average, put before its names


def save(model: SOLQ, path: str | Path) -> None:
    """Write a model as safetensors; `model.config` and `model.meta` (class names, licence, …) go into its metadata.

    A file of that name is replaced only by a complete one.

    Raises:
        ValueError: if `path` does not end in .safetensors, or `model.meta` does not fit the model's classes.
        OSError: if it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path is {path}, must end in .safetensors")
    for name in ("class_names", "category_ids"):
        check_length(name, getattr(model.meta, name), model.config.num_classes)
    metadata = {"format": "pt", "model": "solq", "license": model.meta.license}
    metadata |= {"model_config": json.dumps(asdict(model.config)), "model_meta": json.dumps(asdict(model.meta))}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    try:
        tensors = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
        unfinished.write_bytes(serialize(tensors, metadata))  # save_file would make it readable by its owner only
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error}): free some space, or name another file") from error
    os.replace(unfinished, path)


def load(path: str | Path) -> SOLQ:
    """A model in eval mode, on the CPU in float32, from a file of one of these kinds, told apart by what they hold.

    * `.safetensors` of :func:`save`.
    * A checkpoint of `train.py`; of its weights the moving average, if there is one.
    * An official SOLQ checkpoint: ResNet-50 or 101 or a Swin transformer, one or two stages. The architecture follows
      from the names and sizes of its tensors. What they do not tell is taken from the settings in the file, where
      there are any, and else as published: 8 heads, masks coded at 128×128, 300 queries of a two-stage model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none of these, is damaged, would run code, or does not fit the model that it describes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder: name a file in it" if path.is_dir() else f"{path}: no such file")
    file = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    try:
        model = _build(file if path.suffix == ".safetensors" else _entries(file))
        for name in ("class_names", "category_ids"):
            check_length(name, getattr(model.meta, name), model.config.num_classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # settings that another program wrote may be anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} has settings that make no model ({reason}): use another file") from error
    return model.eval()


def _build(file: dict[str, Any]) -> SOLQ:
    if "model_config" in file:
        model = SOLQ(ModelConfig(**file["model_config"]))
        model.meta = ModelMeta(**file["model_meta"])
        names = {key: [key] for key in model.state_dict()}
    else:
        config = infer_config(file["model"], file.get("args"))
        model = SOLQ(config)
        if config.num_classes == 91:
            model.meta.class_names, model.meta.category_ids = coco_class_names(), list(range(91))
        if config.backbone.startswith("swin"):
            model.meta.eval_scale, model.meta.max_size = 1088, 1536
        constants = dict(model.named_buffers())  # with those that are no weights here but are in an official file
        names = {key: official_names(key, config) for key in model.state_dict() | constants}
    _fill(model, file["model"], names)
    return model


def check_length(name: str, values: list[Any], num_classes: int) -> None:
    """Class names and category ids are either not known or there is one for every class."""
    if values and len(values) != num_classes:
        raise ValueError(f"{name} has {len(values)} entries but the model has {num_classes} classes: give one for each")


def coco_class_names() -> list[str]:
    """The names of COCO's categories by their ids 0 … 90; empty for the ids that are not used."""
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return ["" if name in ("__background__", "N/A") else name for name in names]


# ---- reading files


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        described = {key: json.loads(metadata[key]) for key in ("model_config", "model_meta") if key in metadata}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): use another one") from error
    except ValueError as error:
        raise ValueError(f"{path} has metadata that are not JSON ({error}): use another one") from error
    return {"model": weights, **described}


def _read_pickle(path: Path) -> Any:
    """What a file holds. Nothing but tensors, plain containers and a Namespace of settings is made of it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what comes of them is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        why = f"reading it would call {called[1]}" if called else "it is damaged, or a pickle of more than weights"
        raise ValueError(
            f"{path} is refused: {why}, and no file may run code; nothing was run. Ask for the weights as .safetensors"
        ) from error
    except Exception as error:  # readers of zip files and of tensors each raise their own
        reason = str(error).splitlines()[0] if " " in str(error) else repr(error)
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}): use another one") from error


def _entries(file: Any) -> dict[str, Any]:
    """What a model is made from, of the content of a checkpoint of `train.py` or of the official code."""
    if isinstance(file, Mapping) and "model" not in file and all(isinstance(value, Tensor) for value in file.values()):
        file = {"model": file}  # the bare weights
    weights = file.get("model") if isinstance(file, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("it holds no weights of a model, so it is no checkpoint: use another file")
    if "model_config" not in file:
        if all(key.startswith(WRAPPED) for key in weights):
            weights = {key.removeprefix(WRAPPED): value for key, value in weights.items()}
        return {"model": weights, "args": file.get("args")}
    if file.get("ema"):
        weights = {key.removeprefix(WRAPPED): value for key, value in file["ema"].items() if key.startswith(WRAPPED)}
    training = file.get("config", {})
    sizes = {key: training[key] for key in ("eval_scale", "max_size") if key in training}
    names = {key: file[key] for key in ("class_names", "category_ids") if key in file}
    return {"model": weights, "model_config": file["model_config"], "model_meta": {**names, **sizes}}


# ---- official checkpoints


def official_names(key: str, config: ModelConfig) -> list[str]:
    """What a tensor of this model is called in an official file: several names where a module is held several times.

    Swin transformers are named as in Microsoft's repository, where the step to a coarser stage ends the stage before.
    """
    if key.startswith("vector_embed."):
        return [key.replace(".", f".{layer}.", 1) for layer in range(config.decoder_layers + config.two_stage)]
    if key.startswith("bbox_embed.") or (key.startswith("class_embed.") and config.two_stage):
        return [key, f"transformer.decoder.{key}"]
    if not key.startswith("backbone."):
        return [key]
    name = key.replace("backbone.", "backbone.0.", 1)
    if downsample := re.match(r"(.*body\.)layers_(\d)(\.downsample\..*)", name):
        before, stage, after = downsample.groups()
        return [f"{before}layers.{int(stage) - 1}{after}"]
    name = re.sub(r"\.norms\.(\d)\.", lambda match: f".body.norm{int(match[1]) + 1}.", name)
    return [re.sub(r"body\.layers_(\d)", r"body.layers.\1", name)]


def infer_config(weights: Mapping[str, Tensor], settings: Any = None) -> ModelConfig:
    """The architecture of an official checkpoint.

    Args:
        weights: by their official names.
        settings: the file's `args`, an object or a dict, if it has them.
    """

    def shape(key: str) -> torch.Size:
        if key not in weights:
            raise ValueError(
                f"it is neither a file of solq.save, nor a checkpoint of train.py, nor an official SOLQ checkpoint, "
                f"which would have {key}"
            )
        return weights[key].shape

    def count(pattern: str) -> int:
        return len({match[1] for key in weights if (match := re.match(pattern, key))})

    if isinstance(settings, Mapping):
        settings = argparse.Namespace(**settings)
    for name, value in REQUIRED_SETTINGS.items():
        if getattr(settings, name, value) != value:
            raise ValueError(f"it was trained with {name} {getattr(settings, name)!r}, must be {value!r}")
    num_levels, width = shape("transformer.level_embed")
    num_heads = getattr(settings, "nheads", 8)
    sampled = shape("transformer.decoder.layers.0.cross_attn.attention_weights.bias")[0]
    two_stage = "transformer.enc_output.weight" in weights
    with_masks = "vector_embed.0.layers.0.weight" in weights
    return ModelConfig(
        backbone=_infer_backbone(weights, count),
        num_classes=shape("class_embed.0.bias")[0],
        width=width,
        num_heads=num_heads,
        encoder_layers=count(r"transformer\.encoder\.layers\.(\d+)\."),
        decoder_layers=count(r"transformer\.decoder\.layers\.(\d+)\."),
        feedforward=shape("transformer.decoder.layers.0.linear1.bias")[0],
        num_queries=getattr(settings, "num_queries", 300) if two_stage else shape("query_embed.weight")[0],
        num_levels=num_levels,
        num_points=sampled // (num_heads * num_levels),
        two_stage=two_stage,
        mask_branch="unified" if with_masks else "none",
        num_coefficients=shape("vector_embed.0.layers.2.bias")[0] if with_masks else None,
        mask_size=getattr(settings, "gt_mask_len", 128) if with_masks else None,
        vector_hidden=shape("vector_embed.0.layers.0.bias")[0] if with_masks else 1024,
    )


def _infer_backbone(weights: Mapping[str, Tensor], count: Callable[[str], int]) -> Backbone:
    """By the width of its first layer and the number of blocks in its third stage."""
    known: dict[tuple[int, int], Backbone]
    if (stem := weights.get("backbone.0.body.conv1.weight")) is not None:
        blocks = count(r"backbone\.0\.body\.layer3\.(\d+)\.")
        known = {(64, 6): "resnet50", (64, 23): "resnet101"}
    elif (stem := weights.get("backbone.0.body.patch_embed.proj.weight")) is not None:
        blocks = count(r"backbone\.0\.body\.layers\.2\.blocks\.(\d+)\.")
        known = {(96, 6): "swin-t", (96, 18): "swin-s", (128, 18): "swin-b", (192, 18): "swin-l"}
    else:
        raise ValueError("its backbone is neither a ResNet nor a Swin transformer")
    if (len(stem), blocks) not in known:
        raise ValueError(
            f"its backbone has {len(stem)} channels at first and {blocks} blocks in the third stage, "
            f"must be one of {', '.join(f'{name} {sizes}' for sizes, name in known.items())}"
        )
    return known[len(stem), blocks]


# ---- from a file into a model


def _fill(model: SOLQ, weights: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> None:
    """Copy weights into a model.

    Args:
        names: for each tensor of the model its names in `weights`, which must hold the same values under all of them.
            A tensor that is no weight but a constant of the model may be there, with the model's value.
    """
    state, constants = model.state_dict(), dict(model.named_buffers())
    expected = {name for of_tensor in names.values() for name in of_tensor}
    missing = [name for key in state for name in names[key] if name not in weights]
    problems = {
        "lacks": missing,
        "holds what the model lacks:": [name for name in weights if name not in expected],
    }
    different, unequal = [], []
    for key, of_tensor in names.items():
        present = [name for name in of_tensor if name in weights]
        wanted = state[key] if key in state else constants[key]
        different += [
            f"{name} {list(weights[name].shape)} instead of {list(wanted.shape)}"
            for name in present
            if weights[name].shape != wanted.shape
        ]
        first = weights[present[0]] if key in state and present else wanted
        unequal += [name for name in present if not torch.equal(weights[name], first)]
    problems |= {"holds tensors of another shape:": different, "holds different values under": unequal}
    found = [f"the file {what} {', '.join(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{'; '.join(found)} (model: {model.config})")
    model.load_state_dict({key: weights[names[key][0]] for key in state})
