"""The estimators of best-subset selection: scikit-learn's own checks, and what they add."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="NOT TESTED: scikit-learn is not installed")

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from cbs_opt.estimator import BestSubsetRegressor, BestSubsetRegressorCV, best_subset_path


@parametrize_with_checks([BestSubsetRegressor(), BestSubsetRegressorCV(ks=[1], cv=2)])
def test_protocol(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 9)) * rng.uniform(0.5, 3, 9) + 1.0
    return X, 2 * X[:, 1] - X[:, 4] + 0.5 * X[:, 7] - 3 + 0.1 * rng.standard_normal(40)


def test_attributes(data):
    X, y = data
    model = BestSubsetRegressor(k=3, ridge=1e-3, solver="exact").fit(X, y)
    assert np.flatnonzero(model.support_).tolist() == [1, 4, 7]
    residual = y - X @ model.coef_ - model.intercept_
    objective = residual @ residual / 80 + 0.5e-3 * model.coef_ @ model.coef_
    assert model.objective_ == pytest.approx(objective, rel=1e-9)
    assert model.bound_ <= model.objective_ and 0 <= model.gap_ <= 1e-6
    assert model.result_.status == "optimal"
    assert (model.coef_[~model.support_] == 0).all()
    assert pickle.loads(pickle.dumps(model)).predict(X) == pytest.approx(model.predict(X))
    assert clone(model).get_params() == model.get_params()


def test_more_columns_than_samples_without_a_ridge():
    rng = np.random.default_rng(1)
    X = rng.standard_normal((20, 60))
    y = 3 * X[:, 5] - 2 * X[:, 40]
    model = BestSubsetRegressor(k=2, solver="exact", standardize=True).fit(X, y)
    assert np.flatnonzero(model.support_).tolist() == [5, 40] and model.score(X, y) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"singular; it has rank 19, and 30 weights are kept"):
        BestSubsetRegressor(k=30).fit(X, y)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 10}, "`k` must be a whole number from 1 to 9, the number of features, got 10"),
        ({"k": 0}, "`k` must be"),
        ({"k": 2.0}, "`k` must be"),
        ({"ridge": -1}, "`ridge` must be a finite number ≥ 0"),
        ({"solver": "none"}, "none"),
        ({"solver": "search"}, "'search' minimises selection only"),
    ],
)
def test_bad_parameters_are_one_sentence(options, words, data):
    with pytest.raises(ValueError, match=words) as refusal:
        BestSubsetRegressor(**options).fit(*data)
    assert "\n" not in str(refusal.value)


def test_path_and_cross_validation(data):
    X, y = data
    path = best_subset_path(X, y, range(1, 6), 1e-3, solver="exact")
    assert path.keep.tolist() == [5, 4, 3, 2, 1]
    assert (np.diff(path.objectives) >= -1e-12).all() and (path.bounds <= path.objectives + 1e-12).all()
    assert (np.count_nonzero(path.coefficients, axis=1) == path.keep).all()
    one = BestSubsetRegressor(k=3, ridge=1e-3, solver="exact").fit(X, y)
    assert path.coefficients[2] == pytest.approx(one.coef_) and path.intercepts[2] == pytest.approx(one.intercept_)
    model = BestSubsetRegressorCV(ks=range(1, 7), ridge=1e-3, cv=4).fit(X, y)
    assert model.mse_path_.shape == (6, 4) and model.ks_.tolist() == [6, 5, 4, 3, 2, 1]
    assert {1, 4, 7} <= set(np.flatnonzero(model.support_).tolist()) and model.k_ >= 3
    search = GridSearchCV(BestSubsetRegressor(ridge=1e-3), {"k": [1, 3]}, cv=3).fit(X, y)
    assert search.best_params_ == {"k": 3}
    with pytest.raises(ValueError, match="`ks` must hold at least one"):
        BestSubsetRegressorCV(ks=[]).fit(X, y)
    with pytest.raises(ValueError, match="`ks` must be a sequence of sizes"):
        BestSubsetRegressorCV(ks=3).fit(X, y)


def test_constant_columns():
    """Nothing is lost whichever is kept."""
    y = np.arange(80.0) % 7
    fitted = BestSubsetRegressor(k=1).fit(np.ones((80, 3)), y)
    np.testing.assert_allclose(fitted.predict(np.ones((2, 3))), y.mean())
