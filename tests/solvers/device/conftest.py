"""A card for the tests: a real one for those marked `gpu`, else one emulated on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is declared


@pytest.fixture
def card(monkeypatch):
    """The card under test, with Triton."""
    from cbs_opt.device import EMULATE, find_card

    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv(EMULATE, "1")
    found, why_not = find_card()
    assert found is not None and found.triton, why_not
    return found
