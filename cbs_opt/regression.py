"""Best-subset selection as a joint problem: an instance from a regression, and its coefficients back.

Room: core; `cbs_opt.from_regression` and `cbs_opt.regression_coefficients` are public, the estimator of
`cbs_opt.estimator` builds on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cbs_opt.budget import Budget
from cbs_opt.curvature import GradientFactor
from cbs_opt.errors import UsageError
from cbs_opt.files.quadratic_text import STATED
from cbs_opt.instance import Instance
from cbs_opt.linalg import solve_psd
from cbs_opt.result import Result
from cbs_opt.scalars import is_finite, is_integer
from cbs_opt.solution import Solution
from cbs_opt.typing import FloatArray
from cbs_opt.update import best_update

KEY = "regression"
"""Key of the metadata: how the columns were centred and scaled."""


class Coefficients(NamedTuple):
    """A linear model y ≈ X values + intercept in the units of the data.

    Attributes
    ----------
    values : float64 (n,)
        Zero on the columns that are not in the subset.
    intercept : float
    """

    values: FloatArray
    intercept: float


def from_regression(
    X: ArrayLike,
    y: ArrayLike,
    ridge: float = 0.0,
    *,
    keep: int | None = None,
    intercept: bool = True,
    standardize: bool = False,
) -> Instance:
    """The instance whose joint problem is best-subset selection with a ridge.

    minimise ‖y − β₀ − Xβ‖² / 2m + ½ ridge ‖β‖² over β with at most `keep` nonzeros. With H = XᵀX/m + ridge I and
    the unconstrained minimiser w this is the joint loss, ½ (β − w)ᵀH(β − w), plus a constant, which the metadata
    hold: the objective is reported with it.

    Parameters
    ----------
    X : array_like (m, n)
        One row per sample.
    y : array_like (m,)
    ridge : float
        ≥ 0, in units of the mean square of a column. 0 is allowed with fewer samples than columns too, if `keep`
        is below the rank of X.
    keep : int, optional
        Number of columns to keep; all where not given: choose it with `Instance.with_kept`, `solve_path(keep=…)`
        or `cbs-solve --keep`.
    intercept : bool
        Fit an intercept: X and y are centred.
    standardize : bool
        Scale the columns to mean square 1; the ridge then weighs the scaled coefficients.

    Returns
    -------
    Instance
        A gradient factor of at most min(m, n) rows. `regression_coefficients` maps its solutions back.

    Raises
    ------
    UsageError
        For data of the wrong shape, NaN or infinite entries, a negative ridge, or `keep` outside 0 … n.

    Notes
    -----
    O(m n min(m, n)) time. With more samples than columns X is replaced by the factor R of its QR decomposition:
    XᵀX and Xᵀy are all that counts.

    Examples
    --------
    >>> import numpy as np
    >>> import cbs_opt
    >>> X = np.random.default_rng(0).standard_normal((50, 8))
    >>> instance = cbs_opt.from_regression(X, X[:, 2] - 3 * X[:, 5] + 1, ridge=1e-6, keep=2)
    >>> result = cbs_opt.solve(instance, "exact", objective="joint")
    >>> values, intercept = cbs_opt.regression_coefficients(instance, result)
    >>> np.flatnonzero(values), round(intercept, 3)
    (array([2, 5]), 1.0)
    """
    X, y = _data(X, y)
    m, n = X.shape
    if not is_finite(ridge) or ridge < 0:
        raise UsageError(f"`ridge` must be a finite number ≥ 0, got {ridge!r}")
    if keep is not None and (not is_integer(keep) or not 0 <= keep <= n):
        raise UsageError(f"`keep` must be a whole number from 0 to {n}, the number of columns, got {keep!r}")
    mean = X.mean(axis=0) if intercept else np.zeros(n)
    offset = float(y.mean()) if intercept else 0.0
    A, b = X - mean, y - offset
    # What centring leaves of a constant column is rounding.
    size = _column_sizes(A)
    constant = size <= 1e-13 * _column_sizes(X)
    A[:, constant] = 0.0
    scale = np.ones(n)
    if standardize:
        scale = np.where(constant, 1.0, size)
        A /= scale
    rest = 0.0  # of ‖b‖²/2m, outside the range of A
    rows = A
    if m > n:
        Q, R = np.linalg.qr(A)
        projected = Q.T @ b
        rest = max(float(b @ b - projected @ projected), 0.0) / (2 * m)
        rows, b = R * np.sqrt(n / m), projected * np.sqrt(n / m)
    w = _minimiser(rows, b, float(ridge))
    residual = b - rows @ w
    constant_term = rest + float(residual @ residual) / (2 * len(rows)) + 0.5 * float(ridge) * float(w @ w)
    metadata = {
        "network": "regression",
        KEY: {
            "samples": m,
            "ridge": float(ridge),
            "intercept": bool(intercept),
            "standardize": bool(standardize),
            "x_mean": mean.tolist(),
            "x_scale": scale.tolist(),
            "y_mean": offset,
        },
        STATED: {"sense": "minimize", "constant": constant_term},
    }
    budget = Budget(0 if keep is None else n - int(keep))
    return Instance(w, GradientFactor(np.ascontiguousarray(rows), float(ridge)), budget, metadata=metadata)


def regression_coefficients(instance: Instance, solution: Result | Solution | ArrayLike) -> Coefficients:
    """Coefficients and intercept, in the units of the data, of a solution of `from_regression`.

    Parameters
    ----------
    instance : Instance
        Made by `from_regression`, or read from a file of such an instance.
    solution : Result, Solution, or bool (n,)
        Of weights that are pruned. Without updated weights the best update is computed.

    Returns
    -------
    Coefficients

    Raises
    ------
    UsageError
        For an instance of another origin, or a solution of another size.
    """
    about = instance.metadata.get(KEY)
    if not isinstance(about, Mapping) or len(about.get("x_mean", ())) != instance.n:
        raise UsageError("the instance does not come from `from_regression`: its metadata have no `regression`")
    weights = getattr(solution, "weights", None)
    if weights is None:
        pruned = np.asarray(getattr(solution, "pruned", solution))
        if pruned.shape != (instance.n,) or pruned.dtype != np.bool_:
            raise UsageError(f"`solution` must hold bool ({instance.n},), got {pruned.dtype} {pruned.shape}")
        weights = best_update(instance, pruned)
    if np.shape(weights) != (instance.n,):
        raise UsageError(f"`solution` must have {instance.n} weights, got {np.shape(weights)}")
    values = np.asarray(weights) / np.asarray(about["x_scale"])
    return Coefficients(values, float(about["y_mean"]) - float(np.asarray(about["x_mean"]) @ values))


def _data(X: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    out: list[FloatArray] = []
    for name, values, axes in (("X", X, 2), ("y", y, 1)):
        try:
            if np.iscomplexobj(values):
                raise UsageError(f"`{name}` must hold real numbers, got complex ones")
            array: Any = np.array(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise UsageError(f"`{name}` must be an array of numbers, got {type(values).__name__}") from None
        if array.ndim != axes:
            shape = "(m, n)" if axes == 2 else "(m,)"
            raise UsageError(f"`{name}` must have shape {shape}, got {array.shape}")
        if not np.isfinite(array).all():
            raise UsageError(f"`{name}` has NaN or infinite entries")
        out.append(array)
    m, n = out[0].shape
    if m < 1 or n < 1:
        raise UsageError(f"`X` must have at least one row and one column, got {out[0].shape}")
    if out[1].size != m:
        raise UsageError(f"`X` has {m} rows, and `y` {out[1].size} entries")
    return out[0], out[1]


def _column_sizes(A: FloatArray) -> FloatArray:
    """Root mean squares of the columns, float64 (n,); squares do not underflow."""
    largest = np.abs(A).max(axis=0)
    largest = np.where(largest > 0, largest, 1.0)
    return np.asarray(largest * np.sqrt(np.mean((A / largest) ** 2, axis=0)))


def _minimiser(rows: FloatArray, b: FloatArray, ridge: float) -> FloatArray:
    """Argmin ‖b − rows w‖² / 2m + ½ ridge ‖w‖²; where there are several, the shortest in units of the columns."""
    m, n = rows.shape
    if ridge == 0:
        # Whether columns are dependent must not depend on their units.
        size = _column_sizes(rows)
        size = np.where(size > 0, size, 1.0)
        return np.asarray(np.linalg.lstsq(rows / size, b, rcond=None)[0]) / size
    if m < n:
        gram = rows @ rows.T
        gram[np.diag_indices(m)] += m * ridge
        return np.asarray(rows.T @ solve_psd(gram, b)[0])
    H = rows.T @ rows / m
    H[np.diag_indices(n)] += ridge
    return solve_psd(H, rows.T @ b / m)[0]
