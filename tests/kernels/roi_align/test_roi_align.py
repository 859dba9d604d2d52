"""Multi-level RoIAlign against torchvision's RoIAlign of each level, and its gradients against the definition's."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from solq.kernels import multiscale_roi_align, reference, use_backend

STRIDES = (4, 8, 16, 32)
IMAGE_SIZE = (352, 480)  # height, width


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def random_features(
    device: torch.device, dtype: torch.dtype = torch.float32, channels: int = 5, channels_last: bool = True
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.randn(2, channels, IMAGE_SIZE[0] // stride, IMAGE_SIZE[1] // stride, generator=generator)
        .to(device, dtype)
        .contiguous(memory_format=layout)
        .requires_grad_()
        for stride in STRIDES
    ]


def random_boxes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Make two boxes of each level and image, which may reach beyond the image, and the image of each."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.tensor([40.0, 150.0, 300.0, 700.0]).repeat(4)[:, None] * (
        0.75 + 0.3 * torch.rand(16, 2, generator=generator)
    )
    centers = torch.rand(16, 2, generator=generator) * torch.tensor([IMAGE_SIZE[1], IMAGE_SIZE[0]])
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)
    return boxes.to(device), torch.arange(16, device=device) % 2


def torchvision_per_level(
    features: list[Tensor], boxes: Tensor, box_image: Tensor, output_size: tuple[int, int], aligned: bool = True
) -> Tensor:
    """Sample each level with torchvision, choosing levels as mmdetection does."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = torch.floor(torch.log2(area.sqrt() / 56 + 1e-6)).clamp(0, len(features) - 1)
    regions = torch.cat([box_image[:, None].to(boxes), boxes], dim=1)
    output = features[0].new_zeros(len(boxes), features[0].shape[1], *output_size)
    for index, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        chosen = level == index
        output[chosen] = roi_align(feature, regions[chosen], output_size, 1 / stride, 2, aligned)
    return output


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("output_size", "aligned"), [((3, 5), True), ((2, 2), False)])
def test_equals_torchvision_per_level(
    backend: str, device: torch.device, channels_last: bool, output_size: tuple[int, int], aligned: bool
) -> None:
    features = random_features(device, channels_last=channels_last)
    boxes, box_image = random_boxes(device)
    output = multiscale_roi_align(features, boxes, box_image, output_size, aligned=aligned)
    expected = torchvision_per_level(features, boxes, box_image, output_size, aligned)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert output.is_contiguous(memory_format=torch.channels_last)

    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((output * weights).sum(), features)
    for grad, of_torchvision in zip(grads, torch.autograd.grad((expected * weights).sum(), features), strict=True):
        torch.testing.assert_close(grad, of_torchvision, rtol=1e-4, atol=1e-4)


def test_bins_of_queryinst(backend: str, device: torch.device) -> None:
    boxes, box_image = (tensor[:4] for tensor in random_boxes(device))
    features = random_features(device)
    for bins in (7, 14):
        output = multiscale_roi_align(features, boxes, box_image, bins)
        expected = torchvision_per_level(features, boxes, box_image, (bins, bins))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_definition_equals_torchvision_per_level(device: torch.device) -> None:
    features = [feature.double() for feature in random_features(device)]
    boxes, box_image = random_boxes(device)
    output = reference.multiscale_roi_align(features, boxes.double(), box_image, (4, 6))
    torch.testing.assert_close(output, torchvision_per_level(features, boxes.double(), box_image, (4, 6)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_definition_in_every_dtype(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    features = random_features(device, dtype, channels=20)
    boxes, box_image = (tensor[:8] for tensor in random_boxes(device))
    output = multiscale_roi_align(features, boxes, box_image, 3)
    exact_features = [feature.detach().double().requires_grad_() for feature in features]
    expected = reference.multiscale_roi_align(exact_features, boxes, box_image, 3)
    assert output.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)

    weights = torch.randn_like(output)
    grads = torch.autograd.grad(output, features, weights)
    exact_grads = torch.autograd.grad(expected, exact_features, weights.double())
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=tolerance)


def test_gradients_by_finite_differences(backend: str, device: torch.device) -> None:
    features = [
        torch.randn(1, 1, 4 // size, 6 // size, dtype=torch.float64, device=device, requires_grad=True)
        for size in (1, 2)
    ]
    boxes = torch.tensor([[3.0, 2, 20, 13], [-4, -4, 40, 30]], dtype=torch.float64, device=device)
    box_image = torch.zeros(2, dtype=torch.int64, device=device)

    def of_features(*features: Tensor) -> Tensor:
        return multiscale_roi_align(features, boxes, box_image, 2, finest_scale=10, strides=(4, 8))

    torch.autograd.gradcheck(of_features, features)


@pytest.mark.parametrize(
    ("side", "level"),
    [(1, 0), (111.9, 0), (112, 1), (223.9, 1), (224, 2), (447.9, 2), (448, 3), (5000, 3)],
)
def test_level_of_a_size(backend: str, device: torch.device, side: float, level: int) -> None:
    features = [torch.full((1, 1, 2000, 2000), float(index), device=device) for index in range(4)]
    boxes = torch.tensor([[0.0, 0.0, side, side]], device=device)
    output = multiscale_roi_align(features, boxes, torch.zeros(1, dtype=torch.int64, device=device), 1)
    assert output.flatten().tolist() == [level]


def test_boxes_that_torchvision_knows(backend: str, device: torch.device) -> None:
    boxes = torch.tensor(
        [
            [50.0, 60, 50, 60],  # no area
            [50, 60, 50, 90],
            [-900, 10, -800, 100],  # outside
            [470, 340, 600, 500],  # partly outside
            [90, 100, 40, 30],  # both sides inverted
            [-1e6, -1e6, 1e6, 1e6],
        ],
        device=device,
    )
    box_image = torch.tensor([0, 1, 0, 1, 0, 1], device=device)
    features = random_features(device)
    output = multiscale_roi_align(features, boxes, box_image, 3)
    torch.testing.assert_close(output, torchvision_per_level(features, boxes, box_image, (3, 3)), rtol=1e-4, atol=1e-4)
    assert (output[0] == output[0, :, :1, :1]).all()
    assert (output[2] == 0).all()


@pytest.mark.parametrize(
    "box",
    [
        [float("nan"), 10, 50, 60],
        [10, 10, 50, float("nan")],
        [float("-inf"), 10, 50, 60],
        [10, 10, float("inf"), float("inf")],
        [60, 10, 50, 60],  # one side inverted
    ],
)
def test_boxes_without_a_level_are_zero(backend: str, device: torch.device, box: list[float]) -> None:
    boxes = torch.tensor([box, [10.0, 10, 50, 60]], device=device)
    box_image = torch.zeros(2, dtype=torch.int32, device=device)
    features = random_features(device)
    output = multiscale_roi_align(features, boxes, box_image, 2)
    assert (output[0] == 0).all()
    assert (output[1] != 0).all()
    assert (reference.multiscale_roi_align(features, boxes, box_image, 2)[0] == 0).all()
    grads = torch.autograd.grad(output.sum(), features)
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads[0].sum().item(), 5 * 4.0)  # the second box alone: 5 channels of 4 bins


def test_no_boxes(backend: str, device: torch.device) -> None:
    features = random_features(device)
    boxes, box_image = torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    output = multiscale_roi_align(features, boxes, box_image, 7)
    assert output.shape == (0, 5, 7, 7)
    output.sum().backward()
    assert all((feature.grad == 0).all() for feature in features)


def test_boxes_get_no_gradient(backend: str, device: torch.device) -> None:
    boxes, box_image = random_boxes(device)
    features = random_features(device)
    output = multiscale_roi_align(features, boxes.requires_grad_(), box_image, 1)
    output.sum().backward()
    assert boxes.grad is None


def test_deterministic_gradients_do_not_depend_on_the_order_of_boxes(device: torch.device) -> None:
    boxes, box_image = random_boxes(device)
    features = random_features(device)
    weights = torch.randn(16, 5, 3, 3, device=device)
    order = torch.randperm(16)
    expected = torch.autograd.grad(reference.multiscale_roi_align(features, boxes, box_image, 3), features, weights)
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend("triton"):
            grads = torch.autograd.grad(multiscale_roi_align(features, boxes, box_image, 3), features, weights)
            output = multiscale_roi_align(features, boxes[order], box_image[order], 3)
            permuted = torch.autograd.grad(output, features, weights[order])
    finally:
        torch.use_deterministic_algorithms(False)
    for grad, again, exact in zip(grads, permuted, expected, strict=True):
        assert torch.equal(grad, again)
        torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_deterministic_gradients_show_what_is_not_finite(device: torch.device, value: float) -> None:
    boxes, box_image = random_boxes(device)
    features = random_features(device)
    weights = torch.ones(16, 5, 1, 1, device=device)
    weights[0, 0] = value
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend("triton"):
            grads = torch.autograd.grad(multiscale_roi_align(features, boxes, box_image, 1), features, weights)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not grads[0].isfinite().all()


def test_autocast_rounds_features_alone(backend: str, device: torch.device) -> None:
    boxes, box_image = random_boxes(device)
    boxes += 0.3  # which bfloat16 does not hold
    features = random_features(device)
    with torch.autocast(device.type, torch.bfloat16):
        output = multiscale_roi_align(features, boxes, box_image, 2)
    halves = [feature.bfloat16() for feature in features]
    assert torch.equal(output, multiscale_roi_align(halves, boxes, box_image, 2))
    output.float().sum().backward()
    assert features[0].grad.dtype == torch.float32


def test_operators_pass_opcheck(backend: str, device: torch.device) -> None:
    boxes, box_image = (tensor[:4] for tensor in random_boxes(device))
    options = [2, 2], 2, 56.0, [float(stride) for stride in STRIDES], True
    torch.library.opcheck(
        torch.ops.solq.multiscale_roi_align, (random_features(device, channels=3), boxes, box_image, *options)
    )
    sizes = [[IMAGE_SIZE[axis] // stride for stride in STRIDES] for axis in (0, 1)]
    grad_output = torch.randn(4, 3, 2, 2, device=device)
    torch.library.opcheck(
        torch.ops.solq.multiscale_roi_align_backward, (grad_output, boxes, box_image, 2, *sizes, *options[1:])
    )


def test_compiles_without_graph_breaks(backend: str, device: torch.device) -> None:
    boxes, box_image = (tensor[:4] for tensor in random_boxes(device))
    features = random_features(device)

    def doubled(features: list[Tensor], boxes: Tensor, box_image: Tensor) -> Tensor:
        return 2 * multiscale_roi_align(features, boxes, box_image, 2)

    output = torch.compile(doubled, fullgraph=True, backend="aot_eager")(features, boxes, box_image)
    expected = doubled(features, boxes, box_image)
    torch.testing.assert_close(output, expected)
    grads = torch.autograd.grad(output.sum(), features)
    for grad, exact in zip(grads, torch.autograd.grad(expected.sum(), features), strict=True):
        torch.testing.assert_close(grad, exact)


def test_exports_in_standard_operators(device: torch.device) -> None:
    class Module(torch.nn.Module):
        def forward(self, boxes: Tensor, box_image: Tensor, *features: Tensor) -> Tensor:
            return multiscale_roi_align(features, boxes, box_image, 2)

    arguments = *random_boxes(device), *random_features(device)
    with use_backend("reference"):
        program = torch.export.export(Module(), arguments)
    assert "solq" not in str(program.graph)
    expected = torchvision_per_level(list(arguments[2:]), *arguments[:2], (2, 2))
    torch.testing.assert_close(program.module()(*arguments), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "features is a list, must be a list of at least one tensor"),
        ({"boxes": torch.zeros(3, 5)}, r"boxes has shape \(3, 5\), must be \(R, 4\)"),
        ({"boxes": torch.zeros(3, 4, dtype=torch.int64)}, "boxes is torch.int64, must be float16"),
        ({"boxes": [[0.0, 0, 1, 1]] * 3}, "boxes is a list, must be a tensor"),
        ({"box_image": torch.zeros(2, dtype=torch.int64)}, r"box_image is torch.int64 of shape \(2,\), must be int64"),
        ({"box_image": torch.tensor([0, 2, 0])}, r"box_image has 2, must be in 0..1: there are 2 images"),
        ({"box_image": torch.tensor([0, -1, 0])}, r"box_image has -1, must be in 0..1: there are 2 images"),
        ({"strides": (4, 8)}, "strides has 2 entries, must have 4"),
        ({"sampling_ratio": 0}, "output_size is .* and sampling_ratio 0, both must be at least 1"),
        ({"output_size": (0, 7)}, r"output_size is \(0, 7\)"),
        ({"finest_scale": 0.0}, r"finest_scale is 0.0 and strides \(4, 8, 16, 32\), both must be positive"),
    ],
)
def test_bad_input_is_an_error_of_one_line(backend: str, change: dict[str, object], message: str) -> None:
    arguments = {
        "features": random_features(torch.device("cpu")),
        "boxes": torch.zeros(3, 4),
        "box_image": torch.zeros(3, dtype=torch.int64),
        "output_size": 7,
        **change,
    }
    with pytest.raises((TypeError, ValueError), match=message) as error:
        multiscale_roi_align(
            arguments.pop("features"), arguments.pop("boxes"), arguments.pop("box_image"),
            arguments.pop("output_size"), **arguments,
        )  # fmt: skip
    assert "\n" not in str(error.value)


def test_features_must_agree(backend: str) -> None:
    features = random_features(torch.device("cpu"))
    features[2] = features[2].half()
    with pytest.raises(ValueError, match=r"features\[2\] is torch.float16"):
        multiscale_roi_align(features, torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 7)


@pytest.mark.gpu
def test_images_that_do_not_exist_are_zero_on_a_gpu(device: torch.device) -> None:
    boxes, _ = random_boxes(device)
    output = multiscale_roi_align(random_features(device), boxes, torch.full((16,), 2, device=device), 2)
    assert (output == 0).all()


@pytest.mark.gpu
def test_host_does_not_wait(device: torch.device) -> None:
    boxes, box_image = random_boxes(device)
    features = random_features(device)
    multiscale_roi_align(features, boxes, box_image, 7).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        multiscale_roi_align(features, boxes, box_image, 7).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
