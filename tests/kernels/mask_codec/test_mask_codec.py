"""The mask codec against SciPy, torchvision, float64 definitions, and its own properties."""

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import roi_align

from solq.kernels import (
    crop_dct_encode,
    dct_decode,
    dct_decode_binary,
    dct_decode_paste,
    dct_encode,
    mask_runs,
    paste_masks,
    paste_runs,
    reference,
    use_backend,
)
from solq.kernels.mask_codec import operators

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def blobs(K: int, H: int, W: int, seed: int = 0) -> Tensor:
    """Smooth masks (K, H, W) bool."""
    noise = torch.rand(K, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (H, W), mode="bicubic")[:, 0] > 0.5


def random_boxes(K: int, H: int, W: int, seed: int = 0, smallest: float = 0.02) -> Tensor:
    """Boxes (K, 4) of all sizes, some leaving the image."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([W, H])
    corner = (torch.rand(K, 2, generator=generator) * 1.5 - 0.4) * extent
    size = smallest + torch.rand(K, 2, generator=generator) ** 2 * 1.5
    return torch.cat([corner, corner + size * extent], 1)


def jpeg_zigzag(N: int) -> list[tuple[int, int]]:
    """Walk as in the JPEG standard's figure: along a diagonal, one step on the border, back along the next."""
    row, column, upwards, path = 0, 0, True, []
    while len(path) < N * N:
        path.append((row, column))
        if upwards:
            if column == N - 1:
                row, upwards = row + 1, False
            elif row == 0:
                column, upwards = column + 1, False
            else:
                row, column = row - 1, column + 1
        elif row == N - 1:
            column, upwards = column + 1, True
        elif column == 0:
            row, upwards = row + 1, True
        else:
            row, column = row + 1, column - 1
    return path


def scipy_encode(masks: Tensor, n: int) -> np.ndarray:
    spectra = scipy.fft.dctn(masks.double().cpu().numpy(), axes=(1, 2), norm="ortho")
    rows, columns = zip(*jpeg_zigzag(masks.shape[-1])[:n], strict=True)
    return spectra[:, rows, columns]


def grid_sample_paste(masks: Tensor, boxes: Tensor, H: int, W: int) -> Tensor:
    """The usual paste (K, H, W), before the threshold, in float64."""
    x0, y0, x1, y1 = boxes.double()[:, :, None].unbind(1)
    y = (torch.arange(H) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(W) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)], dim=-1)
    return F.grid_sample(masks[:, None].double(), grid, align_corners=False)[:, 0]


@pytest.mark.parametrize("N", [2, 16, 48, 128])
def test_zigzag_is_that_of_jpeg(N: int) -> None:
    assert reference.zigzag(N, N * N).T.tolist() == [list(position) for position in jpeg_zigzag(N)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("N", "n"), [(16, 1), (16, 256), (48, 100), (64, 4096), (128, 256), (256, 400)])
def test_encode_is_scipys_dct(N: int, n: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    if N != 128 and dtype in (torch.float64, torch.bfloat16):
        pytest.skip("conversions do not depend on N")
    masks = blobs(3, N, N).to(device, dtype)
    if dtype == torch.uint8:
        masks *= 255  # every byte counts as a number
    masks[2] = 0
    masks[2, 0, 0] = 1  # one pixel: all coefficients are small
    expected = scipy_encode(masks, n)
    vectors = dct_encode(masks, n)
    assert vectors.dtype == torch.float32
    largest = np.abs(expected).max(axis=1, keepdims=True)
    as_bytes = backend == "reference" and dtype == torch.bool
    assert np.abs((vectors.cpu().numpy() - expected) / largest).max() < (4e-5 if as_bytes else 2e-6)


@pytest.mark.parametrize("N", [16, 80, 128, 256])
def test_rounding_of_cosines_in_the_worst_masks(N: int) -> None:
    cosines = reference.dct_matrix(N)[[0, 1, 2, 7]]
    columns = [row > 0 for row in cosines]
    masks = torch.stack([down[:, None] & across for down in columns for across in columns])
    expected = torch.from_numpy(scipy_encode(masks, 200))
    with use_backend("reference"):
        vectors = dct_encode(masks, 200)
        assert torch.equal(dct_encode(masks.to(torch.uint8), 200), vectors)
    assert ((vectors - expected).abs() / expected[:, :1]).max() < 4e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("N", "n"), [(16, 256), (48, 100), (128, 256), (256, 300)])
def test_decode_is_scipys_inverse(N: int, n: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    coefficients = torch.randn(3, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rows, columns = zip(*jpeg_zigzag(N)[:n], strict=True)
    spectra = np.zeros((3, N, N))
    spectra[:, rows, columns] = coefficients.double().cpu()
    expected = torch.from_numpy(scipy.fft.idctn(spectra, axes=(1, 2), norm="ortho"))
    decoded = dct_decode(coefficients, N)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded.cpu().double(), expected, rtol=0, atol=2e-6)

    middle = (expected.amin((1, 2), keepdim=True) + expected.amax((1, 2), keepdim=True)) / 2
    clear = (expected - middle).abs() > 1e-5
    binary = dct_decode_binary(coefficients, N).cpu()
    assert binary.dtype == torch.bool
    assert torch.equal(binary[clear], (expected > middle)[clear])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), N=st.sampled_from([16, 32, 48]), data=st.data())
def test_properties(seed: int, N: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, N * N))
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 1, N, N, generator=generator)
    vector = dct_encode(a, n)
    torch.testing.assert_close(dct_encode(2 * a - 3 * b, n), 2 * vector - 3 * dct_encode(b, n), rtol=0, atol=1e-4)
    # A band-limited mask survives the round trip; the energy of all coefficients is the mask's.
    torch.testing.assert_close(dct_encode(dct_decode(vector, N), n), vector, rtol=0, atol=1e-5)
    torch.testing.assert_close(dct_encode(a, N * N).square().sum(), a.square().sum())
    # Decode is the transpose of encode.
    other = torch.randn(1, n, generator=generator)
    torch.testing.assert_close((vector * other).sum(), (a * dct_decode(other, N)).sum(), rtol=1e-4, atol=1e-3)


def test_gradients(backend: str, device: torch.device) -> None:
    masks = torch.randn(2, 16, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    vectors = torch.randn(2, 40, device=device, requires_grad=True)
    dct_encode(masks, 40).backward(vectors.detach())
    assert masks.grad.dtype == torch.bfloat16
    torch.testing.assert_close(masks.grad, dct_decode(vectors, 16).detach().bfloat16(), rtol=0, atol=1e-2)
    target = blobs(2, 16, 16).to(device)
    ((dct_decode(vectors, 16) - target.float()) ** 2).sum().backward()
    expected = 2 * (vectors - dct_encode(target, 40)).detach()  # Parseval
    torch.testing.assert_close(vectors.grad, expected, rtol=1e-4, atol=1e-4)
    # twice, as a gradient penalty does
    (grad,) = torch.autograd.grad(dct_decode(vectors, 16).square().sum(), vectors, create_graph=True)
    grad.sum().backward()


def test_gradients_of_no_masks(backend: str, device: torch.device) -> None:
    masks = torch.zeros(0, 16, 16, device=device, requires_grad=True)
    vectors = torch.zeros(0, 40, device=device, requires_grad=True)
    (dct_encode(masks, 40).sum() + dct_decode(vectors, 16).sum()).backward()
    assert masks.grad.shape == (0, 16, 16)
    assert vectors.grad.shape == (0, 40)


def test_layouts_and_counts(backend: str, device: torch.device) -> None:
    masks = blobs(4, 32, 64).to(device)
    assert dct_encode(masks[:0, :, :32], 50).shape == (0, 50)
    expected = dct_encode(masks[::2, :, 10:42].contiguous(), 50)
    torch.testing.assert_close(dct_encode(masks[::2, :, 10:42], 50), expected)
    torch.testing.assert_close(dct_encode(masks[::2, :, 10:42].mT.contiguous().mT, 50), expected)
    unaligned = F.pad(masks[:, :, :32].byte().flatten(), (1, 0))[1:].view(4, 32, 32)
    torch.testing.assert_close(dct_encode(unaligned, 50), dct_encode(masks[:, :, :32], 50))
    vectors = torch.randn(50, 3, device=device).T
    torch.testing.assert_close(dct_decode(vectors, 16), dct_decode(vectors.contiguous(), 16))
    boxes = torch.zeros(0, 4, device=device)
    assert dct_decode(vectors[:0], 16).shape == (0, 16, 16)
    assert dct_decode_binary(vectors[:0], 16).shape == (0, 16, 16)
    assert crop_dct_encode(masks[:0], boxes, 16, 50).shape == (0, 50)
    assert dct_decode_paste(vectors[:0], boxes, (7, 9), 16).shape == (0, 7, 9)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    masks = torch.zeros(40_000, 256, 256, dtype=torch.uint8, device=device)
    masks[-1] = blobs(1, 256, 256).to(device)
    torch.testing.assert_close(dct_encode(masks)[-1:], dct_encode(masks[-1:]))
    masks = dct_decode(dct_encode(masks), 256)
    torch.testing.assert_close(masks[-1:], dct_decode(dct_encode(masks[-1:]), 256))


@pytest.mark.parametrize("N", [16, 48, 128])
def test_crop_is_roi_align(N: int, backend: str, device: torch.device) -> None:
    H, W = 90, 120
    K = 60 if backend == "reference" or device.type == "cuda" else 7
    boxes = random_boxes(K, H, W, seed=N)
    boxes[0] = torch.tensor([0, 0, W, H])
    boxes[1] = boxes[1].round()
    boxes[2] = torch.tensor([-W, -H, 2 * W, 2 * H])
    boxes[3] = torch.tensor([30, 40, 20, 25])  # inverted
    boxes[4] = torch.tensor([30, 40, 30, 40])  # empty
    boxes[5] = torch.tensor([10, 10, 10.01, 10.01])  # tiny
    masks = blobs(K, H, W, seed=N)
    crops = torch.cat([
        roi_align(mask[None, None].float(), [box[None]], N, aligned=True)[0]
        for mask, box in zip(masks, boxes, strict=True)
    ])  # fmt: skip
    vectors = crop_dct_encode(masks.to(device), boxes.to(device), N, N * N).cpu()
    decoded = dct_decode(vectors, N)
    unclear = (crops - 0.5).abs() <= 1e-6
    assert unclear.float().mean() < 0.05
    torch.testing.assert_close(decoded[~unclear], (crops >= 0.5)[~unclear].float(), rtol=0, atol=1e-3)
    # Byte and float masks, and those that are a part of larger ones.
    some = slice(5, 7)
    for same in (masks.byte(), masks.half(), F.pad(masks, (3, 2, 1, 4))[:, 1:-4, 3:-2]):
        torch.testing.assert_close(
            crop_dct_encode(same[some].to(device), boxes[some].to(device), N, 64).cpu(), vectors[some, :64],
            rtol=0, atol=1e-4,
        )  # fmt: skip


def test_crop_of_boxes_that_are_not_finite_is_empty(backend: str, device: torch.device) -> None:
    boxes = torch.tensor([0.0, 0.0, 8.0, 8.0]).repeat(12, 1)
    for index, value in enumerate(NOT_FINITE * 4):
        boxes[index, index % 4] = value
    masks = torch.ones(len(boxes), 8, 8, dtype=torch.bool, device=device)
    assert not crop_dct_encode(masks, boxes.to(device), 16, 64).any()
    huge = torch.tensor([[-1e9, -1e9, 1e9, 1e9], [1e30, 0, 3e38, 5], [-3e38, -3e38, 3e38, 3e38]], device=device)
    assert crop_dct_encode(masks[:3, :4, :4], huge, 16, 64).isfinite().all()


@pytest.mark.parametrize("N", [16, 28, 128])
def test_paste_is_grid_sample(N: int, backend: str, device: torch.device) -> None:
    H, W = 90, 121
    K = 60 if backend == "reference" or device.type == "cuda" else 16
    boxes = random_boxes(K, H, W, seed=N)
    boxes[0] = torch.tensor([0, 0, W, H])
    boxes[1] = torch.tensor([-W, -H, 2 * W, 2 * H])
    boxes[2] = torch.tensor([10, 10, 10.9, 10.9])
    boxes[3] = torch.tensor([-1e6, 5, 1e6, 50])
    masks = blobs(K, N, N, seed=N)
    expected = grid_sample_paste(masks, boxes, H, W)
    pasted = paste_masks(masks.to(device), boxes.to(device), (H, W)).cpu()
    assert pasted.dtype == torch.bool
    assert pasted.shape == (K, H, W)
    clear = (expected - 0.5).abs() > 1e-4
    assert torch.equal(pasted[clear], (expected >= 0.5)[clear])
    for dtype in (torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(paste_masks(masks.to(device, dtype), boxes.to(device), (H, W)).cpu(), pasted)


def test_paste_of_probabilities(backend: str, device: torch.device) -> None:
    probabilities, boxes = torch.rand(3, 28, 28), random_boxes(3, 40, 50)
    expected = grid_sample_paste(probabilities, boxes, 40, 50)
    clear = (expected - 0.5).abs() > 1e-4
    pasted = paste_masks(probabilities.to(device), boxes.to(device), (40, 50)).cpu()
    assert torch.equal(pasted[clear], (expected >= 0.5)[clear])
    positions, counts = paste_runs(probabilities.to(device), boxes.to(device), (40, 50))
    of_images = mask_runs(pasted)
    assert torch.equal(positions.cpu(), of_images[0])
    assert torch.equal(counts.cpu(), of_images[1])


def test_decode_paste_is_decode_then_paste(backend: str, device: torch.device) -> None:
    vectors = dct_encode(blobs(6, 128, 128)).to(device)
    boxes = random_boxes(6, 40, 70).to(device)
    pasted = dct_decode_paste(vectors, boxes, (40, 70))
    assert pasted.any()
    assert torch.equal(pasted, paste_masks(dct_decode_binary(vectors), boxes, (40, 70)))


def test_paste_of_bad_boxes_and_vectors_is_empty(backend: str, device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0, 8, 8]]).repeat(15, 1)
    for index, value in enumerate(NOT_FINITE * 4):
        boxes[index, index % 4] = value
    boxes[12] = torch.tensor([6, 6, 2, 2])
    boxes[13] = torch.tensor([3, 3, 3, 3])
    boxes[14] = torch.tensor([1e30, 1e30, 2e30, 2e30])
    full = torch.ones(len(boxes), 16, 16, dtype=torch.bool, device=device)
    assert not paste_masks(full, boxes.to(device), (20, 20)).any()
    vectors = torch.randn(len(NOT_FINITE) + 1, 64, device=device)
    for index, value in enumerate(NOT_FINITE):
        vectors[index, index] = value
    vectors[-1] = 0
    assert not dct_decode_binary(vectors, 16).any()
    dct_encode(torch.full((1, 16, 16), float("nan"), device=device))


@pytest.mark.parametrize(("H", "W"), [(20, 33), (1, 40), (40, 1)])
def test_runs_are_those_of_pycocotools(H: int, W: int, backend: str, device: torch.device) -> None:
    boxes = random_boxes(24, H, W)
    boxes[:12] = torch.tensor([
        [0, 0, W, H], [-9, -9, W + 9, H + 9], [3, -9, 9, H + 9], [-9, 3, W + 9, 9], [W - 5, H - 5, W + 5, H + 5],
        [-5, -5, 5, 5], [W + 3, 0, W + 9, H], [9, 9, 3, 3], [5, 5, 5, 5], [torch.nan] * 4, [-1e9, -1e9, 1e9, 1e9],
        [0, 0, torch.inf, 9],
    ])  # fmt: skip
    masks = blobs(24, 16, 16)
    masks[:12] = True
    masks[12] = False
    masks, boxes = masks.to(device), boxes.to(device)
    pasted = paste_masks(masks, boxes, (H, W)).cpu().numpy()
    positions, counts = paste_runs(masks, boxes, (H, W))
    assert positions.dtype == counts.dtype == torch.int64
    expected = coco_mask.encode(np.asfortranarray(pasted.transpose(1, 2, 0).astype(np.uint8)))
    for of_mask, rle in zip(positions.cpu().split(counts.tolist()), expected, strict=True):
        lengths = np.diff(of_mask.numpy(), prepend=0, append=H * W)
        assert coco_mask.frPyObjects({"size": [H, W], "counts": lengths}, H, W) == rle
    of_images = mask_runs(paste_masks(masks, boxes, (H, W)))
    assert torch.equal(of_images[0], positions)
    assert torch.equal(of_images[1], counts)
    none = paste_runs(masks[:0], boxes[:0], (H, W))
    assert [part.tolist() for part in none] == [[], []]


OPERATORS = {
    "encode": (operators.dct_encode, lambda: (torch.randn(2, 16, 16, requires_grad=True), 9)),
    "encode bytes": (operators.dct_encode, lambda: (blobs(2, 16, 16), 9)),
    "decode": (operators.dct_decode, lambda: (torch.randn(2, 9, requires_grad=True), 16)),
    "decode binary": (operators.dct_decode_binary, lambda: (torch.randn(2, 9), 16)),
    "crop encode": (operators.crop_dct_encode, lambda: (blobs(2, 8, 9), random_boxes(2, 8, 9), 16, 9)),
    "paste": (operators.paste_masks, lambda: (blobs(2, 16, 16), random_boxes(2, 8, 9), (8, 9))),
    "decode paste": (operators.dct_decode_paste, lambda: (torch.randn(2, 9), random_boxes(2, 8, 9), (8, 9), 16)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_registered_well(name: str, backend: str, device: torch.device) -> None:
    operator, arguments = OPERATORS[name]
    torch.library.opcheck(operator, [a.to(device) if isinstance(a, Tensor) else a for a in arguments()])


class Codec(torch.nn.Module):
    def forward(self, masks: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        vectors = crop_dct_encode(masks, boxes, 32, 64)
        binary = dct_decode_binary(vectors, 32)
        pasted = dct_decode_paste(dct_encode(binary, 64), boxes, (20, 30), 32)
        return vectors, dct_decode(vectors, 32), binary, pasted, paste_masks(binary, boxes, (20, 30))


def test_compile_and_export(backend: str, device: torch.device) -> None:
    def inputs(K: int) -> tuple[Tensor, Tensor]:
        return blobs(K, 40, 50).to(device), random_boxes(K, 40, 50).to(device)

    compiled = torch.compile(Codec(), fullgraph=True, dynamic=True, backend="aot_eager")
    K = torch.export.Dim("K")
    exported = torch.export.export(Codec(), inputs(3), dynamic_shapes=({0: K}, {0: K})).module()
    for program in (compiled, exported):
        for expected, got in zip(Codec()(*inputs(5)), program(*inputs(5)), strict=True):
            torch.testing.assert_close(got, expected)


def test_export_of_decode_is_plain_pytorch() -> None:
    class Decode(torch.nn.Module):
        def forward(self, vectors: Tensor) -> Tensor:
            return dct_decode(vectors)

    with use_backend("reference"):
        program = torch.export.export(Decode(), (torch.randn(3, 256),), dynamic_shapes=({0: torch.export.Dim("K")},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("matmul" in target for target in targets)
    assert not any("solq" in target or "higher_order" in target for target in targets)


def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    masks = blobs(2, 32, 32).to(device)
    expected = dct_encode(masks, 64)
    with torch.autocast(device.type, torch.bfloat16):
        vectors = dct_encode(masks, 64)
        decoded = dct_decode(vectors, 32)
    assert torch.equal(vectors, expected)
    torch.testing.assert_close(decoded, dct_decode(expected, 32))


square, boxes_of_two = torch.zeros(2, 16, 16), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dct_encode(square, 257), "num_coefficients is 257, must be a whole number in 1..256"),
        (lambda: dct_encode(square, 0), "num_coefficients is 0"),
        (lambda: dct_encode(torch.zeros(2, 16, 32)), r"masks has shape \(2, 16, 32\), must be square"),
        (lambda: dct_encode(torch.zeros(16, 16)), r"masks has shape \(16, 16\), must be \(K, N, N\)"),
        (lambda: dct_encode(torch.zeros(2, 20, 20)), "the side of masks is 20, must be a multiple of 16"),
        (lambda: dct_encode(torch.zeros(2, 272, 272)), "from 16 to 256"),
        (lambda: dct_encode(square.long()), "masks is torch.int64, must be bool, uint8 or floating-point"),
        (lambda: dct_decode(torch.zeros(2, 300), 16), "the length of coefficients is 300, must be a whole"),
        (lambda: dct_decode(torch.zeros(2, 9), 100), "size is 100, must be a multiple of 16"),
        (lambda: dct_decode(torch.zeros(9), 16), r"coefficients has shape \(9,\), must be \(K, n\)"),
        (lambda: dct_decode(torch.zeros(2, 9).int(), 16), "coefficients is torch.int32"),
        (lambda: dct_decode_binary(torch.zeros(2, 0), 16), "the length of coefficients is 0"),
        (lambda: crop_dct_encode(square, torch.zeros(3, 4), 16, 9), r"boxes has shape \(3, 4\), must be \(2, 4\)"),
        (lambda: crop_dct_encode(square, boxes_of_two, 17, 9), "size is 17"),
        (lambda: crop_dct_encode(square, boxes_of_two, 16, 999), "num_coefficients is 999"),
        (lambda: crop_dct_encode(torch.zeros(2, 0, 5), boxes_of_two, 16, 9), "H and W at least 1"),
        (lambda: crop_dct_encode(square, boxes_of_two.bool(), 16, 9), "boxes is torch.bool"),
        (lambda: crop_dct_encode(square, boxes_of_two.to("meta"), 16, 9), "boxes is on meta but masks on cpu"),
        (lambda: dct_decode_paste(torch.zeros(2, 9), torch.zeros(2, 5), (9, 9), 16), r"boxes has shape \(2, 5\)"),
        (lambda: dct_decode_paste(torch.zeros(2, 9), boxes_of_two, (0, 9), 16), r"image_size is \(0, 9\)"),
        (lambda: dct_decode_paste(torch.zeros(2, 9), boxes_of_two, (9.0, 9), 16), r"image_size is \(9.0, 9\)"),
        (lambda: dct_decode(torch.zeros(2, 9), 48.0), "size is 48.0, must be a multiple of 16"),
        (lambda: dct_encode(square, 9.0), "num_coefficients is 9.0, must be a whole number"),
        (lambda: paste_masks(torch.zeros(2, 9, 8).bool(), boxes_of_two, (9, 9)), "must be square"),
        (lambda: paste_masks(square.int(), boxes_of_two, (9, 9)), "masks is torch.int32, must be bool, uint8 or float"),
        (lambda: paste_runs(square.bool(), boxes_of_two[:1], (9, 9)), r"boxes has shape \(1, 4\)"),
        (lambda: paste_runs(square.bool(), boxes_of_two, (9, -1)), r"image_size is \(9, -1\)"),
    ],
)
def test_errors(call, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
