"""Time the mask codec: encode, decode, crop + encode, decode + paste, decode + run lengths; N = 128 and n = 256.

Contenders: this project; its definitions in PyTorch, eager and compiled; the whole spectrum by FFT (torch-dct where it
is installed, else the same algorithm here); OpenCV's cv2.dct or cv2.idct mask by mask, with the copies to and from the
host; for crops torchvision's RoIAlign, for pastes grid_sample over whole images, as Detectron2 does; for run lengths
pycocotools on pasted images, copied to the host.
`extra_info` has the bytes that must be moved (each input read once, each output written once), GB/s, and its share of
the bandwidth of a large copy in the same process.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import roi_align

from solq.detections import encode_runs
from solq.kernels import (
    binarize,
    crop_dct_encode,
    dct_decode,
    dct_decode_binary,
    dct_decode_paste,
    dct_encode,
    paste_runs,
    reference,
    use_backend,
)
from solq.kernels.runtime import Backend

try:
    import torch_dct
except ImportError:
    torch_dct = None

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND: Backend = "triton" if DEVICE.type == "cuda" else "reference"  # never the interpreter
N, n = 128, 256
COUNTS = (10, 100, 1000, 10_000)
IMAGE_SIZE = (800, 1333) if DEVICE.type == "cuda" else (480, 640)


def blobs(K: int, H: int, W: int) -> Tensor:
    """Make smooth masks (K, H, W) uint8."""
    noise = torch.rand(min(K, 200), 1, 6, 6, generator=torch.Generator().manual_seed(0))
    masks = (F.interpolate(noise, (H, W), mode="bicubic")[:, 0] > 0.5).to(DEVICE, torch.uint8)
    return masks.repeat(math.ceil(K / len(masks)), 1, 1)[:K]


def boxes_of(K: int, image_size: tuple[int, int] = IMAGE_SIZE) -> Tensor:
    """Make boxes (K, 4) in pixels of log-normal sizes as in COCO: the median is a fifth of the image's side."""
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor(image_size).flip(0)
    size = (0.2 * torch.exp(0.8 * torch.randn(K, 2, generator=generator))).clamp(max=1) * extent
    corner = torch.rand(K, 2, generator=generator) * (extent - size)
    return torch.cat([corner, corner + size], 1).to(DEVICE)


def fft_dct(values: Tensor) -> Tensor:
    """Compute the orthonormal DCT-II of the last axis by one FFT of that length (Makhoul 1980), as torch-dct does."""
    length = values.shape[-1]
    spectrum = torch.fft.fft(torch.cat([values[..., ::2], values[..., 1::2].flip(-1)], -1))
    angle = torch.arange(length, device=values.device) * (math.pi / (2 * length))
    result = spectrum.real * angle.cos() + spectrum.imag * angle.sin()
    result[..., 0] /= math.sqrt(2)
    return result * math.sqrt(2 / length)


def fft_idct(values: Tensor) -> Tensor:
    """Invert `fft_dct`."""
    length = values.shape[-1]
    values = values * math.sqrt(2 * length)
    values[..., 0] *= math.sqrt(2)
    mirrored = torch.cat([torch.zeros_like(values[..., :1]), -values[..., 1:].flip(-1)], -1) / 2
    angle = torch.arange(length, device=values.device) * (math.pi / (2 * length))
    signal = torch.fft.ifft(torch.complex(values / 2, mirrored) * torch.polar(torch.ones_like(angle), angle)).real
    result = torch.empty_like(signal)
    result[..., ::2] = signal[..., : length - length // 2]
    result[..., 1::2] = signal[..., length - length // 2 :].flip(-1)
    return result


@functools.cache
def zigzag_positions() -> tuple[Tensor, Tensor]:
    rows, columns = reference.zigzag(N, n)
    return rows.to(DEVICE), columns.to(DEVICE)


def ours(masks: Tensor) -> Tensor:
    return dct_encode(masks, n)


def eager(masks: Tensor) -> Tensor:
    return reference.dct_encode(masks, n)


compiled = torch.compile(eager, dynamic=False)


def full_fft(masks: Tensor) -> Tensor:
    rows, columns = zigzag_positions()
    masks = masks.float()
    spectra = torch_dct.dct_2d(masks, norm="ortho") if torch_dct else fft_dct(fft_dct(masks).mT).mT
    return spectra[:, rows, columns]


def opencv_loop(masks: Tensor) -> Tensor:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    rows, columns = (index.cpu().numpy() for index in zigzag_positions())
    return torch.stack([
        torch.from_numpy(cv2.dct(mask.cpu().numpy().astype("float32"))[rows, columns]).to(masks.device)
        for mask in masks
    ])  # fmt: skip


def ours_decode(vectors: Tensor) -> Tensor:
    return dct_decode(vectors, N)


def eager_decode(vectors: Tensor) -> Tensor:
    return reference.dct_decode(vectors, N)


compiled_decode = torch.compile(eager_decode, dynamic=False)


def full_fft_decode(vectors: Tensor) -> Tensor:
    rows, columns = zigzag_positions()
    spectra = vectors.new_zeros(len(vectors), N, N)
    spectra[:, rows, columns] = vectors
    return torch_dct.idct_2d(spectra, norm="ortho") if torch_dct else fft_idct(fft_idct(spectra).mT).mT


def opencv_loop_decode(vectors: Tensor) -> Tensor:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    rows, columns = (index.cpu().numpy() for index in zigzag_positions())
    masks = []
    for vector in vectors:
        spectrum = torch.zeros(N, N).numpy()
        spectrum[rows, columns] = vector.cpu().numpy()
        masks.append(torch.from_numpy(cv2.idct(spectrum)).to(vectors.device))
    return torch.stack(masks)


def ours_paste(vectors: Tensor, boxes: Tensor) -> Tensor:
    return dct_decode_paste(vectors, boxes, IMAGE_SIZE, N)


def eager_paste(vectors: Tensor, boxes: Tensor) -> Tensor:
    return reference.dct_decode_paste(vectors, boxes, IMAGE_SIZE, N)


def grid_sample_paste(vectors: Tensor, boxes: Tensor) -> Tensor:
    masks = binarize(eager_decode(vectors)).float()
    H, W = IMAGE_SIZE
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    y = (torch.arange(H, device=DEVICE) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(W, device=DEVICE) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)], dim=-1)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5


def ours_runs(vectors: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> list[dict]:
    return encode_runs(*paste_runs(dct_decode_binary(vectors, N), boxes, image_size), image_size)


def pycocotools_runs(vectors: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> list[dict]:
    pasted = dct_decode_paste(vectors, boxes, image_size, N).cpu().numpy().view(np.uint8)
    encoded = coco_mask.encode(np.asfortranarray(pasted.transpose(1, 2, 0)))
    return [rle | {"counts": rle["counts"].decode()} for rle in encoded]


def ours_crop(masks: Tensor, boxes: Tensor) -> Tensor:
    return crop_dct_encode(masks, boxes, N, n)


def roi_align_crop(masks: Tensor, boxes: Tensor) -> Tensor:
    index = torch.arange(len(masks), device=DEVICE, dtype=torch.float32)[:, None]
    crops = roi_align(masks[:, None].float(), torch.cat([index, boxes], 1), N, aligned=True)[:, 0] >= 0.5
    return eager(crops)


def seconds(call: Callable[[], object], rounds: int = 7) -> float:
    """Measure the median time of one call; on a GPU that of the device, with a cold cache."""
    if DEVICE.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=50, rep=200, return_mode="median") / 1000
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


Run = Callable[..., None]


@pytest.fixture
def run(benchmark, copy_bandwidth: float) -> Run:
    return functools.partial(time_call, benchmark, copy_bandwidth)


def time_call(
    benchmark, copy_bandwidth: float, call: Callable[[], Tensor], expected: Tensor, moved: int, wrong: float
) -> None:
    """Time `call` after a check that at most the share `wrong` of its results differs from `expected`."""

    def timed() -> Tensor:
        result = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    with use_backend(BACKEND):
        difference = (timed().float() - expected.float()).abs()
        assert (difference > 1e-3).float().mean().item() <= wrong
        del difference
        rounds = max(3, min(50, int(2 / seconds(timed, 1))))
        device_time = seconds(call, rounds)
        benchmark.extra_info |= {
            "bytes": moved,
            "GB/s": moved / device_time / 1e9,
            "share_of_copy": moved / device_time / copy_bandwidth,
        }
        benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("contender", [ours, eager, pytest.param(compiled, id="compiled"), full_fft, opencv_loop])
@pytest.mark.parametrize("K", COUNTS)
def test_encode(benchmark, run: Run, K: int, contender: Callable[[Tensor], Tensor]) -> None:
    benchmark.group = f"encode {K} masks"
    masks = blobs(K, N, N)
    run(lambda: contender(masks), eager(masks), K * (N * N + 4 * n), wrong=0)


@pytest.mark.parametrize(
    "contender",
    [
        ours_decode,
        eager_decode,
        pytest.param(compiled_decode, id="compiled_decode"),
        full_fft_decode,
        opencv_loop_decode,
    ],
)
@pytest.mark.parametrize("K", COUNTS)
def test_decode(benchmark, run: Run, K: int, contender: Callable[[Tensor], Tensor]) -> None:
    benchmark.group = f"decode {K} vectors"
    vectors = eager(blobs(K, N, N))
    run(lambda: contender(vectors), eager_decode(vectors), K * 4 * (n + N * N), wrong=0)


@pytest.mark.parametrize("contender", [ours_crop, roi_align_crop])
@pytest.mark.parametrize("K", COUNTS[:2])
def test_crop_encode(benchmark, run: Run, K: int, contender: Callable[[Tensor, Tensor], Tensor]) -> None:
    benchmark.group = f"crop and encode {K} masks of {IMAGE_SIZE[0]} × {IMAGE_SIZE[1]}"
    masks, boxes = blobs(K, *IMAGE_SIZE), boxes_of(K)
    area = int((boxes[:, 2:] - boxes[:, :2]).prod(1).sum())
    # A pixel whose average is 0.5 may fall on either side, and changes all coefficients of its mask.
    run(lambda: contender(masks, boxes), roi_align_crop(masks, boxes), area + 4 * K * (n + 4), wrong=0.5)


@pytest.mark.parametrize("contender", [ours_paste, eager_paste, grid_sample_paste])
@pytest.mark.parametrize("K", COUNTS[:2])
def test_decode_paste(benchmark, run: Run, K: int, contender: Callable[[Tensor, Tensor], Tensor]) -> None:
    benchmark.group = f"decode and paste {K} masks into {IMAGE_SIZE[0]} × {IMAGE_SIZE[1]}"
    vectors, boxes = eager(blobs(K, N, N)), boxes_of(K)
    moved = K * (4 * (n + 4) + IMAGE_SIZE[0] * IMAGE_SIZE[1])
    expected = grid_sample_paste(vectors, boxes)
    run(lambda: contender(vectors, boxes), expected, moved, wrong=1e-4)


@pytest.mark.parametrize("contender", [ours_runs, pycocotools_runs])
@pytest.mark.parametrize("image_size", [(480, 640), (800, 1333)])
def test_decode_to_run_lengths(benchmark, image_size: tuple[int, int], contender: Callable[..., list[dict]]) -> None:
    benchmark.group = f"decode 100 vectors to run lengths of {image_size[0]} × {image_size[1]}"
    vectors, boxes = eager(blobs(100, N, N)), boxes_of(100, image_size)
    with use_backend(BACKEND):
        assert contender(vectors, boxes, image_size) == pycocotools_runs(vectors, boxes, image_size)
        benchmark.pedantic(contender, (vectors, boxes, image_size), rounds=20, warmup_rounds=1)
