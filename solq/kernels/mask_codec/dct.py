"""Mask coding in plain PyTorch (SOLQ, section 3.2)."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128  # masks at a time: what is computed of them stays in the processor's cache


def kept_rows(size: int, num_coefficients: int) -> int:
    """How many rows (and columns) of a spectrum hold the first n zigzag coefficients: 24 of 128 for n = 256."""
    diagonals = (math.isqrt(8 * num_coefficients - 7) + 1) // 2
    return min((diagonals + 7) // 8 * 8, size)  # matrix products are faster at multiples of eight


def dct_matrix(size: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal DCT-II matrix A (size, size): the transform of a square mask is A @ mask @ A.T."""
    frequency = torch.arange(size, dtype=torch.float64, device=device)[:, None]
    position = torch.arange(size, dtype=torch.float64, device=device) + 0.5
    scale = torch.where(frequency == 0, math.sqrt(1 / size), math.sqrt(2 / size))
    return (torch.cos(math.pi / size * frequency * position) * scale).to(dtype)


def zigzag(size: int, num_coefficients: int, *, device: torch.device | None = None) -> Tensor:
    """Rows and columns (2, n) of the first coefficients in JPEG's zigzag order: (0,0), (0,1), (1,0), (2,0), …"""
    index = torch.arange(num_coefficients, device=device)
    # Past the longest diagonal the order is that of the beginning, mirrored: both corners are counted alike.
    mirrored = index >= size * (size + 1) // 2
    index = torch.where(mirrored, size * size - 1 - index, index)
    diagonal = ((torch.sqrt(8.0 * index.double() + 1) - 1) / 2).long()
    along = index - diagonal * (diagonal + 1) // 2
    upwards = diagonal % 2 == 0
    order = torch.stack([torch.where(upwards, diagonal - along, along), torch.where(upwards, along, diagonal - along)])
    return torch.where(mirrored, size - 1 - order, order)


def _as_digits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes (N, 2·kept), the higher and lower digits to the base 255 of `matrix` (kept, N), and their unit.

    No digit is −128: processors without instructions for bytes add two products in 16 bits, which 127 just fits into.
    """
    unit = matrix[0, 0] / 22989  # the mean is exact; cosines, up to √2 times as large, are less than 127·255 + 127
    number = matrix / unit
    higher = (number / 255).round()
    return torch.cat([higher, (number - 255 * higher).round()]).to(torch.int8).T, unit


def _are_binary(masks: Tensor) -> bool:
    return masks.dtype == torch.bool or (masks.dtype == torch.uint8 and masks.numel() > 0 and bool(masks.max() <= 1))


def dct_encode(masks: Tensor, num_coefficients: int = 256) -> Tensor:
    """The first n zigzag coefficients (K, n) of the orthonormal 2-D DCT-II of masks (K, N, N).

    On x86 processors the rows of masks of zeros and ones are multiplied as bytes: exact sums of cosines rounded to 15
    bits. No coefficient is then off by more than 4e-5 of the first one.
    """
    size, kept = masks.shape[-1], kept_rows(masks.shape[-1], num_coefficients)
    matrix = dct_matrix(size, device=masks.device)[:kept].float()
    rows, columns = zigzag(size, num_coefficients, device=masks.device)
    digits, unit = _as_digits(matrix)
    bytes_multiply = masks.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    vectors = []
    for some in masks.split(CHUNK):
        if bytes_multiply and _are_binary(some):
            sums = torch._int_mm(some.reshape(-1, size).view(torch.int8), digits)
            half = torch.add(sums[:, kept:], sums[:, :kept], alpha=255).float().view(-1, size, kept)
            spectrum = matrix @ half * unit
        else:
            spectrum = matrix @ some.float() @ matrix.T
        vectors.append(spectrum.flatten(1).index_select(1, rows * kept + columns))
    return torch.cat(vectors)


def dct_decode(coefficients: Tensor, size: int = 128) -> Tensor:
    """The masks (K, size, size) of which `coefficients` (K, n) are the first DCT coefficients, the others zero."""
    n = coefficients.shape[-1]
    kept = kept_rows(size, n)
    matrix = dct_matrix(size, device=coefficients.device)[:kept].float()
    rows, columns = zigzag(size, n, device=coefficients.device)
    spectrum = coefficients.new_zeros(coefficients.shape[0], kept * kept, dtype=torch.float32)
    spectrum = spectrum.index_copy(1, rows * kept + columns, coefficients.float()).unflatten(1, (kept, kept))
    return matrix.T @ (spectrum @ matrix)


def binarize(masks: Tensor) -> Tensor:
    """True where a decoded mask (K, N, N) lies above the middle between its own minimum and maximum."""
    return masks > (masks.amin((1, 2), keepdim=True) + masks.amax((1, 2), keepdim=True)) / 2


def dct_decode_binary(coefficients: Tensor, size: int = 128) -> Tensor:
    """`dct_decode`, binarised (K, size, size)."""
    return torch.cat([binarize(dct_decode(some, size)) for some in coefficients.split(CHUNK)])


LARGEST_CORNER = 2.0**20  # corners of boxes farther out are moved to there: no image reaches it


def _roi_align_weights(start: float, end: float, extent: int, size: int, device: torch.device) -> tuple[Tensor, int]:
    """RoIAlign along one axis is linear: its weights (size, reach) on the pixels first … first + reach, and first."""
    if not math.isfinite(end - start):
        return torch.zeros(size, 0, device=device), 0
    low, high = torch.tensor([start, end]).clamp(-LARGEST_CORNER, LARGEST_CORNER) - 0.5
    bin_size = ((high - low) / size).item()
    count = math.ceil(bin_size)  # adaptive sampling: samples per bin
    if count <= 0:  # inverted or empty
        return torch.zeros(size, 0, device=device), 0
    # The samples of all bins in one row, of which only those about the image are made.
    first, last = (min(max(int((edge - low.item()) * count / bin_size), 0), size * count) for edge in (-3, extent + 2))
    sample = torch.arange(first, last)
    index, step = sample // count, sample % count
    position = low + index * bin_size + (step + 0.5) * bin_size / count
    inside = (position >= -1) & (position <= extent)
    index, position = index[inside], position[inside].clamp(0, extent - 1)
    if not len(index):
        return torch.zeros(size, 0, device=device), 0
    pixel = position.floor().long()
    upper_share = position - pixel
    first, last = pixel[[0, -1]].tolist()
    weights = torch.zeros(size, last + 2 - first)
    weights.index_put_((index, pixel - first), 1 - upper_share, accumulate=True)
    weights.index_put_((index, pixel + 1 - first), upper_share, accumulate=True)  # zero where pixel + 1 is outside
    return (weights[:, : extent - first] / count).to(device), first


def crop_masks(masks: Tensor, boxes: Tensor, size: int = 128) -> Tensor:
    """Masks (K, H, W) cropped by their boxes (K, 4) with RoIAlign (aligned, adaptive sampling), True where ≥ 0.5."""
    H, W = masks.shape[-2:]
    crops = masks.new_empty(len(masks), size, size, dtype=torch.bool)
    for crop, mask, (x0, y0, x1, y1) in zip(crops, masks, boxes.tolist(), strict=True):
        down, top = _roi_align_weights(y0, y1, H, size, masks.device)
        across, left = _roi_align_weights(x0, x1, W, size, masks.device)
        region = mask[top : top + down.shape[1], left : left + across.shape[1]]
        torch.ge(down @ region.float() @ across.T, 0.5, out=crop)
    return crops


def crop_dct_encode(masks: Tensor, boxes: Tensor, size: int = 128, num_coefficients: int = 256) -> Tensor:
    """`dct_encode` of full-image masks (K, H, W) cropped by `boxes` (K, 4) in pixels."""
    return dct_encode(crop_masks(masks, boxes, size), num_coefficients)


def _neighbours(start: float, end: float, extent: int, size: int) -> tuple[int, Tensor, Tensor]:
    """The first pixel that a mask stretched over start … end can reach; of each pixel from there on, the cell before it
    in the mask with zeros around it, and the share (…, 1) of the next cell.
    """
    # A pixel whose centre lies outside the box is closer to the zeros around the mask: below the threshold.
    first, last = (int(min(max(edge, 0), extent)) for edge in (start - 1, end + 1))
    position = ((torch.arange(first, last) + 0.5 - start) / (end - start) * size + 0.5).clamp(0, size + 1)
    cell = position.long().clamp(max=size)
    return first, cell, (position - cell)[:, None]


def _visible_parts(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Iterator[tuple[int, int, int, Tensor]]:
    """Of each mask with a usable box its index, the first row and column of the image that it can reach, and its part
    of the image from there on, True where ≥ 0.5, column by column: (w, h).
    """
    H, W = image_size
    boxes = boxes.float()
    extent = boxes[:, 2:] - boxes[:, :2]
    usable = ((extent > 0) & extent.isfinite()).all(1)
    for index in usable.nonzero()[:, 0].tolist():
        x0, y0, x1, y1 = boxes[index].tolist()
        top, *down = _neighbours(y0, y1, H, masks.shape[-1])
        left, *across = _neighbours(x0, x1, W, masks.shape[-1])
        part = F.pad(masks[index].T.float(), (1, 1, 1, 1))
        for cell, share in (down, across):
            cell, share, part = cell.to(part.device), share.to(part.device), part.T.contiguous()
            part = torch.lerp(part.index_select(0, cell), part.index_select(0, cell + 1), share)
        yield index, top, left, part >= 0.5


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Masks (K, N, N) stretched over their boxes (K, 4) in an image (H, W), True where ≥ 0.5: (K, H, W) bool."""
    images = masks.new_zeros(len(masks), *image_size, dtype=torch.bool)
    for index, top, left, part in _visible_parts(masks, boxes, image_size):
        images[index, top : top + part.shape[1], left : left + part.shape[0]] = part.T
    return images


def mask_runs(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Where full-image masks (K, H, W) change: places (R,) and their numbers (K,), see `solq.kernels.paste_runs`."""
    places = masks.transpose(1, 2).flatten(1)
    changes = torch.cat([places[:, :1], places[:, 1:] ^ places[:, :-1]], dim=1)
    return changes.nonzero()[:, 1], changes.sum(1)


def paste_runs(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`mask_runs` of `paste_masks`, without the images."""
    H, W = image_size
    changes = [boxes.new_zeros(0, dtype=torch.int64)] * len(masks)
    for index, top, left, part in _visible_parts(masks, boxes, image_size):
        # Runs end with a column, for there is a row below, unless the next column goes on where this one ends.
        column = F.pad(part, (0, int(part.shape[1] < H)))
        values = F.pad(column.flatten(), (1, 1))
        place = (values[1:] ^ values[:-1]).nonzero()[:, 0]
        x, y = place // column.shape[1], place % column.shape[1]
        place = (left + x) * H + top + y
        changes[index] = place[place < H * W]  # the last run needs no end
    counts = torch.tensor([len(places) for places in changes], dtype=torch.int64, device=masks.device)
    return torch.cat(changes) if changes else counts, counts


def dct_decode_paste(coefficients: Tensor, boxes: Tensor, image_size: tuple[int, int], size: int = 128) -> Tensor:
    """Decoded, binarised masks of vectors (K, n) pasted into their boxes (K, 4) in pixels: (K, H, W) bool."""
    return paste_masks(dct_decode_binary(coefficients, size), boxes, image_size)
