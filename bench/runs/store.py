"""The store of a benchmark: one SQLite file of rows, each written as soon as it is produced.

A run has one writer, which holds a lock file next to the store while it runs; others may read. A
process that dies in the middle of a row leaves the rows before it, as SQLite has it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

from cbs_opt.errors import CbsError
from cbs_opt.files.paths import real_path
from cbs_opt.result import relative_gap
from cbs_opt.version import __version__

FORMAT = "cbs-bench"
VERSION = 1

OK, WRONG, INFEASIBLE, ERROR, LOST, UNSUPPORTED = "ok", "wrong", "infeasible", "error", "lost", "unsupported"
KINDS = (OK, WRONG, INFEASIBLE, ERROR, LOST, UNSUPPORTED)
"""Kinds of rows, according to the recomputation, not to the solver.

`ok` is a feasible selection with the loss and a bound that can be true; `wrong` claims a loss or a bound that the
recomputation refutes; `infeasible` misses the budget; `error` gave nothing; `lost` killed its worker at every try;
`unsupported` is refused by the solver.
"""

Trace = list[tuple[float, float | None, float | None]]
"""Seconds, objective, bound of each event of a run."""

_ADDED = {"own_s": "REAL", "scores": "TEXT"}
"""Columns that the first stores of this version lack: readers see None, writers add them."""

_NO_LIMIT = -1.0  # a NULL would make no key unique
_PATIENCE = 30.0  # seconds that a reader and the writer wait for each other

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE environments (id INTEGER PRIMARY KEY, content TEXT UNIQUE);
CREATE TABLE instances (
  sha256 TEXT PRIMARY KEY, name TEXT, n INTEGER, blocks INTEGER, curvature TEXT, metadata TEXT
);
CREATE TABLE rows (
  id INTEGER PRIMARY KEY,
  instance_sha256 TEXT, solver TEXT, parameters TEXT, objective_kind TEXT, budget INTEGER, seed INTEGER,
  time_limit REAL,
  label TEXT, sparsity REAL, kind TEXT, status TEXT, message TEXT,
  objective REAL, selection_loss REAL, joint_loss REAL, bound REAL,
  claimed_objective REAL, iterations INTEGER, nodes INTEGER,
  build_s REAL, solve_s REAL, cpu_s REAL, row_s REAL,
  started TEXT, environment INTEGER REFERENCES environments(id),
  trace TEXT,
  own_s REAL,
  scores TEXT,
  UNIQUE (instance_sha256, solver, parameters, objective_kind, budget, seed, time_limit)
);
"""


class StoreError(CbsError):
    """A store that cannot be read or written."""

    exit_code: ClassVar[int] = 3


class Key(NamedTuple):
    """What a row answers; no two rows of a store have the same."""

    instance_sha256: str
    solver: str
    parameters: str
    objective_kind: str
    budget: int
    seed: int
    time_limit: float | None


@dataclass(slots=True)
class Row:
    """One run of one solver. Unknown is None.

    Attributes
    ----------
    instance_sha256, solver, parameters, objective_kind, budget, seed, time_limit
        The key. `parameters` is canonical JSON of those that were given; `time_limit` in seconds, None for none.
    label : str
        How tables name the solver with its parameters.
    sparsity : float
        budget / n.
    kind : str
        One of `KINDS`.
    status, message : str
        `Status` of the run, and a sentence where the kind is not `ok`.
    objective, selection_loss, joint_loss : float or None
        Recomputed outside the solver.
    bound : float or None
        As the solver proved it; at most `objective` unless the row is `wrong`.
    claimed_objective : float or None
        What the solver said.
    iterations, nodes : int or None
    build_s, solve_s, cpu_s : float or None
        Seconds of preparing, of solving, and of the processor in both.
    row_s : float or None
        Seconds of the whole row: reading, recomputation and transport included.
    own_s : float or None
        Seconds that an outside solver reports for itself.
    scores : mapping or None
        JSON object: how the pruned network does, where one was run; see `cbs_opt.bench.paper.scores`.
    started : str or None
        ISO 8601, UTC.
    environment : int or None
        Id of an environment of the store.
    trace : list or None
        Events of the run; None also where it was not read.
    id : int or None
        Of the row in the store.
    """

    instance_sha256: str
    solver: str
    parameters: str
    objective_kind: str
    budget: int
    seed: int
    time_limit: float | None
    label: str
    sparsity: float
    kind: str
    status: str | None = None
    message: str | None = None
    objective: float | None = None
    selection_loss: float | None = None
    joint_loss: float | None = None
    bound: float | None = None
    claimed_objective: float | None = None
    iterations: int | None = None
    nodes: int | None = None
    build_s: float | None = None
    solve_s: float | None = None
    cpu_s: float | None = None
    row_s: float | None = None
    started: str | None = None
    environment: int | None = None
    own_s: float | None = None
    scores: Mapping[str, Any] | None = None
    trace: Trace | None = None
    id: int | None = None

    @property
    def key(self) -> Key:
        """What the row answers."""
        return Key(
            self.instance_sha256,
            self.solver,
            self.parameters,
            self.objective_kind,
            self.budget,
            self.seed,
            self.time_limit,
        )

    @property
    def gap(self) -> float | None:
        """(objective − bound) / |objective|, None where either is unknown."""
        return relative_gap(self.objective, self.bound)


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """What the store keeps of an instance: its name, size, form of the curvature, and the file's metadata."""

    sha256: str
    name: str
    n: int
    blocks: int
    curvature: str
    metadata: Mapping[str, Any]


_COLUMNS = [field.name for field in fields(Row) if field.name not in ("id", "trace")]


class Store:
    """The rows of a benchmark in one SQLite file. A context manager.

    Parameters
    ----------
    path : Path or str
    mode : {"r", "w"}
        "w" makes the file where there is none, and lets no other writer in until it is closed.

    Raises
    ------
    StoreError
        For a file that is no store, is of a newer version, is missing (mode "r"), cannot be made, or has a writer
        already (mode "w").

    Examples
    --------
    >>> with Store("results.sqlite") as store:  # doctest: +SKIP
    ...     objectives = [row.objective for row in store.rows()]
    """

    def __init__(self, path: Path | str, mode: str = "r") -> None:
        self.path = Path(path)
        self.mode = mode
        self._lock: sqlite3.Connection | None = None
        if mode == "w":
            self._lock = _lock(self.path)
        try:
            self._connection = self._open()
            self._check()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let the next writer in."""
        self._connection.close()
        self._release()

    @property
    def meta(self) -> dict[str, str]:
        """Format, version, time of making, version of the package that made it."""
        return dict(self._fetch("SELECT key, value FROM meta"))

    def set_meta(self, key: str, value: str) -> None:
        """Keep a fact about the store."""
        self._execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def add(self, row: Row, *, replace: bool = False) -> int:
        """Write a row; it is on the disk when this returns.

        Parameters
        ----------
        row : Row
        replace : bool
            Whether a row with the same key goes; else it is an error.

        Returns
        -------
        int
            Its id.
        """
        content = {name: getattr(row, name) for name in _COLUMNS}
        content["time_limit"] = _NO_LIMIT if row.time_limit is None else row.time_limit
        for name in ("trace", "scores"):
            value = getattr(row, name)
            content[name] = None if value is None else json.dumps(value, separators=(",", ":"))
        names, marks = ", ".join(content), ", ".join("?" * len(content))
        verb = "INSERT OR REPLACE" if replace else "INSERT"
        try:
            added = self._execute(f"{verb} INTO rows ({names}) VALUES ({marks})", tuple(content.values()))
        except sqlite3.IntegrityError:
            raise StoreError(f"{self.path}: has a row for {row.label}, seed {row.seed}, already") from None
        assert added is not None
        return added

    def set_kind(self, row_id: int | None, kind: str, message: str) -> None:
        """Correct a stored row by the result of another one."""
        self._execute("UPDATE rows SET kind = ?, message = ? WHERE id = ?", (kind, message, row_id))

    def add_instance(self, instance: StoredInstance) -> None:
        """Store the description of an instance; the first one is kept."""
        values = (
            instance.sha256,
            instance.name,
            instance.n,
            instance.blocks,
            instance.curvature,
            json.dumps(instance.metadata),
        )
        self._execute("INSERT OR IGNORE INTO instances VALUES (?, ?, ?, ?, ?, ?)", values)

    def add_environment(self, content: Mapping[str, Any]) -> int:
        """Keep a description of machine, versions and threads, once; returns its id."""
        text = json.dumps(content, sort_keys=True)
        self._execute("INSERT OR IGNORE INTO environments (content) VALUES (?)", (text,))
        return int(self._fetch("SELECT id FROM environments WHERE content = ?", (text,))[0][0])

    def keys(self) -> dict[Key, tuple[str, str | None]]:
        """Kind and status of every row, by its key."""
        found = self._fetch(f"SELECT {', '.join(Key._fields)}, kind, status FROM rows")
        return {Key._make([*row[:6], _limit(row[6])]): (row[7], row[8]) for row in found}

    def rows(self, traces: bool = False) -> list[Row]:
        """Every row in the order in which they were made; traces only where asked for."""
        there = [name if name in self._columns() else f"NULL AS {name}" for name in _COLUMNS]
        names = f"{', '.join(there)}, {'trace' if traces else 'NULL'}, id"
        found = self._fetch(f"SELECT {names} FROM rows ORDER BY id")
        with self._as_store_error("read as a store"):
            return [_row(values) for values in found]

    def trace(self, row_id: int | None) -> Trace:
        """The events of a row: seconds, objective, bound; empty where nothing is known."""
        found = self._fetch("SELECT trace FROM rows WHERE id = ?", (row_id,))
        with self._as_store_error("read as a store"):
            return _trace(found[0][0]) or [] if found else []

    def traces(self, row_ids: Iterable[int]) -> dict[int, Trace]:
        """The events of several rows, by id."""
        return {row_id: self.trace(row_id) for row_id in row_ids}

    def instances(self) -> dict[str, StoredInstance]:
        """The instances, by the hash of their file."""
        found = self._fetch("SELECT sha256, name, n, blocks, curvature, metadata FROM instances")
        with self._as_store_error("read as a store"):
            return {
                sha256: StoredInstance(sha256, name, n, blocks, curvature, json.loads(metadata))
                for sha256, name, n, blocks, curvature, metadata in found
            }

    def environments(self) -> dict[int, dict[str, Any]]:
        """Descriptions of machine, versions and threads, by id."""
        found = self._fetch("SELECT id, content FROM environments")
        with self._as_store_error("read as a store"):
            return {row[0]: json.loads(row[1]) for row in found}

    def _open(self) -> sqlite3.Connection:
        if self.mode == "r" and not self.path.is_file():
            raise StoreError(f"{self.path}: there is no such store")
        if self.path.is_dir():
            raise StoreError(f"{self.path}: is a directory, a store is a file")
        address = real_path(self.path).as_uri()
        # A reader too may have to undo the last, half-written row of a process that was killed.
        mode = "rwc" if self.mode == "w" else "rw"
        try:
            connection = sqlite3.connect(f"{address}?mode={mode}", uri=True, timeout=_PATIENCE)
            if self.mode == "r":
                connection.execute("PRAGMA query_only = ON")
            return connection
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: cannot be opened: {error}") from None

    def _check(self) -> None:
        """Make the tables of a new store; see that an old one can be read."""
        tables = {name for (name,) in self._fetch("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables and self.mode == "w":
            made = {
                "format": FORMAT,
                "version": str(VERSION),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "cbs_opt": __version__,
            }
            values = ", ".join(f"('{key}', '{value}')" for key, value in made.items())
            # One transaction: a process that dies here leaves an empty file, which the next one fills.
            with self._as_store_error("written"):
                self._connection.executescript(f"BEGIN; {_SCHEMA} INSERT INTO meta VALUES {values}; COMMIT;")
            return
        meta = self.meta if "meta" in tables else {}
        if meta.get("format") != FORMAT:
            raise StoreError(f"{self.path}: is no store of cbs-bench (`format` is not '{FORMAT}')")
        version = meta.get("version", "")
        if not version.isdigit() or int(version) > VERSION:
            raise StoreError(
                f"{self.path}: is a store of version {version}, this cbs-opt {__version__} reads versions up to "
                f"{VERSION}: use a newer cbs-opt"
            )
        if self.mode == "w":
            for name in _ADDED.keys() - self._columns():
                self._execute(f"ALTER TABLE rows ADD COLUMN {name} {_ADDED[name]}", ())

    def _columns(self) -> set[str]:
        """Names of the columns of the rows."""
        return {column for _, column, *_ in self._fetch("PRAGMA table_info(rows)")}

    def _fetch(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._as_store_error("read as a store"):
            return self._connection.execute(query, values).fetchall()

    def _execute(self, query: str, values: tuple[Any, ...]) -> int | None:
        """Run one statement in a transaction of its own."""
        if self.mode != "w":
            raise StoreError(f"{self.path}: is open for reading only")
        with self._as_store_error("written"), self._connection:
            return self._connection.execute(query, values).lastrowid

    @contextmanager
    def _as_store_error(self, done: str) -> Iterator[None]:
        """Turn errors of the database, and of the JSON in it, to sentences; except for a key that is there."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except (sqlite3.Error, ValueError, TypeError, LookupError) as error:
            reason = " ".join(str(error).split())[:200]  # it may quote what is damaged
            raise StoreError(f"{self.path}: cannot be {done}: {reason}") from None

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _lock(path: Path) -> sqlite3.Connection:
    """Become the only writer: an exclusive lock of a file next to the store, released with the process."""
    if path.is_dir():
        raise StoreError(f"{path}: is a directory, a store is a file")
    target = real_path(path)  # a store has one lock, whatever links lead to it
    place = target.with_name(f".{target.name}.lock")
    if not target.parent.is_dir():
        raise StoreError(f"{path}: cannot be written: there is no directory {path.parent}")
    try:
        lock = sqlite3.connect(place, timeout=0, check_same_thread=False)
    except sqlite3.Error as error:
        raise StoreError(f"{path}: cannot be written: {place}: {error}") from None
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        if "locked" in str(error):
            raise StoreError(
                f"{path}: another cbs-bench writes to it at this moment; wait for its end, or name another store"
            ) from None
        raise StoreError(f"{path}: cannot be written: {place}: {error}") from None
    except sqlite3.DatabaseError as error:
        lock.close()
        raise StoreError(f"{path}: cannot be written: {place}: {error}") from None
    return lock


def _limit(value: float) -> float | None:
    return None if value == _NO_LIMIT else value


def _trace(text: str | None) -> Trace | None:
    return None if text is None else [(event[0], event[1], event[2]) for event in json.loads(text)]


def _row(values: tuple[Any, ...]) -> Row:
    row = Row(*values)
    texts = row.instance_sha256, row.solver, row.parameters, row.objective_kind, row.label, row.kind
    numbers = (row.budget, row.seed, row.sparsity, *(value for value in values[12:23] if value is not None))
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(n, int | float) for n in numbers):
        raise ValueError("a row whose entries are of other types: the file is damaged")
    row.time_limit, row.trace = _limit(values[6]), _trace(values[-2])
    row.scores = None if row.scores is None else json.loads(str(row.scores))
    return row
