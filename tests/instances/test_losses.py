"""The declared loss, sample by sample: against PyTorch's own reductions and automatic differentiation."""

import functools
import logging

import numpy as np
import pytest

import cbs_opt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from cbs_opt import InstanceError, UsageError  # noqa: E402
from cbs_opt.instances.batches import Bundle  # noqa: E402
from cbs_opt.instances.export import export  # noqa: E402
from cbs_opt.instances.losses import declared, guessed  # noqa: E402
from cbs_opt.instances.metrics import declared_metric  # noqa: E402
from cbs_opt.instances.outputs import output_tensor  # noqa: E402
from cbs_opt.instances.scores import Judge, Score, worries  # noqa: E402

torch.manual_seed(0)
M, C, T = 12, 4, 5
LOGITS, CLASSES = torch.randn(M, C), torch.randint(0, C, (M,))
TOKENS, WORDS = torch.randn(M, T, C), torch.randint(0, C, (M, T))
SOME = WORDS.masked_fill(torch.rand(M, T) < 0.4, -100)
VALUES = torch.randn(M, C)
WEIGHT = torch.tensor([1.0, 5.0, 0.5, 0.1])


def as_torch(module, outputs, targets):
    return module(outputs, targets)


CASES = {
    "cross-entropy": ("cross-entropy", LOGITS, CLASSES, lambda: functional.cross_entropy(LOGITS, CLASSES)),
    "int32": ("cross-entropy", LOGITS, CLASSES.int(), lambda: functional.cross_entropy(LOGITS, CLASSES)),
    "one axis more": (
        "cross-entropy",
        LOGITS,
        CLASSES[:, None],
        lambda: functional.cross_entropy(LOGITS, CLASSES),
    ),
    "one-hot": (
        "cross-entropy",
        LOGITS,
        functional.one_hot(CLASSES, C),
        lambda: functional.cross_entropy(LOGITS, CLASSES),
    ),
    "class weights": (
        nn.CrossEntropyLoss(weight=WEIGHT),
        LOGITS,
        CLASSES,
        lambda: functional.cross_entropy(LOGITS, CLASSES, weight=WEIGHT),
    ),
    "weights, ignored, smooth": (
        functools.partial(functional.cross_entropy, weight=WEIGHT, ignore_index=1, label_smoothing=0.1),
        LOGITS,
        CLASSES,
        lambda: functional.cross_entropy(LOGITS, CLASSES, weight=WEIGHT, ignore_index=1, label_smoothing=0.1),
    ),
    "tokens": ("cross-entropy", TOKENS, WORDS, lambda: functional.cross_entropy(TOKENS.mT, WORDS)),
    "ignored tokens": ("cross-entropy", TOKENS, SOME, lambda: functional.cross_entropy(TOKENS.mT, SOME)),
    "flat tokens": (
        nn.CrossEntropyLoss(),
        TOKENS.flatten(0, 1),
        SOME,
        lambda: functional.cross_entropy(TOKENS.mT, SOME),
    ),
    "pixels": (
        nn.CrossEntropyLoss(ignore_index=2),
        TOKENS.mT[..., None],
        WORDS[..., None],
        lambda: functional.cross_entropy(TOKENS.mT, WORDS, ignore_index=2),
    ),
    "next token": (
        "next-token",
        TOKENS,
        SOME,
        lambda: functional.cross_entropy(TOKENS[:, :-1].mT, SOME[:, 1:]),
    ),
    "probabilities": (
        nn.CrossEntropyLoss(),
        LOGITS,
        VALUES.softmax(1),
        lambda: functional.cross_entropy(LOGITS, VALUES.softmax(1)),
    ),
    "nll": ("nll", LOGITS.log_softmax(1), CLASSES, lambda: functional.cross_entropy(LOGITS, CLASSES)),
    "mse": ("mse", LOGITS, VALUES, lambda: functional.mse_loss(LOGITS, VALUES)),
    "mse of one value": (
        functional.mse_loss,
        LOGITS[:, :1],
        VALUES[:, 0],
        lambda: functional.mse_loss(LOGITS[:, 0], VALUES[:, 0]),
    ),
    "bce": (
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
        LOGITS,
        VALUES > 0,
        lambda: functional.binary_cross_entropy_with_logits(LOGITS, (VALUES > 0).float(), pos_weight=WEIGHT),
    ),
    "a function": (
        lambda outputs, targets: functional.cross_entropy(outputs, targets) + outputs.square().mean(),
        LOGITS,
        CLASSES,
        lambda: functional.cross_entropy(LOGITS, CLASSES) + LOGITS.square().mean(),
    ),
    "a function of single losses": (
        lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none"),
        LOGITS,
        CLASSES,
        lambda: functional.cross_entropy(LOGITS, CLASSES),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_shares_average_to_the_loss_of_torch(name):
    loss, outputs, targets, expected = CASES[name]
    judge = Judge(loss)
    for part in (slice(0, 5), slice(5, M)):
        flat = slice(part.start * T, part.stop * T) if len(outputs) == M * T else part
        judge.take(outputs[flat], targets[part], None)
    assert judge.score().loss == pytest.approx(float(expected()), rel=1e-5)
    shares = judge.loss.over(judge.mean_weight).per_sample(outputs, targets)
    assert float(shares.mean()) == pytest.approx(float(expected()), rel=1e-5)


def test_a_sum_is_noticed(caplog):
    judge = Judge(nn.MSELoss(reduction="sum"))
    judge.take(LOGITS, VALUES, None)
    assert judge.score().loss == pytest.approx(float(functional.mse_loss(LOGITS, VALUES, reduction="sum")) / M)
    with caplog.at_level(logging.INFO, "cbs_opt"):
        judge = Judge(lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="sum"))
        judge.take(LOGITS, CLASSES, None)
    assert "sums over the samples" in caplog.text
    assert judge.score().loss == pytest.approx(float(functional.cross_entropy(LOGITS, CLASSES)), rel=1e-5)
    with caplog.at_level(logging.WARNING, "cbs_opt"):
        Judge(lambda outputs, targets: functional.cross_entropy(outputs, targets, weight=WEIGHT)).take(
            LOGITS, CLASSES, None
        )
    assert "neither the mean nor the sum" in caplog.text


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "words"),
    [
        (None, LOGITS[:, :1], VALUES[:, :1], "makes no classes: declare the loss, `--loss mse`"),
        (None, LOGITS, VALUES, "no class numbers: declare the loss"),
        (None, LOGITS, (VALUES > 0).long(), "several labels per sample: declare the loss"),
        (None, LOGITS, {"a": CLASSES}, "no single tensor"),
        ("cross-entropy", LOGITS, CLASSES + 1, "count from 1; subtract 1"),
        ("cross-entropy", LOGITS, torch.where(CLASSES == 0, -1, CLASSES), r"ignore_index=-1"),
        ("cross-entropy", LOGITS, CLASSES.float(), "class numbers, int64, got torch.float32"),
        ("cross-entropy", LOGITS, VALUES.abs(), "probabilities that sum to 1"),
        ("cross-entropy", LOGITS, (VALUES > 0).long(), "declare `--loss bce`"),
        ("cross-entropy", LOGITS, WORDS, r"outputs \(12, 4\) and targets \(12, 5\)"),
        ("nll", LOGITS.softmax(1), CLASSES, "needs log-probabilities, the network gives probabilities"),
        ("mse", LOGITS, CLASSES, "declare `--loss cross-entropy`"),
        ("mse", LOGITS, VALUES[:, :3], r"the shape of the outputs, \(4,\) a sample, got \(3,\)"),
        ("bce", LOGITS, VALUES, r"targets in \[0, 1\]"),
        (nn.BCELoss(), LOGITS, (VALUES > 0), "for logits declare `--loss bce`"),
        ("huber!", LOGITS, VALUES, "must be one of cross-entropy"),
        (lambda outputs, targets: 1.0, LOGITS, CLASSES, "must return a tensor"),
        (lambda outputs, targets: outputs @ targets, LOGITS, CLASSES, "does not take outputs and targets"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(loss, outputs, targets, words):
    targets = Bundle(targets, M) if isinstance(targets, dict) else targets
    with pytest.raises((InstanceError, UsageError), match=words) as caught:
        Judge(loss).take(outputs, targets, torch.zeros(M, 2))
    assert "\n" not in str(caught.value)


def test_the_loss_of_a_language_model_is_guessed():
    assert guessed(TOKENS, WORDS, WORDS, None).name == "next-token"
    assert guessed(TOKENS, SOME, Bundle(((), {"input_ids": WORDS}), M), None).name == "next-token"
    assert guessed(TOKENS, WORDS, WORDS + 1, None).name == "cross-entropy"


def test_rows_are_gradients_of_the_weighted_loss():
    model = nn.Linear(3, C)
    x = torch.randn(M, 3)
    loss = nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2)
    instance = export(model, x, CLASSES, loss=loss, first_order=True, blocks="full")
    (expected,) = torch.autograd.grad(loss(model(x), CLASSES), [model.weight])
    np.testing.assert_allclose(instance.linear, expected.flatten().numpy(), atol=1e-6)
    rows = instance.curvature.gradients
    assert not rows[(CLASSES == 2).numpy()].any()
    heavy, light = ((k == CLASSES).numpy() for k in (1, 3))
    assert np.abs(rows[heavy]).mean() > 5 * np.abs(rows[light]).mean()


METRICS = {
    "accuracy": ("cross-entropy", LOGITS, CLASSES, lambda: (LOGITS.argmax(1) == CLASSES).double().mean()),
    "top-2": (
        "cross-entropy",
        LOGITS,
        CLASSES,
        lambda: (LOGITS.topk(2, 1).indices == CLASSES[:, None]).any(1).double().mean(),
    ),
    "mean-iou": (
        "cross-entropy",
        TOKENS.mT,
        WORDS,
        lambda: torch.stack(
            [
                ((TOKENS.argmax(2) == k) & (k == WORDS)).sum() / ((TOKENS.argmax(2) == k) | (k == WORDS)).sum()
                for k in range(C)
            ]
        ).mean(),
    ),
    "perplexity": (
        "next-token",
        TOKENS,
        SOME,
        lambda: functional.cross_entropy(TOKENS[:, :-1].mT, SOME[:, 1:]).exp(),
    ),
    "mse": ("mse", LOGITS, VALUES, lambda: functional.mse_loss(LOGITS, VALUES)),
    "r2": (
        "mse",
        LOGITS,
        VALUES,
        lambda: (1 - (LOGITS - VALUES).square().sum(0) / (VALUES - VALUES.mean(0)).square().sum(0)).mean(),
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_over_batches(name):
    loss, outputs, targets, expected = METRICS[name]
    judge = Judge(loss, name)
    for part in (slice(0, 5), slice(5, M)):
        judge.take(outputs[part], targets[part], None)
    score = judge.score()
    assert (score.metric, score.value) == (name, pytest.approx(float(expected()), rel=1e-5))


def test_other_metrics():
    assert declared_metric("none", declared("mse")) is None
    assert declared_metric(None, declared("mse")).name == "r2"
    assert declared_metric(None, declared("next-token")).name == "perplexity"
    judge = Judge("bce", None)
    judge.take(LOGITS, VALUES > 0, None)
    assert judge.score().accuracy == pytest.approx(float(((LOGITS > 0) == (VALUES > 0)).double().mean()))
    judge = Judge("cross-entropy", lambda outputs, targets: outputs.argmax(1).double().std() + len(targets))
    judge.take(LOGITS[:5], CLASSES[:5], None)
    judge.take(LOGITS[5:], CLASSES[5:], None)
    assert judge.score().value == pytest.approx(float(LOGITS.argmax(1).double().std()) + M)
    with pytest.raises(UsageError, match="`metric` must be one of accuracy"):
        declared_metric("f1", declared("mse"))


def test_the_part_of_an_output():
    hidden = torch.zeros(M, 9)
    assert output_tensor({"loss": torch.tensor(1.0), "logits": LOGITS, "hidden": hidden}) is LOGITS
    assert output_tensor((torch.tensor(1.0), LOGITS, hidden)) is LOGITS
    assert output_tensor({"a": LOGITS}) is LOGITS
    assert output_tensor({"a": hidden, "b": LOGITS}, "b") is LOGITS
    with pytest.raises(InstanceError, match=r"a \(12, 9\), b \(12, 4\), does not determine.*--output-key"):
        output_tensor({"a": hidden, "b": LOGITS})
    with pytest.raises(InstanceError, match="no tensor 'c'; it has a"):
        output_tensor({"a": hidden}, "c")


def test_scores_that_nobody_should_overlook():
    good = Score(0.9, 0.3, 10, "accuracy", 0.9)
    assert worries(good, Score(0.5, 1.5, 10, "accuracy", 0.5)) == []
    assert "NOT A FINITE NUMBER" in worries(good, Score(0.1, float("nan"), 10, "accuracy", 0.1))[0]
    assert "THE LOSS EXPLODES" in worries(good, Score(0.1, 50.0, 10, "accuracy", 0.1), 10)[0]


@pytest.mark.parametrize(
    ("labels", "bias", "words"),
    [(torch.zeros(M).long(), 0.0, "have the same label"), (CLASSES * 0, 200.0, "THE LOSS OF THE SAMPLES IS 0")],
)
def test_data_without_information_are_warned_of(labels, bias, words, caplog):
    model = nn.Linear(3, C)
    with torch.no_grad():
        model.bias[0] = bias
    with caplog.at_level(logging.WARNING, "cbs_opt"):
        export(model, torch.randn(M, 3), labels)
    assert words in caplog.text
    assert ("ALL GRADIENTS ARE ZERO" in caplog.text) == (bias > 0)


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(7, 4)

    def forward(self, left, right):
        return self.a(left), self.b(right)


def info_nce(outputs, targets):
    a, b = outputs
    return functional.cross_entropy(a @ b.T, torch.arange(len(a)))


@pytest.mark.parametrize("source", ["kfac", "reconstruction", "fisher"])
def test_a_loss_that_compares_the_samples_of_a_batch_is_taken_of_batches(source, caplog):
    torch.manual_seed(0)
    network, data = Pairs(), ((torch.randn(50, 5), torch.randn(50, 7)), torch.zeros(50))
    options = {"loss": info_nce, "source": source, "threads": 1, "max_iterations": 3, "held_out": data}
    if source == "fisher":
        with pytest.raises(UsageError, match=r"the loss info_nce compares the samples.*`--batch 50`"):
            cbs_opt.prune(network, data, 0.5, **options)
        options |= {"batch": 5}
        caplog.clear()
    with caplog.at_level(logging.INFO, logger="cbs_opt"):
        done = cbs_opt.prune(network, data, 0.5, **options)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("info_nce compares the samples of a batch" in text for text in warnings) == 1
    assert not any(word in text for text in warnings for word in ("ZERO", "IS 0", "same label"))
    with torch.no_grad():
        for net, score in ((network, done.before), (done.model, done.after)):
            assert score.loss == pytest.approx(float(info_nce(net(*data[0]), None)), rel=1e-5)
    assert done.before.loss > 1


def test_a_loss_that_does_not_divide_is_told_once(caplog):
    network = nn.Sequential(nn.Linear(4, 3))
    x, y = torch.randn(40, 4), torch.arange(40) % 3
    cbs_opt.prune(network, (x, y), 0.5, loss=lambda o, t: functional.cross_entropy(o, t) ** 2, max_iterations=3)
    assert sum("neither the mean nor the sum" in text for text in caplog.messages) == 1
