"""The problems that the parts share: networks of the CBS paper on made images, layers with made inputs.

Nothing is read from outside of the checkout: a machine with a card may have no data. The losses are therefore
those of these problems, and comparable between devices, not with the tables of the paper.
"""

from __future__ import annotations

import numpy as np
import torch

from cbs_opt import Instance
from cbs_opt.instances.export import export
from cbs_opt.instances.networks import load_network
from cbs_opt.solvers.layers.problem import Layer
from cbs_opt.typing import FloatArray

SPARSITY = 0.9


def images(count: int, shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten blurred patterns under noise, zero at the border as digits are; inputs (count, …), labels (count,)."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(10, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (count,), generator=generator)
    kernel = torch.ones(1, 1, 5, 5) / 25
    flat = patterns.view(-1, 1, *shape[-2:])
    blurred = torch.nn.functional.conv2d(flat, kernel, padding=2).view(10, *shape)
    inputs = 2.0 * blurred[labels] + 2.0 * torch.randn(count, *shape, generator=generator)
    border = torch.zeros(shape[-2:])
    border[4:-4, 4:-4] = 1.0
    return inputs.clamp_min(0) * border, labels


def trained(name: str, steps: int, seed: int = 0) -> torch.nn.Module:
    """A network of the package after a few steps of Adam on such images, on the CPU."""
    torch.manual_seed(seed)
    model = load_network(name).model
    shape = (1, 28, 28) if name == "mlpnet" else (3, 32, 32)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        inputs, labels = images(64, shape, 1000 + step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def mlpnet(tiny: bool, samples: int = 1000) -> Instance:
    """MLPNet, 32,360 weights, as one block; tiny: 600 weights of the same kind, random."""
    if tiny:
        rng = np.random.default_rng(0)
        return made(rng, 600, 40, [600])
    inputs, labels = images(samples, (1, 28, 28), 1)
    model = trained("mlpnet", 150)
    instance = export(
        model, inputs, labels, blocks="full", curvature="gradients", damping=1e-5, sparsity=SPARSITY, device="cpu"
    )
    assert isinstance(instance, Instance)
    return instance


def resnet20(tiny: bool, device: str, samples: int = 1000) -> Instance:
    """ResNet20, 267,264 weights in 18 blocks, one for each layer; tiny: three small blocks, random."""
    if tiny:
        return made(np.random.default_rng(1), 240, 30, [80, 80, 80])
    inputs, labels = images(samples, (3, 32, 32), 2)
    model = trained("resnet20", 20)
    instance = export(
        model,
        inputs,
        labels,
        blocks="layer",
        curvature="gradients",
        damping=1e-5,
        sparsity=SPARSITY,
        device=device,
    )
    assert isinstance(instance, Instance)
    return instance


def made(rng: np.random.Generator, n: int, m: int, sizes: list[int]) -> Instance:
    """Random weights and correlated gradients."""
    from cbs_opt import Budget, GradientFactor

    mix = rng.normal(size=(8, n))
    gradients = np.maximum(rng.normal(size=(m, 8)) @ mix + 0.5 * rng.normal(size=(m, n)), 0)
    curvature = GradientFactor(gradients.astype(np.float32), 1e-3, sizes)
    return Instance(rng.normal(size=n), curvature, Budget(int(SPARSITY * n)))


def layer(rows: int, columns: int, device: torch.device, seed: int) -> tuple[Layer, float]:
    """Random weights and a Hessian XXᵀ of inputs whose spectrum falls like 1/k, with scales per column.

    Also the loss of removing everything, with which errors are compared.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rank = columns
    spectrum = torch.arange(1, rank + 1, dtype=torch.float32, device=device) ** -0.5
    A = torch.randn(columns, rank, generator=generator, device=device) * spectrum
    A *= torch.exp(0.7 * torch.randn(columns, 1, generator=generator, device=device))
    S = A @ A.T
    S.diagonal().add_(0.01 * float(S.diagonal().mean()))
    weights = torch.randn(rows, columns, generator=generator, device=device) / columns**0.5
    S = 0.5 * (S + S.T)
    W = weights.to(torch.float64)
    size = 0.5 * float(((W @ S.to(torch.float64)) * W).sum())
    return Layer(_host(weights), _host(S)), size


def _host(tensor: torch.Tensor) -> FloatArray:
    return np.asarray(tensor.to(torch.float64).cpu().numpy())
