"""Cases that read damaged files: refused in one sentence, or read as what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from cbs_opt import (
    CbsError,
    Instance,
    read_certificate,
    read_instance,
    read_solution,
    selection_loss,
    solve,
    verify,
    verify_certificate,
)
from cbs_opt.bench.faults.damage import (
    Generator,
    damaged_arrays,
    damaged_bytes,
    read_arrays,
    write_arrays,
)
from cbs_opt.bench.faults.material import INSTANCES, Material, contents
from cbs_opt.bench.faults.processes import Surroundings, isolated, run
from cbs_opt.bench.faults.verdict import FINE, Finding, Verdict, judge_error

Reader = Callable[[Path], Finding]


def damaged_file(material: Material, rng: Generator, folder: Path) -> Finding:
    """A file of any format with damaged bytes is read, by its function or by a command."""
    name = str(rng.choice([*material.files]))
    source = material.files[name]
    data, what = damaged_bytes(source.read_bytes(), rng)
    path = folder / source.name
    path.write_bytes(data)
    same = data == source.read_bytes()
    found = isolated(partial(_read, material, name, path, intact=True))
    if not found.is_fault and not same and rng.random() < 0.15:
        found = _by_command(material, name, path, folder, rng)
    return Finding(found.verdict, f"{name}, {what}: {found.text}") if found.text else found


def damaged_content(material: Material, rng: Generator, folder: Path) -> Finding:
    """An .npz file with another content under correct checksums: refused, or solved with a true loss."""
    names = [*INSTANCES, "solution", "weights", "certificate", "joint-certificate", "network.npz"]
    name = str(rng.choice(names))
    arrays, what = damaged_arrays(read_arrays(material.files[name]), rng)
    path = folder / material.files[name].name
    write_arrays(path, arrays, rng)
    found = isolated(partial(_read, material, name, path, intact=False))
    if not found.is_fault and rng.random() < 0.15:
        found = _by_command(material, name, path, folder, rng)
    return Finding(found.verdict, f"{name}, {what}: {found.text}") if found.text else found


def _read(material: Material, name: str, path: Path, *, intact: bool) -> Finding:
    """Read a file by the function of its format. `intact`: what is accepted must be what it was."""
    try:
        if name in INSTANCES:
            return _instance(read_instance(path), material.files[name] if intact else None)
        if name in ("solution", "weights"):
            return _solution(material, name, path, intact)
        if name.endswith("certificate"):
            return _certificate(material, name, path)
        return _other(name, path)
    except BaseException as error:
        return judge_error(error)


def _instance(instance: Instance, original: Path | None) -> Finding:
    if original is not None:
        if contents(instance) != contents(read_instance(original)):
            return Finding(Verdict.WRONG, "accepted with another content")
        return FINE
    try:
        result = solve(instance, "obd", threads=1)
    except CbsError as error:
        return judge_error(error)
    curvature, moved = instance.curvature, np.where(result.pruned, -instance.weights, 0.0)
    with np.errstate(all="ignore"):
        loss = 0.0 if instance.linear is None else float(instance.linear @ moved)
        for k in range(curvature.number_of_blocks):
            part = moved[curvature.block_slice(k)]
            loss += 0.5 * float(part @ curvature.block(k) @ part)
    scale = abs(loss) + abs(result.selection_loss)
    if not instance.admits(result.pruned) or not abs(loss - result.selection_loss) <= 1e-6 * scale + 1e-300:
        return Finding(Verdict.WRONG, f"selection loss {result.selection_loss!r}, dense {loss!r}")
    return FINE


def _solution(material: Material, name: str, path: Path, intact: bool) -> Finding:
    instance = material.instance("hessian")
    solution = read_solution(path, instance)
    if intact:
        original = read_solution(material.files[name], instance)
        same = np.array_equal(solution.pruned, original.pruned) and solution.result == original.result
        if not same:
            return Finding(Verdict.WRONG, "accepted with another content")
    found = verify(instance, solution)
    if abs(found.selection_loss - selection_loss(instance, solution.pruned)) > 1e-12 * abs(found.selection_loss):
        return Finding(Verdict.WRONG, "another loss")
    stated = solution.result.get("selection_loss")
    if (
        found.valid
        and isinstance(stated, float)
        and abs(stated - found.selection_loss) > 1e-5 * found.selection_loss
    ):
        return Finding(Verdict.WRONG, "a wrong statement passed")
    return FINE


def _certificate(material: Material, name: str, path: Path) -> Finding:
    """What the checker accepts must be true, whatever the file says."""
    certificate = read_certificate(path)
    instance = material.instance("proven")
    found = verify_certificate(instance, certificate)
    if certificate.budget != instance.budget.total:
        return Finding(Verdict.WRONG, "accepted for another budget")
    optimum = material.optima[certificate.objective_kind]
    if max(found.bound, certificate.bound) > optimum * (1 + 1e-6):
        return Finding(Verdict.WRONG, f"a bound of {certificate.bound!r} passed, the optimum is {optimum!r}")
    return FINE


def _other(name: str, path: Path) -> Finding:
    if name == "configuration":
        from cbs_opt.bench.runs.configuration import read_configuration

        read_configuration(path)
    elif name == "store":
        from cbs_opt.bench.runs.store import Store

        with Store(path) as store:
            json.dumps([repr(row) for row in store.rows(traces=True)])
    elif name.startswith("network."):
        from cbs_opt.instances.checkpoints import load_checkpoint
        from cbs_opt.instances.networks import load_network

        load_checkpoint(load_network("digits-mlp").model, path)
    elif name in ("images", "labels"):
        from cbs_opt.instances.image_files import read_idx

        read_idx(path)
    else:
        from cbs_opt.instances.cifar_batch import decode_batch

        decode_batch(path)
    return FINE


def _by_command(material: Material, name: str, path: Path, folder: Path, rng: Generator) -> Finding:
    """The same file given to a command."""
    hessian, proven, solution = (material.files[key] for key in ("hessian", "proven", "solution"))
    lines: list[tuple[str, list[object]]]
    if name in INSTANCES:
        lines = [
            ("solve", [path, "--solver", "obd", "--json", "r.json"]),
            ("solve", [path, "--check", solution]),
            ("info", [path]),
            ("info", [path, "--json", "-"]),
        ]
    elif name in ("solution", "weights"):
        lines = [
            ("solve", [hessian, "--check", path]),
            ("solve", [hessian, "--solver", "ls", "--warm-start", path]),
            ("info", [path]),
            ("info", [hessian, "--solution", path]),
        ]
    elif name.endswith("certificate"):
        lines = [("solve", [proven, "--check", path]), ("info", [path])]
    elif name == "configuration":
        lines = [("bench", ["run", path, "--dry-run"]), ("solve", [hessian, "--config", path])]
    elif name == "store":
        lines = [
            ("bench", ["report", path, "-o", "report"]),
            ("bench", ["compare", path, material.files["store"]]),
        ]
    elif name.startswith("network."):
        lines = [
            ("export", ["digits-mlp", "--data", "digits", "--checkpoint", path, "--samples", "20", "-o", "x.npz"])
        ]
    else:
        lines = [
            ("export", ["mlpnet", "--data", path, "--checkpoint", material.files["network.pt"], "-o", "x.npz"])
        ]
    command, arguments = lines[int(rng.integers(len(lines)))]
    found = run(command, arguments, Surroundings(folder)).finding()
    return Finding(found.verdict, f"cbs-{command} {' '.join(map(str, arguments))}: {found.text}")
