"""The three forms of the Hessian against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest

from cbs_opt import GradientFactor, HessianBlocks, InstanceError, InverseHessianBlocks, UsageError
from cbs_opt.curvature import flat
from cbs_opt.selection import SelectionObjective

KINDS = ("hessian", "inverse_hessian", "gradients")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


FORMS = {
    "one block": {"m": 20},
    "blocks": {"blocks": 3, "m": 20},
    "m < b": {"blocks": 3, "m": 2, "damping": 0.1},
    "shared": {"shared": (0, 1, 0), "m": 20},
    "shared, next to each other": {"shared": (0, 0, 1), "m": 2, "damping": 0.1},
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def given(request, kind, problem):
    return problem(4, n=12, kind=kind, **request.param)


def test_matrix_of_every_route(given):
    curvature, H = given.instance.curvature, given.H
    inverse = np.linalg.inv(H)
    close = {"rel": 1e-8, "abs": 1e-10 * np.abs(H).max()}
    assert curvature.diagonal() == pytest.approx(H.diagonal(), **close)
    assert curvature.inverse_diagonal() == pytest.approx(inverse.diagonal(), rel=1e-8)
    x = np.random.default_rng(0).standard_normal((12, 3))
    assert curvature.matmul(x) == pytest.approx(H @ x, **close)
    assert curvature.matmul(x[:, 0]) == pytest.approx(H @ x[:, 0], **close)
    for k in range(curvature.number_of_blocks):
        part = curvature.block_slice(k)
        here = H[part, part]
        b = here.shape[0]
        index, rows = np.arange(b)[::-2].copy(), np.arange(b)[: b // 2 + 1]
        assert curvature.block(k) == pytest.approx(here, **close)
        assert curvature.inverse_block(k) == pytest.approx(inverse[part, part], rel=1e-8, abs=1e-8)
        assert curvature.columns(k, index) == pytest.approx(here[:, index], **close)
        assert curvature.submatrix(k, rows, index) == pytest.approx(here[np.ix_(rows, index)], **close)
        assert curvature.block_quadratic(k, x[part, 0]) == pytest.approx(x[part, 0] @ here @ x[part, 0])


def test_selection_problem_is_q_and_c(problem):
    for kind in KINDS:
        given = problem(5, n=9, kind=kind, blocks=2, linear=True)
        view = SelectionObjective(given.instance)
        Q, c = given.w[:, None] * given.H * given.w, -given.g * given.w
        x = np.random.default_rng(1).random(9)
        assert view.c == pytest.approx(c)
        assert view.diagonal == pytest.approx(Q.diagonal())
        assert view.gradient(x) == pytest.approx(Q @ x + c)
        pruned = x > 0.5
        assert view.value(pruned) == pytest.approx(0.5 * Q[np.ix_(pruned, pruned)].sum() + c[pruned].sum())
        for k in range(2):
            part = given.instance.curvature.block_slice(k)
            assert view.block(k) == pytest.approx(Q[part, part])
            assert view.columns(k, np.array([1, 0])) == pytest.approx(Q[part, part][:, [1, 0]])


def test_gradients_in_pieces_equal_gradients_at_once(problem, monkeypatch):
    from cbs_opt.curvature import gradient_factor

    whole = problem(6, n=30, m=7, blocks=3, dtype=np.float32, linear=True)
    monkeypatch.setattr(gradient_factor, "_COPY_BYTES", 0)
    monkeypatch.setattr(gradient_factor, "_CHUNK_BYTES", 8 * 7 * 2)
    pieces = problem(6, n=30, m=7, blocks=3, dtype=np.float32, linear=True)
    assert len(list(pieces.instance.curvature.pieces(0, 30))) == 15
    pruned = np.arange(30) % 4 != 0
    for a, b in ((whole, pieces), (pieces, whole)):
        assert a.instance.curvature.diagonal() == pytest.approx(b.H.diagonal(), rel=1e-12)
    x = np.linspace(-1, 1, 30)
    assert pieces.instance.curvature.matmul(x) == pytest.approx(whole.instance.curvature.matmul(x), rel=1e-12)
    from cbs_opt import evaluate

    first, second = evaluate(whole.instance, pruned), evaluate(pieces.instance, pruned)
    assert first.joint_loss == pytest.approx(second.joint_loss, rel=1e-10)
    assert first.selection_loss == pytest.approx(second.selection_loss, rel=1e-12)


def test_inverse_blocks_are_made_again_when_memory_is_short(problem, monkeypatch):
    from cbs_opt.curvature import inverse_hessian_blocks

    monkeypatch.setattr(inverse_hessian_blocks, "_CACHE_BYTES", 1)
    given = problem(7, n=12, kind="inverse_hessian", blocks=4)
    for _ in range(2):
        assert given.instance.curvature.diagonal() == pytest.approx(given.H.diagonal())
    assert len(given.instance.curvature._inverted) == 1


def test_rounding_asymmetry_is_averaged():
    A = np.array([[2.0, 1.0], [1.0 + 2e-6, 2.0]])
    curvature = HessianBlocks.from_blocks([A])
    assert np.array_equal(curvature.block(0), (A + A.T) / 2)
    assert A[1, 0] == 1.0 + 2e-6


@pytest.mark.parametrize(
    ("block", "inverse_too", "text"),
    [
        ([[1.0, 0.5], [0.4, 1.0]], True, "symmetric"),
        ([[1.0, 2.0], [2.0, 1.0]], True, "positive"),
        ([[-1.0, 0.0], [0.0, 1.0]], True, "positive"),
        ([[1.0, 0.0], [0.0, -1e-30]], True, "positive"),
        ([[0.0, 1.0], [1.0, 0.0]], True, "positive"),
        ([[np.nan, 0.0], [0.0, 1.0]], True, "NaN"),
        ([[np.inf, 0.0], [0.0, 1.0]], True, "infinite"),
        ([[1.0, 1.0], [1.0, 1.0]], False, "positive definite"),
        ([[0.0, 0.0], [0.0, 0.0]], False, "positive definite"),
    ],
)
def test_bad_blocks(block, inverse_too, text):
    good = np.eye(3)
    with pytest.raises(InstanceError, match=text) as refusal:
        InverseHessianBlocks.from_blocks([good, block])
    assert "block 1" in str(refusal.value)
    if text == "positive":
        assert HessianBlocks.from_blocks([good, block]).indefinite_blocks == (1,)
    elif inverse_too:
        with pytest.raises(InstanceError, match=text):
            HessianBlocks.from_blocks([good, block])
    else:
        HessianBlocks.from_blocks([good, block])


def test_indefinite_large_block_is_found_by_lanczos(monkeypatch):
    from cbs_opt import linalg

    monkeypatch.setattr(linalg, "_CHOLESKY_LIMIT", 10)
    A = np.diag(np.linspace(1, 2, 60))
    assert HessianBlocks.from_blocks([A]).is_convex
    A[7, 7] = -0.5
    A[7, 9] = A[9, 7] = 1.0
    assert not HessianBlocks.from_blocks([A]).is_convex
    A[7, 7] = 1.5
    A[7, 9] = A[9, 7] = 2.0  # no negative diagonal entry
    indefinite = HessianBlocks.from_blocks([A])
    assert indefinite.indefinite_blocks == (0,)
    x = np.eye(60)[7] - np.eye(60)[9]
    assert indefinite.quadratic(x) == pytest.approx(float(x @ A @ x)) and x @ A @ x < 0
    B = np.eye(60)
    B[3, 4] = B[4, 3] = 2.0
    with pytest.raises(InstanceError, match="indefinite"):
        InverseHessianBlocks.from_blocks([B])


@pytest.mark.parametrize(
    ("gradients", "damping", "sizes", "text"),
    [
        (np.ones(3), 0.0, None, "shape"),
        (np.ones((0, 3)), 0.0, None, "at least one row"),
        (np.ones((2, 3), dtype=int), 0.0, None, "float32 or float64"),
        (np.full((2, 3), np.nan), 0.0, None, "NaN"),
        (np.ones((2, 3)), -1.0, None, "damping"),
        (np.ones((2, 3)), np.nan, None, "damping"),
        (np.ones((2, 3)), 0.0, [2], "sum of `block_sizes`"),
        (np.ones((2, 3)), 0.0, [3, 0], "block_sizes"),
        (np.ones((2, 3)), 0.0, [1.5, 1.5], "block_sizes"),
    ],
)
def test_bad_gradients(gradients, damping, sizes, text):
    with pytest.raises(InstanceError, match=text):
        GradientFactor(gradients, damping, sizes)


def test_damping_changes_only_where_it_is_apart(problem):
    given = problem(8, n=6, damping=0.5)
    other = given.instance.with_damping(2.0)
    assert other.curvature.diagonal() == pytest.approx(given.H.diagonal() + 1.5)
    assert given.instance.curvature.damping == 0.5
    for kind in ("hessian", "inverse_hessian"):
        with pytest.raises(UsageError, match="damping"):
            problem(8, n=6, kind=kind).instance.with_damping(1.0)
    with pytest.raises(UsageError, match="damping"):
        given.instance.with_damping(-1.0)


@pytest.mark.parametrize("kind", ["hessian", "gradients"])
def test_singular_hessian_has_no_inverse(kind, problem):
    given = problem(9, n=6, m=2, damping=0.0, kind=kind)
    for ask in (given.instance.curvature.inverse_diagonal, lambda: given.instance.curvature.inverse_block(0)):
        with pytest.raises(InstanceError, match="singular"):
            ask()


def test_big_endian_arrays_are_taken(problem):
    given = problem(10, n=5)
    swapped = GradientFactor(given.instance.curvature.gradients.astype(">f8"), 1e-3)
    assert swapped.diagonal() == pytest.approx(given.H.diagonal())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_large_mapped_matrix_that_is_nearly_symmetric_is_copied_to_a_file(tmp_path, monkeypatch, dtype):
    rng = np.random.default_rng(0)
    A = rng.standard_normal((12, 12))
    blocks = [(A @ A.T + 1e-6 * rng.standard_normal((12, 12))).astype(dtype), np.eye(12, dtype=dtype)]
    np.concatenate([block.ravel() for block in blocks]).tofile(tmp_path / "flat")
    mapped = np.memmap(tmp_path / "flat", dtype, "r")
    expected = HessianBlocks(np.array(mapped), [12, 12])
    monkeypatch.setattr(flat, "_IN_MEMORY", 0)
    monkeypatch.setattr(flat, "_CHUNK", 7)
    found = HessianBlocks(mapped, [12, 12])
    assert isinstance(found.flat, np.memmap)
    np.testing.assert_array_equal(found.flat, expected.flat)
    np.testing.assert_array_equal(found.block(0), found.block(0).T)
    assert (tmp_path / "flat").read_bytes() == mapped.tobytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InstanceError, match=r"symmetric only up to rounding, .* No space left .* TMPDIR"):
        HessianBlocks(mapped, [12, 12])


def test_gradients_whose_squares_overflow_are_refused():
    with pytest.raises(InstanceError, match=r"entries above 1e\+150 in columns 0 … 1"):
        GradientFactor(np.array([[1.0, 1e200]]), 0.1)


def test_sentences_about_files_are_bounded_and_visible():
    sentence = str(InstanceError("a name \x1b[31m" + "x" * 10_000))
    assert len(sentence) < 2100 and "\x1b" not in sentence and r"\x1b[31m" in sentence
