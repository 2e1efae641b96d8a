"""Compiles every Triton kernel as the solvers launch it, for cards that are not here.

Room: bench; a program of its own, `python -m cbs_opt.bench.gpu.compiled`, which a test uses, too. The solvers' own
code launches the kernels, most of them on tensors that hold nothing; a launch ends after the compilation. What the
interpreter accepts and the compiler does not shows here, as do registers, spills and shared memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbs_opt.bench.gpu import problems
from cbs_opt.device import Card
from cbs_opt.selection import SelectionObjective
from cbs_opt.solvers.device import dense
from cbs_opt.solvers.device.lanes import LARGEST, Lanes, TritonEngine
from cbs_opt.solvers.device.local_search import DeviceLocalSearch
from cbs_opt.solvers.device.objective import DeviceObjective

CAPABILITIES = (80, 90)
"""Compute capabilities: A100, H100 and H200."""

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may take (CUDA C++ Programming Guide, table of compute capabilities)."""

MOST_REGISTERS = 65536
"""Registers of a multiprocessor."""

_LARGEST_SECOND = 65535  # programs along the second axis of a grid
_NO_CARD = Card("no card", "cpu", True)


@dataclass(frozen=True)
class Compiled:
    """One kernel as it was launched.

    Attributes
    ----------
    kernel, arguments : str
        `arguments` names the types of the numbers, and the constants.
    capability, warps : int
    registers : int
        Of a thread.
    stack : int
        Bytes of local memory of a thread: spilled registers, as no kernel declares arrays.
    shared : int
        Bytes.
    """

    kernel: str
    arguments: str
    capability: int
    warps: int
    registers: int
    stack: int
    shared: int

    @property
    def fits(self) -> bool:
        """Whether the card can run it."""
        room = self.registers * 32 * self.warps <= MOST_REGISTERS
        return room and self.shared <= SHARED_LIMIT[self.capability]


class _Driver:
    """What Triton asks a driver before a compilation."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling(capability: int, found: dict[str, Compiled]) -> Iterator[None]:
    """Within it a launch compiles the kernel, adds it to `found`, and does nothing else."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        loose = [name for name, value in tensors.items() if not value.is_contiguous()]
        if loose:
            raise ValueError(f"{kernel.__name__}: {', '.join(loose)} must be contiguous")
        if not (0 < grid[0] < 1 << 31 and all(0 < size <= _LARGEST_SECOND for size in grid[1:])):
            raise ValueError(f"{kernel.__name__}: no card has a grid of {grid}")
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        if made.hash not in found:
            found[made.hash] = _facts(kernel, capability, given, made)
        return made

    driver.set_active(_Driver(capability))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
        with suppress(RuntimeError):  # without a card there is nothing to go back to
            driver.reset_active()


def _facts(kernel: Any, capability: int, given: dict[str, Any], made: Any) -> Compiled:
    """Resources of a compiled kernel, by `cuobjdump`, which comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", printed)}
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    real = sorted({str(value.dtype).removeprefix("torch.") for value in tensors})
    # Triton makes a constant of every number that is 1, too.
    constants = [
        f"{parameter.name} {value}"
        for parameter in kernel.params
        if isinstance(value := given.get(parameter.name), int) and (parameter.is_constexpr or value == 1)
    ]
    return Compiled(
        kernel.__name__, ", ".join([*real, *constants]), capability, made.metadata.num_warps, usage["REG"],
        usage["STACK"], made.metadata.shared,
    )  # fmt: skip


# Launches ---------------------------------------------------------------------------------------------------


def _blocks(sizes: Sequence[int]) -> None:
    """Tabu search and descent on blocks."""
    for dtype in (torch.float32, torch.float64):
        for P in sizes:
            for starts in (64, 1) if max(sizes) == P else (64,):
                q = torch.empty(500, P, P, dtype=dtype, device="meta")
                lanes = Lanes(q, q[:, 0], torch.empty(500, dtype=torch.int64, device="meta"))
                y = torch.empty(500, starts, P, dtype=torch.int8, device="meta")
                rng = torch.empty(500, starts, dtype=torch.int64, device="meta")
                tenure = rng.to(torch.int32)
                state = lanes.tabu_state(y, rng)
                engine = TritonEngine()
                engine.tabu(lanes, state, 2000, 1000, tenure)
                engine.descend(lanes, y.to(dtype), state.h, state.h, 2000, state.f)


def _dense(sizes: Sequence[int]) -> None:
    """Tabu search over all variables of a large block."""
    for n in sizes:
        tiles = -(-n // dense.TILE)
        y = torch.empty(16, n, dtype=torch.bool, device="meta")
        seeds = torch.empty(16, dtype=torch.int64, device="meta")
        branch = dense.Branch(y, y[0], seeds, seeds.to(torch.int32), 64, tiles)
        branch.first()
        branch.steps(torch.empty(n, n, device="meta"), 1)


def _windows() -> None:
    """A step of Algorithm 1; these tensors hold numbers, as the steps between the launches look at them."""
    rng = np.random.default_rng(0)
    for n, p, rho, tau in ((64, 32, 10, 20), (30, 1, 1, 1), (30, 29, 10, 20)):
        problem = SelectionObjective(problems.made(rng, n, 8, [n]))
        objective = DeviceObjective(problem, _NO_CARD)
        search = DeviceLocalSearch(objective, [np.arange(n)], lambda doubled: 1e-6 * doubled, rho, tau)
        start = torch.zeros(2, n, dtype=torch.bool)
        start[:, :p] = True
        search.walk(start, 1, lambda values, selection, taken: False)


def compile_all(
    capabilities: Sequence[int] = CAPABILITIES,
    padded: Sequence[int] = (32, 64, 128, 256, 512, LARGEST),
    sizes: Sequence[int] = (1500, 30_000, 100_000),
) -> list[Compiled]:
    """Every kernel for cards of these compute capabilities.

    Parameters
    ----------
    capabilities : sequence of int
    padded : sequence of int
        Sizes of blocks, powers of two.
    sizes : sequence of int
        Of large dense blocks.

    Raises
    ------
    Exception
        Of Triton, where a kernel does not compile.
    ValueError
        Where an argument is not contiguous, or a grid is too large.
    """
    found: list[Compiled] = []
    for capability in capabilities:
        mine: dict[str, Compiled] = {}
        with compiling(capability, mine):
            _blocks(padded)
            _dense(sizes)
            _windows()
        found += mine.values()
    return found


def markdown(rows: Sequence[Compiled]) -> str:
    """The table of registers, spills and shared memory."""
    out = ["| kernel | arguments | capability | warps | registers | stack, bytes | shared, bytes |"]
    out.append("|---|---|---|---|---|---|---|")
    for row in rows:
        capability = f"{row.capability // 10}.{row.capability % 10}"
        numbers = (capability, row.warps, row.registers, row.stack, row.shared)
        out.append("| " + " | ".join([f"`{row.kernel}`", row.arguments, *map(str, numbers)]) + " |")
    return "\n".join(out)


def main() -> int:
    """Entry point: prints the table; returns the exit code, 1 where a kernel needs more than a card has."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is declared, which is later
    rows = compile_all()
    sys.stdout.write(markdown(rows) + "\n")
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
