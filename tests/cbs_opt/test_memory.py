"""Memory: what is known not to fit is refused in a sentence, before the system ends the process."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from cbs_opt import SolverError, memory, solve
from cbs_opt.errors import MemoryShortageError


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


_LIMITED = """
import sys
from cbs_opt.bench.faults.processes import limit_memory
from cbs_opt.cli import {command}
limit_memory({more})
sys.exit({command}.main({arguments}))
"""


def _limited(command, more, *arguments):
    program = _LIMITED.format(command=command, more=more, arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize("more", [100_000, 4_300_000, 30_000_000, 100_000_000])
@pytest.mark.parametrize("command", ["solve", "info"])
def test_commands_do_not_wait_for_buffers_that_linear_algebra_does_not_get(command, more):
    ended = _limited(command, more, "library:digits-mlp")
    assert ended.returncode == 4
    assert ended.stderr.startswith(f"cbs-{command}: out of memory: linear algebra takes 0.")
    assert ended.stderr.count("\n") == 1


def test_a_command_works_where_the_memory_is_limited_and_suffices():
    ended = _limited("solve", 2_000_000_000, "library:digits-mlp", "--solver", "magnitude", "--threads", "2")
    assert ended.returncode == 0, ended.stderr


def test_threads_for_which_linear_algebra_has_no_memory_are_refused():
    ended = _limited("solve", 1_000_000_000, "library:digits-mlp", "--solver", "magnitude", "--threads", "50")
    assert ended.returncode == 4
    assert "out of memory: linear algebra takes 6." in ended.stderr


@pytest.mark.parametrize("limit", [150_000, 400_000])
def test_a_command_that_cannot_be_loaded_says_so(limit):
    line = f"ulimit -v {limit} && exec {sys.executable} -m cbs_opt.cli.solve library:digits-mlp"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 4
    expected = f"`ulimit -v` allows {limit * 1024 / 1e9:.2f} GB\n"
    assert ended.stderr == f"out of memory: the libraries take 0.6 GB of address space, {expected}"


def test_the_exit_code_stays_where_nobody_reads_the_sentence():
    line = f"ulimit -v 150000 && exec {sys.executable} -m cbs_opt.cli.solve library:digits-mlp 2>&-"
    assert subprocess.run(["sh", "-c", line], timeout=100, check=False).returncode == 4


def test_an_error_in_a_thread_of_linear_algebra_is_one_sentence(monkeypatch):
    """No thread is left behind, and the buffers do not count as held."""
    calls = []

    def failing(matrix):
        calls.append(threading.get_ident())
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(memory, "_limits", lambda: (1e12, 1e12))
    monkeypatch.setattr(memory, "_holding", 0)
    monkeypatch.setattr("scipy.linalg.lapack.dpotrf", failing)
    before = threading.active_count()
    with pytest.raises(MemoryShortageError, match="out of memory: 3 threads do not fit"):
        memory.hold_products(3)
    assert memory._holding == 0 and len(calls) == 3 and threading.active_count() == before
