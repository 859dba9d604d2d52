"""`solq info`: print what a bug report needs: versions, device, backend, and a test of the kernels."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from solq import __version__, kernels
from solq.commands.settings import InfoConfig
from solq.devices import choose_device
from solq.errors import first_line
from solq.kernels import reference, use_backend
from solq.kernels.runtime import INTERPRETED, backend_for

PACKAGES = ("torch", "triton", "torchvision", "numpy", "pycocotools", "faster-coco-eval", "safetensors", "timm")


def info(config: InfoConfig) -> None:
    """Print the report; the status is 1 if a kernel fails its test."""
    console = Console()
    device = choose_device(config.device)
    console.print(facts_table(device))
    backend, why = backend_and_reason(device)
    console.print(f"backend: {backend}, because {why}")
    if backend == "reference":
        console.print("kernels: not tested, Triton needs a GPU (TRITON_INTERPRET=1 solq info runs them interpreted)")
        return
    rows = Table("kernel", "largest error", "allowed", "seconds", "", title="each kernel against its definition")
    all_passed = True
    for name, case in kernel_cases(device).items():
        clock = time.perf_counter()
        passed, error = run_case(name, case)
        all_passed &= passed
        seconds = f"{time.perf_counter() - clock:.1f}"
        rows.add_row(name, error, f"{case.tolerance:g}", seconds, "passed" if passed else "FAILED")
    console.print(rows)
    if not all_passed:
        console.print("a kernel differs from its definition: please report this with the text above")
        raise SystemExit(1)


def facts_table(device: torch.device) -> Table:
    """List versions and hardware."""
    facts = {"solq": __version__}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["python"] = f"{platform.python_version()} on {platform.platform()}"
    facts["CUDA or HIP of torch"] = torch.version.cuda or torch.version.hip or "none"
    facts["CPU"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    facts["device"] = str(device)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.0f} GiB"
        facts[f"GPU {index}"] = f"{gpu.name}, {size}, capability {gpu.major}.{gpu.minor}"
    rows = Table(show_header=False)
    for fact in facts.items():
        rows.add_row(*fact)
    return rows


def backend_and_reason(device: torch.device) -> tuple[str, str]:
    """Return the backend for tensors on this device, and the reason."""
    if device.type == "cuda":
        reason = "tensors on a GPU are served by Triton kernels"
    elif INTERPRETED:
        reason = "TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors, slowly"
    else:
        found = "the device asked for is the CPU" if torch.cuda.is_available() else "torch finds no GPU"
        reason = f"{found}; plain PyTorch computes the same"
    return backend_for(torch.empty(0, device=device)), reason


@dataclass
class Case:
    """A call of an operator, and the allowed difference between kernel and definition."""

    arguments: tuple
    tolerance: float
    gradients: bool = False


def kernel_cases(device: torch.device) -> dict[str, Case]:
    """Make small random calls of every operator that has a kernel."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    shapes = torch.tensor([[8, 6], [4, 3]], device=device)
    starts = torch.tensor([0, 48], device=device)
    value, points = rand(2, 60, 2, 48), rand(2, 5, 2, 2, 4, 2)
    weights = rand(2, 5, 2, 8).softmax(-1).unflatten(-1, (2, 4))
    fused = (value, shapes, starts, rand(2, 5, 2, 2), rand(2, 5, 2, 2, 4, 2), rand(2, 5, 2, 2, 4))
    boxes = torch.tensor([[2.5, 3.0, 20.0, 17.5], [-4.0, 6.0, 9.0, 40.0]], device=device)
    offsets = torch.tensor([0, 3, 5], device=device)
    masks = rand(2, 24, 32) > 0.5
    coefficients = reference.dct_encode(rand(2, 16, 16) > 0.5, 64)
    query_boxes = torch.cat([rand(2, 2, 6, 2), 0.1 + 0.4 * rand(2, 2, 6, 2)], dim=-1)
    labels = torch.tensor([0, 2, 1, 1, 0], device=device)
    pyramid = [rand(1, 16, 40 >> level, 40 >> level) for level in range(4)]
    box_image = torch.zeros(2, dtype=torch.int64, device=device)
    norms = (rand(16), rand(16), rand(32), rand(32))
    return {
        "ms_deform_attn": Case((value, shapes, starts, points, weights), 1e-4, gradients=True),
        "ms_deform_attn_fused": Case(fused, 1e-4, gradients=True),
        "dct_encode": Case((masks[:, :16, :16], 64), 1e-3),
        "dct_decode": Case((coefficients, 16), 1e-3),
        "crop_dct_encode": Case((masks, boxes, 16, 64), 1e-3),
        "dct_decode_paste": Case((coefficients, boxes, (24, 32), 16), 0.01),
        "matching_cost": Case((rand(2, 2, 6, 3), query_boxes, labels, query_boxes[0, 0, :5], offsets), 1e-3),
        "linear_assignment": Case((rand(2, 5, 6), offsets), 0.0),
        "multiscale_roi_align": Case((pyramid, boxes, box_image, 7), 1e-4),
        "dynamic_conv": Case((rand(2, 49, 32), rand(2, 2 * 32 * 16), *norms), 1e-3, gradients=True),
    }


def run_case(operator: str, case: Case) -> tuple[bool, str]:
    """Compare kernel and definition, gradients included.

    Returns:
        whether they agree, and their largest difference or the error of the kernel.
    """
    try:
        by_kernel, by_definition = (_outcome(module, operator, case) for module in (kernels, reference))
    except Exception as error:  # whatever stops a kernel belongs into the report
        return False, f"{type(error).__name__}: {first_line(error)}"
    errors = [
        # Masks differ by a share of their pixels: a value at the threshold may fall on either side.
        float((a != b).float().mean() if a.dtype == torch.bool else (a.double() - b.double()).abs().max())
        for a, b in zip(by_kernel, by_definition, strict=True)
    ]
    return max(errors) <= case.tolerance, f"{max(errors):.1e}"


def _outcome(module: object, operator: str, case: Case) -> list[Tensor]:
    """Return the result of a call, and the gradients of its arguments where there are any."""
    function: Callable[..., Tensor] = getattr(module, operator)
    arguments = [
        a.clone().requires_grad_(case.gradients and a.is_floating_point()) if isinstance(a, Tensor) else a
        for a in case.arguments
    ]
    with use_backend("triton" if module is kernels else "reference"):
        result = function(*arguments)
        if case.gradients:
            result.square().sum().backward()
    gradients = [a.grad for a in arguments if isinstance(a, Tensor) and a.grad is not None]
    return [result.detach(), *gradients]
