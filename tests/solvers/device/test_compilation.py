"""Every Triton kernel compiles for a card of compute capability 9.0, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cbs_opt.solvers.device import block_kernels, dense_kernels, window_kernels

REAL = {"q", "half", "h", "f", "f_best", "curvature", "shift", "x", "tolerance", "linear"}
TYPES = {
    "block_kernels": {"y": "*i8", "best": "*i8", "active": "*i8", "release": "*i32", "idle": "*i32", "rng": "*i64",
                      "tenure": "*i32", "sizes": "*i32", "done": "*i32"},
    "dense_kernels": {"q": "*fp32", "cost": "*fp32", "state": "*i8", "drop_value": "*fp32", "add_value": "*fp32",
                      "gain": "*fp32", "seed": "*i64", "f": "*fp64", "f_best": "*fp64"}
    | dict.fromkeys("drop_index add_index dropped clock next_clock tabu_index tabu_release tenure best_clock "
                    "moves began".split(), "*i32"),
    "window_kernels": {"q": "*fp64", "row_start": "*i64", "block_first": "*i64", "block_size": "*i64",
                       "diagonal": "*fp64", "s": "*fp64", "x": "*i8", "P": "*i64", "C": "*i64", "cost": "*fp64",
                       "members": "*i64", "available": "*i8", "epsilon": "*fp64", "swaps": "*i64"},
}

def compiled(kernel, real, warps, **constants):
    known = TYPES[kernel.fn.__module__.rpartition(".")[2]]
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = known.get(name) or ("*" + real if name in REAL else "i32")
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return len(made.asm["cubin"])

sizes = {}
for real in ("fp32", "fp64"):
    for P in (32, 256, 1024):
        for kernel in (block_kernels.tabu_swaps, block_kernels.pair_descent):
            sizes[f"{kernel.fn.__name__} {real} {P}"] = compiled(kernel, real, 1 if P <= 256 else 4, P=P)
        sizes[f"one start {real} {P}"] = compiled(block_kernels.tabu_swaps, real, 4, P=P, starts=1)
for extra in ({}, {"tiles": 1}):
    sizes["first"] = compiled(dense_kernels.first_candidates, "fp32", 4, TILE=2048, **extra)
    sizes["drop"] = compiled(dense_kernels.drop_step, "fp32", 4, TILE=2048, TILES=16, **extra)
    sizes["add"] = compiled(dense_kernels.add_step, "fp32", 4, TILE=2048, TILES=16, SLOTS=64, **extra)
for extra in ({}, {"p": 1, "tau": 1}):
    sizes["windows"] = compiled(window_kernels.window_swaps, "fp64", 8, WIDTH=32, CHUNK=2048, **extra)
sizes["partners"] = compiled(window_kernels.partner_costs, "fp64", 4, CHUNK=2048)
print(json.dumps(sizes))
"""


@pytest.mark.slow
def test_kernels_compile_without_a_card(repository, tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(repository), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    if "ptxas" in done.stderr and "Cannot find" in done.stderr:
        pytest.skip("this Triton has no assembler for CUDA")
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) > 20 and min(sizes.values()) > 1000
