"""Every kernel compiles ahead of time for five GPUs, without one: no spills, tensor cores used and
not made to wait for each other, shared memory within limits.

Run as a program (`python -m tests.test_kernels_aot sm_90`) it prints one JSON line per kernel;
`--table docs/kernels.md` writes that page. The compiler refuses to work in a process that has
TRITON_INTERPRET set, so the tests run it that way too.
"""

import argparse
import concurrent.futures
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

from kernels import similarity, tiles
from kernels.temporal_shift import temporal_shift_kernel

pytestmark = pytest.mark.kernels

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Shared memory per block in bytes: CUDA programming guide, compute capabilities; CDNA3 ISA (64 KB
# of LDS).
TARGETS = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# Tiles of 16 rows are too low for the newer instructions of sm_90 and sm_100.
TENSOR_CORES = {
    "sm_80": r"mma\.sync",
    "sm_89": r"mma\.sync",
    "sm_90": r"wgmma|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
}
TENSOR_CORES["gfx942"] = "v_mfma"
# Of Triton before 3.8, by target: a part of the label, and AMD's registers or NVIDIA's bytes and
# instructions.
SPILLED_BEFORE_3_8 = {
    "gfx942": ("D=512", 59),
    "sm_80": ("hi+lo D=128", 14),
    "sm_89": ("hi+lo D=128", 14),
}


def compile_kernel(kernel, types, constants, target, warps, stages):
    """-> a dict of the compiler's report. types: argument name -> Triton type, for all that is no
    constant.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name in kernel.arg_names if name not in types and name not in constants]
    assert not missing, f"{kernel.__name__}: no type for {missing}"
    # What the launcher knows too: buffers start at multiples of 16 bytes, and padded sizes are
    # multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in types and (types[name][0] == "*" or name in types["aligned"])
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(
        source, target=gpu, options={"num_warps": warps, "num_stages": stages}
    )
    report = {"kernel": kernel.__name__, "target": target, "warps": warps, "stages": stages}
    report["shared"] = compiled.metadata.shared
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    report["wide_accesses"] = len(
        re.findall(
            r"_(?:load|store)_dwordx4"
            if amd
            else r"\b(?:ld|st)\.global\S*\.v4|cp\.async\S* .*, 0x10,",
            assembly,
        )
    )
    report["tensor_cores"] = len(re.findall(TENSOR_CORES[target], assembly))
    report["carried"] = [
        loop.count(" = ") for loop in re.findall(r"iter_args\((.*?)\) ->", compiled.asm["ttgir"])
    ]
    report["triton"] = triton.__version__
    if amd:
        report["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        report["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])
        return report
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True
        ).stdout
        sass = subprocess.run(
            [tools / "nvdisasm", "-c", cubin.name], capture_output=True, text=True
        ).stdout
    report["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
    report["spills"] = int(re.search(r"STACK:(\d+)", usage)[1]) + len(
        re.findall(r"\b(?:LDL|STL)\b", sass)
    )
    for name in ("SHFL", "MUFU.EX2"):
        report[name.lower()] = len(re.findall(rf"\b{re.escape(name)}\b", sass))
    # Exponentials between an asynchronous product and the wait for it.
    products = re.findall(r"\bHGMMA\b.*?\bWARPGROUP\.DEPBAR", sass, re.DOTALL)
    report["overlapped"] = sum(product.count("MUFU.EX2") for product in products)
    nvidia = triton.knobs.nvidia
    ptxas = nvidia.ptxas_blackwell if target == "sm_100" else nvidia.ptxas
    report["ptxas"] = ptxas.version
    if "wgmma" in assembly:
        report["serialized"] = serialized(ptxas.path, assembly)
    return report


def serialized(ptxas, assembly):
    """Does ptxas say that instructions of a product wait for each other, one by one?"""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(assembly)
        ptx.flush()
        gpu = re.search(r"\.target (\w+)", assembly)[1]
        said = subprocess.run(
            [ptxas, "-v", f"--gpu-name={gpu}", ptx.name, "-o", os.devnull],
            capture_output=True,
            text=True,
        )
    assert said.returncode == 0, said.stderr
    return "serializ" in said.stderr


def argument_types(kernel, element, *, fp32=(), int64=(), aligned=(), scalars=()):
    """Pointers to element but for those named; integers but for the scalars; lower-case names are
    no constants.
    """
    types = {"aligned": aligned}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            types[name] = "*fp32" if name in fp32 else "*i64" if name in int64 else f"*{element}"
        elif name.islower():
            types[name] = "fp32" if name in scalars else "i32"
    return types


def similarity_cases(target, every):
    """(label, kernel, types, constants, warps, stages) of the tiles."""

    chosen = [(1, "bf16", 128), (1, "bf16", 256), (1, "bf16", 512), (2, "fp16", 128)]
    if every:
        chosen = [
            (p, e, d)
            for p, e in ((1, "bf16"), (1, "fp16"), (2, "fp16"), (2, "bf16"))
            for d in (16, 64, 128, 256, 512)
        ]
    for planes, element, block_d in chosen:
        for name in ("half", "full", "bwd", "stats"):
            tile = tiles.tile(name.replace("stats", "bwd"), planes == 2, block_d, target)
            if tile is None or (
                name == "half" and (planes, element) == (2, "bf16")
            ):  # rows of unknown length: full grid
                continue
            kernel = {
                "half": similarity.half_kernel,
                "full": similarity.full_kernel,
                "bwd": similarity.bwd_kernel,
                "stats": similarity.stats_kernel,
            }[name]
            block_m, block_n, warps, stages, *_ = tile
            sums = (
                "slots_ptr",
                "tops_ptr",
                "sums_ptr",
                "lse_rows_ptr",
                "lse_keys_ptr",
                "partial_ptr",
            )
            types = argument_types(
                kernel,
                element,
                fp32=sums,
                aligned=("stride_slot", "stride_kind", "keys_per_range"),
                scalars=("shift",),
            )
            constants = {
                "PAIR_SHIFT": 1,
                "SPLIT": planes == 2,
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
            }
            constants["BLOCK_D"] = block_d
            label = f"{element}{' hi+lo' if planes == 2 else ''} D={block_d}, {block_m}x{block_n}"
            if name == "stats":
                for kind, of_rows, shift in (("pairs", "*fp32", 1), ("classes", "*i32", 0)):
                    of = {"of_rows_ptr": of_rows, "of_keys_ptr": of_rows, "factor_ptr": "*fp32"}
                    sized = constants | {"PAIR_SHIFT": shift}
                    yield f"stats of {kind} {label}", kernel, types | of, sized, warps, stages
                continue
            if name != "bwd":
                yield f"{name} {label}", kernel, types, constants, warps, stages
                continue
            constants |= {"LOG2_SCALE": 13.0 if element == "fp16" else 0.0}
            constants |= {"AHEAD": False, "POLYNOMIAL": 0}
            if (target, planes, element, block_d) == ("sm_90", 1, "bf16", 128):
                for variant, (m, n, *launch), switched in (
                    ("ahead", (128, 64, 8, 2), {"AHEAD": True}),
                    ("ahead", (64, 64, 4, 3), {"AHEAD": True}),
                    ("half a polynomial", (64, 128, 4, 2), {"POLYNOMIAL": 2}),
                    ("a quarter a polynomial", (64, 128, 4, 2), {"POLYNOMIAL": 4}),
                ):
                    sized = constants | {"SHIFTED": True, "BLOCK_M": m, "BLOCK_N": n} | switched
                    yield f"bwd, {variant}, bf16 D=128, {m}x{n}", kernel, types, sized, *launch
            shifted = (True, False) if every or block_d == 128 else (True,)
            for flag in shifted if element == "fp16" or planes == 1 else (False,):
                yield (
                    f"bwd{'' if flag else ', two exponentials,'} {label}",
                    kernel,
                    types,
                    constants | {"SHIFTED": flag},
                    warps,
                    stages,
                )


def loss_cases(target):
    """The kernels around NT-Xent's and SupCon's tiles, and those that do both at once."""

    losses, supervised = sys.modules["kernels.nt_xent"], sys.modules["kernels.sup_con"]
    fp32 = (
        "temperature_ptr",
        "pos_ptr",
        "tops_ptr",
        "sums_ptr",
        "negatives_ptr",
        "lse_ptr",
        "loss_ptr",
        "dloss_ptr",
    )
    fp32 += (
        "partial_ptr",
        "dtemperature_ptr",
        "keys_ptr",
        "out_ptr",
        "partials_ptr",
        "scale_ptr",
        "positives_ptr",
    )
    common = {
        "TEMPERATURE_IS_TENSOR": True,
        "NORMALIZE": True,
        "DECOUPLED": False,
        "BLOCK_P": 16,
    }
    common |= {
        "BLOCK_D": 128,
        "FP16": False,
        "SPLIT": False,
        "SHIFTED": False,
        "SLOTS": 16,
        "BLOCK_R": 128,
        "BLOCK_K": 64,
        "BLOCK_N": 128,
        "LOG2_SCALE": 0.0,
    }
    for kernel in (
        losses._nt_xent_prepare_kernel,
        losses._nt_xent_finish_kernel,
        losses._nt_xent_epilogue_kernel,
        losses._nt_xent_few_rows_fwd_kernel,
        losses._nt_xent_few_rows_bwd_kernel,
        supervised.class_sum_kernel,
        supervised._sup_con_prepare_kernel,
        supervised._sup_con_few_rows_fwd_kernel,
        supervised._sup_con_positives_kernel,
        supervised._sup_con_finish_kernel,
        supervised._sup_con_epilogue_kernel,
    ):
        warps, stages = 4, 3
        types = argument_types(
            kernel,
            "bf16",
            fp32=fp32,
            int64=("order_ptr", "starts_ptr", "ends_ptr", "labels_ptr"),
            aligned=("stride_slot", "keys_per_range"),
            scalars=("temperature", "shift"),
        )
        constants = {name: common[name] for name in kernel.arg_names if name in common}
        if kernel is supervised.class_sum_kernel:
            constants |= {"BLOCK_D": 32, "STEP": 1, "SPAN": supervised.CLASS_SPAN}
        if "sup_con" in kernel.__name__:
            constants["BLOCK_R"] = supervised._block_r(constants["BLOCK_D"])
            constants = {
                name: value for name, value in constants.items() if name in kernel.arg_names
            }
        if kernel is supervised._sup_con_positives_kernel:
            for planes, element, block_d in ((1, "bf16", 128), (2, "fp16", 128), (1, "bf16", 512)):
                tile = tiles.tile("bwd", planes == 2, block_d, target)
                if tile is None:
                    continue
                block_m, block_n, warps, stages, *_ = tile
                typed = types | {"u_ptr": f"*{element}"}
                sized = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d}
                label = f"{kernel.__name__} {element}{' hi+lo' if planes == 2 else ''} D={block_d}"
                yield (
                    label,
                    kernel,
                    typed,
                    constants | sized | {"SPLIT": planes == 2},
                    warps,
                    stages,
                )
            continue
        if "few_rows" not in kernel.__name__:
            yield kernel.__name__, kernel, types, constants, warps, stages
            continue
        block_m, block_n, warps, stages, *_ = tiles.few_rows_tile(target)
        constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n}
        widths = [("bf16", 128, False), ("fp16", 64, True)]
        if kernel is supervised._sup_con_few_rows_fwd_kernel:
            widths += [("bf16", 256, False), ("fp16", 128, True)]
        for element, block_d, split in widths:
            typed = {
                name: f"*{element}" if kind == "*bf16" else kind for name, kind in types.items()
            }
            sized = constants | {"BLOCK_D": block_d, "SPLIT": split}
            label = (
                f"{kernel.__name__} {element}{' hi+lo' if split else ''} D={block_d},"
                f" {block_m}x{block_n}"
            )
            yield label, kernel, typed, sized, warps, stages


def shift_cases(target, every):

    fused = sys.modules["kernels.shift_conv1x1"]
    for channels_last in (False, True):
        types = argument_types(temporal_shift_kernel, "bf16")
        constants = {
            "CHANNELS_LAST": channels_last,
            "SWAP": False,
            "PADDING": "zero",
            "TRANSPOSED": False,
        }
        constants |= {"VECTOR": 8, "BLOCK": 1024}
        constants_of_shift = constants
        label = f"shift bf16 {'channels_last' if channels_last else 'contiguous'}"
        yield label, temporal_shift_kernel, types, constants, 4, 3
    types = argument_types(temporal_shift_kernel, "bf16")
    yield (
        "shift bf16 replicate",
        temporal_shift_kernel,
        types,
        constants | {"PADDING": "replicate"},
        4,
        3,
    )
    # Triton turns an argument of 1 into a constant, which has other methods.
    for padding in ("circulant", "replicate"):
        ones = {"num_frames": 1, "PADDING": padding}
        left = {name: kind for name, kind in types.items() if name not in ones}
        yield (
            f"shift bf16 one frame, {padding}",
            temporal_shift_kernel,
            left,
            constants_of_shift | ones,
            4,
            3,
        )
    # As many channels as the forward keeps; folds that are and are not multiples of a load's width.
    widest = fused.RESIDENT.get(target, 128)
    for vector in (2, 4, 8) if every else (2, 8):
        for name in ("fwd", "fwd_loop", "dx", "dw"):
            kernel = getattr(fused, f"shift_conv1x1_{name}_kernel")
            types = argument_types(kernel, "bf16", fp32=("partial_ptr",))
            block_m, block_n, block_k, warps, stages = fused.TILES.get(target, fused.TILE)[
                name.split("_")[0]
            ]
            constants = {
                "VECTOR": vector,
                "IN_VECTOR": 8,
                "OUT_VECTOR": 8,
                "PRECISION": "ieee",
                "HAS_BIAS": True,
            }
            constants |= {
                "SMALL_AREA": vector == 2,
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_K": block_k,
            }
            channels = widest if vector == 8 else widest * 5 // 8
            fold = channels // 8 // 8 * 8 + vector % 8
            products = fused.segments(channels, fold, 2 * fold)
            assert sum(products.values()) <= widest, products
            constants |= products
            constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
            label = f"shift_conv1x1 {name} bf16, runs of {vector}, {block_m}x{block_n}"
            yield label, kernel, types, constants, warps, stages


def cases(target, every):
    return (*similarity_cases(target, every), *loss_cases(target), *shift_cases(target, every))


TABLE = """# What the compilers report of every kernel

Made without a GPU by

```
python -m tests.test_kernels_aot --table docs/kernels.md
```

Triton {triton}; ptxas {ptxas}. Each cell: tile, warps/stages: registers, shared memory,
instructions of the tensor cores (`mma.sync`, `wgmma`, `tcgen05.mma`, `v_mfma`). The tests assert
that nothing spills, that no instruction of a product waits for the one before, and that shared
memory is within the GPU's limit. Where a cell is empty that GPU has no such tile. `python -m
tests.test_kernels_aot sm_90 --every` reports all types and widths.
[kernels/README.md](../kernels/README.md) says what these reports decided.
"""


def table(reports):
    """docs/kernels.md of the reports of all targets."""
    found = {name: sorted({r[name] for r in reports if name in r}) for name in ("triton", "ptxas")}
    lines = [TABLE.format(**{k: ", ".join(v) for k, v in found.items()})]
    lines.append(f"| kernel | {' | '.join(TARGETS)} |\n|{' --- |' * (1 + len(TARGETS))}")
    rows = {}
    for r in sorted(reports, key=lambda r: [*TARGETS].index(r["target"])):
        name, size = re.fullmatch(r"(.*?)(?:, (\d+x\d+))?", r["label"]).groups()
        cell = f"{size + ' ' if size else ''}{r['warps']}/{r['stages']}: {r['registers']},"
        cell += f" {r['shared'] / 1024:.0f} KB, {r['tensor_cores']}"
        rows.setdefault(name, {}).setdefault(r["target"], []).append(cell)
    for name, cells in rows.items():
        lines.append(f"| {name} | {' | '.join('; '.join(cells.get(t, ())) for t in TARGETS)} |")
    return "\n".join(lines)


def reports(target, *options):
    """What a process of its own says about every kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_kernels_aot", target, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def pending_reports():
    """All targets' reports, made side by side: one compiler is one thread."""
    pytest.importorskip("triton", reason="pip install triton")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {target: pool.submit(reports, target) for target in TARGETS}


def check(target, reports):
    assert len(reports) >= 20
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    spilling, most = "", 0
    if version < (3, 8):
        spilling, most = SPILLED_BEFORE_3_8.get(target, ("", 0))
    for report in reports:
        assert report["spills"] <= (most if spilling in report["label"] else 0), report
        assert report["shared"] <= TARGETS[target], report
        products = any(
            name in report["kernel"]
            for name in (
                "half_",
                "full_",
                "stats_",
                "bwd_kernel",
                "few_rows",
                "positives",
                "conv1x1",
            )
        )
        assert (report["tensor_cores"] > 0) == products, report
        assert not report.get("serialized"), report
        if version >= (3, 8) or "ahead" in report["label"]:  # earlier ones overlap others, too
            assert (report.get("overlapped", 0) > 0) == ("ahead" in report["label"]), report
        if "polynomial" in report["label"]:
            (plain,) = [r for r in reports if r["label"] == "bwd bf16 D=128, 64x128"]
            assert report["mufu.ex2"] < plain["mufu.ex2"], report
        if report["kernel"] == "temporal_shift_kernel" or "runs of 8" in report["label"]:
            assert report["wide_accesses"] > 0, report
        if report["label"] == "shift bf16 replicate":
            # The frame before and the frame itself, which start out equal.
            assert report["carried"] == [2], report


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills_and_with_tensor_cores(target, pending_reports):
    check(target, pending_reports[target].result())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_type_and_width_compiles(target):
    pytest.importorskip("triton", reason="pip install triton")
    check(target, reports(target, "--every"))


def test_the_table_is_of_these_kernels_and_tiles():
    pytest.importorskip("triton", reason="pip install triton")
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    versions = re.search(r"Triton (\d\S+); ptxas (\d.*?)\. Each", text).groups()
    known = dict(zip(("triton", "ptxas"), versions, strict=True))
    known |= {"registers": 0, "shared": 0, "tensor_cores": 0}
    made = [
        {"label": label, "target": target, "warps": warps, "stages": stages, **known}
        for target in TARGETS
        for label, _, _, _, warps, stages in cases(target, False)
    ]
    figures = re.compile(r"(?<=\d: )\d+, \d+ KB, \d+(?= \||;)")
    assert figures.sub("0, 0 KB, 0", text) == table(made) + "\n", "make docs/kernels.md anew"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.test_kernels_aot")
    parser.add_argument("target", nargs="?", choices=TARGETS, help="print a JSON line per kernel")
    parser.add_argument("--every", action="store_true", help="of a target: every type and width")
    parser.add_argument(
        "--table", type=pathlib.Path, metavar="FILE", help="write a page of all targets"
    )
    args = parser.parse_args(argv)
    if (args.table is None) == (args.target is None):
        parser.error("name a target, or --table FILE of all")
    if args.table:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(reports, TARGETS))
        args.table.write_text(table([*itertools.chain(*made)]) + "\n", encoding="utf-8")
    else:
        for label, kernel, types, constants, warps, stages in cases(args.target, args.every):
            report = compile_kernel(kernel, types, constants, args.target, warps, stages)
            print(json.dumps({"label": label, **report}), flush=True)


if __name__ == "__main__":
    main()
