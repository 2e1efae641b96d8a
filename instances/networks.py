"""Networks by name, and user-defined ones: which tensors are pruned, and how images are converted to inputs.

| name | data | normalisation (after scaling to [0, 1]) | pruned tensors |
|---|---|---|---|
| `mlpnet` | MNIST | mean 0.1307, std 0.3081 | fc1, fc2, fc3: 32,360 |
| `cifarnet` | CIFAR-10 | mean .4914 .4822 .4465, std .2023 .1994 .2010 | three convolutions, fc1, fc2: 116,704 |
| `resnet20` | CIFAR-10 | mean .5, std .5 | the 18 convolutions of layer1-3: 267,264 |
| `mobilenetv1`, `mobilenetv1-0.75` | ImageNet | mean .5, std .5 | all convolutions, fc: 4,209,088 at width 1 |
| `digits-mlp` | the digits of scikit-learn, 0 … 16 | none (pixels / 16) | three linear layers: 3,560 |

Normalisation belongs to a checkpoint rather than to its architecture: `mean` and `std` override it. ResNet20's
is that of the public checkpoint that we know (91.4 %); others were trained with CIFARNet's numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cbs_opt.errors import UsageError
from cbs_opt.instances.architectures import CIFARNet, MLPNet, MobileNetV1, ResNet20
from cbs_opt.instances.factory import parts_of
from cbs_opt.instances.modes import unwrapped
from cbs_opt.instances.plugins import call_object, is_object
from cbs_opt.instances.preparation import Preparation
from cbs_opt.instances.prunable import select


@dataclass(frozen=True)
class Network:
    """A network, what is pruned of it, and how its inputs are made.

    Attributes
    ----------
    name : str
        A name of `network_names()`, or `module:factory`.
    model : torch.nn.Module
        In evaluation mode.
    prunable : tuple of str
        Names of its parameters, in the order in which an instance lays them out.
    prepare : callable or None
        From images as read, uint8 (m, H, W[, C]) or the file's own floats, to inputs, float32 (m, …); None takes
        inputs as they are.
    classes : int or None
        Number of classes; None where it is not known beforehand.
    data, test_data : object
        What the factory brought: (inputs, labels), a loader of such batches, or None.
    image_shape : tuple of int or None
        (H, W) or (H, W, C) of the images that `prepare` takes.
    loss, metric, output_key : object
        What the factory declared, see `factory.parts_of`; None otherwise.
    """

    name: str
    model: nn.Module
    prunable: tuple[str, ...]
    prepare: Callable[[Tensor], Tensor] | None
    classes: int | None
    data: Any = None
    test_data: Any = None
    image_shape: tuple[int, ...] | None = None
    loss: Any = None
    metric: Any = None
    output_key: str | None = None


@dataclass(frozen=True)
class _Entry:
    make: Callable[[], nn.Module]
    preparation: Preparation
    classes: int
    prunes: Callable[[str], bool] = lambda name: True  # of the names of matrices and kernels


_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_WIDTH = re.compile(r"mobilenetv1-(\d*\.?\d+)")


def _digits_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 40, bias=False),
        nn.ReLU(),
        nn.Linear(40, 20, bias=False),
        nn.ReLU(),
        nn.Linear(20, 10, bias=False),
    )


_NETWORKS = {
    "mlpnet": _Entry(MLPNet, Preparation((28, 28), (0.1307,), (0.3081,), flat=True), 10),
    "cifarnet": _Entry(CIFARNet, Preparation((32, 32, 3), _CIFAR_MEAN, _CIFAR_STD), 10),
    "resnet20": _Entry(
        ResNet20,
        Preparation((32, 32, 3), (0.5,), (0.5,)),
        10,
        lambda name: name.startswith("layer") and "downsample" not in name,
    ),
    "mobilenetv1": _Entry(MobileNetV1, Preparation((224, 224, 3), (0.5,), (0.5,)), 1000),
    "mobilenetv1-0.75": _Entry(lambda: MobileNetV1(0.75), Preparation((224, 224, 3), (0.5,), (0.5,)), 1000),
    "digits-mlp": _Entry(_digits_mlp, Preparation((8, 8), scale=16.0, flat=True), 10),
}


def network_names() -> list[str]:
    """The networks that the package knows; `mobilenetv1-W` accepts any width W, not only those listed."""
    return list(_NETWORKS)


def is_factory(spec: str) -> bool:
    """Whether `spec` is a user's `module:factory`: loading it runs code."""
    return is_object(spec)


def load_network(spec: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Network:
    """Make a network by its name, or by calling a user's factory.

    Parameters
    ----------
    spec : str
        One of `network_names()`, or `module:factory`: a function without arguments in a module that Python
        finds, the current directory included, or in a file, such as `./nets.py:make`. It returns the model,
        (model, data), (model, training data, test data[, loss[, metric]]) or a dictionary of these; data are
        (inputs, labels), a loader of such batches and much else, see `own_data`. What of it is pruned is told in
        `cbs_opt.instances.prunable`.
    mean, std : sequence of float, optional
        Instead of the network's normalisation, one number or one per channel. Given for a factory, the images
        of a file are scaled to [0, 1], normalised and laid out as (m, C, H, W); without them it takes inputs as
        the file holds them.

    Raises
    ------
    UsageError
        For an unknown name, a factory that cannot be imported or fails, or numbers that do not fit.
    """
    if is_factory(spec):
        return _from_factory(spec, mean, std)
    return _made(spec, mean, std)


def _entry_of(spec: str) -> _Entry:
    """What is known of a network of the package; raises `UsageError` for another name."""
    entry = _NETWORKS.get(spec)
    if entry is None and (match := _WIDTH.fullmatch(spec)) and 0.05 <= float(match[1]) <= 4:
        width = float(match[1])
        entry = _Entry(lambda: MobileNetV1(width), _NETWORKS["mobilenetv1"].preparation, 1000)
    if entry is None:
        raise UsageError(
            f"'{spec}' is not a known network: {', '.join(_NETWORKS)}; your own is named module:factory, such as "
            f"{spec if spec.isidentifier() else 'nets'}:make or ./nets.py:make"
        )
    return entry


def _made(spec: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> Network:
    entry = _entry_of(spec)
    model = entry.make().eval()
    prunable = tuple(name for name in select(model).names if entry.prunes(name))
    preparation = entry.preparation.normalised(mean, std)
    return Network(spec, model, prunable, preparation, entry.classes, image_shape=preparation.image_shape)


def trained_network(
    spec: str,
    checkpoint: Path | None,
    data: str | None,
    *,
    key: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """A network with the weights of a checkpoint, in evaluation mode; that of a factory may bring its own.

    Parameters
    ----------
    spec, mean, std : optional
        As for `load_network`.
    checkpoint : Path or None
    data : str or None
        Not read: only checked to be there for a network of the package, which brings none.
    key : str, optional
        Which dictionary of the checkpoint.

    Raises
    ------
    UsageError
        As `load_network`, and when a network of the package lacks a checkpoint or data.
    InstanceError
        When the checkpoint does not fit.
    """
    from cbs_opt.instances.checkpoints import load_checkpoint

    if not is_factory(spec):
        _entry_of(spec)  # a wrong name is reported first
    for name, value in (("checkpoint", checkpoint), ("data", data)):
        if value is None and not is_factory(spec):
            raise UsageError(f"`--{name}` is needed for '{spec}'")
    network = load_network(spec, mean, std)
    if checkpoint is not None:
        load_checkpoint(network.model, checkpoint, key)
    return network


def _from_factory(spec: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> Network:
    made = call_object(spec)
    parts = parts_of(made, spec)
    model = unwrapped(parts.model).eval()
    selection = select(model)
    prunable = selection.names
    if not prunable and not any(left.tensor and len(left.tensor.layout.shape) > 1 for left in selection.left_out):
        raise UsageError(f"{spec}: the model has no parameter with two axes or more, so nothing to prune")
    preparation = None
    if mean is not None or std is not None:
        preparation = Preparation(None).normalised(mean, std)
    return Network(
        spec,
        model,
        prunable,
        preparation,
        None,
        parts.data,
        parts.test_data,
        loss=parts.loss,
        metric=parts.metric,
        output_key=parts.output_key,
    )
