"""The classes of cases, three sizes, and the table of what was found."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbs_opt.bench.faults import formats, options, proofs, signals, surroundings
from cbs_opt.bench.faults.material import Material, make_material
from cbs_opt.bench.faults.verdict import FAULTS, MEANINGS, Finding, Verdict
from cbs_opt.bench.startup import machine
from cbs_opt.cli import common
from cbs_opt.errors import UsageError

logger = logging.getLogger("cbs_opt")

Case = Callable[[Material, np.random.Generator, Path], Finding]


class Class(NamedTuple):
    """A class of cases: what happens in them, and how many a campaign of a minute has."""

    about: str
    case: Case
    number: int


CLASSES = {
    "bytes": Class("files of every format with damaged bytes", formats.damaged_file, 400),
    "contents": Class("files with another content under correct checksums", formats.damaged_content, 150),
    "proofs": Class("forged certificates", proofs.forged_proof, 150),
    "options": Class("absurd options", options.absurd_options, 40),
    "signals": Class("SIGINT and SIGTERM at a random moment", signals.interrupted, 8),
    "kills": Class("SIGKILL and restart", signals.killed_and_resumed, 3),
    "two": Class("two processes on one store, output or cache", signals.two_at_once, 2),
    "memory": Class("little memory", surroundings.small_memory, 6),
    "disk": Class("a full disk", surroundings.full_disk, 8),
    "descriptors": Class("few open files", surroundings.few_descriptors, 4),
    "places": Class("read-only, missing and odd places", surroundings.odd_places, 12),
    "streams": Class("closed and full streams", surroundings.odd_streams, 4),
    "locales": Class("locales, encodings, odd file names", surroundings.odd_locales, 3),
    "clock": Class("a clock that jumps", surroundings.jumping_clock, 2),
}

SIZES = {"minute": 1, "ten-minutes": 10, "night": 500}
"""Times the number of cases of a minute; processor time on one core, compilation not included."""


@dataclass
class Campaign:
    """What a campaign has found so far, by class."""

    seed: int
    found: dict[str, Counter[Verdict]] = field(default_factory=dict)
    faults: list[tuple[str, int, Finding]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, name: str, number: int, finding: Finding) -> None:
        """Count a case."""
        self.found.setdefault(name, Counter())[finding.verdict] += 1
        if finding.is_fault:
            self.faults.append((name, number, finding))
            logger.warning(f"{name} {number}: {finding.verdict}: {finding.text}")

    def table(self) -> str:
        """Markdown: a row for each class."""
        columns = [str(verdict) for verdict in FAULTS]
        lines = [f"| class | tried | {' | '.join(columns)} | skipped |", f"|---|{'---|' * (len(columns) + 2)}"]
        total: Counter[Verdict] = Counter()
        for name, counts in self.found.items():
            total += counts
            lines.append(self._row(CLASSES[name].about, counts))
        return "\n".join([*lines, self._row("all", total)])

    def _row(self, name: str, counts: Counter[Verdict]) -> str:
        tried = sum(counts.values()) - counts[Verdict.SKIPPED]
        cells = [tried, *(counts[verdict] for verdict in FAULTS), counts[Verdict.SKIPPED]]
        return f"| {name} | {' | '.join(f'{cell:,}' for cell in cells)} |"


def run_campaign(
    seed: int, times: int = 1, classes: Sequence[str] = tuple(CLASSES), only: int | None = None
) -> Campaign:
    """Run the cases of some classes.

    Parameters
    ----------
    seed : int
    times : int
        The number of cases, as a multiple of those of a minute.
    classes : sequence of str
    only : int, optional
        Run this case of each class only.

    Returns
    -------
    Campaign
    """
    campaign = Campaign(seed)
    began = time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="cbs-faults-"))
    try:
        material = make_material(work / "material")
        _load_everything()
        for name in classes:
            chosen = CLASSES[name]
            started, first = time.perf_counter(), len(campaign.faults)
            for number in range(chosen.number * times) if only is None else (only,):
                folder = work / f"{name}-{number}"
                folder.mkdir()
                rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
                campaign.add(name, number, chosen.case(material, rng, folder))
                shutil.rmtree(folder, ignore_errors=True)
            logger.info(
                f"{name}: {sum(campaign.found[name].values())} cases in {time.perf_counter() - started:.1f} s, "
                f"{len(campaign.faults) - first} faults"
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    campaign.seconds = time.perf_counter() - began
    return campaign


def _load_everything() -> None:
    """Import what forked commands would import one by one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot
    import sklearn.datasets  # noqa: F401

    import cbs_opt.bench.reports.report
    import cbs_opt.bench.runs.runner
    import cbs_opt.cli.apply
    import cbs_opt.cli.bench
    import cbs_opt.cli.export
    import cbs_opt.cli.info
    import cbs_opt.cli.prune
    import cbs_opt.cli.solve
    import cbs_opt.pruning.run
    import cbs_opt.solvers  # noqa: F401


def report(campaign: Campaign, size: str) -> str:
    """The table of a campaign with what the columns mean, as Markdown."""
    meanings = "\n".join(f"- {verdict}: {text};" for verdict, text in MEANINGS.items())
    faults = "".join(
        f"\n- `--only {name} --case {number}`: {finding.verdict}: {finding.text}"
        for name, number, finding in campaign.faults
    )
    return (
        f"`python -m cbs_opt.bench.faults --size {size} --seed {campaign.seed}`, {campaign.seconds:.0f} s, "
        f"{machine()}\n\n{campaign.table()}\n\n{meanings}\n{faults}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return common.run_main("cbs_opt.bench.faults", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = common.Parser("python -m cbs_opt.bench.faults", "Try what can go wrong, and count what does.")
    add = parser.add_argument
    add("--size", choices=tuple(SIZES), default="minute", help="default: minute")
    add("--seed", type=int, default=0, metavar="N")
    add("--only", nargs="+", metavar="CLASS", default=list(CLASSES), help=f"of {', '.join(CLASSES)}")
    add("--case", type=int, metavar="N", help="run this case of the classes only")
    add("-o", "--output", type=Path, metavar="FILE.md", help="also write the table there")
    options_ = parser.parse_args(arguments)
    unknown = sorted({*options_.only} - CLASSES.keys())
    if unknown:
        raise UsageError(f"there is no class '{unknown[0]}'; known: {', '.join(CLASSES)}")
    if sys.platform != "linux":
        raise UsageError("the campaign needs Linux: it limits and forks processes")
    common.check_outputs((), (options_.output,))
    common.start_logging(False, False)
    campaign = run_campaign(options_.seed, SIZES[options_.size], options_.only, options_.case)
    text = report(campaign, options_.size)
    common.say(text)
    if options_.output is not None:
        options_.output.write_text(text)
    return 1 if campaign.faults else 0
