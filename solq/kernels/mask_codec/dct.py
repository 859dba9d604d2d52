"""The DCT of masks in plain PyTorch: the definition of the operators, and what serves CPU tensors."""

import math

import torch
from torch import Tensor

CHUNK_SIZE = 128  # masks at a time, so that intermediate results stay in the processor's cache


def kept_rows(size: int, num_coefficients: int) -> int:
    """Return how many rows and columns of a spectrum hold the first n coefficients in zigzag order.

    For n = 256 these are 24 of 128. The number is a multiple of eight, which matrix products prefer.
    """
    diagonals = (math.isqrt(8 * num_coefficients - 7) + 1) // 2
    return min((diagonals + 7) // 8 * 8, size)


def dct_matrix(size: int, *, device: torch.device | None = None) -> Tensor:
    """Make the orthonormal DCT-II matrix A (size, size) float64: the DCT of a square mask is A @ mask @ A.T."""
    frequency = torch.arange(size, dtype=torch.float64, device=device)[:, None]
    position = torch.arange(size, dtype=torch.float64, device=device) + 0.5
    scale = torch.where(frequency == 0, math.sqrt(1 / size), math.sqrt(2 / size))
    return torch.cos(math.pi / size * frequency * position) * scale


def zigzag(size: int, num_coefficients: int, *, device: torch.device | None = None) -> Tensor:
    """List rows and columns (2, n) of the first coefficients in JPEG's zigzag order: (0,0), (0,1), (1,0), (2,0), …"""
    index = torch.arange(num_coefficients, device=device)
    # Past the longest diagonal the order is that of the beginning, mirrored.
    mirrored = index >= size * (size + 1) // 2
    index = torch.where(mirrored, size * size - 1 - index, index)
    diagonal = ((torch.sqrt(8.0 * index.double() + 1) - 1) / 2).long()
    along = index - diagonal * (diagonal + 1) // 2
    upwards = diagonal % 2 == 0
    order = torch.stack([torch.where(upwards, diagonal - along, along), torch.where(upwards, along, diagonal - along)])
    return torch.where(mirrored, size - 1 - order, order)


def _to_int8_digits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round a DCT matrix (R, N) to multiples of a small unit, and write these in two digits to the base 255.

    No digit is −128: processors without instructions for bytes add two products in 16 bits, which 127 just fits into.

    Returns:
        (N, 2·R) int8, R columns of higher digits and R of lower ones; the unit ().
    """
    unit = matrix[0, 0] / 22989  # the mean is exact; cosines, up to √2 times as large, are less than 127·255 + 127
    number = matrix / unit
    higher = (number / 255).round()
    return torch.cat([higher, (number - 255 * higher).round()]).to(torch.int8).T, unit


def _are_binary(masks: Tensor) -> bool:
    return masks.dtype == torch.bool or (masks.dtype == torch.uint8 and masks.numel() > 0 and bool(masks.max() <= 1))


def dct_encode(masks: Tensor, num_coefficients: int = 256) -> Tensor:
    """Compute the first n zigzag coefficients (K, n) of the orthonormal 2-D DCT-II of masks (K, N, N).

    On x86 processors the rows of masks of zeros and ones are multiplied as bytes: exact sums of cosines rounded to 15
    bits. No coefficient is then off by more than 4e-5 of the first one.
    """
    size, kept = masks.shape[-1], kept_rows(masks.shape[-1], num_coefficients)
    matrix = dct_matrix(size, device=masks.device)[:kept].float()
    rows, columns = zigzag(size, num_coefficients, device=masks.device)
    digits, unit = _to_int8_digits(matrix)
    bytes_multiply = masks.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    vectors = []
    for chunk in masks.split(CHUNK_SIZE):
        if bytes_multiply and _are_binary(chunk):
            sums = torch._int_mm(chunk.reshape(-1, size).view(torch.int8), digits)
            half = torch.add(sums[:, kept:], sums[:, :kept], alpha=255).float().view(-1, size, kept)
            spectrum = matrix @ half * unit
        else:
            spectrum = matrix @ chunk.float() @ matrix.T
        vectors.append(spectrum.flatten(1).index_select(1, rows * kept + columns))
    return torch.cat(vectors)


def dct_decode(coefficients: Tensor, size: int = 128) -> Tensor:
    """Compute the masks (K, size, size) whose DCT begins with `coefficients` (K, n) and is zero after them."""
    n = coefficients.shape[-1]
    kept = kept_rows(size, n)
    matrix = dct_matrix(size, device=coefficients.device)[:kept].float()
    rows, columns = zigzag(size, n, device=coefficients.device)
    spectrum = coefficients.new_zeros(coefficients.shape[0], kept * kept, dtype=torch.float32)
    spectrum = spectrum.index_copy(1, rows * kept + columns, coefficients.float()).unflatten(1, (kept, kept))
    return matrix.T @ (spectrum @ matrix)


def binarize(masks: Tensor) -> Tensor:
    """Threshold each decoded mask at the middle between its own minimum and maximum.

    Args:
        masks: (K, N, N) any float dtype, on any device.

    Returns:
        (K, N, N) bool, True above the middle; empty for constant masks and those that hold NaN.
    """
    return masks > (masks.amin((1, 2), keepdim=True) + masks.amax((1, 2), keepdim=True)) / 2


def dct_decode_binary(coefficients: Tensor, size: int = 128) -> Tensor:
    """Decode vectors (K, n) and binarize the masks: (K, size, size) bool."""
    return torch.cat([binarize(dct_decode(chunk, size)) for chunk in coefficients.split(CHUNK_SIZE)])
