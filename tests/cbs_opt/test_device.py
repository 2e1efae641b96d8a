"""The choice of a device: why a card is taken or not, what the log says, and what happens without memory."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cbs_opt import GradientFactor, Instance, device, solve
from cbs_opt.device import Card, Constants, DeviceError, Work, choose, constants_of, in_batches, keep_constants
from cbs_opt.errors import InstanceError

CARD = Card("a test card", "cpu", True)
HEAVY = Work("heavy work", flops64=1e15, upload=1e6)
LIGHT = Work("light work", flops64=1e6, upload=1e6)


@pytest.fixture
def here(monkeypatch, tmp_path, caplog):
    """A card that is there, without measured constants; torch is loaded."""
    pytest.importorskip("torch")
    caplog.set_level(logging.DEBUG, "cbs_opt")
    monkeypatch.setattr(device, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(device, "is_plausible", lambda: True)

    def put(card, why_not=""):
        monkeypatch.setattr(device, "find_card", lambda: (card, why_not))

    put(CARD)
    return put


def test_auto_compares_and_says_why(here, caplog):
    assert choose("auto", HEAVY) is CARD
    assert "heavy work: on a test card," in caplog.text and "estimates: no card has been measured" in caplog.text
    caplog.clear()
    assert choose("auto", LIGHT) is None
    assert "light work: on the CPU, 3 s predicted there" in caplog.text and "on 1 core" in caplog.text
    assert choose("cuda", LIGHT) is CARD and choose("cpu", HEAVY) is None


def test_many_cores_of_the_cpu_count(here):
    work = Work("work", flops64=4e11)
    assert choose("auto", work, 1) is CARD and choose("auto", work, 16) is None


@pytest.mark.parametrize(
    ("card", "why_not", "work", "words"),
    [
        (None, "torch finds no CUDA device here", HEAVY, "torch finds no CUDA device here"),
        (replace(CARD, triton=False), "", replace(HEAVY, triton=True), "pip install triton"),
        (CARD, "", replace(HEAVY, memory=2.0**34), "needs 16.0 GiB, 1.0 GiB are free there"),
    ],
)
@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_without_a_usable_card_the_cpu_works(here, caplog, card, why_not, work, words, requested):
    here(card, why_not)
    assert choose(requested, work) is None
    (record,) = caplog.records
    assert words in record.getMessage() and "on the CPU" in record.getMessage()
    assert record.levelno == (logging.WARNING if requested == "cuda" else logging.INFO)


def test_searches_are_compared_by_their_swaps(here, tmp_path):
    """Twice as fast a core, half the advantage of the card."""
    work = Work("search", swaps=2e8, weights=64, lanes=1000)
    assert device.seconds_on_cpu(work, Constants(), 1) == pytest.approx(100.0)
    assert device.seconds_on_cpu(work, replace(Constants(), cpu_swap=2.5e-7), 2) == pytest.approx(25.0)
    assert device.seconds_on_cpu(replace(work, weights=564), Constants(), 1) == pytest.approx(200.0)
    on_card = [device.seconds_on_card(replace(work, lanes=lanes), Constants()) for lanes in (500, 1000, 9000)]
    assert on_card[0] - on_card[1] == pytest.approx(0.8) and on_card[1] == on_card[2]
    assert choose("auto", replace(work, lanes=1)) is None and choose("auto", work) is CARD


def test_measured_constants_are_kept_and_used(here, caplog, tmp_path):
    assert constants_of(CARD.name) == Constants()
    measured = replace(Constants(), source="measured on a test card", start=0.5, flops64=5e13)
    path = keep_constants(CARD.name, measured)
    assert path is not None and path.parent == tmp_path and constants_of(CARD.name) == measured
    assert constants_of("another card") == Constants()
    choose("auto", HEAVY)
    assert "measured on a test card" in caplog.text
    path.write_text(json.dumps({"start": -1.0}))
    assert constants_of(CARD.name) == Constants()
    path.write_text("{")
    assert constants_of(CARD.name) == Constants() and "not readable" in caplog.text


def test_no_driver_no_import_of_torch(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "cbs_opt")
    monkeypatch.delenv(device.EMULATE, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not device.is_plausible()
    monkeypatch.setattr(device, "find_card", lambda: pytest.fail("looked for a card"))
    assert choose("auto", HEAVY) is None
    assert caplog.records[0].levelno == logging.DEBUG


def test_small_problems_do_not_import_torch_to_find_out(here, monkeypatch, caplog):
    monkeypatch.setattr(device, "find_card", lambda: pytest.fail("looked for a card"))
    assert not device.is_wanted("auto", 500) and device.is_wanted("cuda", 500) and device.is_wanted("auto", 50_000)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert choose("auto", LIGHT) is None and "importing torch takes longer" in caplog.text


def test_a_card_that_can_do_nothing_more_is_not_asked_again(monkeypatch):
    """As after a wrong access to its memory."""

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    cuda = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, empty_cache=broken, synchronize=broken
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(device, "_FAILED", [])
    monkeypatch.setattr(device, "_real_card", lambda: (CARD, ""))
    monkeypatch.delenv(device.EMULATE, raising=False)
    assert device.find_card() == (CARD, "")
    with device.or_on_cpu("the work"):
        broken()
    found, why_not = device.find_card()
    assert found is None and why_not == "it failed before: CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    "text", ["CUDA out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
)
def test_lack_of_memory_has_several_names(text):
    assert device.is_out_of_memory(RuntimeError(text)) and not device.is_out_of_memory(ValueError(text))


def out_of_memory(size):
    raise RuntimeError(f"CUDA out of memory. Tried to allocate {size} bytes")


def test_batches_shrink_until_they_fit(caplog):
    caplog.set_level(logging.INFO, "cbs_opt")
    done = []

    def do(first, last):
        if last - first > 3:
            out_of_memory(last - first)
        done.append((first, last))

    assert in_batches(10, 16, do, lambda: False) == 10
    assert done[0] == (0, 2) and [first for first, _ in done[1:]] == [last for _, last in done[:-1]]
    assert done[-1][1] == 10 and "2 at a time" in caplog.text
    assert in_batches(10, 2, do, lambda: True) == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        in_batches(2, 2, lambda first, last: out_of_memory(1), lambda: False)
    with pytest.raises(ValueError, match="else"):
        in_batches(2, 2, lambda first, last: int("else"), lambda: False)


def test_only_errors_of_the_card_are_answered_by_the_cpu(caplog):
    failed = []
    extras = {}
    with device.or_on_cpu("the work", extras, failed):
        out_of_memory(8)
    assert extras == {}
    extras = {"device": "a card"}
    for _ in range(2):
        with device.or_on_cpu("the work", extras, failed):
            raise DeviceError("not a number")
    assert failed == ["out of memory", "not a number", "not a number"]
    assert extras == {"device": "a card, which failed; cpu"}
    assert caplog.text.count("on the CPU instead") == 3
    for error in (InstanceError("a sentence"), KeyboardInterrupt(), IndexError("a bug")):
        with pytest.raises(type(error)), device.or_on_cpu("the work", {}, failed):
            raise error


@pytest.fixture
def forgotten():
    """What is known of the card of this process is asked for anew, before and after."""
    device._real_card.cache_clear()
    yield
    device._real_card.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("solver", ["ls", "rmp", "cbs", "search", "relax"])
@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_solvers_do_without_torch(solver, requested, monkeypatch, caplog):
    """Without it there is no card; one that is asked for is answered by the CPU and a warning."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delenv("CBS_OPT_EMULATE_DEVICE", raising=False)
    rng = np.random.default_rng(0)
    instance = Instance(rng.standard_normal(12), GradientFactor(rng.standard_normal((6, 12)), 0.1), 6)
    with caplog.at_level("WARNING", logger="cbs_opt"):
        result = solve(instance, solver, device=requested)
    assert instance.admits(result.pruned)
    assert ("torch" in caplog.text) == (requested == "cuda")
