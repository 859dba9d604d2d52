"""The kernels of the mask codec, for benchmarks/compile_report.py."""

from collections.abc import Iterator
from typing import Any

from solq.kernels.mask_codec.decode_kernels import decode_binary_kernel, decode_kernel
from solq.kernels.mask_codec.encode_kernels import crop_encode_kernel, encode_kernel
from solq.kernels.mask_codec.launch import (
    BINARY_PIXELS,
    DECODE_PIXELS,
    ENCODE_REGISTERS,
    PASTE_BLOCK,
    crop_blocks,
    decode_blocks,
    encode_blocks,
)
from solq.kernels.mask_codec.paste_kernel import paste_kernel


def compile_cases() -> Iterator[tuple[Any, ...]]:
    """Yield every kernel and the blocks that launch.py can choose, see benchmarks/compile_report.py."""
    for precision, targets in (("tf32x3", ("sm_80", "sm_90", "sm_100")), ("ieee", ("gfx942",))):

        def case(
            label: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], **expectations: Any
        ) -> tuple[Any, ...]:
            constexprs = dict(constexprs)
            num_warps = constexprs.pop("num_warps", 4)
            if "PRECISION" in kernel.arg_names:
                constexprs["PRECISION"] = precision  # noqa: B023
            pointers = [name for name in signature if name.endswith("_ptr")]
            return label, kernel, signature, constexprs, pointers, num_warps, 3, {**expectations, "targets": targets}  # noqa: B023

        for size, n in ((128, 256), (256, 400), (64, 64), (256, 65536), (16, 256)):
            shape = f"N={size} n={n}"
            for label, dtype in (("bytes", "i16"), ("fp32", "fp32")):
                yield case(
                    f"dct_encode {label} {shape}",
                    encode_kernel,
                    {"masks_ptr": f"*{dtype}", "vectors_ptr": "*fp32", "num_masks": "i32", "num_coefficients": "i32"},
                    encode_blocks(size, n, pairs=label == "bytes"),
                    load=0 if size == 16 else 16 if label == "bytes" else 8,
                    options={} if precision == "ieee" else ENCODE_REGISTERS,
                )
            decode = {"vectors_ptr": "*fp32", "masks_ptr": "*fp32", "num_coefficients": "i32"}
            yield case(f"dct_decode {shape}", decode_kernel, decode, decode_blocks(size, n, DECODE_PIXELS))
            decode["masks_ptr"] = "*u8"
            yield case(
                f"dct_decode_binary {shape}", decode_binary_kernel, decode, decode_blocks(size, n, BINARY_PIXELS)
            )
            yield case(
                f"crop_dct_encode u8 {shape}",
                crop_encode_kernel,
                {"masks_ptr": "*u8", "boxes_ptr": "*fp32", "partial_ptr": "*fp32"}
                | dict.fromkeys(("stride_mask", "stride_y", "stride_x", "height", "width", "num_coefficients"), "i32"),
                crop_blocks(size, n),
            )
        for dtype, size in (("u8", 128), ("fp32", 28)):
            yield case(
                f"paste_masks {dtype} N={size}",
                paste_kernel,
                {"masks_ptr": f"*{dtype}", "boxes_ptr": "*fp32", "images_ptr": "*u8", "height": "i32", "width": "i32"},
                {"SIZE": size, **PASTE_BLOCK},
            )
