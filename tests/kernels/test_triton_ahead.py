"""The Triton kernels, compiled for GPUs that this machine need not have: they fit into shared memory and registers."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton (a CUDA build of torch brings it)")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gpt.kernels import triton_attention, triton_model, triton_sampler  # noqa: E402

SHARED = 64 * 1024  # bytes that a program may have on every GPU since compute capability 7.5
GPUS = [80, 90, 120]
POINTERS = {"positions": "*i64", "parts": "*fp32", "counters": "*i32", "scale": "*fp32", "residual": "*fp32"}
POINTERS |= {"temperatures": "*fp32", "top_ks": "*i64", "top_ps": "*i64", "min_ps": "*fp32", "streams": "*i64"}
POINTERS |= {"turns": "*i64", "next": "*i64", "ids": "*i64", "ignores_eot": "*i1", "banned": "*i1"}
POINTERS |= {"depths": "*fp32", "weights": "*i32", "masses": "*i64", "ties": "*i32"}
NUMBERS = {"H", "S", "R", "N", "K", "row_stride", "V", "readable", "eot"}


class Compiled:
    """A kernel compiled for a GPU of compute capability `gpu` / 10: its PTX, shared memory and spilled bytes."""

    def __init__(self, folder, kernel, gpu, dtype, constants, floats=(), warps=4):
        names = kernel.arg_names
        types = {name: POINTERS.get(name, "i32" if name in NUMBERS else f"*{dtype}") for name in names}
        types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(constants, "constexpr")
        aligned = {
            (number,): [["tt.divisibility", 16]]
            for number, name in enumerate(names)
            if types[name].startswith("*") or name in ("N", "K", "S")
        }
        values = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, {name: types[name] for name in names}, values, aligned)
        result = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": warps})
        self.ptx, self.shared = result.asm["ptx"], result.metadata.shared
        self.spilled = spilled_bytes(folder, self.ptx, gpu)

    def check(self):
        assert self.shared <= SHARED
        assert self.spilled == 0


def spilled_bytes(folder, ptx, gpu):
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin"
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    variant = "a" if gpu >= 90 else ""
    program = assembler / ("ptxas-blackwell" if gpu >= 100 and (assembler / "ptxas-blackwell").exists() else "ptxas")
    command = [program, "-v", f"--gpu-name=sm_{gpu}{variant}", path, "-o", folder / "kernel.cubin"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("width", [64, 80, 136])
def test_attention_reads_ahead_and_fits(tmp_path, gpu, dtype, size, width):
    padded = 1 << (width - 1).bit_length()
    block = triton_attention.block_for(padded * size)
    constants = {"D": width, "WIDTH": padded, "BLOCK": block, "SPLITS": 8, "PDL": False}
    compiled = Compiled(tmp_path, triton_attention.attend, gpu, dtype, constants)
    compiled.check()
    assert "cp.async" in compiled.ptx  # the next tile is read while this one is used


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_products_of_one_row_fit(tmp_path, gpu, dtype):
    for inputs, outputs, norm in ((768, 2304, True), (3072, 768, False), (768, 50304, True)):
        block, step, warps = triton_model.tile_of(1, outputs)
        constants = {"EPS": 1e-5, "NORM": norm, "GELU": norm, "SCALE": False, "BIAS": True, "RESIDUAL": not norm}
        constants |= {"RB": 1, "BN": block, "BK": step, "TILES": -(-inputs // step), "PDL": gpu >= 90, "scale": None}
        constants |= {"residual": None} if norm else {"gain": None, "shift": None}
        floats = ["x"] if norm else ["out"]
        compiled = Compiled(tmp_path, triton_model.linear, gpu, dtype, constants, floats, warps)
        compiled.check()
        assert ("griddepcontrol.wait" in compiled.ptx) == (gpu >= 90)
    constants = {"EPS": 1e-5, "ADD": True, "WIDTH": 1024, "PDL": False}
    Compiled(tmp_path, triton_model.add_norm, gpu, dtype, constants, ["x"]).check()


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_sampler_fits(tmp_path, gpu, dtype):
    blocks = -(-50257 // triton_sampler.BLOCK)
    constants = {"BANS": False, "WIDTH": blocks * triton_sampler.BLOCK, "GROUPS": 2048, "BLOCK": triton_sampler.BLOCK}
    Compiled(tmp_path, triton_sampler.choose_row, gpu, dtype, constants, warps=triton_sampler.WARPS).check()
