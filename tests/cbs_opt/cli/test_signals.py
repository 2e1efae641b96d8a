"""Ctrl-C and SIGTERM keep the incumbent; a second Ctrl-C ends the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cbs_opt import Instance, read_instance, read_solution
from cbs_opt.cli import common
from cbs_opt.cli.solve import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="NOT TESTED: needs POSIX signals")

STUBBORN = """
import sys, time
import cbs_opt
from cbs_opt.cli.solve import main

@cbs_opt.register("stubborn")
class Stubborn(cbs_opt.Solver):
    summary = "reports magnitude, then does not listen"

    def run(self, instance, context):
        pruned = instance.budget.cheapest(abs(instance.weights), instance.fixed)
        context.monitor.report(cbs_opt.selection_loss(instance, pruned), pruned)
        time.sleep(60)

sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def start(process_environment):
    """Start a command and give it back once `text` has appeared on its stderr; killed at the end."""
    running = []

    def call(command, text):
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=process_environment,
        )
        running.append(process)
        wait_for(process, text)
        return process

    yield call
    for process in running:
        process.kill()
        process.wait()


def wait_for(process, text):
    timer = threading.Timer(60, process.kill)
    timer.start()
    try:
        for line in process.stderr:
            if text in line:
                return
    finally:
        timer.cancel()
    pytest.fail(f"the process ended without writing {text!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_keeps_the_incumbent(number, start, instance_file, tmp_path):
    path = tmp_path / "s.npz"
    process = start(
        [
            *("-m", "cbs_opt.cli.solve", instance_file, "--solver", "rmp", "--set", "draws=100000000"),
            *("--solution", path, "--history", tmp_path / "h.csv", "--json", "-"),
        ],
        "incumbent",
    )
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    content = json.loads(out)
    assert content["status"] == "interrupted"
    assert content["pruned_count"] == 6
    assert "Traceback" not in err
    solution = read_solution(path, read_instance(instance_file))
    assert solution.result["status"] == "interrupted"
    assert solution.result["objective"] == content["objective"]
    assert (tmp_path / "h.csv").read_text().startswith("seconds,")
    assert main([str(instance_file), "--check", str(path), "-q"]) == 0


def test_second_signal_ends_the_process(start, instance_file, tmp_path):
    arguments = ["-c", STUBBORN, instance_file, "--solver", "stubborn", "--solution", tmp_path / "s.npz"]
    process = start(arguments, "incumbent")
    process.send_signal(signal.SIGINT)
    wait_for(process, "interrupted: stopping with the best selection so far")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["instance.npz"]


def test_handlers_are_given_back(instance_file):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main([str(instance_file), "--solver", "obd", "-q"]) == 0
    assert main([str(instance_file), "--solver", "nonsense", "-q"]) == 4
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_runs_outside_the_main_thread(instance_file):
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(main([str(instance_file), "--solver", "obd", "-q", "--json", "/dev/null"]))
    )
    thread.start()
    thread.join()
    assert codes == [0]


def test_interrupt_while_reading_gives_magnitude(instance_file, monkeypatch, capsys):
    import os

    from cbs_opt.cli import solve as command

    def interrupted_reading(*arguments) -> Instance:
        os.kill(os.getpid(), signal.SIGINT)
        return read_instance(*arguments)

    monkeypatch.setattr(command, "read_instance", interrupted_reading)
    assert main([str(instance_file), "--solver", "ls", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["status"] == "interrupted"
    w = np.abs(read_instance(instance_file).weights)
    assert content["pruned_count"] == 6
    assert content["iterations"] == 0
    assert w.size == 12


def test_an_import_that_an_interrupt_breaks_is_an_interrupt():
    """Extension modules turn the interrupt into an error of their own."""

    def body(_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert common.run_main("cbs-info", body, []) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_class_whose_definition_an_interrupt_breaks_is_an_interrupt(capsys):
    """Python 3.11 makes a RuntimeError of whatever a descriptor raises while its class is defined."""

    class Descriptor:
        def __set_name__(self, owner, name):
            raise KeyboardInterrupt

    def body(_):
        type("Enumeration", (), {"member": Descriptor()})

    def wrapped(_):
        try:
            body(_)
        except KeyboardInterrupt as error:  # Python 3.12 and later let it through
            raise RuntimeError("Error calling __set_name__") from error

    for run in (body, wrapped):
        assert common.run_main("cbs-info", run, []) == 130
    assert capsys.readouterr().err == ""


def test_too_many_open_files_in_a_library_are_told(capsys):
    def body(_):
        raise RuntimeError("unable to open file <x> in read-only mode: Too many open files (24)")

    assert common.run_main("cbs-prune", body, []) == 3
    assert capsys.readouterr().err == "cbs-prune: Too many open files: `ulimit -n` sets how many may be\n"
