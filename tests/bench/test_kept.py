"""Measurements that are kept in a file, and not made again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cbs_opt.bench.kept import add_line, once, read_lines


@dataclass(frozen=True)
class Found:
    size: int
    seconds: float


def test_a_measurement_is_made_once(tmp_path):
    path, made = tmp_path / "rows.jsonl", []

    def found(size):
        return once(
            path, Found, lambda row: row.size == size, lambda: made.append(size) or Found(size, 0.1 + size)
        )

    assert [found(size).seconds for size in (1, 2, 1, 2)] == [1.1, 2.1, 1.1, 2.1]
    assert made == [1, 2] and read_lines(path, Found) == [Found(1, 1.1), Found(2, 2.1)]
    assert once(None, Found, lambda row: True, lambda: Found(3, 0.0)) == Found(3, 0.0)
    assert len(read_lines(path, Found)) == 2


def test_a_line_that_was_not_finished_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    add_line(path, Found(1, 2.0))
    with path.open("a") as file:
        file.write('{"size": 2, "sec')
    assert read_lines(path, Found) == [Found(1, 2.0)] and read_lines(tmp_path / "none", Found) == []
    add_line(path, Found(3, 4.0))
    assert read_lines(path, Found) == [Found(1, 2.0), Found(3, 4.0)]
    with pytest.raises(ValueError, match="a fault"):
        once(path, Found, lambda row: row.size == 2, lambda: Found(int("a fault"), 0.0))
