"""Every Triton kernel compiles for cards, with the arguments of real launches, on a machine without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

KERNELS = {
    "tabu_swaps", "pair_descent", "first_candidates", "drop_step", "add_step", "partner_costs", "window_swaps",
}  # fmt: skip

SCRIPT = """
import json
import torch
from cbs_opt.bench.gpu import compiled
from cbs_opt.solvers.device.lanes import Lanes, TritonEngine

rows = compiled.compile_all([90], padded=(32, 1024), sizes=(1500, 100_000))
rows += compiled.compile_all([80], padded=(1024,), sizes=(100_000,))

# An argument that the kernel would misread.
q = torch.empty(3, 64, 64, device="meta")
x = torch.empty(3, 2, 64, device="meta")
strided = torch.empty(2, 3, 64, device="meta").transpose(0, 1)
lanes = Lanes(q, q[:, 0], torch.empty(3, dtype=torch.int64, device="meta"))
with compiled.compiling(90, {}):
    try:
        TritonEngine().descend(lanes, x, x, strided, 5, x[:, :, 0].contiguous())
        refused = ""
    except ValueError as error:
        refused = str(error)
print(json.dumps([refused, [(row.kernel, row.arguments, row.capability, row.stack, row.fits) for row in rows]]))
"""


def test_kernels_compile_without_a_card(repository, tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(repository), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(  # here the kernels are those of the interpreter
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    if "Cannot find" in done.stderr and "ptxas" in done.stderr:
        pytest.skip("this Triton has no assembler for CUDA")
    assert done.returncode == 0, done.stderr[-3000:]
    refused, rows = json.loads(done.stdout.splitlines()[-1])
    assert refused == "pair_descent: curvature, shift must be contiguous"
    for capability, sizes in ((80, [1024]), (90, [32, 1024])):
        mine = [row for row in rows if row[2] == capability]
        assert {kernel for kernel, *_ in mine} == KERNELS
        for dtype in ("float32", "float64"):
            for size in sizes:
                assert any(kernel == "tabu_swaps" and f"{dtype}, P {size}" == given for kernel, given, *_ in mine)
        assert any("starts 1," in given for _, given, *_ in mine) and any("p 1" in given for _, given, *_ in mine)
    assert any("tiles 1," in given for _, given, *_ in rows)
    assert [row for row in rows if row[3] or not row[4]] == []  # registers spilled, or more than a card has


def test_every_kernel_of_the_solvers_is_among_them(repository):
    """A new kernel needs a launch in `compiled`."""
    texts = [path.read_text(encoding="utf-8") for path in (repository / "solvers").rglob("*.py")]
    assert {name for text in texts for name in re.findall(r"@triton\.jit.*\ndef ([a-z]\w*)", text)} == KERNELS
