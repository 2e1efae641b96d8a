"""The training loss of a network, per sample.

Everything in this package that differentiates or reports a loss asks a `SampleLoss`. It gives for each sample a
sum over what counts in it (its tokens, pixels or outputs, each times its class weight) and the weight of that. The
sum of the sums over the sum of the weights is the loss that PyTorch's `reduction="mean"` reports; a sum over the
mean weight is the sample's own share of it, so that the gradients of single samples average to the gradient of the
loss: no class weight is divided away, and ignored tokens count nowhere.

`declared` makes one from a name, a loss of PyTorch (module, function or `functools.partial`, whatever its
`reduction`), or any function of outputs and targets.
"""

from __future__ import annotations

import abc
import copy
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instances.batches import Bundle, leaves_of, map_leaves, reason
from cbs_opt.instances.classes import ClassView, class_view
from cbs_opt.instances.outputs import output_tensor

logger = logging.getLogger("cbs_opt")

_NOTHING = 1e-6  # loss of a single sample relative to that of a batch which it says nothing about

LossLike: TypeAlias = "SampleLoss | nn.Module | Callable[..., Tensor] | str"

_MODULES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "next-token": nn.CrossEntropyLoss,
    "nll": nn.NLLLoss,
    "mse": nn.MSELoss,
    "l1": nn.L1Loss,
    "huber": nn.HuberLoss,
    "bce": nn.BCEWithLogitsLoss,
}
LOSS_NAMES = tuple(_MODULES)
"""Losses by name: `bce` takes logits, `nll` log-probabilities, `next-token` logits (m, T, V) and
the tokens (m, T)."""

_FUNCTIONS: dict[Any, type[nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_VALUES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


class SampleLoss(abc.ABC):
    """A loss that knows the share of every sample.

    Attributes
    ----------
    name : str
        For reports.
    mean_weight : float or None
        Mean weight of a sample in the data at hand; a sample's own weight is used where it is None.
    output_key : str or None
        The part of the output that the loss is about, see `outputs.output_tensor`.
    of_batches : bool
        Whether it compares the samples of a batch with each other: a sample alone has no loss.
    """

    name: str
    mean_weight: float | None = None
    output_key: str | None = None
    of_batches = False

    @abc.abstractmethod
    def terms(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Sums and weights of each of m samples, both (m,), in single precision or better."""

    def check(self, outputs: Any, targets: Any, inputs: Any = None) -> None:  # noqa: B027
        """Raise `InstanceError` where outputs and targets of m samples do not fit each other."""

    def classes(self, outputs: Any, targets: Any) -> ClassView | None:
        """Class scores with class numbers, None for a loss without classes."""
        return None

    def per_sample(self, outputs: Any, targets: Any) -> Tensor:
        """The share of each sample in the loss, (m,)."""
        sums, weights = self.terms(outputs, targets)
        if self.mean_weight is not None:
            return sums / self.mean_weight
        return sums / torch.where(weights == 0, torch.ones_like(weights), weights)

    def over(self, mean_weight: float) -> SampleLoss:
        """The same loss where samples weigh so much on average."""
        other = copy.copy(self)
        other.mean_weight = mean_weight if mean_weight > 0 else None
        return other


class ClassLoss(SampleLoss):
    """Cross entropy or negative log likelihood: of samples, tokens or pixels."""

    def __init__(self, module: Any, name: str, output_key: str | None = None, shift: bool = False) -> None:
        self.name, self.output_key, self.shift = name, output_key, shift
        self.total = module.reduction == "sum"
        self.module = copy.copy(module)
        self.module.reduction = "none"
        self.logits = isinstance(module, nn.CrossEntropyLoss)

    def classes(self, outputs: Any, targets: Any) -> ClassView:
        """Scores (m, C, …) and class numbers or probabilities (m, …)."""
        scores = output_tensor(outputs, self.output_key)
        return class_view(scores, targets, int(self.module.ignore_index), self.shift)

    def terms(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Sums and weights of each of m samples."""
        view = self.classes(outputs, targets)
        losses = self.losses(view)
        sums = losses.reshape(len(losses), -1).sum(1)
        if self.total:
            return sums, torch.ones_like(sums)
        if view.target.is_floating_point():
            counts = torch.ones_like(losses)
        else:
            counts = view.counted.to(losses)
            if self.module.weight is not None:
                index = torch.where(view.counted, view.target, torch.zeros_like(view.target))
                counts = counts * self.module.weight.to(losses)[index]
        return sums, counts.reshape(len(losses), -1).sum(1)

    def losses(self, view: ClassView) -> Tensor:
        """The loss at every place, (m, …)."""
        scores = _precise(view.scores)
        module = self.module
        weight = module.weight
        if weight is not None and (weight.device, weight.dtype) != (scores.device, scores.dtype):
            module = copy.deepcopy(module).to(scores.device, scores.dtype)
        target = view.target.to(scores.dtype) if view.target.is_floating_point() else view.target
        losses: Tensor = module(scores, target)
        return losses

    def check(self, outputs: Any, targets: Any, inputs: Any = None) -> None:
        """Classes, their numbers, and whether the scores look like what the loss takes."""
        view = self.classes(outputs, targets)
        raw = output_tensor(outputs, self.output_key)
        if targets.shape == raw.shape and not targets.is_floating_point() and not _one_hot(targets):
            raise InstanceError(
                f"the loss {self.name} needs one class per sample, the targets name several or none: for several "
                "labels per sample declare `--loss bce`"
            )
        if raw.dim() == 3 and raw.shape[1] == raw.shape[2] == targets.shape[-1] and not self.shift:
            logger.warning(
                f"outputs {tuple(raw.shape)}: classes are taken to lie on the second axis, as PyTorch has them"
            )
        view.check(self.name)
        _check_scores(self, view.scores.detach())


class ValueLoss(SampleLoss):
    """Squared error, binary cross entropy and the like: outputs and targets of one shape."""

    def __init__(self, module: Any, name: str, output_key: str | None = None) -> None:
        self.name, self.output_key = name, output_key
        self.total = module.reduction == "sum"
        self.module = copy.copy(module)
        self.module.reduction = "none"

    def values(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Outputs and targets of one shape: axes of length one come and go, nothing else is broadcast."""
        out = _precise(output_tensor(outputs, self.output_key))
        if not isinstance(targets, Tensor):
            raise InstanceError(f"the loss {self.name} takes one tensor of targets, got {type(targets).__name__}")
        if tuple(n for n in out.shape[1:] if n != 1) != tuple(n for n in targets.shape[1:] if n != 1):
            hint = "cross-entropy" if not targets.is_floating_point() and targets.dim() < out.dim() else ""
            raise InstanceError(
                f"the loss {self.name} needs targets of the shape of the outputs, {tuple(out.shape[1:])} a "
                f"sample, got {tuple(targets.shape[1:])}"
                + (f": for class numbers declare `--loss {hint}`" if hint else "")
            )
        return out, targets.to(out.dtype).reshape(out.shape)

    def terms(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Sums and weights of each of m samples."""
        out, y = self.values(outputs, targets)
        module = self.module
        if any(True for _ in module.buffers()):
            module = copy.deepcopy(module).to(out.device, out.dtype)
        losses = module(out, y).reshape(len(out), -1)
        sums = losses.sum(1)
        return sums, torch.full_like(sums, 1.0 if self.total else float(losses.shape[1]))

    def check(self, outputs: Any, targets: Any, inputs: Any = None) -> None:
        """Shapes, and for binary cross entropy targets in [0, 1]."""
        out, y = self.values(outputs, targets)
        if isinstance(self.module, nn.BCELoss | nn.BCEWithLogitsLoss):
            if bool((y < 0).any()) or bool((y > 1).any()):
                raise InstanceError(
                    f"the loss {self.name} needs targets in [0, 1], got {float(y.min()):g} … {float(y.max()):g}"
                )
            inside = bool(((out >= 0) & (out <= 1)).all())
            if isinstance(self.module, nn.BCELoss) and not inside:
                raise InstanceError(
                    f"the loss {self.name} needs probabilities, got {float(out.min()):g} … {float(out.max()):g}: "
                    "for logits declare `--loss bce`"
                )
            if isinstance(self.module, nn.BCEWithLogitsLoss) and inside and out.numel() > 8:
                logger.warning(
                    f"all outputs lie in [0, 1], and the loss {self.name} takes logits: where the network ends "
                    "with a sigmoid, let the factory return torch.nn.BCELoss()"
                )


class FunctionLoss(SampleLoss):
    """Any function of outputs and targets, called with one sample at a time.

    It gets the network's output as it is, or the tensor that `output_tensor` finds in it where it takes that only.
    A vector of m losses is taken as it is; for a scalar, the mean and the sum over a batch are distinguished. A
    loss that is zero for single samples but not for all of them is one of batches, and taken of all at once.
    """

    def __init__(self, function: Callable[..., Any], name: str, output_key: str | None = None) -> None:
        self.function, self.name, self.output_key = function, name, output_key
        self._raw = True
        self._vector = False
        self._told = False

    def _call(self, outputs: Any, targets: Any) -> Tensor:
        value = self.function(outputs if self._raw else output_tensor(outputs, self.output_key), _plain(targets))
        if not isinstance(value, Tensor):
            raise InstanceError(f"the loss {self.name} must return a tensor, got {type(value).__name__}")
        return _precise(value)

    def terms(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Sums and weights of each of m samples."""
        m = len(targets)
        if self.of_batches:
            losses = self._call(outputs, targets).mean().expand(m)
        elif self._vector or m == 1:
            losses = self._call(outputs, targets).reshape(m, -1).mean(1)
        else:
            parts = [self._call(_row(outputs, s, m), targets[s : s + 1]).mean() for s in range(m)]
            losses = torch.stack(parts)
        return losses, torch.ones_like(losses)

    def check(self, outputs: Any, targets: Any, inputs: Any = None) -> None:
        """Find out what the function takes and what it returns."""
        m = len(targets)
        self._raw = self.output_key is None
        self._vector = False
        try:
            whole = self._call(outputs, targets)
        except Exception as error:  # whatever a user's loss does
            try:
                self._raw = False
                whole = self._call(outputs, targets)
            except Exception:
                self._raw = True
                raise InstanceError(
                    f"the loss {self.name} does not take outputs and targets of the network: {reason(error)}"
                ) from error
        if whole.dim() > 0 and len(whole) == m and m > 1:
            self._vector = True
            return
        if m < 2:
            return
        self.of_batches = False
        single = self.terms(outputs, targets)[0].detach().double()
        value, mean, total = float(whole.mean()), float(single.mean()), float(single.sum())
        largest = float(single.abs().max())
        near = 1e-3 * max(abs(value), abs(mean), 1e-12)
        if abs(value - mean) <= near:
            return
        if abs(value - total) <= 1e-3 * max(abs(value), abs(total), 1e-12):
            self._tell(logging.INFO, "sums over the samples of a batch: reported are means over samples")
        elif largest <= _NOTHING * abs(value):
            self.of_batches = True
            self._tell(
                logging.WARNING,
                "compares the samples of a batch, and is zero for one alone: it is taken of as many samples as go "
                "through the network at once",
            )
        else:
            self._tell(
                logging.WARNING,
                "of a batch is neither the mean nor the sum of the losses of its samples: each sample is taken "
                "alone; a loss of PyTorch with `weight` or `ignore_index` keeps its weights",
            )

    def _tell(self, level: int, what: str) -> None:
        if not self._told:
            logger.log(level, f"the loss {self.name} {what}")
        self._told = True


def declared(loss: LossLike, output_key: str | None = None) -> SampleLoss:
    """The loss that a name, a loss of PyTorch, or a function declares.

    Raises
    ------
    UsageError
        For an unknown name, or something that is no loss.
    """
    if isinstance(loss, SampleLoss):
        return loss
    if isinstance(loss, str):
        name = loss.replace("_", "-").lower()
        if name not in _MODULES:
            if ":" in loss:
                from cbs_opt.instances.plugins import load_object

                return declared(load_object(loss, "--loss"), output_key)
            raise UsageError(
                f"`loss` must be one of {', '.join(_MODULES)}, or module:function of (outputs, targets), got "
                f"'{loss}'"
            )
        module = _MODULES[name]()
        if isinstance(module, _OF_CLASSES):
            return ClassLoss(module, name, output_key, name == "next-token")
        return ValueLoss(module, name, output_key)
    function = loss
    if isinstance(function, functools.partial) and function.func in _FUNCTIONS and not function.args:
        function = _from_function(function.func, function.keywords)
    elif not isinstance(function, nn.Module) and function in _FUNCTIONS:
        function = _from_function(function, {})
    if isinstance(function, type) and issubclass(function, nn.Module):
        function = function()
    if isinstance(function, _OF_CLASSES):
        return ClassLoss(function, _name_of(function), output_key)
    if isinstance(function, _OF_VALUES):
        return ValueLoss(function, _name_of(function), output_key)
    if not callable(function):
        raise UsageError(
            f"a loss must be a name, a loss of PyTorch or a function of (outputs, targets), got "
            f"{type(function).__name__}"
        )
    return FunctionLoss(function, _name_of(function), output_key)


def _from_function(function: Any, keywords: dict[str, Any]) -> nn.Module:
    kind = _FUNCTIONS[function]
    known = inspect.signature(kind.__init__).parameters
    unknown = [name for name in keywords if name not in known]
    if unknown:
        raise UsageError(f"the loss {function.__name__} has no option '{unknown[0]}'")
    return kind(**keywords)


def guessed(outputs: Any, targets: Any, inputs: Any, output_key: str | None) -> SampleLoss:
    """Cross entropy where outputs and targets are those of a classifier, or a sentence that asks for the loss.

    Targets that are the inputs themselves are those of a language model, whose logits are of the next token.

    Raises
    ------
    UsageError
        When the loss cannot be cross entropy.
    """
    tensor = output_tensor(outputs, output_key)
    if isinstance(targets, Tensor) and tensor.dim() == 3 and not targets.is_floating_point():
        given = inputs.leaves if isinstance(inputs, Bundle) else [inputs]
        # -100 marks what is not predicted, such as padding.
        if any(
            isinstance(leaf, Tensor)
            and leaf.shape == targets.shape
            and not leaf.is_floating_point()
            and bool(((leaf == targets) | (targets == -100)).all())
            for leaf in given
        ):
            logger.info("the labels are the inputs: the loss is the cross entropy of the next token (next-token)")
            return declared("next-token", output_key)
    examples = "`--loss mse` for values, `--loss bce` for several labels per sample (from Python `loss=`)"
    if not isinstance(targets, Tensor):
        raise UsageError(
            f"the targets are no single tensor: declare the loss, {examples}, or `--loss module:function`"
        )
    shapes = f"outputs {tuple(tensor.shape[1:])} and targets {tuple(targets.shape[1:])}, {targets.dtype}, a sample"
    if tensor.dim() < 2 or tensor.shape[1:].numel() == 1:
        raise UsageError(f"{shapes}: one output a sample makes no classes: declare the loss, {examples}")
    if targets.is_floating_point():
        probabilities = tensor.dim() == 2 and targets.shape == tensor.shape and _sums_to_one(targets)
        if not probabilities and (targets.shape == tensor.shape or not _whole(targets)):
            raise UsageError(f"{shapes}: these are no class numbers: declare the loss, {examples}")
    elif targets.shape == tensor.shape and tensor.dim() == 2 and not _one_hot(targets):
        raise UsageError(f"{shapes}, are several labels per sample: declare the loss, {examples}")
    return declared("cross-entropy", output_key)


def _check_scores(loss: ClassLoss, scores: Tensor) -> None:
    """Probabilities where logits or their logarithms belong."""
    positive = bool((scores >= 0).all()) and bool((scores <= 1).all())
    sums = scores.float().sum(1) if positive else None
    probabilities = sums is not None and bool(((sums - 1).abs() < 1e-2).all())
    if not loss.logits and bool((scores > 1e-3).any()):
        given = "probabilities" if probabilities else "values above 0"
        raise InstanceError(
            f"the loss {loss.name} needs log-probabilities, the network gives {given}: end it with LogSoftmax, or "
            "declare `--loss cross-entropy` for logits"
        )
    if loss.logits and probabilities:
        logger.warning(
            "the outputs are probabilities, and cross entropy takes logits: leave out the network's last softmax "
            "for the loss, or declare a loss of your own, `--loss module:function`"
        )


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _plain(targets: Any) -> Any:
    return targets.tree if isinstance(targets, Bundle) else targets


def _row(outputs: Any, s: int, m: int) -> Any:
    def cut(leaf: Any) -> Any:
        return leaf[s : s + 1] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == m else leaf

    return map_leaves(cut, outputs)


def _name_of(loss: Any) -> str:
    return str(getattr(loss, "__name__", None) or type(loss).__name__)


def _sums_to_one(values: Tensor) -> bool:
    return bool((values >= 0).all()) and bool(((values.double().sum(1) - 1).abs() < 1e-3).all())


def _whole(values: Tensor) -> bool:
    return bool((values == values.round()).all())


def _one_hot(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all()) and bool((values.sum(1) == 1).all())


def finite_outputs(outputs: Any) -> bool:
    """Whether every number that a network returned is finite."""
    tensors: Sequence[Any] = [leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor)]
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
