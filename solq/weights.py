"""Write trained models as safetensors; read them from there, from training checkpoints and from published files.

No reader here runs code from a file.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from solq.detections import ModelMeta
from solq.errors import first_line
from solq.files import atomic_write
from solq.models import MODELS, build
from solq.models.base import InstanceSegmenter

WRAPPED = "module."  # prefix of a model's tensors in a module that wraps it, for several devices or an average


def save(model: InstanceSegmenter, path: str | Path) -> None:
    """Write a model as safetensors; `model.config` and `model.meta` (class names, license, …) go into its metadata.

    A file of that name is replaced only by a complete one.

    Raises:
        ValueError: `path` does not end in .safetensors, or `model.meta` does not fit the model's classes.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path is {path}, must end in .safetensors")
    _check_meta(model)
    metadata = {"format": "pt", "model": model.name, "license": model.meta.license}
    metadata["model_config"] = json.dumps(asdict(model.config), default=str)
    metadata["model_meta"] = json.dumps(asdict(model.meta))
    tensors = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
    try:
        with atomic_write(path) as file:
            file.write(serialize(tensors, metadata))
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): free some space, or name another file") from error


def load(path: str | Path) -> InstanceSegmenter:
    """Read a model, in eval mode, on the CPU in float32, from a file of one of these kinds, told apart by its content.

    * `.safetensors` of :func:`save`.
    * A checkpoint of `train.py`: the moving average of the weights, if there is one.
    * An official SOLQ checkpoint: ResNet-50 or 101 or a Swin transformer, one or two stages. The architecture follows
      from the names and sizes of the tensors; the rest is taken from the settings in the file, where there are any, or
      is as published: 8 heads, masks coded at 128×128, 300 queries of a two-stage model.
    * A published QueryInst checkpoint of mmdetection: ResNet-50 or 101, any number of queries and classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of these, is damaged, would run code, or does not fit the model that it describes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder: name a file in it" if path.is_dir() else f"{path}: no such file")
    file = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    try:
        model = _build(file if path.suffix == ".safetensors" else _entries(file))
        _check_meta(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # settings that another program wrote may be anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{path} has settings that make no model ({reason}): use another file") from error
    return model.eval()


def _build(file: dict[str, Any]) -> InstanceSegmenter:
    """Build the model that a file describes, and fill it with the weights."""
    weights = file["model"]
    if "model_config" in file:
        family = MODELS.get(file.get("model_name", "solq"))
        if family is None:
            raise ValueError(f"it is of a model {file['model_name']!r}, must be one of {', '.join(MODELS)}")
        model = build(family.config(**file["model_config"]))
        model.meta = ModelMeta(**file["model_meta"])
        names = {key: [key] for key in model.state_dict()}
        model.rename_former_keys(weights)
    else:
        official = next((family.official for family in MODELS.values() if family.official.recognizes(weights)), None)
        if official is None:
            raise ValueError(
                "it is neither a file of solq.save, nor a checkpoint of train.py, nor a published checkpoint of "
                f"{' or '.join(family.model_name for family in MODELS.values())}: use another file"
            )
        config = official.infer_config(weights, file.get("args"))
        model = build(config)
        model.meta = official.infer_meta(config)
        constants = dict(model.named_buffers())  # also those that are no weights here but are in an official file
        names = {key: official.official_names(key, config) for key in model.state_dict() | constants}
    _fill(model, weights, names)
    return model


def _check_meta(model: InstanceSegmenter) -> None:
    for name in ("class_names", "category_ids"):
        if values := getattr(model.meta, name):  # otherwise they are not known
            check_length(name, values, model.config.num_classes)


def check_length(name: str, values: list[Any], num_classes: int) -> None:
    """Raise a ValueError unless there is one value for each class."""
    if len(values) != num_classes:
        raise ValueError(f"{name} has {len(values)} entries but the model has {num_classes} classes: give one for each")


# ---- reading files


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        described = {key: json.loads(metadata[key]) for key in ("model_config", "model_meta") if key in metadata}
        described["model_name"] = metadata.get("model", "solq")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): use another one") from error
    except ValueError as error:
        raise ValueError(f"{path} has metadata that are not JSON ({error}): use another one") from error
    return {"model": weights, **described}


def _read_pickle(path: Path) -> Any:
    """Read a file of `torch.save`; only tensors, plain containers and a Namespace of settings are unpickled."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: those that matter are errors
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        why = f"reading it would call {called[1]}" if called else "it is damaged, or a pickle of more than weights"
        raise ValueError(
            f"{path} is refused: {why}, and no file may run code; nothing was run. Ask for the weights as .safetensors"
        ) from error
    except Exception as error:  # readers of zip files and of tensors each raise their own
        raise ValueError(f"{path} is damaged or not a checkpoint ({first_line(error)}): use another one") from error


def _entries(file: Any) -> dict[str, Any]:
    """Extract weights and settings from the content of a checkpoint of `train.py` or of the official code."""
    if isinstance(file, Mapping) and "model" not in file and all(isinstance(value, Tensor) for value in file.values()):
        file = {"model": file}  # the bare weights
    if isinstance(file, Mapping) and "model" not in file and "state_dict" in file:
        file = {"model": file["state_dict"]}  # mmdetection's files
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
    return {
        "model": dict(weights),
        "model_name": file.get("model_name", "solq"),
        "model_config": file["model_config"],
        "model_meta": {**names, **sizes},
    }


# ---- from a file into a model


def _fill(model: InstanceSegmenter, weights: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> None:
    """Copy weights into a model.

    Args:
        model: filled in place.
        weights: tensors by the names of the file.
        names: the names in the file of each of the model's tensors; under all of them must be the same values. A
            constant of the model may be in the file, with the model's value.

    Raises:
        ValueError: tensors are missing, superfluous, of another shape, or differ; all are named.
    """
    state, constants = model.state_dict(), dict(model.named_buffers())
    expected = {name for file_names in names.values() for name in file_names}
    different, unequal = [], []
    for key, file_names in names.items():
        present = {name: weights[name] for name in file_names if name in weights}
        wanted = state[key] if key in state else constants[key]
        shape = list(wanted.shape)
        different += [f"{n} {list(t.shape)} instead of {shape}" for n, t in present.items() if list(t.shape) != shape]
        first = next(iter(present.values()), wanted) if key in state else wanted
        unequal += [name for name, tensor in present.items() if not torch.equal(tensor, first)]
    problems = {
        "lacks": [name for key in state for name in names[key] if name not in weights],
        "holds what the model lacks:": [name for name in weights if name not in expected],
        "holds tensors of another shape:": different,
        "holds different values under": unequal,
    }
    found = [f"the file {problem} {', '.join(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{'; '.join(found)} (model: {model.config})")
    model.load_state_dict({key: weights[names[key][0]] for key in state})
