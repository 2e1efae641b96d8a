"""Instances beyond the library for `bench.exact`: `python -m cbs_opt.bench.exact_blocks -o FOLDER ...`.

Without a network: 200 blocks of 16 weights under one budget, from a seed. With a checkpoint of MLPNet and MNIST's
images: single blocks of 200 to 400 weights of its second and third layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt import Budget, HessianBlocks, Instance, InverseHessianBlocks, read_instance, write_instance
from cbs_opt.cli.common import Parser, run_main, say
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.atomic import check_writable
from cbs_opt.typing import FloatArray

SPARSITY = 0.8
DAMPING = 1e-5
SAMPLES = 1000
LAYERS = {"fc2.weight": (200, 250, 300, 400), "fc3.weight": (200,)}
"""Tensors of MLPNet, and the sizes of the blocks that are cut from them."""

MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's pixels

_SAMPLES_PER_BLOCK = 24


def small_blocks(blocks: int = 200, size: int = 16, seed: int = 0) -> Instance:
    """Blocks H_k = GᵀG/m + λI of Gaussian gradients, as inverses, scaled like the layers of a network.

    Parameters
    ----------
    blocks, size : int
    seed : int

    Returns
    -------
    Instance
        Each block with gradients of its own size, spread over a factor of 30; 80 % to prune.
    """
    rng = np.random.default_rng(seed)
    inverses, weights = [], []
    for _ in range(blocks):
        G = rng.standard_normal((_SAMPLES_PER_BLOCK, size)) * 10 ** rng.uniform(-1.5, 0.0)
        G *= 10 ** rng.uniform(-0.7, 0.3, size)
        H = G.T @ G / len(G) + DAMPING * np.eye(size)
        A = np.linalg.inv(H)
        inverses.append(0.5 * (A + A.T))
        weights.append(0.3 * rng.standard_normal(size))
    about = {"origin": f"Gaussian gradients, {blocks} blocks of {size} weights", "seed": seed, "damping": DAMPING}
    n = blocks * size
    return Instance(
        np.concatenate(weights),
        InverseHessianBlocks.from_blocks(inverses),
        Budget(int(np.ceil(SPARSITY * n))),
        metadata=about,
    )


def network_blocks(checkpoint: Path, images: Path) -> Iterator[tuple[str, Instance]]:
    """Fisher blocks of MLPNet's layers, with their names.

    Of each tensor the weights whose mean squared gradient is largest, in the order of the tensor; gradients of
    the cross entropy of the first 1000 training images, one each; H = λI + GᵀG/1000, λ = 1e-5.

    Parameters
    ----------
    checkpoint : Path
        .npz with fc1.weight (40, 784), fc2.weight (20, 40), fc3.weight (10, 20).
    images : Path
        .npz with x_train (m, 28, 28) uint8 and y_train (m,).
    """
    layers = _arrays(checkpoint, ("fc1.weight", "fc2.weight", "fc3.weight"))
    data = _arrays(images, ("x_train", "y_train"))
    for tensor, sizes in LAYERS.items():
        G = _gradients(layers, data, tensor)
        weights = layers[tensor].ravel().astype(np.float64)
        for n in sizes:
            chosen = np.sort(np.argsort(-np.square(G).mean(axis=0), kind="stable")[:n])
            part = G[:, chosen]
            H = part.T @ part / len(part) + DAMPING * np.eye(n)
            about = {
                "network": "MLPNet 784-40-20-10 on MNIST",
                "tensor": tensor,
                "positions": chosen.tolist(),
                "samples": SAMPLES,
                "damping": DAMPING,
            }
            budget = Budget(int(np.ceil(SPARSITY * n)))
            instance = Instance(weights[chosen], HessianBlocks.from_blocks([H]), budget, metadata=about)
            yield f"mlpnet-{tensor.partition('.')[0]}-{n}", instance


def _arrays(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Arrays of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                raise InstanceError(f"{path}: has no array '{missing[0]}', needed are {', '.join(names)}")
            return {name: file[name] for name in names}
    except (OSError, ValueError) as error:
        raise InstanceError(f"{path}: cannot be read as .npz: {error}") from error


def _gradients(layers: dict[str, Any], data: dict[str, Any], tensor: str) -> FloatArray:
    """Single-sample gradients of a tensor, float64 (m, n)."""
    try:
        import torch

        from cbs_opt.instances.gradients import per_sample_gradients
    except ModuleNotFoundError as error:
        raise UsageError(f"`--network` needs the package '{error.name}', which is not installed") from error
    sizes = [layers[name].shape for name in ("fc1.weight", "fc2.weight", "fc3.weight")]
    linear = [torch.nn.Linear(shape[1], shape[0], bias=False) for shape in sizes]
    model = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1], torch.nn.ReLU(), linear[2]).double().eval()
    with torch.no_grad():
        for layer, name in zip(linear, layers, strict=True):
            layer.weight.copy_(torch.from_numpy(layers[name]))
    x = (data["x_train"][:SAMPLES].reshape(SAMPLES, -1) / 255.0 - MEAN) / DEVIATION
    y = data["y_train"][:SAMPLES].astype(np.int64)
    number = {name: str(2 * k) for k, name in enumerate(layers)}[tensor]
    G = per_sample_gradients(model, torch.from_numpy(x), torch.from_numpy(y), [f"{number}.weight"])
    return np.asarray(G.numpy())


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.exact_blocks", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.bench.exact_blocks", "Make instances for the table of exact solvers.")
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="FOLDER")
    add("--network", type=Path, metavar="CHECKPOINT.npz", help="MLPNet: fc1.weight, fc2.weight, fc3.weight")
    add("--images", type=Path, metavar="MNIST.npz", help="x_train, y_train")
    options = parser.parse_args(arguments)
    if (options.network is None) != (options.images is None):
        raise UsageError("`--network` and `--images` go together")
    check_writable(options.output / "blocks-200x16.npz")
    made = [("blocks-200x16", small_blocks())]
    if options.network is not None:
        made += network_blocks(options.network, options.images)
    for name, instance in made:
        path = options.output / f"{name}.npz"
        write_instance(path, instance)
        say(f"{path}  {read_instance(path).describe()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
