"""Budgets of layers by pattern, and weights that every layer keeps."""

import numpy as np
import pytest

pytest.importorskip("torch")

from cbs_opt import Budget, InstanceError, UsageError
from cbs_opt.instances.budgets import budget_of_layers, keeping, read_rules

NAMES, SIZES = ["conv.weight", "fc.0.weight", "fc.2.weight", "head.weight"], [10, 20, 30, 40]


def test_rules_from_words_and_files(tmp_path):
    file = tmp_path / "layers.toml"
    file.write_text('"fc.*" = 0.9\nhead = "25%"\n[conv]\nweight = 0.5\n', encoding="utf-8")
    assert read_rules([str(file), "head=0.1"]) == {"fc.*": 0.9, "conv.weight": 0.5, "head": 0.1}
    budget = budget_of_layers(NAMES, SIZES, {"fc.*": 0.9, "fc.2": 0.5}, 0.3)
    assert budget.group_budgets.tolist() == [18, 15, 15]  # ⌈0.3 · 50⌉ of conv and head together
    assert np.bincount(budget.groups).tolist() == [20, 30, 50]
    assert budget.groups[[0, 10, 30, 99]].tolist() == [2, 0, 1, 2]
    for words, error, message in (
        (["fc"], UsageError, "takes PATTERN=FRACTION"),
        (["fc=2"], UsageError, "between 0 and 1"),
        (["no.toml"], InstanceError, "cannot be read"),
    ):
        with pytest.raises(error, match=message):
            read_rules(words)
    with pytest.raises(UsageError, match="'gone' is no tensor that is pruned"):
        budget_of_layers(NAMES, SIZES, {"gone": 0.5}, 0.5)


def test_every_layer_keeps_its_largest(caplog):
    weights = np.random.default_rng(0).standard_normal(100)
    budget, fixed = keeping(Budget(60), weights, SIZES, 3, None)
    assert budget.total == 60
    ends = np.cumsum(SIZES)
    for start, end in zip(ends - SIZES, ends, strict=True):
        kept = np.flatnonzero(fixed[start:end] == -1)
        assert set(kept) == set(np.argsort(-np.abs(weights[start:end]))[:3])
    assert keeping(Budget(95), weights, SIZES, 0.5, None)[0].total == 50
    assert "50 are pruned in place of 95" in caplog.text
    layers = budget_of_layers(NAMES, SIZES, dict.fromkeys(NAMES, 0.9), 0.9)
    assert keeping(layers, weights, SIZES, 2, None)[0].group_budgets.tolist() == [8, 18, 27, 36]
    zeros = np.zeros(100, np.int8)
    zeros[:9] = 1  # of ten weights one may stay
    assert (keeping(Budget(60), weights, SIZES, 3, zeros)[1][:10] == [1] * 9 + [-1]).all()
    with pytest.raises(UsageError, match="whole number of weights, or a share"):
        keeping(Budget(60), weights, SIZES, 2.5, None)
