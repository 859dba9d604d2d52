"""Exported files give, in a fresh process, the detections of the model that they were made from."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from solq import load, save
from solq.commands import export
from solq.commands.settings import ExportConfig, Format
from solq.data.batch import normalize
from solq.detections import ModelMeta
from solq.kernels import paste_masks
from solq.models.base import InstanceSegmenter
from solq.models.solq.config import SOLQConfig

META = ModelMeta(tiny.CLASS_NAMES, [], 64, 160)
TOP_K = 8

# What a program that has not this package does with each format.
RUN = {
    "torch-export": """
extra = {"solq.json": ""}
run = torch.export.load(path, extra_files=extra).module()
text = extra["solq.json"]
""",
    "aoti": """
run = torch._inductor.aoti_load_package(path)
text = run.get_metadata()["solq"]
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
text = session.get_modelmeta().custom_metadata_map["solq"]
def run(images, padding_mask):
    found = session.run(None, {"images": images.numpy(), "padding_mask": padding_mask.numpy()})
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}
""",
}
PROGRAM = """
import json, sys, torch
path, inputs, results = sys.argv[1:]
{run}
outputs = [run(*batch) for batch in torch.load(inputs)]
assert not [name for name in sys.modules if name.split(".")[0] == "solq"]
torch.save((json.loads(text), outputs), results)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save(tiny.solq_model(META), path)
    return path


def batches() -> list[tuple[Tensor, Tensor]]:
    """Of other sizes than the one that is traced: two images of which one is padded, and a single, wide one."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 160, 64), dtype=torch.uint8, generator=generator)
    padding_mask = torch.zeros(2, 160, 64, dtype=torch.bool)
    padding_mask[1, 130:], padding_mask[1, :, 50:] = True, True
    wide = torch.randint(0, 256, (1, 3, 96, 160), dtype=torch.uint8, generator=generator)
    return [(images, padding_mask), (wide, torch.zeros(1, 96, 160, dtype=torch.bool))]


def run_in_fresh_process(format: str, path: Path, folder: Path) -> tuple[dict, list[dict[str, Tensor]]]:
    torch.save(batches(), folder / "inputs.pt")
    code = PROGRAM.format(run=RUN[format])
    command = [sys.executable, "-c", code, str(path), str(folder / "inputs.pt"), str(folder / "results.pt")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert finished.returncode == 0, finished.stderr
    return torch.load(folder / "results.pt")


def check_same_detections(solq: InstanceSegmenter, outputs: list[dict[str, Tensor]]) -> None:
    for (images, padding_mask), found in zip(batches(), outputs, strict=True):
        assert {"scores", "labels", "boxes", "masks"} <= found.keys()
        with torch.no_grad():
            expected = solq.postprocess(
                solq(normalize(images, padding_mask), padding_mask), torch.tensor([[120, 90]] * len(images)), TOP_K
            )
        for b, detections in enumerate(expected):
            boxes = found["boxes"][b] * torch.tensor([90.0, 120, 90, 120])
            torch.testing.assert_close(found["scores"][b], detections.scores, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found["labels"][b], detections.labels)
            torch.testing.assert_close(boxes, detections.boxes, atol=1e-2, rtol=1e-4)
            masks = paste_masks(found["masks"][b], boxes, (120, 90))
            assert detections.masks is not None
            assert detections.masks.any()
            assert (masks != detections.masks).float().mean() < 1e-3


def require(format: str) -> None:
    if format == "aoti" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("AOTInductor needs a C++ compiler: neither g++ nor clang++ is installed")
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"{', '.join(missing)} not installed: pip install solq[onnx]")


@pytest.mark.parametrize("format", ["torch-export", "aoti", "onnx"])
def test_file_gives_the_same_detections_in_a_fresh_process(
    format: Format, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require(format)
    path = tmp_path / f"detector{export.SUFFIXES[format]}"
    export.export(ExportConfig(checkpoint, format, path, top_k=TOP_K))
    assert str(path) in capsys.readouterr().out
    description, outputs = run_in_fresh_process(format, path, tmp_path)
    assert set(description["inputs"]) == {"images", "padding_mask"}
    assert list(description["outputs"]) == ["scores", "labels", "boxes", "masks"]
    assert description["class_names"] == tiny.CLASS_NAMES
    assert description["limits"] == {"max_batch": 16, "min_size": 64, "max_size": 160}
    check_same_detections(load(checkpoint), outputs)


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_queryinst(format: Format, tmp_path: Path) -> None:
    """Regions are sampled by standard operators; masks are probabilities in the boxes."""
    require(format)
    model = tiny.queryinst_model(META)
    save(model, tmp_path / "model.safetensors")
    path = tmp_path / f"detector{export.SUFFIXES[format]}"
    export.export(ExportConfig(tmp_path / "model.safetensors", format, path, top_k=TOP_K))
    _, outputs = run_in_fresh_process(format, path, tmp_path)
    check_same_detections(model, [{**found, "masks": found["mask_probabilities"]} for found in outputs])


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_swin_of_any_size(format: Format, tmp_path: Path) -> None:
    """Its maps have one window or several, whole ones and padded ones."""
    require(format)
    swin = tiny.solq_model(META, backbone="swin-t", backbone_norm="frozen")
    save(swin, tmp_path / "swin.safetensors")
    path = tmp_path / f"detector{export.SUFFIXES[format]}"
    export.export(ExportConfig(tmp_path / "swin.safetensors", format, path, top_k=TOP_K))
    _, outputs = run_in_fresh_process(format, path, tmp_path)
    check_same_detections(swin, outputs)


def test_separate_masks() -> None:
    detector = export.Detector(
        tiny.solq_model(META, mask_branch="separate", num_coefficients=None, mask_size=None), TOP_K
    )
    images, padding_mask = batches()[0]
    with torch.no_grad():
        found = detector(images, padding_mask)
        outputs = detector.model(normalize(images, padding_mask), padding_mask)
        expected = detector.model.postprocess(outputs, torch.tensor([[160, 64], [130, 50]]), TOP_K)
    head, features = detector.model.masks, outputs["mask_features"]
    for b, detections in enumerate(expected):
        size = detections.masks.shape[-2:]
        boxes = found["boxes"][b] * torch.tensor(size).flip(0).repeat(2)
        masks = head.paste(found["mask_logits"][b], boxes, features["sizes"][b], size)
        torch.testing.assert_close(found["scores"][b], detections.scores)
        assert (masks != detections.masks).float().mean() < 1e-3


def test_model_without_masks() -> None:
    found = export.Detector(tiny.solq_model(META, mask_branch="none"), 1000)(*batches()[1])
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "scores": (1, 30),
        "labels": (1, 30),
        "boxes": (1, 30, 4),
    }


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (tiny.solq_config(), 64),
        (SOLQConfig(), 96),
        (SOLQConfig(two_stage=True), 128),
        (SOLQConfig(num_levels=5), 160),
    ],
)
def test_min_image_size(config: SOLQConfig, size: int) -> None:
    assert config.min_image_size == size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_size": 100}, "min_size is 100, must be a multiple of 32"),
        ({"min_size": 32}, "min_size is 32, must be at least 64"),
        ({"max_size": 96}, "max_size is 96, must be at least 128"),
        ({"max_batch": 1}, "max_batch is 1, must be at least 2"),
        ({"top_k": 0}, "top_k is 0, must be at least 1"),
        ({"format": "onnx", "device": "tpu"}, "device is 'tpu'"),
        ({"format": "aoti", "output": Path("x.so")}, "output is x.so, must be a file whose name ends in .pt2"),
        ({"format": "onnx", "output": Path("x.pt2")}, "output is x.pt2, must be a file whose name ends in .onnx"),
    ],
)
def test_bad_settings(checkpoint: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.export(ExportConfig(checkpoint, **changes))


def test_missing_onnx(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install solq\[onnx\]"):
        export.export(ExportConfig(checkpoint, "onnx"))


def test_missing_compiler(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OSError, match=r"needs a C\+\+ compiler"):
        export.export(ExportConfig(checkpoint, "aoti"))


def test_description_is_json(checkpoint: Path) -> None:
    solq = load(checkpoint)
    limits = export.size_limits(solq, ExportConfig(checkpoint))
    description = export.describe(export.Detector(solq, TOP_K), limits, "onnx", torch.device("cpu"))
    assert json.loads(json.dumps(description)) == description
