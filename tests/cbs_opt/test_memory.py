"""Memory: what is known not to fit is refused in a sentence, before the system ends the process."""

import numpy as np
import pytest

from cbs_opt import SolverError, memory, solve


def test_the_smaller_of_system_and_container_counts(tmp_path, monkeypatch):
    system, group = tmp_path / "meminfo", tmp_path / "group"
    group.mkdir()
    monkeypatch.setattr(memory, "_SYSTEM", system)
    monkeypatch.setattr(memory, "_GROUP", group)
    assert memory.available_bytes() == float("inf")
    system.write_text("MemTotal: 9 kB\nMemAvailable: 2000 kB\n")
    assert memory.available_bytes() == 2000 * 1024
    (group / "memory.max").write_text("max\n")
    assert memory.available_bytes() == 2000 * 1024
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.stat").write_text("anon 400000\nfile 500000\n")
    assert memory.available_bytes() == 600_000


@pytest.mark.parametrize(
    ("solver", "objective"), [("search", "selection"), ("relax", "selection"), ("exact", "joint")]
)
def test_solvers_that_hold_all_blocks_say_what_they_need(problem, monkeypatch, solver, objective):
    instance = problem(0, kind="hessian", n=12, blocks=1).instance
    monkeypatch.setattr(memory, "available_bytes", lambda: 100.0)
    with pytest.raises(SolverError, match=r"at once would take 0.0 GB, 0.0 GB of memory are free: 'cbs'"):
        solve(instance, solver, objective=objective)
    for other in ("obd", "ls", "cbs"):
        assert instance.admits(solve(instance, other).pruned)


def test_a_heuristic_that_fails_for_memory_keeps_its_first_selection(problem, monkeypatch):
    instance = problem(0, kind="hessian", n=12, blocks=2).instance
    monkeypatch.setattr(memory, "available_bytes", lambda: 100.0)
    result = solve(instance, "joint", parameters={"proof": 0})
    assert instance.admits(result.pruned)
    assert np.isfinite(result.objective)
