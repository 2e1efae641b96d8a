"""The examples in the docstrings of the core say what happens."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import cbs_opt


def modules():
    names = [module.name for module in pkgutil.walk_packages([cbs_opt.__path__[0]], "cbs_opt.")]
    return ["cbs_opt", *(name for name in names if not name.startswith("cbs_opt.cli"))]


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_front_door_has_examples():
    for name in ("budget", "instance", "interactions", "result", "verification"):
        module = importlib.import_module(f"cbs_opt.{name}")
        assert any(test.examples for test in doctest.DocTestFinder().find(module)), name
