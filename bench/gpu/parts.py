"""The card itself and the kernels: copy, products, launches, tabu search on blocks and on dense problems."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from cbs_opt.bench.gpu.measure import Bench
from cbs_opt.device import Constants, keep_constants
from cbs_opt.solvers.device import dense
from cbs_opt.solvers.device.lanes import CpuEngine, Lanes, TritonEngine, padded_size
from cbs_opt.solvers.kernels import selection_numba

_ENDLESS = 1 << 30  # stall that is never reached
_TEST_SECONDS = 80.0


def card(bench: Bench) -> None:
    """The ceilings, and the constants of the cost model."""
    began = time.perf_counter()
    device = bench.card.device
    torch.zeros(1, device=device).sum().item()
    start = time.perf_counter() - began
    bench.row(f"first use of {bench.card.name}", start, "s")
    bandwidth = bench.copy_bandwidth()
    bench.row("copy within the card, read and written", bandwidth, "B/s")
    size = 1 << (12 if bench.tiny else 28)
    there = torch.randn(size, dtype=torch.float64 if bench.tiny else torch.float32)
    upload = there.numel() * there.element_size() / bench.seconds(lambda: there.to(device, copy=True))
    bench.row("upload from pageable memory", upload, "B/s")
    flops = {}
    for dtype in (torch.float64, torch.float32):
        n = 64 if bench.tiny else 8192
        a = torch.randn(n, n, dtype=dtype, device=device)
        flops[dtype] = 2.0 * n**3 / bench.seconds(partial(torch.mm, a, a))
        bench.row(f"matrix product in {str(dtype).removeprefix('torch.')}", flops[dtype], "flop/s")
    x, launches = torch.zeros(1, device=device), 10 if bench.tiny else 2000

    def launch() -> None:
        for _ in range(launches):
            x.add_(1.0)

    latency = bench.seconds(launch) / launches
    bench.row("one of many dependent launches", latency, "s")
    lone, _ = _tabu_rate(bench, 1, 256, 1, torch.float32, 50 if bench.tiny else 4000)
    many, _ = _tabu_rate(bench, 2 if bench.tiny else 128, 256, 2 if bench.tiny else 64, torch.float32,
                         10 if bench.tiny else 2000)  # fmt: skip
    swap, per_weight = _cpu_swaps(bench)
    matrix, cores = torch.randn((64 if bench.tiny else 2048,) * 2, dtype=torch.float64), torch.get_num_threads()
    torch.set_num_threads(1)
    product, matrix_bytes = matrix @ matrix, matrix.numel() * matrix.element_size()
    cpu_flops = 2.0 * matrix.shape[0] ** 3 / _cpu_seconds(lambda: torch.mm(matrix, matrix, out=product))
    cpu_copy = 2.0 * matrix_bytes / _cpu_seconds(lambda: product.copy_(matrix))
    torch.set_num_threads(cores)
    bench.row("one core: matrix product in float64", cpu_flops, "flop/s")
    found = replace(
        Constants(),
        source=f"measured on {bench.card.name}",
        bandwidth=bandwidth,
        upload=upload,
        flops64=flops[torch.float64],
        flops32=flops[torch.float32],
        launch=latency,
        start=max(start, 1e-3),
        lane_step=1.0 / lone,
        lanes=max(many / lone, 1.0),
        cpu_flops64=cpu_flops,
        cpu_bandwidth=cpu_copy,
        cpu_swap=swap,
        cpu_swap_weight=per_weight,
    )
    if bench.device == "cuda":
        path = keep_constants(bench.card.name, found)
        bench.row("constants of the cost model written", 1.0, note=str(path))


def _cpu_seconds(do: object) -> float:
    began = time.perf_counter()
    do()  # type: ignore[operator]
    return max(time.perf_counter() - began, 1e-9)


def _lanes(bench: Bench, blocks: int, size: int, dtype: torch.dtype, where: torch.device) -> Lanes:
    """Random semidefinite blocks of half rank."""
    generator = torch.Generator(where).manual_seed(0)
    P = padded_size(size)
    q = torch.zeros(blocks, P, P, dtype=dtype, device=where)
    for first in range(0, blocks, 64):
        G = torch.randn(min(64, blocks - first), size // 2, size, generator=generator, dtype=dtype, device=where)
        q[first : first + 64, :size, :size] = torch.bmm(G.transpose(1, 2), G) / size
    linear = torch.zeros(blocks, P, dtype=dtype, device=where)
    return Lanes(q, linear, torch.full((blocks,), size, device=where))


def _tabu_rate(
    bench: Bench, blocks: int, size: int, starts: int, dtype: torch.dtype, steps: int
) -> tuple[float, float]:
    """Swaps per second, and the relative drift of the objective in so many steps."""
    where = bench.card.device
    lanes = _lanes(bench, blocks, size, dtype, where)
    generator = torch.Generator(where).manual_seed(1)
    x = torch.rand(blocks, starts, lanes.padded, generator=generator, dtype=dtype, device=where)
    y = lanes.round(x, torch.full((blocks,), size // 2, device=where))
    rng = torch.randint(1, 1 << 62, (blocks, starts), generator=generator, device=where)
    tenure = torch.full((blocks, starts), 8, dtype=torch.int32, device=where)
    state, engine = lanes.tabu_state(y, rng), TritonEngine()
    before = lanes.values(state.best).mean()
    seconds = bench.seconds(lambda: engine.tabu(lanes, state, steps, _ENDLESS, tenure), 3)
    drift = lanes.refresh(state)
    if not bool(lanes.values(state.best).mean() < before) and not bench.tiny:
        raise RuntimeError("the tabu search improved nothing")
    return blocks * starts * steps / seconds, drift


def _cpu_swaps(bench: Bench) -> tuple[float, float]:
    """Seconds of a tabu step on one core: for 64 weights, and for each further one."""
    found = []
    for size in (64, 256):
        where, steps = torch.device("cpu"), 200 if bench.tiny else 50_000
        lanes = _lanes(bench, 1, size, torch.float64, where)
        y = lanes.round(torch.rand(1, 1, lanes.padded), torch.tensor([size // 2]))
        state = lanes.tabu_state(y, torch.ones(1, 1, dtype=torch.int64))
        engine, tenure = CpuEngine(selection_numba), torch.full((1, 1), 8, dtype=torch.int32)
        engine.tabu(lanes, state, 1, _ENDLESS, tenure)
        found.append(_cpu_seconds(lambda: engine.tabu(lanes, state, steps, _ENDLESS, tenure)) / steps)  # noqa: B023
        bench.row(f"one core: tabu on a block of {size}", 1.0 / found[-1], "swaps/s")
    return found[0], max((found[1] - found[0]) / 192, 1e-12)


def blocks(bench: Bench) -> None:
    """Tabu search on many blocks."""
    cases = [
        (500, 64, 64, torch.float32, 2000, 5e8),
        (500, 64, 64, torch.float64, 2000, None),
        (64, 1024, 64, torch.float32, 1000, 2e8),
        (200, 128, 64, torch.float32, 2000, None),
        (100, 256, 64, torch.float32, 2000, None),
        (64, 512, 64, torch.float32, 1000, None),
    ]
    if bench.tiny:
        cases = [(2, 20, 2, torch.float32, 10, None), (1, 40, 2, torch.float64, 10, None)]
    for count, size, starts, dtype, steps, goal in cases:
        name = str(dtype).removeprefix("torch.")
        rate, drift = _tabu_rate(bench, count, size, starts, dtype, steps)
        bench.row(
            f"tabu, {count} blocks of {size}, {starts} starts, {name}", rate, "swaps/s", at_least=goal,
            note=f"drift {drift:.1e} of the objective without a refresh",
        )  # fmt: skip
        _release(bench)


def _release(bench: Bench) -> None:
    """Give memory back before the next size."""
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()


def dense_blocks(bench: Bench) -> None:
    """Tabu search on one large dense problem, against the copy of the same process."""
    copy, where = bench.copy_bandwidth(), bench.card.device
    sizes = [64] if bench.tiny else [30_000, 100_000, 10_000]
    starts = 2 if bench.tiny else 64
    for n in sizes:
        if 4.6 * n * n > bench.card.free_bytes():
            bench.row(f"dense n = {n:,}: not enough memory", None)
            continue
        generator = torch.Generator(where).manual_seed(0)
        G = torch.randn(n, 16 if bench.tiny else 256, generator=generator, device=where)
        q = torch.empty(n, n, device=where)
        for first in range(0, n, 4096):
            q[first : first + 4096] = G[first : first + 4096] @ G.T / G.shape[1]
        # Different points, or the starts would read the same rows of Q, from the cache.
        order = torch.rand(starts, n, generator=generator, device=where).argsort(1)
        y = torch.zeros(starts, n, dtype=torch.bool, device=where).scatter_(1, order[:, : n // 2], True)
        best = 0.0
        choices = [(2048, 4)] if bench.tiny or n != 30_000 else [(2048, 4), (2048, 1), (1024, 4), (4096, 4)]
        for tile, branches in choices:
            rate, drift, gain = _dense_rate(bench, q, y, tile, branches)
            share = 8.0 * n * rate / copy
            best = max(best, share)
            bench.row(
                f"dense n = {n:,}, {starts} starts, tiles of {tile}, {branches} branches", rate, "swaps/s",
                note=f"rows of Q at {share:.0%} of the copy; drift {drift:.1e}; objective {gain:+.1%}",
            )  # fmt: skip
        bench.row(
            f"dense n = {n:,}: rows of Q, share of the copy", best, "", at_least=0.5 if n == 30_000 else None
        )
        del q
        _release(bench)


def _dense_rate(
    bench: Bench, q: torch.Tensor, y: torch.Tensor, tile: int, branches: int
) -> tuple[float, float, float]:
    """Swaps per second, relative drift, and the relative change of the objective."""
    where, starts = q.device, int(y.shape[0])
    kept = dense.TILE, dense.BRANCHES
    dense.TILE, dense.BRANCHES = tile, branches
    try:
        search = dense.DenseTabu(
            q,
            torch.zeros(q.shape[0], dtype=torch.float64, device=where),
            y,
            torch.arange(1, starts + 1, device=where),
            torch.full((starts,), 10, device=where),
            steps=32 if bench.tiny else 1024,
        )
        before = float(search.objectives.mean())
        search.run()
        bench.wait()
        began = time.perf_counter()
        made = search.launch_all()
        bench.wait()
        seconds = time.perf_counter() - began
        search.refresh()
        return starts * made / seconds, search.drift, float(search.objectives.mean()) / before - 1.0
    finally:
        dense.TILE, dense.BRANCHES = kept


def tests(bench: Bench) -> None:
    """The tests marked `gpu`, on this device."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests" / "solvers" / "device").is_dir():
        bench.row("tests marked gpu: no checkout here", None)
        return
    chosen = ["-k", "draws or objective"] if bench.tiny else []
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    command = [
        sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=line",
        "--import-mode=importlib", "-m", "gpu and not slow and not shared", *chosen, "tests/solvers/device",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=_TEST_SECONDS)
        except subprocess.TimeoutExpired:  # the last line then names the test at which it hangs
            process.kill()
            printed, _ = process.communicate()
    lines = [line for line in printed.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            bench.row(line[:160], None)
    last = lines[-1] if lines else "nothing printed"
    bench.row("tests marked gpu: exit code", float(abs(process.returncode)), at_most=0.0, note=last[:160])
