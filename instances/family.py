"""The family of small instances in the library: `python -m cbs_opt.instances.family` generates them.

Blocks of 12 to 200 weights from several layers of two networks that read the 8×8 digits of scikit-learn, the
multilayer perceptron of `cbs_opt.instances.digits` and a small convolutional network, single and several under
one budget, with N:M groups and with a first-order term. Seeded, single-threaded, in float64. The best-known
values in the index come from `python -m cbs_opt.bench.best_known`; generating the files again keeps them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt import Budget, HessianBlocks, Instance, __version__, read_instance, write_instance
from cbs_opt.cli.common import Parser, run_main
from cbs_opt.files.atomic import atomic_write
from cbs_opt.files.library_file import INDEX, INDEX_FORMAT, INDEX_VERSION
from cbs_opt.instances.digits import (
    DAMPING,
    LIBRARY,
    SEED,
    TRAINING,
    TRAINING_SAMPLES,
    Digits,
    read_digits,
    train_digits_network,
)
from cbs_opt.instances.fisher import fisher_inverse_blocks
from cbs_opt.instances.gradients import per_sample_gradients
from cbs_opt.instances.training import accuracy, one_thread, train
from cbs_opt.typing import FloatArray

SAMPLES = 1000
SPARSITY = 0.8

MLP = "digits multilayer perceptron 64-40-20-10, ReLU, no biases"
CONV = "digits convolutional network: 3×3 convolutions with 8 and 16 channels, 10 outputs, ReLU, no biases"


@dataclass(frozen=True)
class Member:
    """The specification of an instance of the family.

    Parameters
    ----------
    network : {"mlp", "conv"}
    tensor : str
        A parameter. A single block takes those of its weights whose mean squared gradient is largest, in the
        order of the tensor; several blocks take its weights from the first on.
    block_sizes : tuple of int
    inverse : bool
        Write inverse blocks instead of Hessian blocks.
    group : tuple of int, optional
        (N, M): prune N of every M consecutive weights.
    linear : bool
        Add the mean gradient of the same samples.
    """

    network: str
    tensor: str
    block_sizes: tuple[int, ...]
    inverse: bool = False
    group: tuple[int, int] | None = None
    linear: bool = False


def family() -> dict[str, Member]:
    """The members by name."""
    hidden = {f"mlp-hidden-{n}": Member("mlp", "2.weight", (n,)) for n in (12, 20, 30, 40, 60, 80, 100, 150, 200)}
    output = {f"mlp-output-{n}": Member("mlp", "4.weight", (n,)) for n in (12, 20, 40, 60, 100, 200)}
    filters = {f"conv-{n}": Member("conv", "3.weight", (n,)) for n in (18, 36, 72, 144)}
    several = {
        "mlp-output-rows": Member("mlp", "4.weight", (20,) * 10, inverse=True),
        "mlp-hidden-rows": Member("mlp", "2.weight", (40,) * 20, inverse=True),
        "conv-filters": Member("conv", "3.weight", (72,) * 16, inverse=True),
        "mlp-output-rows-2of4": Member("mlp", "4.weight", (20,) * 10, inverse=True, group=(2, 4)),
        "conv-filters-2of4": Member("conv", "3.weight", (72,) * 8, inverse=True, group=(2, 4)),
        "mlp-output-60-linear": Member("mlp", "4.weight", (60,), linear=True),
    }
    return hidden | output | filters | several


def train_convolutional_network(digits: Digits, seed: int = SEED) -> nn.Sequential:
    """Train the convolutional network from a seed; inputs (m, 1, 8, 8), about ten seconds."""
    torch_seed = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10, bias=False),
    ).double()
    with one_thread():
        for parameter in model.parameters():
            scale = (3 / parameter[0].numel()) ** 0.5
            with torch.no_grad():
                parameter.uniform_(-scale, scale, generator=torch_seed)
        train(model, digits.x_train.view(-1, 1, 8, 8), digits.y_train, torch_seed, **TRAINING)
    return model.eval()


def make_member(member: Member, weights: FloatArray, gradients: FloatArray, metadata: dict[str, Any]) -> Instance:
    """Cut an instance from a tensor.

    Parameters
    ----------
    member : Member
    weights : float64 (n₀,)
        The tensor, row by row.
    gradients : float64 (m, n₀)
        Its single-sample gradients.
    metadata : dict
        Description of the network; the positions of its weights in the flattened tensor are added.

    Returns
    -------
    Instance
        With ⌈0.8 n⌉ weights to prune, or its groups' share.
    """
    n = sum(member.block_sizes)
    if len(member.block_sizes) == 1:
        chosen = np.sort(np.argsort(-np.square(gradients).mean(axis=0), kind="stable")[:n])
    else:
        chosen = np.arange(n)
    G = gradients[:, chosen]
    inverse = fisher_inverse_blocks(G, DAMPING, member.block_sizes)
    if member.group is None:
        budget = Budget(int(np.ceil(SPARSITY * n)))
    else:
        prune, of = member.group
        budget = Budget(n // of * prune, np.arange(n) // of, np.full(n // of, prune))
    if member.inverse:
        form: Any = inverse
    else:
        ends = np.cumsum(member.block_sizes)
        cuts = [G[:, end - size : end] for end, size in zip(ends, member.block_sizes, strict=True)]
        form = HessianBlocks.from_blocks([g.T @ g / len(g) + DAMPING * np.eye(g.shape[1]) for g in cuts])
    metadata |= {"tensor": member.tensor, "positions": chosen.tolist()}
    linear = G.mean(axis=0) if member.linear else None
    return Instance(weights[chosen], form, budget, linear=linear, metadata=metadata)


def write_family(folder: Path) -> list[Path]:
    """Train both networks; write the family and the index to `folder`. Same machine and versions: same bytes."""
    digits = read_digits()
    networks: dict[str, tuple[str, nn.Module, Tensor, Tensor]] = {
        "mlp": (MLP, train_digits_network(digits), digits.x_train, digits.x_test),
        "conv": (
            CONV,
            train_convolutional_network(digits),
            digits.x_train.view(-1, 1, 8, 8),
            digits.x_test.view(-1, 1, 8, 8),
        ),
    }
    sources: dict[tuple[str, str], tuple[FloatArray, FloatArray, dict[str, Any]]] = {}
    paths = []
    with one_thread():
        for name, member in family().items():
            key = member.network, member.tensor
            title, model, x_train, x_test = networks[member.network]
            if key not in sources:
                tensor = dict(model.named_parameters())[member.tensor].detach()
                G = per_sample_gradients(model, x_train[:SAMPLES], digits.y_train[:SAMPLES], [member.tensor])
                metadata = {
                    "network": title,
                    "data": "8×8 digits of scikit-learn (load_digits), pixels / 16",
                    "training": {
                        **TRAINING,
                        "samples": TRAINING_SAMPLES,
                        "optimizer": "SGD, momentum 0.9, cosine",
                    },
                    "test_accuracy": round(accuracy(model, x_test, digits.y_test), 4),
                    "hessian": "empirical Fisher of single-sample gradients of the cross entropy",
                    "samples": SAMPLES,
                    "damping": DAMPING,
                    "seed": SEED,
                    "shape": list(tensor.shape),
                    "writer": f"cbs-opt {__version__}",
                }
                sources[key] = tensor.flatten().numpy(), G.numpy(), metadata
            weights, gradients, metadata = sources[key]
            paths.append(folder / f"{name}.npz")
            write_instance(paths[-1], make_member(member, weights, gradients, dict(metadata)))
    write_index(folder)
    return paths


def write_index(folder: Path) -> None:
    """List the instances of `folder` in its index, small ones first; best-known values of equal files are kept."""
    path = folder / INDEX
    known: dict[str, Any] = {}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {item["sha256"]: item["best_known"] for item in content["instances"]}
    items = []
    for file in sorted(folder.glob("*.npz")):
        instance = read_instance(file)
        about = instance.metadata
        tensors = [about["tensor"]] if "tensor" in about else [tensor["name"] for tensor in about["tensors"]]
        items.append(
            {
                "name": file.stem,
                "sha256": instance.sha256,
                "origin": f"{about['network']}; {', '.join(tensors)}",
                "n": instance.n,
                "blocks": instance.curvature.number_of_blocks,
                "curvature": instance.curvature.kind,
                "budget": instance.budget.total,
                "groups": 0 if instance.budget.groups is None else instance.budget.number_of_groups,
                "best_known": known.get(instance.sha256 or "", []),
            }
        )
    items.sort(key=lambda item: (item["n"], item["name"]))
    content = {"format": INDEX_FORMAT, "version": INDEX_VERSION, "instances": items}
    with atomic_write(path) as out:
        out.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.instances.family", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.instances.family", "Train two networks and write the family of instances.")
    parser.add_argument(
        "-o", "--output", type=Path, default=LIBRARY, metavar="FOLDER", help="default: the library"
    )
    folder = parser.parse_args(arguments).output
    for path in write_family(folder):
        sys.stdout.write(f"{path}  {path.stat().st_size} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
