"""Kernels compile beside the solver: results do not depend on it, and a run told to stop does not wait."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cbs_opt.solvers.kernels import compilation, loading


@pytest.fixture
def pool(monkeypatch):
    """Two units of this test's own, and no child processes; gives the names of the calls."""
    calls = []
    gate = threading.Event()

    def slow():
        gate.wait(30)
        calls.append("slow")

    functions = {"slow": slow, "quick": lambda: calls.append("quick")}
    monkeypatch.setattr(loading, "UNITS", dict.fromkeys(functions, loading.Unit("nowhere:none", 1.0)))
    monkeypatch.setattr(loading, "_function", functions.__getitem__)
    monkeypatch.setattr(loading, "is_ready", lambda units: False)
    monkeypatch.setattr(loading, "mark_ready", lambda unit: None)
    monkeypatch.setattr(loading, "kernel_folder", lambda: None)
    monkeypatch.setattr(loading, "usable_threads", lambda: 2)
    for name, empty in (("_loaded", set()), ("_jobs", {}), ("_started", [])):
        monkeypatch.setattr(loading, name, empty)
    yield calls, gate
    gate.set()


def test_a_wait_ends_at_once_when_told_to_stop_and_goes_on_later(pool):
    calls, gate = pool
    loading.request("slow", "quick")
    assert loading.wait("quick")
    assert calls[0] == "quick"
    assert not loading.wait("slow", should_stop=lambda: True)
    assert not loading.is_loaded("slow")
    gate.set()
    assert loading.wait("slow")
    assert "slow" in calls


def test_finish_waits_for_everything_requested(pool):
    calls, gate = pool
    loading.request("slow", "quick")
    gate.set()
    loading.finish()
    assert set(calls) == {"slow", "quick"}
    assert loading.is_loaded("slow", "quick")


def test_a_child_process_that_fails_leaves_the_work_to_this_one(pool, monkeypatch, tmp_path):
    calls, gate = pool
    gate.set()
    monkeypatch.setattr(loading, "kernel_folder", lambda: tmp_path)  # the child knows no unit `quick`
    loading.request("quick")
    assert calls == []
    assert loading.wait("quick")
    assert "quick" in calls


def test_without_the_memory_to_compile_the_wait_raises_where_the_compiler_would_end_the_process(pool, monkeypatch):
    calls, gate = pool
    monkeypatch.setattr(loading, "_TO_COMPILE", 1 << 62)
    loading.request("quick")
    with pytest.raises(MemoryError):
        loading.wait("quick")
    assert calls == []
    gate.set()


@pytest.mark.parametrize(
    ("folder", "lasting", "said"),
    [("", True, "process alone"), ("folder", False, "process alone"), ("folder", True, "once for this machine")],
)
def test_the_message_promises_no_cache_where_there_is_none(monkeypatch, tmp_path, folder, lasting, said):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(compilation, "kernel_folder", lambda: tmp_path if folder else None)
    monkeypatch.setattr(compilation, "is_lasting", lambda: lasting)
    assert said in compilation.how_often()


def test_work_is_shared_out_evenly_and_in_the_order_in_which_it_is_wanted(monkeypatch):
    seconds = {"a": 5.0, "b": 10.0, "c": 3.0}
    monkeypatch.setattr(loading, "UNITS", {name: loading.Unit("", cost) for name, cost in seconds.items()})
    assert loading._shares(["c", "a", "b"], 2) == [["b"], ["c", "a"]]
    assert loading._shares(["c", "a", "b"], 1) == [["c", "a", "b"]]


def test_every_unit_can_be_found():
    for unit in loading.UNITS:
        assert callable(loading._function(unit))


def test_the_folder_of_kernels_changes_with_their_source(monkeypatch, tmp_path):
    monkeypatch.setenv("CBS_OPT_CACHE", str(tmp_path))
    compilation.cache_folder.cache_clear()
    source = tmp_path / "kernel.py"
    monkeypatch.setattr(compilation, "sources", lambda: [source])
    found = []
    try:
        for text in ("one", "two", "one"):
            source.write_text(text)
            os.utime(source, (0, 0))  # the time of a file counts, too
            compilation.kernel_folder.cache_clear()
            found.append(compilation.kernel_folder())
    finally:
        compilation.kernel_folder.cache_clear()
        compilation.cache_folder.cache_clear()
    assert found[0] == found[2] != found[1]
    assert {folder.parent for folder in found} == {tmp_path}


@pytest.mark.skipif(sys.platform == "win32", reason="NOT TESTED: needs POSIX signals")
def test_the_first_interrupt_during_compilation_ends_with_a_selection(
    tmp_path, instance_file, process_environment
):
    """No child is left to compile either: the cache holds no unit that is ready."""
    out = tmp_path / "out.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "cbs_opt.cli.solve", str(instance_file), "--solver", "joint", "--json", str(out)],
        env={**process_environment, "CBS_OPT_CACHE": str(tmp_path / "cache"), "NUMBA_CACHE_DIR": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    killer = threading.Timer(60, process.kill)
    killer.start()
    try:
        for line in process.stderr:
            if "compiling" in line:
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 0
    finally:
        killer.cancel()
        process.kill()
    assert "Traceback" not in rest
    assert json.loads(out.read_text())["status"] == "interrupted"
    assert list((tmp_path / "cache").glob("*/*.ready")) == []


def test_what_others_need_is_compiled_before_them_in_another_process(monkeypatch):
    units = {"a": loading.Unit("", 5.0, ("d",)), "b": loading.Unit("", 3.0), "d": loading.Unit("", 4.0)}
    monkeypatch.setattr(loading, "UNITS", units)
    assert loading._shares(["d", "a", "b"], 2) == [["a"], ["d", "b"]]
    assert loading._shares(["a", "d", "b"], 1) == [["d", "b", "a"]]


def test_the_relaxation_of_the_trees_is_compiled_for_the_types_they_use():
    """Otherwise the trees compile it again, and a new machine waits twice."""
    from cbs_opt.solvers.kernels.warm_up_relaxation import RELAXATION, warm_up_relaxation
    from cbs_opt.solvers.trees.warm_up import selection_tree

    warm_up_relaxation()
    before = {kernel: list(kernel.signatures) for kernel in RELAXATION}
    selection_tree()
    for kernel, signatures in before.items():
        assert kernel.signatures == signatures == [RELAXATION[kernel]]
