"""The engines: every task once, a killed worker loses only its task, and is given another."""

import os
import signal
import sys
import time

import pytest

from cbs_opt import UsageError
from cbs_opt.engines import TRIES, Processes, Ray, Serial, make_engine

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="workers are killed by signals of Unix")


def deadly(folder):
    """A function for workers: task 3 kills its worker once, task 5 at every try; each try leaves a file."""

    def work(task):
        # By value to the workers, who cannot import a test: so imports and the folder come along.
        import os
        import pathlib
        import signal
        import time

        tries = len(list(pathlib.Path(folder).glob(f"{task}-*")))
        (pathlib.Path(folder) / f"{task}-{tries}").touch()
        time.sleep(0.02)
        if task == 5 or (task == 3 and tries == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return task**2, os.getpid()

    return work


def check(engine, folder):
    """Run ten tasks, two of them deadly, and look at what came back and how often each was begun."""
    folder = str(folder)
    found = list(engine.run(list(range(10)), deadly(folder)))
    assert sorted(task for task, _ in found) == list(range(10))
    results = dict(found)
    assert results[5] is None
    assert {task: result[0] for task, result in results.items() if result} == {
        task: task**2 for task in range(10) if task != 5
    }
    assert os.getpid() not in {result[1] for result in results.values() if result}
    begun = {task: sum(name.startswith(f"{task}-") for name in os.listdir(folder)) for task in range(10)}  # noqa: PTH208
    assert begun == dict.fromkeys(range(10), 1) | {3: 2, 5: TRIES}


def test_processes_lose_only_the_task_of_a_killed_worker(tmp_path):
    check(Processes(2), tmp_path)


def test_ray_loses_only_the_task_of_a_killed_worker(tmp_path):
    pytest.importorskip("ray", reason="NOT TESTED: the engine `ray`, Ray is not installed")
    before = signal.getsignal(signal.SIGTERM)
    check(Ray(2), tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before


def test_workers_that_are_kept_serve_whoever_keeps_them_again():
    def process(task):
        import os

        return os.getpid()

    with Processes(1).kept() as outer:
        found = []
        for _ in range(2):
            with outer.kept() as inner:
                found += [result for _, result in inner.run([0], process)]
        found += [result for _, result in outer.run([0], process)]
    assert len(set(found)) == 1 and None not in found


def test_serial_stays_in_this_process():
    assert list(Serial().run([1, 2], lambda task: (task, os.getpid()))) == [
        (1, (1, os.getpid())),
        (2, (2, os.getpid())),
    ]


def test_an_interrupt_gives_up_what_is_being_worked_on():
    def work(task):
        import os
        import time

        time.sleep(0 if task == 0 else 30)
        return os.getpid()

    seen = []
    started = time.monotonic()
    for task, pid in Processes(2).run([0, 1, 2, 3], work, lambda: bool(seen)):
        seen.append((task, pid))
    assert [task for task, _ in seen] == [0]
    assert time.monotonic() - started < 25
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0][1], 0)


def test_workers_keep_to_their_threads():
    def work(task):
        import os

        return os.environ[task]

    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"]
    assert dict(Processes(1, threads=3).run(names, work)) == dict.fromkeys(names, "3")


def test_engines_by_name():
    assert make_engine("serial") == Serial()
    assert make_engine("processes", 3, threads=2) == Processes(3, 2)
    assert make_engine("ray", 4) == Ray(4, 1)
    assert make_engine("processes").workers >= 1
    with pytest.raises(UsageError, match="there is no engine 'dask'; known: serial, processes, ray"):
        make_engine("dask")
    with pytest.raises(UsageError, match="`serial` has one worker, not 2"):
        make_engine("serial", 2)
