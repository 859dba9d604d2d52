"""The kernels in another project: copied under another name, beside this one, without Triton, and as a Hub kernel."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import solq.kernels

# Runs every public function of a copy, and lists the operators that it registered.
PRELUDE = """
import sys
import torch

OPERATORS = ["ms_deform_attn", "ms_deform_attn_backward", "dct_encode", "dct_decode", "dct_decode_binary",
             "crop_dct_encode", "paste_masks", "dct_decode_paste", "matching_cost", "linear_assignment",
             "multiscale_roi_align", "multiscale_roi_align_backward", "dynamic_conv", "dynamic_conv_backward"]

def has_operators(namespace):
    found = [hasattr(getattr(torch.ops, namespace), name) for name in OPERATORS]
    assert all(found) or not any(found), (namespace, found)
    return all(found)

def results_of(kernels):
    torch.manual_seed(0)
    results = {}

    def call(name, *arguments):
        results[name] = getattr(kernels, name)(*arguments)
        return results[name]

    masks = torch.rand(3, 32, 32) > 0.5
    boxes = torch.tensor([[2.0, 3.0, 20.0, 25.0], [0.0, 0.0, 40.0, 30.0], [5.0, 5.0, 9.0, 8.0]])
    vectors = call("dct_encode", masks, 64)
    call("binarize", call("dct_decode", vectors, 32))
    binary = call("dct_decode_binary", vectors, 32)
    pasted = call("paste_masks", binary, boxes, (30, 40))
    assert torch.equal(call("dct_decode_paste", vectors, boxes, (30, 40), 32), pasted)
    call("paste_runs", binary, boxes, (30, 40))
    call("mask_runs", pasted)
    call("crop_dct_encode", pasted, boxes, 32, 64)

    target_labels, target_offsets = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3])
    boxes = torch.rand(2, 2, 5, 4) / 2 + 0.25
    cost = call("matching_cost", torch.rand(2, 2, 5, 3), boxes, target_labels, boxes[0, 0, :3], target_offsets)
    call("linear_assignment", cost, target_offsets)

    shapes, starts = [(4, 3), (2, 2)], [0, 12]
    value, points, weights = torch.rand(2, 16, 2, 8), torch.rand(2, 5, 2, 2, 3, 2), torch.rand(2, 5, 2, 2, 3)
    references = torch.rand(2, 5, 2, 4)
    inputs = [tensor.requires_grad_() for tensor in (value, points, weights)]
    for output in (
        call("ms_deform_attn", value, shapes, starts, points, weights),
        call("ms_deform_attn_fused", value, shapes, starts, references, points, weights),
    ):
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        assert all(gradient.any() for gradient in gradients)
        results[f"gradients {len(results)}"] = gradients
    pyramid = [torch.rand(2, 8, side, side).requires_grad_() for side in (16, 8, 4, 2)]
    regions = call("multiscale_roi_align", pyramid, boxes[0, 0] * 50, torch.tensor([0, 1, 1, 0, 0]), 3)
    parameters = torch.rand(5, 2 * 8 * 4).requires_grad_()
    output = call("dynamic_conv", regions.flatten(2).mT, parameters, *map(torch.rand, (4, 4, 8, 8)))
    results["gradients of regions"] = torch.autograd.grad(output.square().sum(), [pyramid[0], parameters])
    layer = kernels.MSDeformAttn(16, 2, 2, 3)
    results["MSDeformAttn"] = layer(torch.rand(2, 5, 16), references, torch.rand(2, 16, 16), shapes, starts)
    assert not set(kernels.__all__) - {"use_backend"} - results.keys(), results.keys()
    return results
"""

HIDE_SOLQ = """
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "solq":
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden)
"""


def run(folder: Path, code: str, **environment: str) -> None:
    """Run code in a fresh process that finds the packages in `folder`."""
    inherited = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(folder), str(Path(solq.__file__).parents[1])]
    environment = inherited | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    command = [sys.executable, "-c", PRELUDE + code]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr


def copy_kernels(target: Path) -> None:
    shutil.copytree(Path(solq.kernels.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.parametrize("name", ["acme_kernels", "acme.vision.ops", "acme.kernels"])
def test_a_copy_works_under_any_name(name: str, tmp_path: Path) -> None:
    copy_kernels(tmp_path.joinpath(*name.split(".")))
    namespace = name.removesuffix(".kernels").replace(".", "_")
    code = f"""
import {name} as kernels
results_of(kernels)
assert has_operators({namespace!r}) and not has_operators("solq")
"""
    run(tmp_path, HIDE_SOLQ + code)


def test_a_copy_works_beside_the_original(tmp_path: Path) -> None:
    copy_kernels(tmp_path / "acme" / "kernels")
    code = """
import acme.kernels, solq.kernels
assert has_operators("acme") and has_operators("solq")
copied, original = results_of(acme.kernels), results_of(solq.kernels)
torch.testing.assert_close(copied, original, rtol=0, atol=0)
with acme.kernels.use_backend("definition"):  # of the copy only
    assert acme.kernels.runtime.backend_for(torch.zeros(1), has_definition=True) == "definition"
    assert solq.kernels.runtime.backend_for(torch.zeros(1), has_definition=True) == "reference"
"""
    run(tmp_path, code)


def test_a_copy_runs_triton(tmp_path: Path) -> None:
    copy_kernels(tmp_path / "acme_kernels")
    code = """
import acme_kernels as kernels
value, points, weights = torch.rand(1, 6, 2, 8), torch.rand(1, 3, 2, 1, 2, 2), torch.rand(1, 3, 2, 1, 2)
by_kernel = kernels.ms_deform_attn(value, [(2, 3)], [0], points, weights)
assert "triton" in sys.modules
with kernels.use_backend("reference"):
    torch.testing.assert_close(by_kernel, kernels.ms_deform_attn(value, [(2, 3)], [0], points, weights))
"""
    run(tmp_path, HIDE_SOLQ + code, TRITON_INTERPRET="1")


def test_import_is_light(tmp_path: Path) -> None:
    code = """
before = set(sys.modules)  # torch imports NumPy where it is installed
import solq, solq.kernels
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not {"triton", "scipy", "torchvision", "numpy"} & loaded, loaded
"""
    run(tmp_path, code)


HIDE_TRITON = """
sys.modules["triton"] = None  # its import fails
import solq, solq.kernels as kernels
"""


def test_without_triton(tmp_path: Path) -> None:
    code = """
for name in solq.__all__:
    getattr(solq, name)
results_of(kernels)
try:
    with kernels.use_backend("triton"):
        raise AssertionError("no error")
except RuntimeError as error:
    assert str(error).startswith("backend is 'triton' but the package triton is not installed"), error
"""
    run(tmp_path, HIDE_TRITON + code)


def test_interpreter_without_triton(tmp_path: Path) -> None:
    code = """
try:
    kernels.binarize(kernels.dct_decode(torch.zeros(1, 16), 16))
except RuntimeError as error:
    assert "served by Triton but the package triton is not installed" in str(error), error
else:
    raise AssertionError("no error")
"""
    run(tmp_path, HIDE_TRITON + code, TRITON_INTERPRET="1")


@pytest.mark.skipif("kernels" not in packages_distributions(), reason="kernels is not installed: pip install kernels")
def test_the_package_kernels_loads_the_folder(tmp_path: Path) -> None:
    """In the layout of a kernel repository of the Hugging Face Hub, under the name that its metadata gives."""
    variant = tmp_path / "build" / "torch-universal"
    copy_kernels(variant)
    metadata = {"id": "_acme_kernels_1", "name": "acme-kernels", "version": 1, "license": "Apache-2.0"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    code = f"""
from pathlib import Path
from kernels import get_local_kernel
results_of(get_local_kernel(Path({str(tmp_path)!r})))
assert has_operators("_acme_kernels_1") and not has_operators("solq")
"""
    run(tmp_path, HIDE_SOLQ + code, HF_HUB_OFFLINE="1")
