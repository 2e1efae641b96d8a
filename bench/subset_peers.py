"""External solvers of best-subset selection, the joint problem: abess, l0bnb, MCP by skglm, OMP and Lasso.

Room: bench; `runs.task` calls them. Each gives a support only: it is completed to the number of weights that stay
by forward selection, its coefficients are fitted exactly, and its loss is recomputed, as for every solver.

OKRidge, which certifies k-sparse ridge regression, is no extra: its release 0.1.1 needs NumPy below 2.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from cbs_opt import Budget, Instance
from cbs_opt.bench.peers import MissingPeerError
from cbs_opt.solvers.joint.forward import select_forward
from cbs_opt.typing import BoolArray, FloatArray, IntArray

MOST_WEIGHTS = 5000
"""Instances up to this size are handed to them, as a dense matrix."""

_PATH = 100  # steps of a path of penalties
_SMALLEST = 1e-4  # penalty, as a share of the largest


class Regression(NamedTuple):
    """½ ‖y − Xβ‖² / m + ½ ridge ‖β‖², the joint loss up to a constant.

    Attributes
    ----------
    X : float64 (m, n)
    y : float64 (m,)
    ridge : float
    """

    X: FloatArray
    y: FloatArray
    ridge: float


def regression_of(instance: Instance) -> Regression:
    """The regression whose best subsets are those of the joint problem.

    For a gradient factor in one block the gradients are X, and y is what makes H w the gradient, if there is such
    a y; else the columns of a square root of H take the place of X, without a ridge.

    Parameters
    ----------
    instance : Instance
        One budget, nothing fixed, no first-order term, at most `MOST_WEIGHTS` weights.

    Raises
    ------
    MissingPeerError
        For another instance.
    """
    if instance.n > MOST_WEIGHTS:
        raise MissingPeerError(f"{instance.n} weights, best-subset peers are given {MOST_WEIGHTS} at most")
    if instance.budget.groups is not None or instance.fixed is not None or instance.linear is not None:
        raise MissingPeerError("best-subset peers take one budget, without `groups`, `fixed` or `linear`")
    curvature, w = instance.curvature, instance.weights
    factor = curvature.as_factor()
    if factor is not None and curvature.number_of_blocks == 1:
        X = factor.factor(0, np.arange(instance.n))
        m, ridge = factor.m, factor.damping
        # Xᵀ y / m = H w = XᵀX w / m + ridge w
        y = X @ w + m * ridge * np.linalg.lstsq(X.T, w, rcond=None)[0]
        wanted = curvature.matmul(w)
        if np.linalg.norm(X.T @ y / m - wanted) <= 1e-9 * np.linalg.norm(wanted):
            return Regression(X, y, ridge)
    root = np.zeros((instance.n, instance.n))
    for k in range(curvature.number_of_blocks):
        part = curvature.block_slice(k)
        values, vectors = np.linalg.eigh(curvature.block(k))
        root[part, part] = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    X = np.sqrt(instance.n) * root
    return Regression(X, X @ w, 0.0)


def solve_subset(name: str, instance: Instance, time_limit: float | None) -> BoolArray:
    """The selection of a peer, bool (n,).

    Parameters
    ----------
    name : str
        One of `SUBSET_PEERS`.
    instance : Instance
    time_limit : float or None
        Seconds, for l0bnb: shared equally by the penalties of its path. The others have no limit.

    Raises
    ------
    MissingPeerError
        When it is not installed or cannot take the instance.
    """
    missing = unavailable_peer(name)
    if missing is not None:
        raise MissingPeerError(missing)
    keep = instance.n - instance.budget.total
    data = regression_of(instance)
    support = SUBSET_PEERS[name].support(data, keep, time_limit) if keep else np.zeros(0, np.int64)
    fixed = np.zeros(instance.n, np.int8)
    fixed[support[:keep]] = -1
    return select_forward(replace(instance, fixed=fixed, budget=Budget(instance.budget.total)))


def unavailable_peer(name: str) -> str | None:
    """Why a peer cannot run here, or None."""
    package = SUBSET_PEERS[name].package
    if importlib.util.find_spec(package) is not None:
        return None
    return f'{name} needs {package}, which is not installed: pip install "cbs-opt[subset-peers]"'


def _largest(values: FloatArray, data: Regression, keep: int) -> IntArray:
    """The columns with the largest effects |β_i| ‖x_i‖, at most `keep` and none that is zero."""
    size = np.abs(values) * np.sqrt((data.X**2).sum(axis=0))
    order = np.argsort(-size, kind="stable")[:keep]
    return np.asarray(order[size[order] > 0], np.int64)


def _omp(data: Regression, keep: int, time_limit: float | None) -> IntArray:
    """Orthogonal matching pursuit on the data with the ridge as further rows."""
    from sklearn.linear_model import orthogonal_mp

    X, y = _with_ridge(data)
    return _largest(np.asarray(orthogonal_mp(X, y, n_nonzero_coefs=min(keep, X.shape[0]))), data, keep)


def _lasso(data: Regression, keep: int, time_limit: float | None) -> IntArray:
    """The last point of the Lasso path (LARS) with at most `keep` columns."""
    from sklearn.linear_model import lars_path

    X, y = _with_ridge(data)
    scale = np.sqrt((X**2).sum(axis=0))
    scale[scale == 0] = 1.0
    _, _, path = lars_path(X / scale, y, method="lasso", max_iter=8 * keep + 50)
    counts = np.count_nonzero(path, axis=0)
    last = int(np.flatnonzero(counts <= keep)[-1])
    return _largest(path[:, last] / scale, data, keep)


def _abess(data: Regression, keep: int, time_limit: float | None) -> IntArray:
    """Adaptive best-subset selection (splicing) at this size."""
    from abess import LinearRegression

    X, y = _with_ridge(data)
    model = LinearRegression(support_size=keep, fit_intercept=False)
    model.fit(X, y)
    return _largest(np.ravel(model.coef_), data, keep)


def _mcp(data: Regression, keep: int, time_limit: float | None) -> IntArray:
    """The minimax concave penalty (γ = 3) along a path: the first point with enough columns, its largest ones."""
    from skglm import MCPRegression

    X, y = _with_ridge(data)
    scale = np.sqrt((X**2).mean(axis=0))
    scale[scale == 0] = 1.0
    X = np.asfortranarray(X / scale)
    highest = float(np.abs(X.T @ y).max()) / len(y)
    best = np.zeros(X.shape[1])
    for share in np.geomspace(1.0, _SMALLEST, _PATH):
        model = MCPRegression(alpha=highest * share, gamma=3.0, fit_intercept=False)
        best = np.ravel(model.fit(X, y).coef_)
        if np.count_nonzero(best) >= keep:
            break
    return _largest(best / scale, data, keep)


def _l0bnb(data: Regression, keep: int, time_limit: float | None) -> IntArray:
    """The path of penalised problems of l0bnb up to this number of columns: its last one that is not larger."""
    from l0bnb import fit_path

    options: dict[str, Any] = {} if time_limit is None else {"time_limit": time_limit / max(keep, 1)}
    with _old_infinity(), contextlib.redirect_stdout(io.StringIO()):
        path = fit_path(
            data.X, data.y, lambda_2=0.5 * len(data.y) * data.ridge, max_nonzeros=keep, intercept=False,
            normalize=False, **options,
        )  # fmt: skip
    fitting = [found["B"] for found in path if np.count_nonzero(found["B"]) <= keep]
    return _largest(np.asarray(fitting[-1]), data, keep) if fitting else np.zeros(0, np.int64)


@contextlib.contextmanager
def _old_infinity() -> Iterator[None]:
    """`numpy.Inf`, which l0bnb 1.0 uses and NumPy 2 no longer has."""
    if hasattr(np, "Inf"):
        yield
        return
    np.Inf = np.inf  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del np.Inf  # type: ignore[attr-defined]


def _with_ridge(data: Regression) -> tuple[FloatArray, FloatArray]:
    """X and y with √(m ridge) I and zeros below, so that plain least squares has the ridge."""
    if data.ridge == 0:
        return data.X, data.y
    m, n = data.X.shape
    below = np.sqrt(m * data.ridge) * np.eye(n)
    return np.vstack([data.X, below]), np.concatenate([data.y, np.zeros(n)])


class SubsetPeer(NamedTuple):
    """A peer: the package that it needs, and the function that gives its columns."""

    package: str
    support: Callable[[Regression, int, float | None], IntArray]


SUBSET_PEERS = {
    "omp": SubsetPeer("sklearn", _omp),
    "lasso": SubsetPeer("sklearn", _lasso),
    "abess": SubsetPeer("abess", _abess),
    "mcp": SubsetPeer("skglm", _mcp),
    "l0bnb": SubsetPeer("l0bnb", _l0bnb),
}
"""The peers by name."""
