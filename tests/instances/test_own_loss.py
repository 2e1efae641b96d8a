"""Networks that take labels and return a loss, as those of Hugging Face do: their own loss is what counts."""

import logging
from dataclasses import dataclass

import numpy as np
import pytest

import cbs_opt
from cbs_opt import UsageError

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

V, W = 12, 6


@dataclass
class Output:
    loss: object = None
    logits: object = None


class Words(nn.Module):
    """Logits of the next token, or of the same one; the labels may be other tokens than the inputs."""

    def __init__(self, shift):
        super().__init__()
        self.table, self.a, self.head, self.shift = nn.Embedding(V, W), nn.Linear(W, W), nn.Linear(W, V), shift

    def forward(self, input_ids, labels=None):
        logits = self.head(torch.tanh(self.a(self.table(input_ids).cumsum(1))))
        if labels is None:
            return Output(logits=logits)
        out, y = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        return Output(functional.cross_entropy(out.flatten(0, 1), y.flatten()), logits)


class EncoderDecoder(nn.Module):
    """Makes the inputs of its decoder from the labels; without, it refuses, or takes its other inputs."""

    def __init__(self, refuses):
        super().__init__()
        self.table, self.a, self.head, self.refuses = nn.Embedding(V, W), nn.Linear(W, W), nn.Linear(W, V), refuses

    def forward(self, input_ids, decoder_input_ids=None, labels=None):
        if decoder_input_ids is None and labels is None and self.refuses:
            raise ValueError("You have to specify decoder_input_ids")
        given = input_ids if labels is None else labels
        before = functional.pad(given.clamp(min=0), (1, -1)) if decoder_input_ids is None else decoder_input_ids
        h = self.table(before).cumsum(1) + self.a(self.table(input_ids)).mean(1, keepdim=True)
        logits = self.head(torch.tanh(h))
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}


class Spans(nn.Module):
    """Targets under names of their own."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.head = nn.Embedding(V, W), nn.Linear(W, W), nn.Linear(W, 2)

    def forward(self, input_ids, start_positions=None, end_positions=None):
        start, end = self.head(torch.tanh(self.a(self.table(input_ids)))).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            both = ((start, start_positions), (end, end_positions))
            loss = sum(functional.cross_entropy(out, y) for out, y in both) / 2
        return {"loss": loss, "start_logits": start, "end_logits": end}


class Twins(nn.Module):
    """A loss of the samples of a batch against each other, on request."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(7, 4)

    def forward(self, left, right, return_loss=None):
        scores = self.a(left) @ self.b(right).T
        loss = functional.cross_entropy(scores, torch.arange(len(left))) if return_loss else None
        return {"loss": loss, "scores": scores}


class Robust(nn.Module):
    """A loss that has no name."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, y=None):
        out = self.head(torch.tanh(self.a(x)))
        return {"logits": out} if y is None else {"loss": (1 + (out - y) ** 2).log().mean(), "logits": out}


def tokens(seed, length=7):
    return torch.randint(1, V, (40, length), generator=torch.Generator().manual_seed(seed))


def made(name):
    torch.manual_seed(0)
    x = tokens(1)
    other = torch.where(torch.rand(x.shape) < 0.2, torch.full_like(x, 3), x)
    other[:, :2] = -100
    return {
        "next token": lambda: (Words(True), {"input_ids": x, "labels": other}, "next-token"),
        "same token": lambda: (Words(False), {"input_ids": x, "labels": x}, "cross-entropy"),
        "decoder": lambda: (EncoderDecoder(True), {"input_ids": x, "labels": tokens(2, 5)}, "cross-entropy"),
        "silent decoder": lambda: (EncoderDecoder(False), {"input_ids": x, "labels": tokens(2)}, "cross-entropy"),
        "spans": lambda: (
            Spans(),
            {"input_ids": x, "start_positions": x[:, 0] % 7, "end_positions": x[:, 1] % 7},
            "of the network",
        ),
        "twins": lambda: (
            Twins(),
            {"left": torch.randn(40, 5), "right": torch.randn(40, 7), "return_loss": True},
            "of the network",
        ),
        "robust": lambda: (Robust(), {"x": torch.randn(40, 5), "y": torch.randn(40, 3)}, "of the network"),
    }[name]()


NAMES = ["next token", "same token", "decoder", "silent decoder", "spans", "twins", "robust"]


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_the_network(name, caplog):
    network, batch, loss = made(name)
    options = {"source": "kfac", "threads": 1, "max_iterations": 3, "held_out": batch}
    with caplog.at_level(logging.INFO, logger="cbs_opt"):
        done = cbs_opt.prune(network, batch, 0.3, **options)
    told = [text for text in caplog.messages if "network itself" in text or "as the network has it" in text]
    assert len(told) == 1 and (loss in told[0] or loss == "of the network")
    with torch.no_grad():
        for net, found in ((network, done.before), (done.model, done.after)):
            own = net(**batch)
            own = float(own.loss if isinstance(own, Output) else own["loss"])
            assert found.loss == pytest.approx(own, rel=1e-5)
    in_parts = [
        {key: v if v is True else v[part] for key, v in batch.items()} for part in (slice(24), slice(24, 40))
    ]
    if name != "twins":  # whose loss depends on the batches
        again = cbs_opt.prune(network, in_parts, 0.3, **options)
        assert again.before.loss == pytest.approx(done.before.loss, rel=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "twins"])
def test_gradients_are_those_of_the_own_loss_of_single_samples(name):
    network, batch, _ = made(name)
    few = {key: v[:9] for key, v in batch.items()}
    weight = next(key for key, _ in network.named_parameters() if key == "a.weight")
    instance = cbs_opt.export(network, few, names=[weight], source="fisher", curvature="gradients", sparsity=0.5)
    G = instance.curvature.gradients
    for s in range(9):
        own = network(**{key: v[s : s + 1] for key, v in few.items()})
        loss = own.loss if isinstance(own, Output) else own["loss"]
        (g,) = torch.autograd.grad(loss, network.get_parameter(weight))
        scale = 1.0 if name != "next token" else float((few["labels"][s, 1:] != -100).sum()) / 5
        np.testing.assert_allclose(G[s], g.flatten() * scale, rtol=2e-3, atol=1e-6)
    assert np.abs(G).max() > 1e-4


def test_a_declared_loss_counts_more():
    network, batch, _ = made("robust")
    instance = cbs_opt.export(network, batch, loss="mse", sparsity=0.5)
    assert instance.metadata["loss"] == "mse"
    expected = functional.mse_loss(network(batch["x"])["logits"], batch["y"])
    assert instance.metadata["dense_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    network, batch, _ = made("decoder")
    assert cbs_opt.export(network, batch, loss="cross-entropy", sparsity=0.5).metadata["dense_loss"] > 0


def test_labels_that_the_network_does_not_take_are_withheld():
    network, batch, _ = made("next token")
    with pytest.raises(UsageError, match="declare the loss"):
        cbs_opt.export(network, {**batch, "labels": torch.rand(40, 3)}, sparsity=0.5)


def test_a_calibration_loop_that_gives_labels_gives_them_as_labels():
    network, batch, loss = made("next token")
    instance = cbs_opt.export(network, lambda net: net(**batch), source="kfac", fisher="sampled", sparsity=0.5)
    assert instance.metadata["loss"] == loss
    with torch.no_grad():
        assert instance.metadata["dense_loss"] == pytest.approx(float(network(**batch).loss), rel=1e-5)
