"""Every kernel compiles ahead of time for four GPUs, without one: no spills, tensor cores used, shared memory within limits.

Run as a program (`python tests/test_kernels_aot.py sm_90`) it prints one JSON line per kernel: the tables of kernels/README.md.
The compiler refuses to work in a process that has TRITON_INTERPRET set, so the tests run it that way too.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Shared memory per block in bytes: CUDA programming guide, compute capabilities; CDNA3 ISA (64 KB of LDS).
TARGETS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


def compile_kernel(kernel, types, constants, target, warps, stages):
    """-> a dict of the compiler's report. types: argument name -> Triton type, for all that is no constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name in kernel.arg_names if name not in types and name not in constants]
    assert not missing, f"{kernel.__name__}: no type for {missing}"
    # What the launcher knows too: buffers start at multiples of 16 bytes, and padded sizes are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in types and (types[name][0] == "*" or name in types["aligned"])
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=gpu, options={"num_warps": warps, "num_stages": stages})
    report = {"kernel": kernel.__name__, "target": target, "warps": warps, "stages": stages}
    report["shared"] = compiled.metadata.shared
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    report["tensor_cores"] = len(re.findall(re.escape(TENSOR_CORES[target]), assembly))
    if amd:
        report["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        report["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])
        return report
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin.name], capture_output=True, text=True).stdout
    report["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
    report["spills"] = int(re.search(r"STACK:(\d+)", usage)[1]) + len(re.findall(r"\b(?:LDL|STL)\b", sass))
    for name in ("SHFL", "MUFU.EX2"):
        report[name.lower()] = len(re.findall(rf"\b{re.escape(name)}\b", sass))
    return report


def gram_cases(target):
    """(kernel, types, constants, warps, stages, label) of the tiles, for every type of rows and width."""
    from kernels import gram

    for planes, element in ((1, "bf16"), (1, "fp16"), (2, "fp16")):
        for block_d in (64, 128, 256, 512):
            for name in ("half", "full", "bwd"):
                kernel = {"half": gram.half_kernel, "full": gram.full_kernel, "bwd": gram.bwd_kernel}[name]
                block_m, block_n, warps, stages = gram.tile(name, planes, block_d, target)
                types = {"aligned": ("stride_slot", "keys_per_split"), "shift": "fp32"}
                for argument in kernel.arg_names:
                    if argument in ("u_ptr", "rows_ptr", "keys_ptr"):
                        types[argument] = f"*{element}"
                    elif argument.endswith("_ptr"):
                        types[argument] = "*fp32"
                    elif argument.islower() and argument != "shift":
                        types[argument] = "i32"
                constants = {"PAIR_SHIFT": 1, "SPLIT": planes == 2, "BLOCK_M": block_m, "BLOCK_N": block_n}
                constants["BLOCK_D"] = block_d
                if name == "bwd":
                    constants |= {"SHIFTED": True, "LOG2_SCALE": 13.0 if element == "fp16" else 0.0}
                label = f"{name} {'split ' if planes == 2 else ''}{element} D={block_d} {block_m}x{block_n}"
                yield kernel, types, constants, warps, stages, label


def main(target):
    sys.path.insert(0, str(ROOT))
    for kernel, types, constants, warps, stages, label in gram_cases(target):
        report = compile_kernel(kernel, types, constants, target, warps, stages)
        print(json.dumps({"label": label, **report}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
