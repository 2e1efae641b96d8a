"""The campaign notices what it is there to notice, and is repeatable."""

import os
import signal
import sys
import time

import numpy as np
import pytest

from cbs_opt import CbsError, InstanceError
from cbs_opt.bench.faults import campaign, damage
from cbs_opt.bench.faults.campaign import CLASSES, Campaign, Class
from cbs_opt.bench.faults.material import Material
from cbs_opt.bench.faults.processes import Finished, Surroundings, drop_privileges, isolated, run, run_fresh
from cbs_opt.bench.faults.verdict import FAULTS, FINE, Finding, Verdict, judge_error

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: the campaign needs Linux")


@pytest.mark.parametrize(
    ("finished", "verdict"),
    [
        (Finished(0, False, "", ""), Verdict.FINE),
        (Finished(3, False, "", "cbs-solve: x.npz: `weights` is missing\n"), Verdict.FINE),
        (Finished(3, False, "", ""), Verdict.CRASHED),
        (Finished(99, False, "", "why\n"), Verdict.CRASHED),
        (Finished(-signal.SIGSEGV, False, "", ""), Verdict.CRASHED),
        (Finished(-signal.SIGTERM, False, "", "", (signal.SIGTERM,)), Verdict.FINE),
        (Finished(-signal.SIGKILL, True, "", ""), Verdict.HUNG),
        (
            Finished(4, False, "", "unexpected TypeError: x; --debug shows where: please report it"),
            Verdict.TRACEBACK,
        ),
        (Finished(1, False, "", "Traceback (most recent call last)\n  of the start of Python"), Verdict.FINE),
    ],
)
def test_ends_of_commands(finished, verdict):
    assert finished.finding().verdict is verdict


def test_a_traceback_of_the_package_counts(tmp_path):
    def fail():
        raise KeyError("planted")

    done = run("solve", ["--list-solvers"], Surroundings(tmp_path, prepare=fail))
    assert done.finding().verdict is Verdict.TRACEBACK


def test_forked_and_fresh_commands_say_the_same(tmp_path):
    for arguments, code in (
        (["nothing.npz"], 3),
        (["--version"], 0),
        (["library:mlp-output-12", "--solver", "x"], 4),
    ):
        forked, fresh = (each("solve", arguments, Surroundings(tmp_path)) for each in (run, run_fresh))
        assert (forked.code, forked.out, forked.err) == (fresh.code, fresh.out, fresh.err)
        assert forked.code == code


def test_signals_reach_the_command_and_what_hangs_is_ended(tmp_path):
    def sleep():
        time.sleep(20)

    done = run("solve", [], Surroundings(tmp_path, prepare=sleep, signals=[(0.05, signal.SIGTERM)]))
    assert (done.code, done.sent, done.finding()) == (-signal.SIGTERM, (signal.SIGTERM,), FINE)
    assert run("solve", [], Surroundings(tmp_path, prepare=sleep, patience=0.1)).finding().verdict is Verdict.HUNG


def test_isolated_functions():
    assert isolated(lambda: FINE) == FINE
    assert isolated(lambda: os.kill(os.getpid(), signal.SIGKILL)).verdict is Verdict.CRASHED
    assert isolated(lambda: time.sleep(20) or FINE, patience=0.1).verdict is Verdict.HUNG
    assert isolated(lambda: 1 / 0).verdict is Verdict.TRACEBACK
    assert isolated(lambda: Finding(text=str(np.ones(1 << 28))), memory=1 << 27).verdict is Verdict.TRACEBACK


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="NOT TESTED: not root")
def test_privileges_are_dropped(tmp_path):
    tmp_path.chmod(0o555)

    def write():
        drop_privileges()
        try:
            (tmp_path / "x").write_text("")
        except PermissionError:
            return FINE
        return Finding(Verdict.WRONG, "root may write everywhere")

    assert isolated(write) == FINE
    tmp_path.chmod(0o755)


def test_errors_are_sentences():
    assert judge_error(InstanceError("x.npz: `weights` is missing")) == FINE
    assert judge_error(InstanceError("two\nlines")).verdict is Verdict.TRACEBACK
    assert judge_error(ValueError("of NumPy")).verdict is Verdict.TRACEBACK
    assert judge_error(CbsError("x.npz: does not fit into memory")).verdict is Verdict.CRASHED


def test_inputs_that_change_are_noticed(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"1")
    material = Material(tmp_path, {}, {}, {})
    assert material.check().verdict is Verdict.LOST


def test_damage_follows_from_the_seed():
    data = bytes(range(256)) * 20
    for seed in range(60):
        made = [damage.damaged_bytes(data, np.random.default_rng(seed)) for _ in range(2)]
        assert made[0] == made[1]
    arrays = {"weights": np.arange(4.0), "budget": np.array(2), "metadata": np.array('{"a": [1, {"b": 2}]}')}
    names = {damage.damaged_arrays(arrays, np.random.default_rng(seed))[1] for seed in range(200)}
    assert len(names) > 25


def test_the_table_counts_and_the_exit_code_tells(tmp_path, monkeypatch, capsys):
    found = iter([FINE, Finding(Verdict.LOST, "planted"), Finding(Verdict.SKIPPED, "not here")])
    monkeypatch.setattr(campaign, "CLASSES", {"planted": Class("planted faults", lambda *_: next(found), 3)})
    monkeypatch.setattr(campaign, "make_material", lambda folder: None)
    monkeypatch.setattr(campaign, "_load_everything", lambda: None)
    assert campaign.main(["--only", "planted", "-o", str(tmp_path / "out.md")]) == 1
    text = capsys.readouterr().out
    assert "| planted faults | 2 | 0 | 0 | 0 | 1 | 0 | 1 |" in text
    assert "`--only planted --case 1`: lost: planted" in text
    assert (tmp_path / "out.md").read_text() == text
    monkeypatch.setattr(campaign, "CLASSES", {"fine": Class("fine", lambda *_: FINE, 1)})
    assert campaign.main(["--only", "fine"]) == 0
    assert campaign.main(["--only", "nothing"]) == 2


def test_every_class_has_cases():
    assert all(chosen.number >= 1 for chosen in CLASSES.values())
    assert set(FAULTS) == set(Verdict) - {Verdict.FINE, Verdict.SKIPPED}
    assert Campaign(0).table().count("\n") == 2
