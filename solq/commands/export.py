"""`solq export`: write a trained model as one file that programs without this package run.

There are three formats: ``torch-export`` is a `torch.export` program, ``aoti`` the same compiled ahead of time by
AOTInductor, ``onnx`` for any ONNX runtime. On a CPU a program is made of plain PyTorch operators; on a GPU it calls the
Triton operators registered as `torch.ops.solq`, so whoever runs it imports `solq.kernels` first.
"""

import json
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from solq.commands.settings import ExportConfig, Format
from solq.data.batch import normalize
from solq.devices import choose_device
from solq.kernels import use_backend
from solq.models.base import InstanceSegmenter, select_top_k
from solq.weights import load

SUFFIXES: dict[Format, str] = {"torch-export": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}
DESCRIPTION = "solq.json"  # the file with the description inside a torch.export program
STRIDE = 32  # of C5: images are padded to multiples of it
ONNX_OPSET = 18


def export(config: ExportConfig) -> None:
    """Write the file, and print its inputs and outputs."""
    device = choose_device(config.device)
    if config.format == "onnx":
        if device.type != "cpu":
            raise ValueError(f"device is {config.device} but ONNX files are made on the CPU: leave --device out")
        _require_onnx()
    path = config.output or config.checkpoint.with_name(config.checkpoint.stem + SUFFIXES[config.format])
    ending = ".onnx" if config.format == "onnx" else ".pt2"
    if path.suffix != ending or path.is_dir():
        raise ValueError(f"output is {path}, must be a file whose name ends in {ending}")
    if config.format == "aoti" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise OSError("AOTInductor needs a C++ compiler: install g++ or clang++, or name yours in CXX")
    model = load(config.checkpoint).to(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    limits = size_limits(model, config)
    detector = Detector(model, config.top_k)
    program = trace(detector, limits, standard_operators=config.format == "onnx")
    description = describe(detector, limits, config.format, device)
    write(program, description, path, config.format)
    print(json.dumps(description["inputs"] | description["outputs"], indent=2, ensure_ascii=False))
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB), which holds this description")


# ---- what is exported


class Detector(nn.Module):
    """Find the K best detections of each image: the model with everything around it but resizing and pasting.

    Args:
        model: in eval mode.
        top_k: K, at most queries × classes.
    """

    def __init__(self, model: InstanceSegmenter, top_k: int) -> None:
        super().__init__()
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, must be at least 1")
        self.model = model
        self.top_k = min(top_k, model.config.num_queries * model.config.num_classes)

    def forward(self, images: Tensor, padding_mask: Tensor) -> dict[str, Tensor]:
        """Return detections, best first; see :func:`describe`.

        Args:
            images: (B, 3, H, W) uint8.
            padding_mask: (B, H, W) bool, True on padding.
        """
        outputs = self.model(normalize(images, padding_mask), padding_mask, last_layer_only=True)
        selection = select_top_k(outputs, self.top_k)
        detections = {"scores": selection.scores, "labels": selection.labels, "boxes": selection.boxes}
        return detections | self.model.masks.export(outputs, selection)


class SizeLimits(NamedTuple):
    """The limits of the batches that a program takes; heights and widths are multiples of 32 pixels."""

    max_batch: int
    min_size: int
    max_size: int


def size_limits(model: InstanceSegmenter, config: ExportConfig) -> SizeLimits:
    """Return the limits in the settings, or the widest that the model allows.

    Raises:
        ValueError: a limit is no multiple of 32, or the model cannot take images of the least size.
    """
    least = model.config.min_image_size
    min_size = config.min_size or least
    max_size = config.max_size or max(least + 2 * STRIDE, math.ceil(model.meta.max_size / STRIDE) * STRIDE)
    for name, size in (("min_size", min_size), ("max_size", max_size)):
        if size % STRIDE:
            raise ValueError(f"{name} is {size}, must be a multiple of {STRIDE}")
    if min_size < least:
        raise ValueError(f"min_size is {min_size}, must be at least {least} for this model")
    if max_size < min_size + 2 * STRIDE:
        needed = min_size + 2 * STRIDE
        raise ValueError(f"max_size is {max_size}, must be at least {needed}: {2 * STRIDE} more than min_size")
    if config.max_batch < 2:
        raise ValueError(f"max_batch is {config.max_batch}, must be at least 2 (a batch may still be of one image)")
    return SizeLimits(config.max_batch, min_size, max_size)


def trace(detector: Detector, limits: SizeLimits, standard_operators: bool = False) -> torch.export.ExportedProgram:
    """Trace the detector to a program for batches, heights and widths within the limits.

    Args:
        detector: on the device that the program is for.
        limits: of the program.
        standard_operators: use the definitions in `solq.kernels`, of operators that ONNX has, instead of what is
            fastest.
    """
    device = next(detector.parameters()).device
    H, W = limits.min_size + STRIDE, limits.min_size + 2 * STRIDE  # any that differ
    B = min(limits.max_batch, 7)  # unusual, so that torch does not unify it with another dimension
    images = torch.zeros(B, 3, H, W, dtype=torch.uint8, device=device)
    padding_mask = torch.zeros(B, H, W, dtype=torch.bool, device=device)
    batch = torch.export.Dim("batch", min=1, max=limits.max_batch)
    bounds = {"min": limits.min_size // STRIDE, "max": limits.max_size // STRIDE}
    height, width = (STRIDE * torch.export.Dim(name, **bounds) for name in ("height_in_32", "width_in_32"))
    sizes = {"images": {0: batch, 2: height, 3: width}, "padding_mask": {0: batch, 1: height, 2: width}}
    detector.eval().requires_grad_()  # torch compares strides of weights without a gradient, and fixes the batch
    with torch.no_grad(), use_backend("definition") if standard_operators else nullcontext():
        # Strict, so that `len` of a tensor stays a symbol.
        return torch.export.export(detector, (images, padding_mask), dynamic_shapes=sizes, strict=True)


# ---- the file


def describe(detector: Detector, limits: SizeLimits, format: Format, device: torch.device) -> dict[str, Any]:
    """Describe the file, its inputs and outputs; the description is written into it."""
    model, K = detector.model, detector.top_k
    sides = f"H and W multiples of {STRIDE} from {limits.min_size} to {limits.max_size}"
    outputs = {
        "scores": f"(B, {K}) float32, best first",
        "labels": f"(B, {K}) int64, indices into class_names and category_ids",
        "boxes": f"(B, {K}, 4) float32, x0 y0 x1 y1 in 0..1 of each image without its padding",
    }
    outputs |= model.masks.describe_export(K)
    return {
        "model": model.name,
        "format": format,
        "device": device.type,
        "needs": "import solq.kernels before loading" if device.type == "cuda" else "nothing of this package",
        "inputs": {
            "images": f"(B, 3, H, W) uint8 RGB, B from 1 to {limits.max_batch}, {sides}; images of other sizes are "
            "resized and padded at the right and at the bottom",
            "padding_mask": "(B, H, W) bool, True on padding",
        },
        "outputs": outputs,
        "shorter_side": model.meta.eval_scale,
        "longer_side": model.meta.max_size,
        "limits": limits._asdict(),
        "class_names": model.meta.class_names,
        "category_ids": model.meta.category_ids,
        "license": model.meta.license,
    }


def write(program: torch.export.ExportedProgram, description: dict[str, Any], path: Path, format: Format) -> None:
    """Write a traced detector with its description."""
    text = json.dumps(description, ensure_ascii=False)
    match format:
        case "torch-export":
            torch.export.save(program, path, extra_files={DESCRIPTION: text})
        case "aoti":
            options = {"aot_inductor.metadata": {"solq": text}}
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        case "onnx":
            _write_onnx(program, description, path)


def _write_onnx(program: torch.export.ExportedProgram, description: dict[str, Any], path: Path) -> None:
    inputs, outputs = description["inputs"], description["outputs"]
    settings: dict[str, Any] = {"input_names": list(inputs), "output_names": list(outputs), "opset_version": ONNX_OPSET}
    onnx_program = torch.onnx.export(program, **settings, dynamo=True, verbose=False)
    assert onnx_program is not None
    ir_model = onnx_program.model
    ir_model.metadata_props["solq"] = json.dumps(description, ensure_ascii=False)
    for value in (*ir_model.graph.inputs, *ir_model.graph.outputs):
        value.doc_string = (inputs | outputs)[value.name]
    onnx_program.save(path)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX files need {error.name}: pip install solq[onnx]") from error
