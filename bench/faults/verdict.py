"""What a case of the campaign can find."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class Verdict(enum.StrEnum):
    """The outcome of a case."""

    FINE = "fine"
    SKIPPED = "skipped"
    CRASHED = "crashed"
    TRACEBACK = "traceback"
    HUNG = "hung"
    LOST = "lost"
    WRONG = "wrong"


FAULTS = (Verdict.CRASHED, Verdict.TRACEBACK, Verdict.HUNG, Verdict.LOST, Verdict.WRONG)
"""The outcomes that may not happen."""

MEANINGS = {
    Verdict.CRASHED: "ended by a signal that was not sent, with an undocumented exit code or an unlimited demand "
    "for memory",
    Verdict.TRACEBACK: "a Python traceback, or a message that asks to report an unexpected error",
    Verdict.HUNG: "not ended within its time limit, or a minute after a signal",
    Verdict.LOST: "an input that has changed, an output that was there before and is gone, a row of a store that "
    "is missing, a file that is half written",
    Verdict.WRONG: "a damaged file or forged proof that was accepted, a loss or a bound that is not true",
}


@dataclass(frozen=True)
class Finding:
    """What a case found, in words."""

    verdict: Verdict = Verdict.FINE
    text: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it is one of those that may not happen."""
        return self.verdict in FAULTS

    def where(self, text: str) -> Finding:
        """The same with what was being done, if it is a fault."""
        return Finding(self.verdict, f"{text}: {self.text}") if self.is_fault else self


FINE = Finding()

_SENTENCE = re.compile(r"\A[^\n]{1,3000}\Z")


def judge_error(error: BaseException) -> Finding:
    """The finding of an error that a reader raised: a sentence of the package, or a fault."""
    from cbs_opt.errors import CbsError

    if not isinstance(error, CbsError):
        return Finding(Verdict.TRACEBACK, f"{type(error).__name__}: {error}")
    if "not fit into memory" in str(error):
        return Finding(Verdict.CRASHED, f"a small file that takes all memory: {error}")
    if not _SENTENCE.match(str(error)):
        return Finding(Verdict.TRACEBACK, f"no sentence: {str(error)!r}")
    return FINE
