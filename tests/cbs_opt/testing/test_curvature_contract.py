"""`check_curvature` accepts the forms that come with the package and finds each method that lies."""

from __future__ import annotations

import numpy as np
import pytest

from cbs_opt import HessianBlocks
from cbs_opt.testing import ContractError, check_curvature, curvature_checks, make_problem

KINDS = ("hessian", "inverse_hessian", "gradients")
FORMS = {"one block": (1, 20, 1e-3), "blocks": (3, 20, 1e-3), "m < b": (3, 2, 0.1), "singular": (2, 2, 0.0)}


def curvatures():
    for kind in KINDS:
        for form, (blocks, m, damping) in FORMS.items():
            if damping > 0 or kind != "inverse_hessian":
                yield pytest.param(kind, blocks, m, damping, id=f"{kind}, {form}")


@pytest.mark.parametrize(("kind", "blocks", "m", "damping"), [*curvatures()])
def test_forms_of_the_package(kind, blocks, m, damping):
    given = make_problem(4, n=12, kind=kind, blocks=blocks, m=m, damping=damping)
    check_curvature(given.instance.curvature)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_blocks(kind):
    check_curvature(make_problem(4, n=12, kind=kind, shared=(0, 1, 0)).instance.curvature)


def wrong(name, lie):
    """Dense blocks, one method of which is wrong."""

    def method(self, *arguments):
        return lie(getattr(HessianBlocks, name)(self, *arguments), *arguments)

    base = make_problem(2, n=9, kind="hessian", blocks=2).instance.curvature
    return type("Wrong", (HessianBlocks,), {name: method})(base.flat, base.block_sizes)


@pytest.mark.parametrize(
    ("name", "lie", "sentence"),
    [
        ("diagonal", lambda x: 1.001 * x, "`diagonal` is wrong"),
        ("inverse_diagonal", lambda x: 1.001 * x, "`inverse_diagonal` is wrong"),
        ("inverse_block", lambda x, k: x * 1.001, "H times `inverse_block`"),
        ("columns", lambda x, k, index: x[:, ::-1], "`columns` of block"),
        ("columns", lambda x, k, index: x.T, "`columns` of block 0 is wrong"),
        ("submatrix", lambda x, k, rows, columns: -x, "`submatrix` of block"),
        ("block_matmul", lambda y, k, x: y + 0.1 * x, "`block_matmul`"),
        ("block_matmul", lambda y, k, x: np.atleast_2d(y.T).T, "of a vector must have shape"),
        ("block_quadratic", lambda y, k, x: y / 2, "`block_quadratic`"),
        ("best_update", lambda d, k, w, P, g: np.where(P, d, 0.0), "the gradient of block"),
        ("best_update", lambda d, k, w, P, g: np.where(P, 0.0, d), "on the pruned weights"),
        ("conditional_inverse_diagonal", lambda x, k, kept: x + 1, "`conditional_inverse_diagonal`"),
        ("matmul", lambda y, x: y * 1.01, "`matmul` is wrong"),
        ("block", lambda H, k: np.triu(H), "against its transpose"),
        ("block", lambda H, k: H - 10 * np.eye(len(H)), "positive semidefinite"),
        ("block", lambda H, k: H.astype(np.float32), "must be float64"),
        ("coupled", lambda c, k: ~c, "`coupled` misses"),
        ("connected_components", lambda c, k, index: np.arange(index.size), "separates weights"),
        ("diagonal_split", lambda d, stop=None: 1.5 * d, "must be semidefinite"),
        ("diagonal_split", lambda d, stop=None: -d, "must be positive, or None"),
        ("quadratic", lambda y, x: y + 1, "`quadratic`"),
        ("arrays", lambda a: {"hessian": 2 * a["hessian"]}, "from a file"),
        ("facts", lambda rows: rows[::-1], "`facts` must begin"),
    ],
)
def test_wrong_method_is_found(name, lie, sentence):
    with pytest.raises(ContractError) as failure:
        check_curvature(wrong(name, lie))
    assert sentence in str(failure.value)


def test_damping_that_does_nothing_is_found():
    class Stubborn(HessianBlocks):
        def with_damping(self, damping):
            return self

    base = make_problem(2, n=6, kind="hessian").instance.curvature
    with pytest.raises(ContractError, match="more damping must add to H"):
        check_curvature(Stubborn(base.flat, base.block_sizes))


def test_checks_have_names_of_their_own():
    checks = curvature_checks(make_problem(2, kind="hessian").instance.curvature)
    assert len({str(check) for check in checks}) == len(checks) >= 12


def test_large_blocks_are_refused():
    flat = np.eye(500).ravel()
    with pytest.raises(ContractError, match="check a smaller curvature"):
        check_curvature(HessianBlocks(flat, [500]))
