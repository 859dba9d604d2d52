"""The dynamic convolution against two batched products with LayerNorm and ReLU of torch, and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from solq.kernels import dynamic_conv, reference, use_backend

NAMES = ("features", "parameters", "norm_in_weight", "norm_in_bias", "norm_out_weight", "norm_out_bias")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def random_arguments(
    device: torch.device,
    regions: int = 3,
    positions: int = 9,
    channels: int = 32,
    hidden: int = 16,
    dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(regions, positions, channels, generator=generator)
    parameters = torch.randn(regions, 2 * channels * hidden, generator=generator) / channels**0.5
    sizes = (hidden, hidden, channels, channels)
    norms = [torch.randn(size, generator=generator) + (index + 1) % 2 for index, size in enumerate(sizes)]
    if dtype == torch.float64:
        norm_dtype = dtype
    tensors = [
        features.to(device, dtype),
        parameters.to(device, dtype),
        *(norm.to(device, norm_dtype) for norm in norms),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def exact(arguments: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in arguments]


def region_by_region(
    features: Tensor, parameters: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor
) -> Tensor:
    """Compute one region after another as the paper's text has it."""
    C, D = len(weight_out), len(weight_in)
    outputs = []
    for region, numbers in zip(features, parameters, strict=True):
        first, second = numbers[: C * D].reshape(C, D), numbers[C * D :].reshape(D, C)
        middle = F.relu(F.layer_norm(region @ first, (D,), weight_in, bias_in))
        outputs.append(F.relu(F.layer_norm(middle @ second, (C,), weight_out, bias_out)))
    return torch.stack(outputs)


def test_definition_computes_each_region_by_itself(device: torch.device) -> None:
    arguments = random_arguments(device, dtype=torch.float64)
    torch.testing.assert_close(reference.dynamic_conv(*arguments), region_by_region(*arguments))


@pytest.mark.parametrize(
    ("regions", "positions", "channels", "hidden"),
    [
        (2, 49, 256, 64),  # QueryInst's boxes
        (1, 196, 256, 64),  # its masks
        (3, 1, 32, 16),
        (2, 20, 40, 24),  # no powers of two
        (2, 70, 17, 5),
        (1, 16, 8, 130),
    ],
)
def test_equals_definition(
    backend: str, device: torch.device, regions: int, positions: int, channels: int, hidden: int
) -> None:
    arguments = random_arguments(device, regions, positions, channels, hidden)
    check(arguments, tolerance=2e-4)


@pytest.mark.parametrize("norm_dtype", [torch.float32, None], ids=["float32 norms", "norms alike"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_equals_definition_in_every_dtype(
    backend: str, device: torch.device, dtype: torch.dtype, norm_dtype: torch.dtype | None
) -> None:
    arguments = random_arguments(device, dtype=dtype, norm_dtype=norm_dtype or dtype)
    check(arguments, tolerance={torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype])


def check(arguments: list[Tensor], tolerance: float) -> None:
    """Compare the output and all gradients with the definition's in float64.

    The error of a tensor is that of its root mean square: where a number close to zero is rounded to the other side of
    ReLU's corner, its gradient differs by more than its own rounding.
    """
    output = dynamic_conv(*arguments)
    exact_arguments = exact(arguments)
    expected = reference.dynamic_conv(*exact_arguments)
    assert output.dtype == arguments[0].dtype
    assert output.shape == arguments[0].shape
    assert error(output, expected) < tolerance
    weights = torch.randn_like(output)
    grads = torch.autograd.grad(output, arguments, weights)
    exact_grads = torch.autograd.grad(expected, exact_arguments, weights.double())
    for name, argument, grad, exact_grad in zip(NAMES, arguments, grads, exact_grads, strict=True):
        assert grad.dtype == argument.dtype
        assert error(grad, exact_grad) < tolerance * 4, name


def error(tensor: Tensor, expected: Tensor) -> float:
    """Return the root mean square difference, relative to that of what is expected."""
    return ((tensor.double() - expected).norm() / expected.norm()).item()


def test_gradients_by_finite_differences(backend: str, device: torch.device) -> None:
    arguments = random_arguments(device, regions=1, positions=2, channels=3, hidden=2, dtype=torch.float64)
    if backend == "triton":  # the interpreter is slow: some directions instead of all
        torch.autograd.gradcheck(dynamic_conv, arguments, fast_mode=True)
    else:
        torch.autograd.gradcheck(dynamic_conv, arguments)


def test_eps_is_added_to_the_variance(backend: str, device: torch.device) -> None:
    arguments = random_arguments(device)
    with torch.no_grad():
        expected = reference.dynamic_conv(*arguments, eps=0.5)
        torch.testing.assert_close(dynamic_conv(*arguments, eps=0.5), expected, rtol=1e-4, atol=1e-4)


def test_constant_rows_have_the_bias(backend: str, device: torch.device) -> None:
    """A variance of zero must not divide by zero."""
    arguments = random_arguments(device)
    arguments[0] = torch.zeros_like(arguments[0]).requires_grad_()
    arguments[3] = torch.zeros_like(arguments[3]).requires_grad_()
    output = dynamic_conv(*arguments)
    torch.testing.assert_close(output, arguments[5].relu().expand_as(output))
    grads = torch.autograd.grad(output.sum(), arguments)
    assert all(grad.isfinite().all() for grad in grads)


def test_not_finite_stays_in_its_region(backend: str, device: torch.device) -> None:
    arguments = random_arguments(device)
    with torch.no_grad():
        arguments[0][1, 2, 3] = float("nan")
        output = dynamic_conv(*arguments)
    assert output[1, 2].isnan().all()
    assert output[[0, 2]].isfinite().all()
    assert output[1, 3:].isfinite().all()


def test_norm_gradients_are_the_same_in_every_run(backend: str, device: torch.device) -> None:
    arguments = random_arguments(device, regions=5, positions=70)
    weights = torch.randn_like(arguments[0])
    first, second = (torch.autograd.grad(dynamic_conv(*arguments), arguments, weights) for _ in range(2))
    assert all(torch.equal(grad, again) for grad, again in zip(first, second, strict=True))


def test_no_regions(backend: str, device: torch.device) -> None:
    arguments = random_arguments(device, regions=0)
    output = dynamic_conv(*arguments)
    assert output.shape == (0, 9, 32)
    grads = torch.autograd.grad(output.sum(), arguments)
    assert [grad.shape for grad in grads] == [argument.shape for argument in arguments]
    assert all((grad == 0).all() for grad in grads)


def test_arguments_need_not_be_contiguous(backend: str, device: torch.device) -> None:
    arguments = random_arguments(device)
    strided = [argument.detach().mT.contiguous().mT if argument.ndim > 1 else argument for argument in arguments]
    strided[2] = torch.stack([arguments[2].detach()] * 2, dim=1)[:, 0]
    assert not strided[0].is_contiguous()
    assert not strided[2].is_contiguous()
    torch.testing.assert_close(dynamic_conv(*strided), dynamic_conv(*arguments), rtol=0, atol=0)


def test_autocast_rounds_operands_alone(backend: str, device: torch.device) -> None:
    arguments = random_arguments(device)
    with torch.autocast(device.type, torch.bfloat16):
        output = dynamic_conv(*arguments)
    halves = [argument.bfloat16() for argument in arguments[:2]]
    assert torch.equal(output, dynamic_conv(*halves, *arguments[2:]))
    output.float().sum().backward()
    assert all(argument.grad.dtype == torch.float32 for argument in arguments)


def test_operators_pass_opcheck(backend: str, device: torch.device) -> None:
    features, parameters, *norms = random_arguments(device)
    torch.library.opcheck(torch.ops.solq.dynamic_conv, (features, parameters, norms, 1e-5))
    tensors = [tensor.detach() for tensor in (features, parameters)]
    norms = [norm.detach() for norm in norms]
    grad_output = torch.randn_like(features)
    torch.library.opcheck(torch.ops.solq.dynamic_conv_backward, (grad_output, *tensors, norms, 1e-5))


def test_compiles_without_graph_breaks(backend: str, device: torch.device) -> None:
    arguments = random_arguments(device)

    def doubled(*arguments: Tensor) -> Tensor:
        return 2 * dynamic_conv(*arguments)

    output, expected = torch.compile(doubled, fullgraph=True, backend="aot_eager")(*arguments), doubled(*arguments)
    torch.testing.assert_close(output, expected)
    grads = torch.autograd.grad(output.sum(), arguments)
    for grad, eager in zip(grads, torch.autograd.grad(expected.sum(), arguments), strict=True):
        torch.testing.assert_close(grad, eager)


def test_exports_in_standard_operators(device: torch.device) -> None:
    class Module(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return dynamic_conv(*arguments)

    arguments = tuple(argument.detach() for argument in random_arguments(device))
    with use_backend("reference"):
        program = torch.export.export(Module(), arguments)
    assert "solq" not in str(program.graph)
    torch.testing.assert_close(program.module()(*arguments), region_by_region(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", torch.zeros(3, 32), r"features has shape \(3, 32\), must be \(R, A, C\)"),
        ("features", torch.zeros(3, 9, 32, dtype=torch.int64), "features is torch.int64, must be float16"),
        ("features", [1.0], "features is a list, must be a tensor"),
        ("parameters", torch.zeros(3, 100), r"parameters has shape \(3, 100\), must be \(3, 1024\)"),
        ("parameters", torch.zeros(2, 1024), r"parameters has shape \(2, 1024\), must be \(3, 1024\)"),
        ("norm_in_weight", torch.zeros(0), r"norm_in_weight has shape \(0,\), must be \(D,\)"),
        ("norm_in_bias", torch.zeros(15), r"norm_in_bias has shape \(15,\), must be \(16,\)"),
        ("norm_out_weight", torch.zeros(16), r"norm_out_weight has shape \(16,\), must be \(32,\)"),
        ("norm_out_bias", torch.zeros(32, device="meta"), "norm_out_bias is on meta but features on cpu"),
        ("eps", 0.0, "eps is 0.0, must be positive"),
    ],
)
def test_bad_input_is_an_error_of_one_line(backend: str, name: str, value: object, message: str) -> None:
    arguments = dict(zip(NAMES, random_arguments(torch.device("cpu")), strict=True)) | {name: value}
    with pytest.raises((TypeError, ValueError), match=message) as error:
        dynamic_conv(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_host_does_not_wait(device: torch.device) -> None:
    arguments = random_arguments(device)
    dynamic_conv(*arguments).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        dynamic_conv(*arguments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
