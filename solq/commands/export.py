"""`solq export`: a trained model as one file that programs without this package run: images in, detections out.

Three formats. ``torch-export`` is a `torch.export` program, ``aoti`` the same compiled ahead of time by AOTInductor,
``onnx`` for any ONNX runtime. On a CPU a program is made of plain PyTorch operators; on a GPU it calls the Triton
operators registered as `torch.ops.solq`, so whoever runs it imports `solq.kernels` first.
"""

import json
import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from solq.data.batch import normalize
from solq.devices import choose_device
from solq.kernels import use_backend
from solq.models.base import InstanceSegmenter, select_top_k
from solq.weights import load

Format = Literal["torch-export", "aoti", "onnx"]

SUFFIXES: dict[Format, str] = {"torch-export": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}
DESCRIPTION = "solq.json"  # the file with the description inside a torch.export program
STRIDE = 32  # of C5: images are padded to multiples of it
ONNX_OPSET = 18


@dataclass
class ExportConfig:
    """Write a model as one file: images in, detections out. docs/export.md shows how each format is run."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A file of solq.save, of train.py, or an official SOLQ checkpoint."""
    format: Format = "torch-export"
    """A torch.export program, an AOTInductor package (needs a C++ compiler), or ONNX."""
    output: Path | None = None
    """File to write; the checkpoint's name with another ending unless given."""
    top_k: int = 100
    """Detections of an image, whatever their scores; fixed in the file."""
    max_batch: int = 16
    """Most images of a batch."""
    min_size: int | None = None
    """Least height and width of a padded image, a multiple of 32; the least that the model takes unless given."""
    max_size: int | None = None
    """Most height and width of a padded image, a multiple of 32; as in the model's evaluation unless given."""
    device: str = "cpu"
    """The kind of device that the file is for: cpu or cuda."""


def export(config: ExportConfig) -> None:
    """Write the file, and print what goes in and what comes out.

    Raises:
        OSError, ValueError: the checkpoint or a setting cannot be used, or the file cannot be written.
        ImportError: ONNX is wanted but not installed.
    """
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
    """Images to the K best detections of each: the model with everything around it but resizing and pasting.

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
        """Detections, best first; see :func:`describe`.

        Args:
            images: (B, 3, H, W) uint8.
            padding_mask: (B, H, W) bool, True on padding.
        """
        outputs = self.model(normalize(images, padding_mask), padding_mask, last_layer_only=True)
        selection = select_top_k(outputs, self.top_k)
        detections = {"scores": selection.scores, "labels": selection.labels, "boxes": selection.boxes}
        return detections | self.model.masks.export(outputs, selection)


@dataclass
class SizeLimits:
    """What the batches that a program takes are bounded by; heights and widths are multiples of 32."""

    max_batch: int
    min_size: int
    max_size: int


def size_limits(model: InstanceSegmenter, config: ExportConfig) -> SizeLimits:
    """The settings' limits, or the widest that the model allows.

    Raises:
        ValueError: if they are no multiples of 32, or the model cannot take images of the least size.
    """
    least = model.config.min_image_size
    largest = config.max_size or max(least + 2 * STRIDE, math.ceil(model.meta.max_size / STRIDE) * STRIDE)
    limits = SizeLimits(config.max_batch, config.min_size or least, largest)
    for name in ("min_size", "max_size"):
        if getattr(limits, name) % STRIDE:
            raise ValueError(f"{name} is {getattr(limits, name)}, must be a multiple of {STRIDE}")
    if limits.min_size < least:
        raise ValueError(f"min_size is {limits.min_size}, must be at least {least} for this model")
    if limits.max_size < limits.min_size + 2 * STRIDE:
        raise ValueError(
            f"max_size is {limits.max_size}, must be at least {limits.min_size + 2 * STRIDE}: "
            f"{2 * STRIDE} more than min_size"
        )
    if limits.max_batch < 2:
        raise ValueError(f"max_batch is {limits.max_batch}, must be at least 2 (a batch may still be of one image)")
    return limits


def trace(detector: Detector, limits: SizeLimits, standard_operators: bool = False) -> torch.export.ExportedProgram:
    """The detector as a program for batches, heights and widths within the limits.

    Args:
        standard_operators: with the definitions of `solq.kernels`, of operators that ONNX has, instead of what is
            fastest.
    """
    device = next(detector.parameters()).device
    H, W = limits.min_size + STRIDE, limits.min_size + 2 * STRIDE  # any that differ
    B = min(limits.max_batch, 7)  # no size in the model: torch may take two that agree by chance for one
    images = torch.zeros(B, 3, H, W, dtype=torch.uint8, device=device)
    padding_mask = torch.zeros(B, H, W, dtype=torch.bool, device=device)
    batch = torch.export.Dim("batch", min=1, max=limits.max_batch)
    bounds = {"min": limits.min_size // STRIDE, "max": limits.max_size // STRIDE}
    height, width = (STRIDE * torch.export.Dim(name, **bounds) for name in ("height_in_32", "width_in_32"))
    sizes = {"images": {0: batch, 2: height, 3: width}, "padding_mask": {0: batch, 1: height, 2: width}}
    detector.eval().requires_grad_()  # of weights without a gradient torch compares the strides, and fixes the batch
    with torch.no_grad(), use_backend("definition") if standard_operators else nullcontext():
        # Strict, so that `len` of a tensor stays a symbol.
        return torch.export.export(detector, (images, padding_mask), dynamic_shapes=sizes, strict=True)


# ---- the file


def describe(detector: Detector, limits: SizeLimits, format: Format, device: torch.device) -> dict[str, Any]:
    """What the file is, takes and returns; written into it."""
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
        "limits": asdict(limits),
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
    onnx_program = torch.onnx.export(
        program,
        input_names=list(description["inputs"]),
        output_names=list(description["outputs"]),
        opset_version=ONNX_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert onnx_program is not None
    ir_model = onnx_program.model
    ir_model.metadata_props["solq"] = json.dumps(description, ensure_ascii=False)
    for value in (*ir_model.graph.inputs, *ir_model.graph.outputs):
        value.doc_string = (description["inputs"] | description["outputs"])[value.name]
    onnx_program.save(path)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX files need {error.name}: pip install solq[onnx]") from error
