"""What every part uses: rows that are written at once, and clocks that wait for the card."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cbs_opt.bench.kept import add_line, read_lines
from cbs_opt.device import Card, find_card


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes
    ----------
    part, what : str
    value : float or None
        None where it could not be measured.
    unit : str
    target : str
        The value to reach; empty where there is none.
    met : bool or None
    note : str
    """

    part: str
    what: str
    value: float | None
    unit: str = ""
    target: str = ""
    met: bool | None = None
    note: str = ""


class Bench:
    """A part at work.

    Parameters
    ----------
    part : str
    device : {"cuda", "cpu"}
        "cpu" emulates the card.
    tiny : bool
        Sizes that take seconds on a CPU.
    folder : Path
        Of the instances that parts share.
    rows : Path
        A file of JSON lines that rows are appended to.
    """

    def __init__(self, part: str, device: str, tiny: bool, folder: Path, rows: Path) -> None:
        self.part, self.device, self.tiny, self.folder, self._rows = part, device, tiny, folder, rows

    @property
    def card(self) -> Card:
        """The card; `RuntimeError` where there is none."""
        found, why_not = find_card()
        if found is None:
            raise RuntimeError(why_not)
        return found

    def row(
        self,
        what: str,
        value: float | None,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        note: str = "",
    ) -> None:
        """Write a row; `at_least` and `at_most` are targets, which tiny sizes have not."""
        if self.tiny:
            at_least = at_most = None
        target, met = "", None
        if at_least is not None:
            target, met = f"≥ {at_least:g}", None if value is None else value >= at_least
        if at_most is not None:
            target, met = f"≤ {at_most:g}", None if value is None else value <= at_most
        self.write(Row(self.part, what, value, unit, target, met, note))

    def write(self, row: Row) -> None:
        """Append a row to the file."""
        add_line(self._rows, row)

    def wait(self) -> None:
        """Wait until the card has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, do: Callable[[], object], repeats: int = 5) -> float:
        """Median seconds of a call, after one that warms up."""
        do()
        self.wait()
        found = []
        for _ in range(1 if self.tiny else repeats):
            began = time.perf_counter()
            do()
            self.wait()
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def copy_bandwidth(self) -> float:
        """Bytes per second that a copy within the card reads and writes."""
        size = 1 << (16 if self.tiny else 31)
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.card.device)
        target = torch.empty_like(source)
        return 2.0 * size / self.seconds(lambda: target.copy_(source), 10)


def read_rows(path: Path) -> list[Row]:
    """All complete rows of a file."""
    return read_lines(path, Row)
