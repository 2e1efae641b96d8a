"""The store: what is written comes back, one writer at a time, and old programs refuse new stores."""

import json
import signal
import sqlite3
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from cbs_opt.bench.runs import store as store_module
from cbs_opt.bench.runs.store import KINDS, Key, Row, Store, StoredInstance, StoreError

FULL = Row(
    instance_sha256="ab" * 32,
    solver="ls",
    parameters='{"epsilon":0.1}',
    objective_kind="selection",
    budget=5,
    seed=3,
    time_limit=2.5,
    label="ls, fine",
    sparsity=0.5,
    kind="ok",
    status="converged",
    message="a sentence",
    objective=1.5,
    selection_loss=1.5,
    joint_loss=1.25,
    bound=1.0,
    claimed_objective=1.5,
    iterations=7,
    nodes=9,
    build_s=0.1,
    solve_s=0.2,
    cpu_s=0.3,
    row_s=0.4,
    own_s=0.15,
    scores={"accuracy": 0.9, "images": 1000},
    started="2026-01-01T00:00:00.000+00:00",
    trace=[(0.01, 2.0, None), (0.2, 1.5, 1.0)],
)
BARE = Row("cd" * 32, "exact", "{}", "joint", 4, 0, None, "exact", 0.25, "lost")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.sqlite"


def test_every_field_comes_back(path):
    assert all(
        getattr(FULL, field.name) is not None for field in fields(Row) if field.name not in ("environment", "id")
    )
    with Store(path, "w") as store:
        environment = store.add_environment({"cores": 2, "numpy": "2"})
        full = replace(FULL, environment=environment)
        first, second = store.add(full), store.add(BARE)
    with Store(path) as store:
        assert store.rows(traces=True) == [replace(full, id=first), replace(BARE, id=second)]
        assert store.rows() == [replace(full, id=first, trace=None), replace(BARE, id=second)]
        assert store.trace(first) == FULL.trace
        assert store.traces([first, second]) == {first: FULL.trace, second: []}
        assert store.keys() == {FULL.key: ("ok", "converged"), BARE.key: ("lost", None)}
        assert store.environments() == {environment: {"cores": 2, "numpy": "2"}}
    assert FULL.gap == pytest.approx(1 / 3)
    assert BARE.gap is None
    assert FULL.kind in KINDS
    assert BARE.key == Key("cd" * 32, "exact", "{}", "joint", 4, 0, None)


def test_instances_and_environments_are_kept_once(path):
    known = StoredInstance("ab", "one", 12, 2, "hessian", {"network": "mlp", "samples": 100})
    with Store(path, "w") as store:
        store.add_instance(known)
        store.add_instance(replace(known, name="another"))
        assert store.add_environment({"b": 1, "a": 2}) == store.add_environment({"a": 2, "b": 1})
        assert store.instances() == {"ab": known}
        assert len(store.environments()) == 1


@pytest.mark.parametrize("row", [FULL, BARE], ids=["limit", "no limit"])
def test_no_key_is_there_twice(path, row):
    with Store(path, "w") as store:
        store.add(row)
        with pytest.raises(StoreError, match=r"has a row for .* already"):
            store.add(replace(row, objective=9.0))
        store.add(replace(row, objective=7.0), replace=True)
        assert [found.objective for found in store.rows()] == [7.0]
        store.add(replace(row, seed=11))
        assert len(store.rows()) == 2


@pytest.mark.parametrize("row", [FULL, BARE], ids=["limit", "no limit"])
@pytest.mark.parametrize("part", Key._fields)
def test_every_part_of_the_key_counts(path, row, part):
    """Two rows that differ in one part are two rows; both are found by their keys."""
    value = getattr(row, part)
    other = "another" if isinstance(value, str) else 1.25 if part == "time_limit" else value + 1
    with Store(path, "w") as store:
        store.add(row)
        store.add(replace(row, **{part: other}))
        assert set(store.keys()) == {row.key, replace(row, **{part: other}).key}
        for again in (row, replace(row, **{part: other})):
            with pytest.raises(StoreError, match="already"):
                store.add(again)
        assert len(store.rows()) == 2


def test_a_second_writer_is_refused_and_readers_are_not(path, process_environment):
    with Store(path, "w") as store:
        store.add(FULL)
        with pytest.raises(StoreError, match="another cbs-bench writes to it at this moment"):
            Store(path, "w")
        script = (
            "import sys\nfrom cbs_opt.bench.runs.store import Store\nfrom cbs_opt import CbsError\n"
            f"print(len(Store({str(path)!r}).rows()))\n"
            f"try: Store({str(path)!r}, 'w')\nexcept CbsError as error: sys.exit(str(error))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=process_environment, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "1\n"
        assert done.returncode == 1
        assert "another cbs-bench writes to it" in done.stderr
        store.add(BARE)
    with Store(path, "w") as store:
        assert len(store.rows()) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
def test_a_link_to_a_store_has_the_same_writer(path, tmp_path):
    link = tmp_path / "link.sqlite"
    with Store(path, "w"):
        link.symlink_to(path)
        with pytest.raises(StoreError, match=r"link\.sqlite: another cbs-bench writes to it"):
            Store(link, "w")


def test_a_writer_that_dies_leaves_its_rows_and_its_place(path, process_environment):
    script = (
        "import os, sys\nfrom cbs_opt.bench.runs.store import Row, Store\n"
        f"store = Store({str(path)!r}, 'w')\n"
        "for seed in range(5):\n"
        "    store.add(Row('ab', 'ls', '{}', 'selection', 5, seed, None, 'ls', 0.5, 'ok'))\n"
        "store._connection.execute('BEGIN IMMEDIATE')\n"  # half a row
        "store._connection.execute('DELETE FROM rows')\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    done = subprocess.run([sys.executable, "-c", script], env=process_environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    with Store(path) as store:
        assert [row.seed for row in store.rows()] == list(range(5))
    with Store(path, "w") as store:
        store.add(BARE)


def test_a_newer_store_is_refused(path):
    with Store(path, "w") as store:
        store.set_meta("version", "2")
    for mode in ("r", "w"):
        with pytest.raises(StoreError, match=r"is a store of version 2, .* reads versions up to 1"):
            Store(path, mode)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = '1' WHERE key = 'version'")
    connection.close()
    Store(path, "w").close()  # the refusals have left the writer's place free


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="there is no such store"):
        Store(tmp_path / "none.sqlite")
    with pytest.raises(StoreError, match="there is no directory"):
        Store(tmp_path / "no" / "none.sqlite", "w")
    with pytest.raises(StoreError, match="is a directory"):
        Store(tmp_path, "w")
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, only some words that are longer than a header\n" * 50)
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE things (a, b)")
    connection.close()
    for mode in ("r", "w"):
        with pytest.raises(StoreError, match=r"text.sqlite: cannot be read as a store"):
            Store(text, mode)
        with pytest.raises(StoreError, match=r"other.sqlite: is no store of cbs-bench"):
            Store(other, mode)
    assert text.read_text().startswith("not a database")


def test_a_directory_is_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (".", "/", str(tmp_path)):
        with pytest.raises(StoreError, match="is a directory"):
            Store(place, "w")


def test_a_reader_cannot_write(path):
    Store(path, "w").close()
    with Store(path) as store, pytest.raises(StoreError, match="open for reading only"):
        store.add(FULL)


def test_the_tables_are_those_of_the_format(path):
    """Others read the file too: names of tables and columns are a contract."""
    with Store(path, "w") as store:
        store.add(FULL)
        meta = store.meta
    assert meta["format"] == "cbs-bench"
    assert meta["version"] == "1"
    connection = sqlite3.connect(path)
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"meta", "environments", "instances", "rows"}
    columns = [row[1] for row in connection.execute("PRAGMA table_info(rows)")]
    assert set(columns) == {field.name for field in fields(Row)}
    limit, trace = connection.execute("SELECT time_limit, trace FROM rows").fetchone()
    assert limit == 2.5
    assert json.loads(trace) == [[0.01, 2.0, None], [0.2, 1.5, 1.0]]
    connection.close()


def test_a_store_without_the_columns_of_later_ones_is_read_and_filled(path):
    with Store(path, "w") as store:
        store.add(FULL)
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE rows DROP COLUMN own_s")
    connection.close()
    with Store(path) as store:
        assert store.rows(traces=True) == [replace(FULL, own_s=None, id=1)]
    with Store(path, "w") as store:
        store.add(replace(FULL, seed=4))
        assert [row.own_s for row in store.rows()] == [None, FULL.own_s]


def test_what_sqlite_reports_is_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "store.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_SCHEMA", "CREATE TABLE rows (; ")
        with pytest.raises(StoreError, match=r"store.sqlite: cannot be written: near"):
            Store(path, "w")
    with Store(path, "w") as store:
        store._execute("INSERT INTO environments (content) VALUES (?)", ("{damaged",))
        with pytest.raises(StoreError, match="cannot be read as a store"):
            store.environments()


def test_rows_of_other_types_are_refused(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store(path, "w") as store:
        store.add(FULL)
        for column, value in (("instance_sha256", None), ("budget", "many"), ("objective", "small")):
            before = store._fetch(f"SELECT {column} FROM rows")[0][0]
            store._execute(f"UPDATE rows SET {column} = ?", (value,))
            with pytest.raises(StoreError, match="entries are of other types"):
                store.rows()
            store._execute(f"UPDATE rows SET {column} = ?", (before,))
        assert len(store.rows()) == 1


def test_a_message_that_quotes_damage_is_one_line(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store(path, "w") as store:
        store.add(FULL)
        store._execute("UPDATE rows SET label = CAST(x'0a880a' AS TEXT)", ())
        with pytest.raises(StoreError, match="Could not decode") as caught:
            store.rows()
    assert "\n" not in str(caught.value)
