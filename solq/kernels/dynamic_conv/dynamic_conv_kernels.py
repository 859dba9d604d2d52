"""Triton kernels of the dynamic convolution. A program computes a block of positions of one region.

The second product has too many columns to keep in registers, so it is computed a few columns at a time, first for the
mean and variance of each row, then again for the result. Its operands are at hand: the middle is in registers, and the
matrix of the region in the cache.
"""

import triton
import triton.language as tl


@triton.jit
def _relu(values, grad):
    """Keep `grad` where `values` are positive, or NaN as in torch."""
    return tl.where(values <= 0, 0.0, grad)


@triton.jit
def _load_columns(ptr, first, SIZE: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """Load a part of a norm's weight or bias, as a row."""
    columns = first + tl.arange(0, BLOCK)
    return tl.load(ptr + columns, mask=columns < SIZE, other=0).to(COMPUTE)[None, :]


@triton.jit
def _matrix(first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, num_rows, NUM_COLUMNS: tl.constexpr):
    """Compute the offsets of a block of a matrix whose rows lie one after another, and which elements exist."""
    rows = (first_row + tl.arange(0, ROWS))[:, None]
    columns = (first_column + tl.arange(0, COLUMNS))[None, :]
    return rows * NUM_COLUMNS + columns, (rows < num_rows) & (columns < NUM_COLUMNS)


@triton.jit
def _normalize_first_product(
    features_ptr,
    parameters_ptr,
    position,
    num_positions,
    eps,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply a block of positions by the first matrix and normalize; also return 1 / standard deviation."""
    product = tl.zeros((BLOCK_POSITIONS, BLOCK_HIDDEN), COMPUTE)
    for channel in tl.range(0, CHANNELS, BLOCK_CHANNELS):
        offsets, mask = _matrix(position, channel, BLOCK_POSITIONS, BLOCK_CHANNELS, num_positions, CHANNELS)
        inputs = tl.load(features_ptr + offsets, mask=mask, other=0).to(OPERAND)
        first_offsets, first_mask = _matrix(channel, 0, BLOCK_CHANNELS, BLOCK_HIDDEN, CHANNELS, HIDDEN)
        first = tl.load(parameters_ptr + first_offsets, mask=first_mask, other=0).to(OPERAND)
        product = tl.dot(inputs, first, product, input_precision=PRECISION, out_dtype=COMPUTE)
    exists = tl.arange(0, BLOCK_HIDDEN) < HIDDEN
    mean = tl.sum(product, 1) / HIDDEN
    centered = tl.where(exists[None, :], product - mean[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centered * centered, 1) / HIDDEN + eps)
    return centered * inverse[:, None], inverse


@triton.jit
def _multiply_second(
    middle,
    second_ptr,
    channel,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply the middle by some columns of the second matrix; also return them."""
    offsets, mask = _matrix(0, channel, BLOCK_HIDDEN, BLOCK_CHANNELS, HIDDEN, CHANNELS)
    second = tl.load(second_ptr + offsets, mask=mask, other=0).to(middle.dtype)
    return tl.dot(middle, second, input_precision=PRECISION, out_dtype=COMPUTE), second


@triton.jit
def _second_statistics(
    middle,
    second_ptr,
    eps,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the mean of each row of the second product, and 1 / standard deviation.

    Means and sums of squares of blocks are combined as by Chan, Golub and LeVeque, without a difference of squares.
    """
    mean = tl.zeros((middle.shape[0],), COMPUTE)
    squares = tl.zeros((middle.shape[0],), COMPUTE)
    for channel in tl.range(0, CHANNELS, BLOCK_CHANNELS):
        product, _second = _multiply_second(
            middle, second_ptr, channel, CHANNELS, HIDDEN, BLOCK_HIDDEN, BLOCK_CHANNELS, COMPUTE, PRECISION
        )
        exists = channel + tl.arange(0, BLOCK_CHANNELS) < CHANNELS
        count = tl.minimum(CHANNELS - channel, BLOCK_CHANNELS).to(COMPUTE)
        block_mean = tl.sum(product, 1) / count
        centered = tl.where(exists[None, :], product - block_mean[:, None], 0.0)
        share = count / (channel + count)
        difference = block_mean - mean
        mean += difference * share
        squares += tl.sum(centered * centered, 1) + difference * difference * (share * channel)
    return mean[:, None], (1 / tl.sqrt(squares / CHANNELS + eps))[:, None]


@triton.jit(do_not_specialize=["num_positions"])
def forward_kernel(
    features_ptr,  # (R, A, C)
    parameters_ptr,  # (R, 2 · C · D)
    norm_in_weight_ptr,  # (D,)
    norm_in_bias_ptr,
    norm_out_weight_ptr,  # (C,)
    norm_out_bias_ptr,
    output_ptr,  # (R, A, C)
    num_positions,
    eps,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype of what is multiplied
    COMPUTE: tl.constexpr,  # dtype of sums and norms
    PRECISION: tl.constexpr,
):
    region = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK_POSITIONS
    features_ptr += region * num_positions * CHANNELS
    output_ptr += region * num_positions * CHANNELS
    parameters_ptr += region * (2 * CHANNELS * HIDDEN)
    second_ptr = parameters_ptr + CHANNELS * HIDDEN

    normalized_in, _inverse_in = _normalize_first_product(
        features_ptr, parameters_ptr, position, num_positions, eps, CHANNELS, HIDDEN,
        BLOCK_POSITIONS, BLOCK_HIDDEN, BLOCK_CHANNELS, OPERAND, COMPUTE, PRECISION,
    )  # fmt: skip
    middle = normalized_in * _load_columns(norm_in_weight_ptr, 0, HIDDEN, BLOCK_HIDDEN, COMPUTE)
    middle += _load_columns(norm_in_bias_ptr, 0, HIDDEN, BLOCK_HIDDEN, COMPUTE)
    middle = _relu(middle, middle).to(OPERAND)

    mean, inverse = _second_statistics(
        middle, second_ptr, eps, CHANNELS, HIDDEN, BLOCK_HIDDEN, BLOCK_CHANNELS, COMPUTE, PRECISION
    )
    for channel in tl.range(0, CHANNELS, BLOCK_CHANNELS):
        product, _second = _multiply_second(
            middle, second_ptr, channel, CHANNELS, HIDDEN, BLOCK_HIDDEN, BLOCK_CHANNELS, COMPUTE, PRECISION
        )
        output = (product - mean) * inverse
        output *= _load_columns(norm_out_weight_ptr, channel, CHANNELS, BLOCK_CHANNELS, COMPUTE)
        output += _load_columns(norm_out_bias_ptr, channel, CHANNELS, BLOCK_CHANNELS, COMPUTE)
        offsets, mask = _matrix(position, channel, BLOCK_POSITIONS, BLOCK_CHANNELS, num_positions, CHANNELS)
        tl.store(output_ptr + offsets, _relu(output, output), mask=mask)


@triton.jit
def _output_gradient(
    grad_output_ptr,
    norm_out_weight_ptr,
    norm_out_bias_ptr,
    product,
    mean,
    inverse,
    position,
    channel,
    num_positions,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Take some columns of the output's gradient back through the ReLU.

    Return this gradient, that of the normalized product, and the normalized product, whose columns that do not exist
    are to be ignored.
    """
    normalized = (product - mean) * inverse
    weight = _load_columns(norm_out_weight_ptr, channel, CHANNELS, BLOCK_CHANNELS, product.dtype)
    output = normalized * weight + _load_columns(norm_out_bias_ptr, channel, CHANNELS, BLOCK_CHANNELS, product.dtype)
    offsets, mask = _matrix(position, channel, product.shape[0], BLOCK_CHANNELS, num_positions, CHANNELS)
    grad = tl.load(grad_output_ptr + offsets, mask=mask, other=0).to(product.dtype)
    grad = _relu(output, grad)
    return grad, grad * weight, normalized


@triton.jit(do_not_specialize=["num_positions"])
def backward_kernel(
    grad_output_ptr,  # (R, A, C)
    features_ptr,
    parameters_ptr,
    norm_in_weight_ptr,
    norm_in_bias_ptr,
    norm_out_weight_ptr,
    norm_out_bias_ptr,
    grad_features_ptr,  # (R, A, C)
    grad_parameters_ptr,  # (R, blocks of positions, 2 · C · D)
    grad_norms_ptr,  # (R, blocks of positions, 2 · D + 2 · C)
    num_positions,
    eps,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    region = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK_POSITIONS
    block = region * tl.num_programs(1) + tl.program_id(1)
    grad_output_ptr += region * num_positions * CHANNELS
    features_ptr += region * num_positions * CHANNELS
    grad_features_ptr += region * num_positions * CHANNELS
    parameters_ptr += region * (2 * CHANNELS * HIDDEN)
    second_ptr = parameters_ptr + CHANNELS * HIDDEN
    grad_parameters_ptr += block * (2 * CHANNELS * HIDDEN)
    grad_second_ptr = grad_parameters_ptr + CHANNELS * HIDDEN
    grad_norm_in_ptr = grad_norms_ptr + block * (2 * HIDDEN + 2 * CHANNELS)
    grad_norm_out_ptr = grad_norm_in_ptr + 2 * HIDDEN

    # The forward pass again
    normalized_in, _inverse_in = _normalize_first_product(
        features_ptr, parameters_ptr, position, num_positions, eps, CHANNELS, HIDDEN,
        BLOCK_POSITIONS, BLOCK_HIDDEN, BLOCK_CHANNELS, OPERAND, COMPUTE, PRECISION,
    )  # fmt: skip
    middle = normalized_in * _load_columns(norm_in_weight_ptr, 0, HIDDEN, BLOCK_HIDDEN, COMPUTE)
    middle += _load_columns(norm_in_bias_ptr, 0, HIDDEN, BLOCK_HIDDEN, COMPUTE)
    middle = _relu(middle, middle).to(OPERAND)
    mean, inverse = _second_statistics(
        middle, second_ptr, eps, CHANNELS, HIDDEN, BLOCK_HIDDEN, BLOCK_CHANNELS, COMPUTE, PRECISION
    )

    # The second norm: what its gradient needs of whole rows, and the gradients of its weight and bias
    grad_sum = tl.zeros((BLOCK_POSITIONS,), COMPUTE)
    projection = tl.zeros((BLOCK_POSITIONS,), COMPUTE)
    for channel in tl.range(0, CHANNELS, BLOCK_CHANNELS):
        product, _second = _multiply_second(
            middle, second_ptr, channel, CHANNELS, HIDDEN, BLOCK_HIDDEN, BLOCK_CHANNELS, COMPUTE, PRECISION
        )
        grad, grad_normalized, normalized = _output_gradient(
            grad_output_ptr, norm_out_weight_ptr, norm_out_bias_ptr, product, mean, inverse,
            position, channel, num_positions, CHANNELS, BLOCK_CHANNELS,
        )  # fmt: skip
        grad_sum += tl.sum(grad_normalized, 1)
        projection += tl.sum(grad_normalized * normalized, 1)
        columns = channel + tl.arange(0, BLOCK_CHANNELS)
        tl.store(grad_norm_out_ptr + columns, tl.sum(grad * normalized, 0), mask=columns < CHANNELS)
        tl.store(grad_norm_out_ptr + CHANNELS + columns, tl.sum(grad, 0), mask=columns < CHANNELS)
    grad_mean, projection = grad_sum[:, None] / CHANNELS, projection[:, None] / CHANNELS

    # The second matrix
    grad_middle = tl.zeros((BLOCK_POSITIONS, BLOCK_HIDDEN), COMPUTE)
    for channel in tl.range(0, CHANNELS, BLOCK_CHANNELS):
        product, second = _multiply_second(
            middle, second_ptr, channel, CHANNELS, HIDDEN, BLOCK_HIDDEN, BLOCK_CHANNELS, COMPUTE, PRECISION
        )
        _grad, grad_normalized, normalized = _output_gradient(
            grad_output_ptr, norm_out_weight_ptr, norm_out_bias_ptr, product, mean, inverse,
            position, channel, num_positions, CHANNELS, BLOCK_CHANNELS,
        )  # fmt: skip
        grad_product = ((grad_normalized - grad_mean - normalized * projection) * inverse).to(OPERAND)
        grad_middle = tl.dot(grad_product, tl.trans(second), grad_middle, input_precision=PRECISION, out_dtype=COMPUTE)
        grad_second = tl.dot(tl.trans(middle), grad_product, input_precision=PRECISION, out_dtype=COMPUTE)
        offsets, mask = _matrix(0, channel, BLOCK_HIDDEN, BLOCK_CHANNELS, HIDDEN, CHANNELS)
        tl.store(grad_second_ptr + offsets, grad_second, mask=mask)

    # The first norm and matrix, its product computed once more: it would be in the way in the registers until here
    normalized_in, inverse_in = _normalize_first_product(
        features_ptr, parameters_ptr, position, num_positions, eps, CHANNELS, HIDDEN,
        BLOCK_POSITIONS, BLOCK_HIDDEN, BLOCK_CHANNELS, OPERAND, COMPUTE, PRECISION,
    )  # fmt: skip
    weight_in = _load_columns(norm_in_weight_ptr, 0, HIDDEN, BLOCK_HIDDEN, COMPUTE)
    grad_middle = _relu(middle, grad_middle)
    hidden = tl.arange(0, BLOCK_HIDDEN)
    tl.store(grad_norm_in_ptr + hidden, tl.sum(grad_middle * normalized_in, 0), mask=hidden < HIDDEN)
    tl.store(grad_norm_in_ptr + HIDDEN + hidden, tl.sum(grad_middle, 0), mask=hidden < HIDDEN)
    grad_in = grad_middle * weight_in
    grad_in -= (tl.sum(grad_in, 1) / HIDDEN)[:, None] + normalized_in * (
        tl.sum(grad_in * normalized_in, 1) / HIDDEN
    )[:, None]  # fmt: skip
    grad_in = (grad_in * inverse_in[:, None]).to(OPERAND)
    for channel in tl.range(0, CHANNELS, BLOCK_CHANNELS):
        first_offsets, first_mask = _matrix(channel, 0, BLOCK_CHANNELS, BLOCK_HIDDEN, CHANNELS, HIDDEN)
        first = tl.load(parameters_ptr + first_offsets, mask=first_mask, other=0).to(OPERAND)
        offsets, mask = _matrix(position, channel, BLOCK_POSITIONS, BLOCK_CHANNELS, num_positions, CHANNELS)
        inputs = tl.load(features_ptr + offsets, mask=mask, other=0).to(OPERAND)
        grad_features = tl.dot(grad_in, tl.trans(first), input_precision=PRECISION, out_dtype=COMPUTE)
        tl.store(grad_features_ptr + offsets, grad_features, mask=mask)
        grad_first = tl.trans(tl.dot(tl.trans(grad_in), inputs, input_precision=PRECISION, out_dtype=COMPUTE))
        tl.store(grad_parameters_ptr + first_offsets, grad_first, mask=first_mask)
