"""Generated layers of any size as instances, for `bench.layers` and `bench.layer_scale`."""

from __future__ import annotations

import numpy as np

from cbs_opt.budget import Budget, number_of
from cbs_opt.curvature import HessianBlocks, SharedBlocks
from cbs_opt.instance import Instance
from cbs_opt.typing import FloatArray

DAMPING = 0.01
"""Of the mean of the diagonal."""


def generate(rows: int, columns: int, samples: int, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """Weights (rows, K) and S (K, K), float64: Gaussian weights, and inputs whose spectrum falls like 1/k.

    S = XᵀX/m of m `samples` with independent entries of variance 1/k in the k-th direction of a random basis, plus
    a hundredth of its mean diagonal; the weights have variance 1/K.
    """
    generator = np.random.default_rng(seed)
    X = generator.standard_normal((samples, columns), dtype=np.float32)
    X *= np.sqrt(1.0 / np.arange(1, columns + 1)).astype(np.float32)
    X = X @ np.linalg.qr(generator.standard_normal((columns, columns), dtype=np.float32))[0]
    S = (X.T @ X / samples).astype(np.float64)
    S[np.diag_indices(columns)] += DAMPING * float(np.mean(np.diag(S)))
    return generator.standard_normal((rows, columns)) / np.sqrt(columns), S


def as_instance(weights: FloatArray, S: FloatArray, sparsity: float | tuple[int, int]) -> Instance:
    """An instance of rows that share S, in single precision, with one budget or n of every m weights."""
    rows, columns = weights.shape
    n = weights.size
    if isinstance(sparsity, tuple):
        count, size = sparsity
        groups = np.arange(n) // size
        budget = Budget(n // size * count, groups, np.full(n // size, count))
    else:
        budget = Budget(number_of(sparsity, n))
    stored = HessianBlocks(S.astype(np.float32).ravel(), [columns])
    curvature = SharedBlocks(stored, np.zeros(rows, dtype=np.int64))
    return Instance(
        weights=weights.astype(np.float32).astype(np.float64).ravel(),
        curvature=curvature,
        budget=budget,
        metadata={
            "data": f"generated, {rows} rows of {columns}, spectrum 1/k",
            "hessian": f"second moment of the inputs, plus {DAMPING:g} of its mean diagonal",
            "seed": 0,
        },
    )


def transformer_block(width: int, hidden: int, sparsity: float) -> Instance:
    """One block of a transformer under one budget: 4 layers width × width, 2 hidden × width, 1 width × hidden.

    The layers are generated with the seeds 0 to 6, from as many samples as twice their columns.
    """
    shapes = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]
    made = [generate(rows, columns, 2 * columns, seed) for seed, (rows, columns) in enumerate(shapes)]
    stored = HessianBlocks(
        np.concatenate([S.astype(np.float32).ravel() for _, S in made]), [columns for _, columns in shapes]
    )
    weights = np.concatenate([W.astype(np.float32).ravel() for W, _ in made]).astype(np.float64)
    return Instance(
        weights=weights,
        curvature=SharedBlocks(stored, np.repeat(np.arange(len(shapes)), [rows for rows, _ in shapes])),
        budget=Budget(number_of(sparsity, weights.size)),
        metadata={"data": f"generated: a transformer block, {width} and {hidden} wide, spectra 1/k", "seed": 0},
    )
