"""Where a computation runs: which card there is, whether it pays, and what happens when its memory is short.

Room: the core; all rooms may import it. torch and Triton are imported inside its functions only.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cbs_opt.cache import cache_folder

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("cbs_opt")

EMULATE = "CBS_OPT_EMULATE_DEVICE"
"""Environment variable: 1 runs the code of the card on the CPU, by torch and Triton's interpreter. For tests."""

_OLDEST = (7, 0)  # compute capability: Triton supports no older card
_FAILED: list[str] = []  # why the card of this process can do nothing more
_FEW = 1000  # weights up to which importing torch takes longer than a card can save
_IMPORT = 1.0  # seconds that importing torch takes at least
_SHARE = 0.8  # of the free memory that one problem may take
_AND_THEN = ", which failed; cpu"
_ADVANTAGE = 0.7  # the card is chosen where it takes at most this share of the time of the CPU

T = TypeVar("T")


@dataclass(frozen=True)
class Constants:
    """The constants of the cost model. The defaults are estimates, low for a card and high for the CPU.

    `python -m cbs_opt.bench.gpu` measures those of a card and keeps them in the cache folder, from where they are
    read; `source` says which of the two they are.

    Attributes
    ----------
    bandwidth : float
        Bytes per second that a copy within the card reads and writes.
    upload : float
        Bytes per second from the memory of the computer.
    flops64, flops32 : float
        Operations per second of matrix products.
    launch : float
        Seconds from one dependent kernel to the next.
    start : float
        Seconds that the first use of the card takes.
    lane_step : float
        Seconds of one tabu step of a block of up to 256 weights; `lanes` of them run at the same time.
    lanes : float
    cpu_flops64, cpu_bandwidth : float
        Of one core.
    cpu_swap : float
        Seconds of one tabu step on one core, for blocks of 64 weights.
    cpu_swap_weight : float
        Seconds more for each further weight.
    """

    source: str = "estimates: no card has been measured here"
    bandwidth: float = 1.0e12
    upload: float = 5.0e9
    flops64: float = 1.0e13
    flops32: float = 2.0e13
    launch: float = 1.0e-5
    start: float = 3.0
    lane_step: float = 4.0e-6
    lanes: float = 1000.0
    cpu_flops64: float = 4.0e10
    cpu_bandwidth: float = 1.0e10
    cpu_swap: float = 5.0e-7
    cpu_swap_weight: float = 1.0e-9


@dataclass(frozen=True)
class Card:
    """A card that can be used.

    Attributes
    ----------
    name : str
    torch_name : str
        "cuda"; "cpu" where the card is emulated.
    triton : bool
        Whether Triton is there, so that the package's own kernels run.
    """

    name: str
    torch_name: str
    triton: bool

    @property
    def device(self) -> torch.device:
        """As torch names it."""
        import torch

        return torch.device(self.torch_name)

    def free_bytes(self) -> int:
        """Memory that one problem may take."""
        if self.torch_name == "cpu":
            return 1 << 30
        import torch

        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(_SHARE * (torch.cuda.mem_get_info()[0] + cached))


@dataclass(frozen=True)
class Work:
    """What a computation costs, for the cost model.

    Attributes
    ----------
    what : str
        For the log.
    flops64, flops32, moved : float
        Operations of matrix products, and bytes that are read and written on the device.
    upload : float
        Bytes to bring to the card.
    launches : float
        Kernels that depend on each other.
    memory : float
        Bytes that it needs on the card.
    cpu_seconds : float, optional
        On the cores of this process; from `flops64`, `flops32`, `moved` and `swaps` without it.
    card_seconds : float
        Beyond what the rest tells.
    swaps, weights, lanes : float
        Tabu steps in blocks of so many weights, and how many searches can run at the same time on the card.
    triton : bool
        Whether it needs the package's own kernels.
    """

    what: str
    flops64: float = 0.0
    flops32: float = 0.0
    moved: float = 0.0
    upload: float = 0.0
    launches: float = 0.0
    memory: float = 0.0
    cpu_seconds: float | None = None
    card_seconds: float = 0.0
    swaps: float = 0.0
    weights: float = 64.0
    lanes: float = 1.0
    triton: bool = False


def find_card() -> tuple[Card | None, str]:
    """The card of this process, or None and the reason: no torch, no CUDA, a card that is too old."""
    if os.environ.get(EMULATE) == "1":
        return _emulated(), ""
    return (None, f"it failed before: {_FAILED[0]}") if _FAILED else _real_card()


def _emulated() -> Card:
    try:
        import triton  # type: ignore[import-untyped, unused-ignore]  # noqa: F401

        there = os.environ.get("TRITON_INTERPRET") == "1"
    except ModuleNotFoundError:
        there = False
    return Card("a card emulated on the CPU", "cpu", there)


@functools.cache
def _real_card() -> tuple[Card | None, str]:
    try:
        import torch
    except ModuleNotFoundError:
        return None, "torch is not installed"
    try:
        if not torch.cuda.is_available():
            return None, "torch finds no CUDA device here"
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        if capability < _OLDEST:
            return None, f"{name} has compute capability {capability[0]}.{capability[1]}, 7.0 is needed"
        torch.zeros(1, device="cuda").sum().item()  # a driver that does not fit fails here, not later
    except RuntimeError as error:
        return None, f"CUDA does not start: {str(error).splitlines()[0]}"
    # Full single precision: tf32 has three digits.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return Card(name, "cuda", False), ""
    return Card(name, "cuda", True), ""


def is_plausible() -> bool:
    """Whether it is worth importing torch to look for a card: a driver is there."""
    if os.environ.get(EMULATE) == "1":
        return True
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    if sys.platform == "win32":
        return True
    return any(Path(file).exists() for file in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvhost-gpu"))


def is_wanted(requested: str, weights: int) -> bool:
    """Whether to look for a card for so many weights: that imports torch, which takes seconds.

    A warning where one is asked for and torch is missing.
    """
    if requested == "cpu" or (requested == "auto" and (weights <= _FEW or not is_plausible())):
        return False
    with suppress(ValueError):  # its entry in sys.modules is None: imports of it are blocked
        if importlib.util.find_spec("torch") is not None:
            return True
    say = logger.warning if requested == "cuda" else logger.info
    say("no card is used: torch is not installed")
    return False


def choose(requested: str, work: Work, threads: int = 1) -> Card | None:
    """The card if the work should run there, else None; the log says what was chosen and why.

    Parameters
    ----------
    requested : {"auto", "cpu", "cuda"}
        "auto" compares the predictions of the cost model. "cuda" without a usable card is answered with the CPU
        and a warning.
    work : Work
    threads : int
        Cores of the CPU for the comparison.
    """
    if requested == "cpu":
        return None
    if requested == "auto" and not is_plausible():
        logger.debug(f"{work.what}: on the CPU, no card is here")
        return None
    if requested == "auto" and "torch" not in sys.modules:
        seconds = seconds_on_cpu(work, Constants(), threads)
        if seconds < _IMPORT:
            logger.debug(f"{work.what}: on the CPU, where it takes {seconds:.2g} s; importing torch takes longer")
            return None
    card, why_not = find_card()
    if card is not None and work.triton and not card.triton:
        card, why_not = None, "Triton is not installed: pip install triton"
    if card is not None and work.memory > (free := card.free_bytes()):
        card, why_not = None, f"it needs {_gigabytes(work.memory)}, {_gigabytes(free)} are free there"
    if card is None:
        say = logger.warning if requested == "cuda" else logger.info
        say(f"{work.what}: on the CPU, not on a card: {why_not}")
        return None
    if requested == "cuda":
        logger.info(f"{work.what}: on {card.name}, as asked for")
        return card
    constants = constants_of(card.name)
    there, here = seconds_on_card(work, constants), seconds_on_cpu(work, constants, threads)
    pays = there < _ADVANTAGE * here
    cores = f"{threads} core{'s' * (threads != 1)}"
    logger.info(
        f"{work.what}: on {card.name if pays else 'the CPU'}, {there:.2g} s predicted there, "
        f"{here:.2g} s on {cores} ({constants.source})"
    )
    return card if pays else None


def seconds_on_card(work: Work, constants: Constants) -> float:
    """Prediction for the card, its start and all transfers included."""
    products = work.flops64 / constants.flops64 + work.flops32 / constants.flops32
    busy = max(products, work.moved / constants.bandwidth) + work.launches * constants.launch
    swap = constants.lane_step * max(1.0, work.weights / 256) / min(max(work.lanes, 1.0), constants.lanes)
    busy += work.swaps * swap
    return _start_seconds(constants) + work.upload / constants.upload + busy + work.card_seconds


def _start_seconds(constants: Constants) -> float:
    torch = sys.modules.get("torch")
    return 0.0 if torch is not None and torch.cuda.is_initialized() else constants.start


def seconds_on_cpu(work: Work, constants: Constants, threads: int) -> float:
    """Prediction for the cores."""
    if work.cpu_seconds is not None:
        return work.cpu_seconds
    products = (work.flops64 + 0.5 * work.flops32) / (threads * constants.cpu_flops64)
    swaps = work.swaps * swap_on_cpu(work.weights, constants) / threads
    return max(products, work.moved / constants.cpu_bandwidth) + swaps


def swap_on_cpu(weights: float, constants: Constants | None = None) -> float:
    """Seconds of one tabu step on one core, in a block of so many weights; estimated without constants."""
    found = constants or Constants()
    return found.cpu_swap + found.cpu_swap_weight * max(weights - 64.0, 0.0)


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


# Constants of a card ----------------------------------------------------------------------------------------


def _constants_file(name: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"device-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json"


def constants_of(name: str) -> Constants:
    """The measured constants of a card, or the estimates."""
    path = _constants_file(name)
    try:
        text = "" if path is None else path.read_text(encoding="utf-8")
    except OSError:
        text = ""
    try:
        found = json.loads(text) if text else {}
        known = {field.name for field in fields(Constants)}
        numbers = {key: float(value) for key, value in found.items() if key in known - {"source"}}
        if not numbers or min(numbers.values()) <= 0:
            return Constants()
        return replace(Constants(), source=str(found.get("source", "measured")), **numbers)
    except (ValueError, TypeError, AttributeError):
        logger.warning(f"{path}: not readable, the cost model of the card uses estimates")
        return Constants()


def keep_constants(name: str, constants: Constants) -> Path | None:
    """Write the measured constants of a card; None where no cache folder can be written."""
    path = _constants_file(name)
    if path is not None:
        path.write_text(json.dumps(asdict(constants), indent=1) + "\n", encoding="utf-8")
    return path


# Memory -----------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that the memory of the card is used up."""
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "status_alloc_failed" in text)
    )


def release_memory() -> None:
    """Give unused memory of torch back to the card."""
    torch = sys.modules.get("torch")
    with suppress(RuntimeError):  # a card in an error state can do nothing more
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class Batches:
    """How many of something go to the card together: half as many after every lack of memory.

    Parameters
    ----------
    size : int
    least : int
        Below which there is nothing to divide.
    """

    def __init__(self, size: int, least: int = 1) -> None:
        self.size, self.least = max(size, least), least

    def run(
        self, count: int, do: Callable[[int, int], Any], should_stop: Callable[[], bool] = lambda: False
    ) -> int:
        """Call `do(first, last)` for consecutive ranges.

        Returns the number done, fewer than `count` when told to stop. Raises the error of torch where the least
        number does not fit.
        """
        first = 0
        while first < count and not (first and should_stop()):
            last = min(first + self.size, count)
            try:
                do(first, last)
            except RuntimeError as error:
                if not is_out_of_memory(error) or last - first <= self.least:
                    raise
                release_memory()
                self.size = max(self.least, (last - first) // 2)
                logger.info(f"the memory of the card is short: {self.size} at a time")
                continue
            first = last
        return first


def in_batches(count: int, size: int, do: Callable[[int, int], Any], should_stop: Callable[[], bool]) -> int:
    """`Batches.run` from batches of `size`."""
    return Batches(size).run(count, do, should_stop)


class or_on_cpu:  # noqa: N801 - reads as a function, like those of contextlib
    """Lets an error of the card in this block end in a warning; the CPU then does the work.

    Errors of the package, and everything that is no error of torch, Triton or the driver, pass.

    Parameters
    ----------
    what : str
        What failed, for the log.
    extras : dict, optional
        Of the result: its `device` then says that the CPU did the rest.
    failed : list of str, optional
        Receives the reason.
    """

    def __init__(self, what: str, extras: dict[str, Any] | None = None, failed: list[str] | None = None) -> None:
        self._what, self._extras, self._failed = what, extras, failed

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Swallow errors of the card."""
        if not isinstance(error, Exception) or not _is_of_the_card(error):
            return False
        short = "out of memory" if is_out_of_memory(error) else (str(error).splitlines() or [""])[0][:200]
        logger.warning(f"{self._what}: the card failed ({type(error).__name__}: {short}); on the CPU instead")
        logger.debug("error of the card", exc_info=error)
        if self._extras is not None and (used := self._extras.get("device", "cpu")) != "cpu":
            self._extras["device"] = used.removesuffix(_AND_THEN) + _AND_THEN
        if self._failed is not None:
            self._failed.append(short)
        release_memory()
        _note_whether_it_lives()
        return True


def _note_whether_it_lives() -> None:
    """Use the card no more where every further call fails, as after a wrong access to its memory."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        _FAILED.append((str(error).splitlines() or [""])[0][:200])


def _is_of_the_card(error: Exception) -> bool:
    module = type(error).__module__.partition(".")[0]
    return is_out_of_memory(error) or module in ("torch", "triton") or type(error) in (RuntimeError, DeviceError)


class DeviceError(RuntimeError):
    """A result of the card that is not a number, or does not agree with its check in float64."""
