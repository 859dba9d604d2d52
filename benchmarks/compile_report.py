"""Compile every kernel for GPUs that need not be there, and report: `python -m benchmarks.compile_report`.

Each module of `benchmarks.compile_cases` has one function `compile_cases()`, which yields a plain tuple for every
kernel and configuration that a launch can choose:

    (label, kernel, signature, constexprs, attrs, num_warps, num_stages, expectations)

    label         str, names the row of the table: "matching_cost focal float32"
    kernel        the @triton.jit function
    signature     dict of every argument but the constexprs, in any order: {"logits_ptr": "*fp32", "num_queries": "i32"}
                  ("*fp64", "*fp32", "*bf16", "*fp16", "*i64", "*i32", "*u8", "*i1", "fp32", "i32", "i64")
    constexprs    dict of every constexpr argument: {"BLOCK_QUERIES": 128}
    attrs         names of the arguments known to be divisible by 16; torch's allocations are 16-byte aligned, so this
                  is usually [name for name in signature if name.endswith("_ptr")]
    num_warps     int
    num_stages    int
    expectations  dict of what the table must show, empty where nothing is promised. Besides, no case may ever spill.
                    "load": 16             the widest load from global memory has at least so many bytes
                    "vector_atomics": True from sm_90 on, atomic additions go out in vectors
                    "occupancy": 0.5       on sm_90, at least this share of the warps that a multiprocessor can hold
                    "targets": ("sm_90",)  compile for these only
                    "options": {"maxnreg": 64}  options of the launch besides the warps and stages

`report` compiles the cases for sm_80, sm_90, sm_100 and gfx942, in as many processes as there are processors, prints
one Markdown table, and fails if a case does not compile or does not show what is expected of it.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import compile_cases
from solq.kernels.runtime import LAUNCH_OPTIONS

MODULES = tuple(module.name for module in pkgutil.iter_modules(compile_cases.__path__))  # an operator family each
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_PER_SM = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # bytes


@dataclass
class Row:
    """One kernel in one configuration for one target."""

    label: str
    target: str
    num_warps: int
    registers: int  # per thread
    spills: int  # bytes per thread
    shared: int  # bytes
    occupancy: float | None  # share of the warps a multiprocessor can hold; NVIDIA only
    load: int  # bytes of the widest load from global memory
    atomics: str  # kinds of atomic addition to global memory, "" where there are none
    broken: list[str]  # expectations that do not hold


@cache
def cases(module: str) -> list[tuple[Any, ...]]:
    """Return all cases of a module; kernels cannot be passed between processes, so each makes its own."""
    return list(importlib.import_module(f"benchmarks.compile_cases.{module}").compile_cases())


def _occupancy(target: str, num_warps: int, registers: int, shared: int) -> float:
    """Return the share of a multiprocessor's 64 warps that fit its 65,536 registers (in units of 256) and 32 blocks."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    blocks = min(65536 // (registers_per_warp * num_warps), 64 // num_warps, 32)
    if shared:
        blocks = min(blocks, SHARED_PER_SM[target] // (shared + 1024))
    return blocks * num_warps / 64


def _nvidia(target: str, compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    loads = [int(v or 1) * int(bits) // 8 for v, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)]
    copies = [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\].*?\], 0x(\w+)", ptx)]
    atomics = {_atomic_name(line) for line in ptx.splitlines() if re.search(r"\b(red|atom)\.", line)}
    shared = compiled.metadata.shared
    return {
        "registers": registers,
        "spills": stack,
        "shared": shared,
        "occupancy": _occupancy(target, compiled.metadata.num_warps, registers, shared),
        "load": max(loads + copies, default=0),
        "atomics": ", ".join(sorted(atomics)),
    }


def _atomic_name(line: str) -> str:
    """Shorten `@%p1 red.global.gpu.acq_rel.add.v4.f32 [...]` to red.add.v4.f32."""
    parts = re.search(r"\b(?:red|atom)\.\S+", line)[0].rstrip(";").split(".")  # type: ignore[index]
    dropped = {"global", "gpu", "acq_rel", "relaxed", "release", "acquire", "noftz", "sys", "cta", "L2"}
    return ".".join(part for part in parts if part.split("::")[0] not in dropped)


def _amd(compiled: Any) -> dict[str, Any]:
    gcn = compiled.asm["amdgcn"]
    field = lambda name: int(re.findall(rf"\.{name}:\s+(\d+)", gcn)[-1])  # noqa: E731
    words = re.findall(r"(?:global|buffer|flat)_load_(dwordx?\d?|ushort|ubyte|short)", gcn)
    width = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1}
    return {
        "registers": field("vgpr_count"),
        "spills": field("private_segment_fixed_size"),
        "shared": field("group_segment_fixed_size"),
        "occupancy": None,
        "load": max((width[word] for word in words), default=0),
        "atomics": ", ".join(sorted(set(re.findall(r"(?:global|buffer|flat)_atomic_\w+", gcn)))),
    }


def _paths(index: int, kind: str | tuple[str, ...]) -> list[tuple[int, ...]]:
    """List the paths, as `ASTSource` has them, of an argument of this index: one, or one for each entry of a tuple."""
    return [(index,)] if isinstance(kind, str) else [(index, entry) for entry in range(len(kind))]


def compile_case(module: str, index: int, target: str) -> Row:
    """Compile one case for one target, and compare what comes out with its expectations."""
    label, kernel, signature, constexprs, attrs, num_warps, num_stages, expectations = cases(module)[index]
    names = kernel.arg_names
    if missing := set(names) ^ (set(signature) | set(constexprs)):
        raise ValueError(f"{label}: {kernel.__name__} and its case disagree about {sorted(missing)}")
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs=constexprs,
        attrs={
            path: [["tt.divisibility", 16]] for name in attrs for path in _paths(names.index(name), signature[name])
        },
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, **LAUNCH_OPTIONS}
    options |= expectations.get("options", {})
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    found = _amd(compiled) if target.startswith("gfx") else _nvidia(target, compiled)
    broken = []
    if found["spills"]:
        broken.append(f"spills {found['spills']}")
    if found["load"] < expectations.get("load", 0):
        broken.append(f"loads of {found['load']} bytes, not {expectations['load']}")
    if target == "sm_90" and found["occupancy"] < expectations.get("occupancy", 0):
        broken.append(f"occupancy {found['occupancy']:.0%}")
    if expectations.get("vector_atomics") and target in ("sm_90", "sm_100") and ".v" not in found["atomics"]:
        broken.append(f"scalar atomics {found['atomics']}")
    return Row(label=label, target=target, num_warps=num_warps, broken=broken, **found)


def report(targets: list[str], match: str = "", modules: Iterable[str] = MODULES) -> list[Row]:
    """Compile every case whose label matches the regular expression `match` for the targets, in parallel."""
    jobs = [
        (module, index, target)
        for module in modules
        for index, case in enumerate(cases(module))
        for target in targets
        if re.search(match, case[0]) and target in case[7].get("targets", targets)
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_case, *zip(*jobs, strict=True))) if jobs else []


def markdown(rows: list[Row]) -> str:
    lines = [
        "| kernel | target | warps | registers | spills | shared memory | occupancy | widest load | atomics |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        occupancy = "" if row.occupancy is None else f"{row.occupancy:.0%}"
        lines.append(
            f"| {row.label} | {row.target} | {row.num_warps} | {row.registers} | {row.spills} | {row.shared} B "
            f"| {occupancy} | {row.load} B | {row.atomics} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--modules", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--match", default="", help="regular expression that labels must match")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, kernels can only be compiled without it: unset it")
    rows = report(arguments.targets, arguments.match, arguments.modules)
    print(markdown(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if broken := [row for row in rows if row.broken]:
        sys.exit("\n".join(f"{row.label} on {row.target}: {', '.join(row.broken)}" for row in broken))


if __name__ == "__main__":
    main()
