"""Instances of a small network that reads digits: `python -m cbs_opt.instances.digits` generates the library.

The network is a 64-40-20-10 multilayer perceptron without biases, trained here on the 8×8 digits that
scikit-learn ships. Everything is seeded, single-threaded and in float64: the same machine and versions give
the same bytes; others give the same numbers up to rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt import Budget, Curvature, GradientFactor, Instance, __version__, write_instance
from cbs_opt.cli.common import Parser, run_main
from cbs_opt.errors import CbsError
from cbs_opt.instances.fisher import fisher_inverse_blocks, row_blocks, tensor_table
from cbs_opt.instances.gradients import per_sample_gradients
from cbs_opt.instances.training import accuracy, multilayer_perceptron, one_thread, train

LIBRARY = Path(__file__).resolve().parent / "library"

SEED = 0
SIZES = (64, 40, 20, 10)
TRAINING_SAMPLES = 1437  # of 1797; the others are the test samples
TRAINING: dict[str, Any] = {"epochs": 20, "batch_size": 64, "learning_rate": 0.1, "weight_decay": 1e-4}
DAMPING = 1e-5
SPARSITY = 0.9


@dataclass(frozen=True)
class Digits:
    """Pixels in [0, 1], float64 (m, 64), and labels, int64 (m,), of training and test samples."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def read_digits(seed: int = SEED) -> Digits:
    """Read the digits of scikit-learn and split them at random.

    Raises
    ------
    CbsError
        When scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise CbsError('the digits need scikit-learn: pip install "cbs-opt[digits]"') from None
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels / 16.0), torch.from_numpy(labels.astype(np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    return Digits(x[:TRAINING_SAMPLES], y[:TRAINING_SAMPLES], x[TRAINING_SAMPLES:], y[TRAINING_SAMPLES:])


def train_digits_network(digits: Digits, seed: int = SEED) -> nn.Module:
    """Train the network from a seed; about two seconds."""
    generator = torch.Generator().manual_seed(seed)
    with one_thread():
        model = multilayer_perceptron(SIZES, generator)
        train(model, digits.x_train, digits.y_train, generator, **TRAINING)
    return model.eval()


def make_instance(
    digits: Digits, model: nn.Module, names: Sequence[str], samples: int, *, curvature: str
) -> Instance:
    """Turn the network into an instance.

    Parameters
    ----------
    digits : Digits
    model : torch.nn.Module
    names : sequence of str
        The tensors to prune, by their names in the model.
    samples : int
        Training samples whose gradients make H.
    curvature : {"inverse_hessian", "gradients"}
        A dense inverse block for the weights of each neuron, or the gradients themselves, in float32, with
        all weights in one block.

    Returns
    -------
    Instance
        With a budget of ⌈0.9 n⌉ weights.
    """
    tensors = {name: dict(model.named_parameters())[name].detach() for name in names}
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    form: Curvature
    with one_thread():
        G = per_sample_gradients(model, digits.x_train[:samples], digits.y_train[:samples], names).numpy()
        if curvature == "gradients":
            form = GradientFactor(G.astype(np.float32), DAMPING)
        else:
            form = fisher_inverse_blocks(G, DAMPING, row_blocks(shapes))
    weights = torch.cat([tensor.flatten() for tensor in tensors.values()]).numpy()
    metadata = {
        "network": f"multilayer perceptron {'-'.join(map(str, SIZES))}, ReLU, no biases",
        "data": "8×8 digits of scikit-learn (load_digits), pixels / 16",
        "tensors": tensor_table(list(names), shapes),
        "training": {**TRAINING, "samples": TRAINING_SAMPLES, "optimizer": "SGD, momentum 0.9, cosine"},
        "train_accuracy": round(accuracy(model, digits.x_train, digits.y_train), 4),
        "test_accuracy": round(accuracy(model, digits.x_test, digits.y_test), 4),
        "hessian": "empirical Fisher of single-sample gradients of the cross entropy",
        "samples": samples,
        "damping": DAMPING,
        "seed": SEED,
        "writer": f"cbs-opt {__version__}",
    }
    return Instance(weights, form, Budget(int(np.ceil(SPARSITY * weights.size))), metadata=metadata)


def write_library(folder: Path) -> list[Path]:
    """Train the network and write its instances to `folder`; reproducible on the same machine and versions."""
    digits = read_digits()
    model = train_digits_network(digits)
    names = [name for name, _ in model.named_parameters()]
    instances = {
        "digits-mlp.npz": make_instance(digits, model, names, 1000, curvature="inverse_hessian"),
        "digits-mlp-gradients.npz": make_instance(digits, model, names[1:], 480, curvature="gradients"),
    }
    for name, instance in instances.items():
        write_instance(folder / name, instance)
    return [folder / name for name in instances]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.instances.digits", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.instances.digits", "Train a network on digits and write its instances.")
    parser.add_argument(
        "-o", "--output", type=Path, default=LIBRARY, metavar="FOLDER", help="default: the library"
    )
    folder = parser.parse_args(arguments).output
    for path in write_library(folder):
        sys.stdout.write(f"{path}  {path.stat().st_size} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
