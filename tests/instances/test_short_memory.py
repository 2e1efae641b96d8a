"""Networks on a card whose memory is short: smaller batches, then the CPU, with the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cbs_opt.cli.common import run_main
from cbs_opt.errors import InstanceError
from cbs_opt.instances import batches, dense, scores
from cbs_opt.instances.data import HeldSource
from cbs_opt.instances.reconstruction import input_covariances
from cbs_opt.pruning import statistics


class Hungry(nn.Module):
    """Needs the memory of at most `room` samples at a time."""

    def __init__(self, room: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.room, self.calls = room, []

    def forward(self, x):
        self.calls.append(len(x))
        if self.room is not None and len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.last(torch.relu(self.norm(self.layer(x))))


@pytest.fixture
def source():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(230, 5, generator=generator)
    return HeldSource("samples", inputs, torch.randint(0, 3, (230,), generator=generator))


@pytest.fixture
def freed(monkeypatch):
    """The CPU, which has memory enough; a card is not here to be left."""

    def leave(*networks):
        for network in networks:
            network.room = None

    for module in (batches, dense, scores, statistics):
        monkeypatch.setattr(module, "on_cpu_instead", leave)


@pytest.mark.parametrize("room", [60, 7, 1])
def test_scores_come_from_smaller_batches(source, room, caplog):
    caplog.set_level("INFO", "cbs_opt")
    whole, model = scores.evaluate(Hungry(None), source), Hungry(room)
    found = scores.evaluate(model, source)
    assert (found.samples, found.accuracy) == (230, whole.accuracy)
    assert found.loss == pytest.approx(whole.loss, rel=1e-6)
    assert "the memory of the card is short" in caplog.text
    too_large = [size for size in model.calls if size > room]
    assert too_large == sorted(set(too_large), reverse=True)  # no size is tried twice


@pytest.mark.usefixtures("freed")
def test_scores_come_from_the_cpu_where_one_sample_is_too_much(source):
    whole, found = (scores.evaluate(Hungry(room), source) for room in (None, 0))
    assert (found.samples, found.accuracy) == (230, whole.accuracy)
    assert found.loss == pytest.approx(whole.loss, rel=1e-6)


@pytest.mark.parametrize("room", [40, 0])
@pytest.mark.usefixtures("freed")
def test_the_dense_network_of_an_export(source, room):
    samples = source.read()
    facts = [
        dense.dense_scores(Hungry(r), samples.inputs, samples.labels, scores.Judge(), chunk_bytes=1 << 20)
        for r in (None, room)
    ]
    assert facts[0].keys() == facts[1].keys()
    assert facts[1]["dense_loss"] == pytest.approx(facts[0]["dense_loss"], rel=1e-6)


@pytest.mark.parametrize("room", [40, 0])
@pytest.mark.usefixtures("freed")
def test_sums_begin_again_with_less(source, room):
    inputs = source.read().inputs
    whole, found = (input_covariances(Hungry(r), inputs, ["last.weight"])[0] for r in (None, room))
    assert np.array(found.ranges[0].covariance) == pytest.approx(np.array(whole.ranges[0].covariance), rel=1e-6)


@pytest.mark.usefixtures("freed")
def test_statistics_of_a_card_without_room_are_those_of_the_cpu(source):
    models = [Hungry(room) for room in (None, 3)]
    for model in models:
        statistics.reestimate(model, source)
    assert torch.equal(models[0].norm.running_mean, models[1].norm.running_mean)
    assert torch.equal(models[0].norm.running_var, models[1].norm.running_var)


def test_memory_that_is_short_on_the_cpu_too_is_said(source):
    with pytest.raises(InstanceError, match="the memory is too short"):
        scores.evaluate(Hungry(0), source)


def test_a_command_says_it_in_a_sentence(capsys):
    def body(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    assert run_main("cbs-prune", body, []) == 4
    assert capsys.readouterr().err == "cbs-prune: the memory of the card is too short: `--device cpu` has more\n"
