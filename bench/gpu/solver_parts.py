"""The solvers on a card: RMP, the paper's method, search, update, layers, export; and one core beside it."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch

from cbs_opt import Instance, Result, Stop, read_instance, solve, write_instance
from cbs_opt.bench.gpu import problems
from cbs_opt.bench.gpu.measure import Bench
from cbs_opt.solvers.kernels import loading
from cbs_opt.solvers.layers.incumbent import Incumbent
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.solvers.paper.ls import PUBLISHED_EPSILON
from cbs_opt.update import best_update

CPU_SECONDS = 60.0
"""Of the solvers on one core."""

_CARD_SECONDS = 10.0
_PAIR_SECONDS = 20.0  # of `cbs` with all pairs
_WARM_UP = Stop(
    time_limit=15.0, max_iterations=4097
)  # ResNet20 takes some seconds to build, a visit 2048 iterations


def make(bench: Bench) -> None:
    """The instances of the other parts; on a card this is the export of ResNet20, too."""
    small = problems.mlpnet(bench.tiny)
    write_instance(bench.folder / "mlpnet.npz", small)
    bench.row("MLPNet, made images: weights", float(small.n), note=small.describe())
    if not bench.tiny:
        problems.resnet20(False, bench.device, 8)  # warms up
    began = time.perf_counter()
    large = problems.resnet20(bench.tiny, bench.device)
    write_instance(bench.folder / "resnet20.npz", large)
    seconds = time.perf_counter() - began
    bench.row("ResNet20: training, export of 1000 samples and writing", seconds, "s", note=large.describe())


def export(bench: Bench) -> None:
    """Samples per second of the export, against the CPU."""
    from cbs_opt.instances.export import export as export_network
    from cbs_opt.instances.networks import load_network

    cases: list[tuple[str, str, tuple[int, ...], int, int, float | None]] = [
        ("resnet20", "layer", (3, 32, 32), 1000, 40, 20.0)
    ]
    if bench.tiny:
        cases = [("mlpnet", "layer", (1, 28, 28), 4, 2, None)]
    else:
        cases.append(("mobilenetv1", "10000", (3, 224, 224), 64, 4, 20.0))
    for name, blocks, shape, there, here, goal in cases:
        model = load_network(name).model.eval()
        rates, cores = {}, torch.get_num_threads()
        for device, count in ((bench.device, there), ("cpu", here)):
            inputs, labels = problems.images(count, shape, 3)

            def run(count: int, device: str = device, inputs: torch.Tensor = inputs, labels: torch.Tensor = labels,
                    model: torch.nn.Module = model, blocks: str = blocks) -> None:  # fmt: skip
                export_network(
                    model, inputs[:count], labels[:count], blocks=int(blocks) if blocks.isdigit() else blocks,
                    curvature="gradients", damping=1e-5, device=device,
                )  # fmt: skip

            if device == "cpu":
                torch.set_num_threads(min(2, cores))
            run(2)
            began = time.perf_counter()
            run(count)
            rates[device, count] = count / (time.perf_counter() - began)
            bench.row(f"export of {name}, {count} samples, {device}", rates[device, count], "samples/s")
        first, second = rates.values()
        torch.set_num_threads(cores)
        bench.row(f"export of {name}: card over {min(2, cores)} cores", first / second, at_least=goal)


def mlpnet(bench: Bench) -> None:
    """RMP and the paper's method on MLPNet."""
    instance = read_instance(bench.folder / "mlpnet.npz")
    draws = 20 if bench.tiny else 1000
    for seed in (0, 1):  # the first one compiles and warms up
        result = solve(instance, "rmp", seed=seed, device="cuda", parameters={"draws": draws})
    _on_card(bench, result)
    note = f"{result.build_seconds:.2f} s to bring the gradients there; loss {result.objective:.6e}"
    bench.row(f"rmp, {draws} draws of MLPNet", result.solve_seconds, "s", at_most=0.1, note=note)
    parameters = {"starts": 2, "draws": 4, "steps": 2} if bench.tiny else {"starts": 64, "draws": 1000}
    # ε is given: the target is that of Algorithms 1 and 2, without the pairs that are tried in the end otherwise.
    published = {**parameters, "epsilon": PUBLISHED_EPSILON}
    for seed in (0, 1):
        result = solve(instance, "cbs", seed=seed, device="cuda", parameters=published)
    _on_card(bench, result)
    note = f"{result.build_seconds:.2f} s to form Q; {result.extras['swaps']} swaps; loss {result.objective:.6e}"
    bench.row(f"cbs on MLPNet, {parameters['starts']} starts", result.solve_seconds, "s", at_most=1.0, note=note)
    seconds = 2.0 if bench.tiny else _PAIR_SECONDS
    result = solve(instance, "cbs", seed=1, device="cuda", parameters=parameters, stop=Stop(time_limit=seconds))
    _on_card(bench, result)
    note = f"all pairs in the end; {result.status}; {result.extras['swaps']} swaps"
    bench.row(f"cbs on MLPNet, card, {seconds:g} s: loss", result.objective, note=note)


def search(bench: Bench) -> None:
    """The selection search, with its losses over time."""
    seconds = 3.0 if bench.tiny else _CARD_SECONDS
    loading.wait("selection", "sweeps")
    for name in ("resnet20", "mlpnet"):
        instance = read_instance(bench.folder / f"{name}.npz")
        if not bench.tiny:  # compiles the kernels for these sizes
            solve(instance, "search", device="cuda", stop=_WARM_UP, parameters={"proof": 0})
        result = solve(instance, "search", device="cuda", stop=Stop(time_limit=seconds), parameters={"proof": 0})
        if not _ran_on_card(bench, result):  # the other one may
            bench.row(f"search on {name}: failed", None, note=f"ran on {result.environment['device']}")
            continue
        note = f"{result.build_seconds:.1f} s before; bound {_short(result.bound)}; {result.iterations} cycles; "
        note += f"drift {result.extras.get('drift', 0.0):.1e}"
        bench.row(f"search on {name}, card, {seconds:g} s: loss", result.objective, note=note)
        _history(bench, f"search on {name}, card", result)


def core(bench: Bench, name: str) -> None:
    """The same on one core: `cbs` and `search` on MLPNet, or `search` on ResNet20."""
    torch.set_num_threads(1)
    loading.wait("selection", "sweeps")
    seconds = 1.0 if bench.tiny else CPU_SECONDS
    instance = read_instance(bench.folder / f"{name}.npz")
    for solver in ("search", "cbs") if name == "mlpnet" else ("search",):
        parameters = {"proof": 0} if solver == "search" else {"draws": 50, "starts": 50}
        result = solve(
            instance, solver, device="cpu", threads=1, stop=Stop(time_limit=seconds), parameters=parameters
        )
        note = f"{result.build_seconds:.1f} s before; {result.status}; bound {_short(result.bound)}"
        bench.row(f"{solver} on {name}, one core, {seconds:g} s: loss", result.objective, note=note)
        _history(bench, f"{solver} on {name}, one core", result)


def update(bench: Bench) -> None:
    """CBS-U of the magnitude selection, against the CPU."""
    for name in ("mlpnet", "resnet20"):
        instance: Instance = read_instance(bench.folder / f"{name}.npz")
        pruned = instance.budget.cheapest(np.abs(instance.weights))
        found = {}
        for device in ("cuda", "cpu"):
            if device == "cuda":
                best_update(instance, pruned, device)
            began = time.perf_counter()
            found[device] = best_update(instance, pruned, device)
            bench.row(
                f"update of {name}, {'card' if device == 'cuda' else 'CPU'}", time.perf_counter() - began, "s"
            )
        off = float(np.abs(found["cuda"] - found["cpu"]).max() / np.abs(found["cpu"]).max())
        bench.row(f"update of {name}: largest difference of weights, relative", off, at_most=1e-6)


def layers(bench: Bench) -> None:
    """Layers of a transformer block, .7 in every row, joint."""
    from cbs_opt.solvers.layers.device_wide import DeviceWideSearch

    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    if bench.tiny:
        shapes = [(8, 16)]
    total = 0.0
    for k, (rows, columns) in enumerate(shapes):
        layer, size = problems.layer(rows, columns, bench.card.device, k)
        budget = LayerBudget(per_row=(np.full(rows, round(0.7 * columns)),))
        limit = 1.0 if bench.tiny else 4.5
        if k == 0:
            _alps(bench, layer, budget, size)
        began = time.perf_counter()
        incumbent = Incumbent([layer])
        remaining = partial(_remaining, began + limit)
        stop = partial(_is_over, began + limit)
        search = DeviceWideSearch([layer], budget, incumbent, stop, remaining, bench.card)
        search.run([budget.cheapest([layer], [np.abs(layer.weights)])])
        bench.wait()
        seconds = time.perf_counter() - began
        total += seconds
        note = f"error {incumbent.objective / size:.6e} of ‖WX‖²"
        bench.row(
            f"joint, layer of {rows} × {columns}, .7", seconds, "s", at_most=5.0 if k == 0 else None, note=note
        )
        if k == 0:
            bench.row("joint, first layer: error, relative", incumbent.objective / size)
    if not bench.tiny:
        bench.row("joint, 7 layers of a 7B transformer block", total, "s", at_most=60.0)


def _remaining(end: float) -> float:
    return end - time.perf_counter()


def _is_over(end: float) -> bool:
    return time.perf_counter() > end


def _alps(bench: Bench, layer: Layer, budget: LayerBudget, size: float) -> None:
    """ADMM as ALPS runs it, then ten conjugate gradients: what the error is compared with."""
    from cbs_opt.solvers.layers.device_wide import DeviceWideSearch

    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        search = DeviceWideSearch(
            [layer], budget, Incumbent([layer]), lambda: False, lambda: float("inf"), bench.card
        )
        search.bring()
        masks, weights = search.admm(3)
        refitted = [search.there[0].refit(masks[0], weights[0], 10)]
        value = search.objective(refitted)
        seconds = time.perf_counter() - began
    bench.row("ADMM by the schedule of ALPS, first layer", seconds, "s")
    bench.row("ADMM by the schedule of ALPS, first layer: error, relative", value / size)


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4e}"


def _on_card(bench: Bench, result: Result) -> None:
    """Raise where the run was not on the card."""
    if not _ran_on_card(bench, result):
        device = result.environment["device"]
        raise RuntimeError(f"{result.solver} ran on {device}, not on the card: see the log above")


def _ran_on_card(bench: Bench, result: Result) -> bool:
    return bool(result.environment["device"] == bench.card.name)


def _history(bench: Bench, what: str, result: Result) -> None:
    """The losses over time as rows without a target; at most 60."""
    rows = result.history
    for row in rows[:: max(1, len(rows) // 60)]:
        if row.objective is not None:
            bench.row(f"history: {what}", row.objective, note=f"{row.seconds:.2f} s")
