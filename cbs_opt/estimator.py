"""Best-subset selection in the protocol of scikit-learn: `BestSubsetRegressor` and `BestSubsetRegressorCV`.

Room: core, imported by nobody: scikit-learn is an extra, `pip install "cbs-opt[regression]"`. It imports the core
only; solvers come through the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from cbs_opt.errors import CbsError, RequirementError, UsageError
from cbs_opt.files.quadratic_text import STATED
from cbs_opt.instance import Instance
from cbs_opt.path import solve_path
from cbs_opt.regression import from_regression, regression_coefficients
from cbs_opt.result import Result, relative_gap
from cbs_opt.scalars import is_integer
from cbs_opt.solve import solve
from cbs_opt.stop import Stop
from cbs_opt.typing import FloatArray, IntArray

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.model_selection import check_cv
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    raise RequirementError('cbs_opt.estimator needs scikit-learn: pip install "cbs-opt[regression]"') from error


class BestSubsetPath(NamedTuple):
    """Best subsets of several sizes, from the largest to the smallest.

    Attributes
    ----------
    keep : int64 (p,)
    coefficients : float64 (p, n)
    intercepts : float64 (p,)
    objectives : float64 (p,)
        ‖y − β₀ − Xβ‖² / 2m + ½ ridge ‖β‖².
    bounds : float64 (p,)
        Lower bounds on the objectives, −∞ where none is known.
    results : list of Result
    """

    keep: IntArray
    coefficients: FloatArray
    intercepts: FloatArray
    objectives: FloatArray
    bounds: FloatArray
    results: list[Result]


def best_subset_path(
    X: ArrayLike,
    y: ArrayLike,
    keep: Sequence[int],
    ridge: float = 0.0,
    *,
    fit_intercept: bool = True,
    standardize: bool = False,
    solver: str = "joint",
    time_limit: float | None = None,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    threads: int | None = 1,
) -> BestSubsetPath:
    """Best subsets of several sizes, each the warm start of the next smaller one.

    Parameters
    ----------
    X : array_like (m, n)
    y : array_like (m,)
    keep : sequence of int
        Sizes of the subsets.
    ridge, fit_intercept, standardize
        As for `cbs_opt.from_regression`.
    solver, parameters, seed, threads
        As for `cbs_opt.solve`.
    time_limit : float, optional
        Seconds for each size.

    Returns
    -------
    BestSubsetPath

    Raises
    ------
    UsageError, SolverError
        As `from_regression` and `solve_path`.

    Examples
    --------
    >>> import numpy as np
    >>> from cbs_opt.estimator import best_subset_path
    >>> X = np.random.default_rng(0).standard_normal((50, 6))
    >>> best_subset_path(X, X[:, 1] + 2 * X[:, 4], [1, 2], solver="exact").coefficients.round(6)[0]
    array([0., 1., 0., 0., 2., 0.])
    """
    instance = from_regression(X, y, ridge, intercept=fit_intercept, standardize=standardize)
    results = solve_path(
        instance, keep=list(keep), solver=solver, objective="joint", stop=Stop(time_limit=time_limit),
        parameters=parameters, seed=seed, threads=threads,
    )  # fmt: skip
    fitted = [regression_coefficients(instance, result) for result in results]
    constant = instance.metadata[STATED]["constant"]
    return BestSubsetPath(
        keep=np.array([instance.n - result.pruned_count for result in results]),
        coefficients=np.array([model.values for model in fitted]),
        intercepts=np.array([model.intercept for model in fitted]),
        objectives=np.array([result.objective + constant for result in results]),
        bounds=np.array([-np.inf if result.bound is None else result.bound + constant for result in results]),
        results=results,
    )


class _BestSubset(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """What both estimators share: the linear model, and how it is taken from a result."""

    coef_: FloatArray
    intercept_: float

    def predict(self, X: ArrayLike) -> FloatArray:
        """Predict y, float64 (m,), for X (m, n)."""
        check_is_fitted(self)
        data = validate_data(self, X, reset=False, dtype=np.float64)
        return np.asarray(data @ self.coef_ + self.intercept_)

    def _take(self, instance: Instance, result: Result) -> None:
        """Set the attributes of the fitted model."""
        constant = instance.metadata[STATED]["constant"]
        self.coef_, self.intercept_ = regression_coefficients(instance, result)
        self.support_ = ~result.pruned
        self.objective_ = result.objective + constant
        self.bound_ = None if result.bound is None else result.bound + constant
        self.gap_ = relative_gap(self.objective_, self.bound_)
        self.result_ = result


class BestSubsetRegressor(_BestSubset):
    """Least squares, with a ridge if wanted, on the best k columns.

    minimise ‖y − β₀ − Xβ‖² / 2m + ½ ridge ‖β‖² over β with at most k nonzeros.

    Parameters
    ----------
    k : int
        Columns to keep, 1 … n.
    ridge : float
        ≥ 0. Without a ridge k must be below the rank of X (centred with an intercept), or X of full column rank.
    time_limit : float, optional
        Seconds.
    solver : str
        "joint", a search with a bound, "exact", which proves an optimum, or another solver of the joint objective.
    fit_intercept : bool
    standardize : bool
        Scale the columns to mean square 1; the ridge then weighs the scaled coefficients.
    parameters : mapping, optional
        Parameters of the solver.
    random_state : int
        Seed of the solver.
    threads : int, optional
        None for all cores.

    Attributes
    ----------
    coef_ : float64 (n,)
    intercept_ : float
    support_ : bool (n,)
        The columns that are kept.
    objective_ : float
    bound_ : float or None
        Proven lower bound on the objective of every subset of k columns.
    gap_ : float or None
        (objective − bound) / |objective|.
    result_ : Result
        Of the solver; its losses are the objective less that of all columns.
    n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> from cbs_opt.estimator import BestSubsetRegressor
    >>> X = np.random.default_rng(0).standard_normal((60, 12))
    >>> y = 3 * X[:, 2] - X[:, 7] + 1
    >>> model = BestSubsetRegressor(k=2, ridge=1e-6, solver="exact").fit(X, y)
    >>> np.flatnonzero(model.support_), round(float(model.score(X, y)), 6), model.gap_ < 1e-6
    (array([2, 7]), 1.0, True)
    """

    def __init__(
        self,
        k: int = 1,
        ridge: float = 0.0,
        *,
        time_limit: float | None = None,
        solver: str = "joint",
        fit_intercept: bool = True,
        standardize: bool = False,
        parameters: Mapping[str, Any] | None = None,
        random_state: int = 0,
        threads: int | None = 1,
    ) -> None:
        self.k = k
        self.ridge = ridge
        self.time_limit = time_limit
        self.solver = solver
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.parameters = parameters
        self.random_state = random_state
        self.threads = threads

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Choose the columns and fit their coefficients.

        Parameters
        ----------
        X : array_like (m, n)
        y : array_like (m,)

        Returns
        -------
        BestSubsetRegressor
            Itself.

        Raises
        ------
        ValueError
            One sentence, for data or parameters that do not fit.
        """
        data, target = _samples(self, X, y)
        try:
            instance = from_regression(
                data, target, self.ridge, keep=_checked_size(self.k, data.shape[1]), intercept=self.fit_intercept,
                standardize=self.standardize,
            )  # fmt: skip
            result = solve(
                instance, self.solver, objective="joint", stop=Stop(time_limit=self.time_limit),
                parameters=self.parameters, seed=self.random_state, threads=self.threads,
            )  # fmt: skip
        except CbsError as error:
            raise ValueError(str(error)) from error
        self._take(instance, result)
        return self


class BestSubsetRegressorCV(_BestSubset):
    """Best subset of the size that predicts best in cross-validation; one warm-started path per fold.

    Parameters
    ----------
    ks : sequence of int, optional
        Sizes to try; 1 … min(10, n) by default, as far as every fold determines them.
    cv : int, cross-validation generator or iterable, optional
        As in scikit-learn; five folds by default.
    ridge, time_limit, solver, fit_intercept, standardize, parameters, random_state, threads
        As for `BestSubsetRegressor`; the time limit holds for each size and fold.

    Attributes
    ----------
    k_ : int
        The chosen size.
    mse_path_ : float64 (p, folds)
        Mean squared errors of the sizes on the samples left out.
    ks_ : int64 (p,)
        The sizes, from the largest to the smallest.
    coef_, intercept_, support_, objective_, bound_, gap_, result_
        As for `BestSubsetRegressor`, of the fit on all samples.
    """

    def __init__(
        self,
        ks: Sequence[int] | None = None,
        ridge: float = 0.0,
        *,
        cv: Any = None,
        time_limit: float | None = None,
        solver: str = "joint",
        fit_intercept: bool = True,
        standardize: bool = False,
        parameters: Mapping[str, Any] | None = None,
        random_state: int = 0,
        threads: int | None = 1,
    ) -> None:
        self.ks = ks
        self.ridge = ridge
        self.cv = cv
        self.time_limit = time_limit
        self.solver = solver
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.parameters = parameters
        self.random_state = random_state
        self.threads = threads

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Find the size by cross-validation and fit it on all samples; errors as `BestSubsetRegressor.fit`."""
        data, target = _samples(self, X, y)
        folds = list(check_cv(self.cv).split(data, target))
        options: dict[str, Any] = {
            "fit_intercept": self.fit_intercept, "standardize": self.standardize, "solver": self.solver,
            "time_limit": self.time_limit, "parameters": self.parameters, "seed": self.random_state,
            "threads": self.threads,
        }  # fmt: skip
        try:
            sizes = self._sizes(data, folds)
            errors = []
            for train, test in folds:
                path = best_subset_path(data[train], target[train], sizes, self.ridge, **options)
                predicted = data[test] @ path.coefficients.T + path.intercepts
                errors.append(((predicted - target[test][:, None]) ** 2).mean(axis=0))
            self.ks_, self.mse_path_ = path.keep, np.array(errors).T
            self.k_ = int(self.ks_[int(np.argmin(self.mse_path_.mean(axis=1)))])
            instance = from_regression(
                data, target, self.ridge, keep=self.k_, intercept=self.fit_intercept, standardize=self.standardize
            )
            del options["fit_intercept"], options["standardize"]
            stop = Stop(time_limit=options.pop("time_limit"))
            self._take(instance, solve(instance, objective="joint", stop=stop, **options))
        except CbsError as error:
            raise ValueError(str(error)) from error
        return self

    def _sizes(self, X: FloatArray, folds: list[tuple[IntArray, IntArray]]) -> list[int]:
        """The sizes to try, checked against the number of columns."""
        n = X.shape[1]
        if self.ks is not None:
            if np.ndim(self.ks) != 1:
                raise UsageError(f"`ks` must be a sequence of sizes, such as range(1, 6), got {self.ks!r}")
            if not len(self.ks):
                raise UsageError("`ks` must hold at least one size")
            return [_checked_size(k, n) for k in self.ks]
        most = min(10, n)
        if self.ridge == 0 and n > 1:  # below the rank of every fold
            least = min(int(np.linalg.matrix_rank(X[train] - X[train].mean(axis=0))) for train, _ in folds)
            most = most if least == n else max(1, min(most, least - 1))
        return list(range(1, most + 1))


def _samples(estimator: BaseEstimator, X: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """X (m, n) and y (m,) in float64, checked as scikit-learn does; at least two samples."""
    data, target = validate_data(estimator, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
    return np.asarray(data, np.float64), np.asarray(target, np.float64)


def _checked_size(k: Any, n: int) -> int:
    if not is_integer(k) or not 1 <= k <= n:
        raise UsageError(f"`k` must be a whole number from 1 to {n}, the number of features, got {k!r}")
    return int(k)
