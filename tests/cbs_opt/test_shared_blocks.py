"""Blocks that share a stored Hessian, against the same blocks as copies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt import (
    GradientFactor,
    HessianBlocks,
    InstanceError,
    SharedBlocks,
    evaluate,
    read_instance,
    write_instance,
)
from cbs_opt.files.instance_file import instance_arrays

KINDS = ("hessian", "inverse_hessian", "gradients")


def copied(case):
    """The same instance with a copy of its stored block for every block."""
    curvature = case.instance.curvature
    blocks = [curvature.block(k) for k in range(curvature.number_of_blocks)]
    return HessianBlocks.from_blocks(blocks)


@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
    st.integers(2, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_everything_is_that_of_the_copies(problem, kind, shared, b, linear, seed):
    shared = np.unique(shared, return_inverse=True)[1].tolist()
    case = problem(seed, kind=kind, shared=shared, n=b * len(shared), linear=linear, damping=0.05)
    ours, theirs = case.instance.curvature, copied(case)
    rng = np.random.default_rng(seed)
    x, pruned = rng.standard_normal(ours.n), rng.random(ours.n) < 0.5
    close = {"rel": 1e-9, "abs": 1e-11 * np.abs(case.H).max()}
    assert ours.matmul(x) == pytest.approx(theirs.matmul(x), **close)
    assert ours.quadratic(x) == pytest.approx(theirs.quadratic(x), rel=1e-10)
    assert ours.diagonal() == pytest.approx(theirs.diagonal(), rel=1e-12)
    assert ours.inverse_diagonal() == pytest.approx(theirs.inverse_diagonal(), rel=1e-8)
    g = case.instance.linear
    expected = theirs.best_weights(case.w, pruned, g)
    assert ours.best_weights(case.w, pruned, g) == pytest.approx(expected, rel=1e-7, abs=1e-9)
    for k in range(ours.number_of_blocks):
        index = np.arange(b)
        assert ours.coupled(k).tolist() == theirs.coupled(k).tolist()
        assert ours.connected_components(k, index).tolist() == theirs.connected_components(k, index).tolist()
        kept = np.flatnonzero(rng.random(b) < 0.7)
        if kept.size:
            assert ours.conditional_inverse_diagonal(k, kept) == pytest.approx(
                theirs.conditional_inverse_diagonal(k, kept), rel=1e-7
            )
    split = ours.diagonal_split()
    assert split is not None
    assert (np.linalg.eigvalsh(case.H - np.diag(split)) > -1e-10 * np.abs(case.H).max()).all()


@pytest.mark.parametrize("rows", [5, 200])
def test_many_small_rows_are_updated_in_batches(rows, problem, monkeypatch):
    from cbs_opt.curvature import shared_blocks

    case = problem(1, kind="hessian", shared=[0] * rows, n=6 * rows)
    monkeypatch.setattr(shared_blocks, "_BATCH_LARGEST", 6 if rows == 200 else 96)
    monkeypatch.setattr(shared_blocks, "_BATCH_BYTES", 8 * 36 * 7)
    pruned = np.random.default_rng(0).random(6 * rows) < 0.5
    expected = copied(case).best_weights(case.w, pruned, None)
    assert case.instance.curvature.best_weights(case.w, pruned, None) == pytest.approx(expected, rel=1e-8)


def test_the_rows_of_a_stored_block_are_updated_together(problem, monkeypatch):
    """The update reads a stored block a few times, not once for each of its rows."""
    case = problem(3, kind="hessian", shared=[0] * 40, n=40 * 5)
    monkeypatch.setattr("cbs_opt.curvature.shared_blocks._BATCH_LARGEST", 4)
    reads, plain = [], HessianBlocks.block
    monkeypatch.setattr(HessianBlocks, "block", lambda self, k: reads.append(k) or plain(self, k))
    pruned = np.tile([True, True, False, True, False], 40)
    weights = case.instance.curvature.best_weights(case.w, pruned, None)
    assert len(reads) <= 4
    assert weights == pytest.approx(copied(case).best_weights(case.w, pruned, None), rel=1e-8)


def test_an_update_in_rows_that_is_stopped_keeps_what_it_has(problem, monkeypatch):
    case = problem(4, kind="hessian", shared=[0] * 6, n=6 * 8)
    curvature = case.instance.curvature
    pruned = np.random.default_rng(0).random(48) < 0.6
    best, asked = curvature.best_weights(case.w, pruned, None), []
    start = (1.5 * best).astype(np.float32)

    def third():
        asked.append(0)
        return len(asked) > 2

    _, complete = curvature.improved_weights(case.w, pruned, None, start, third)
    assert complete and not asked  # it takes too little time to be asked
    monkeypatch.setattr("cbs_opt.curvature.row_updates._UNASKED", 0)
    weights, complete = curvature.improved_weights(case.w, pruned, None, start, third)
    assert not complete and weights.dtype == np.float64
    assert weights[:16] == pytest.approx(best[:16]) and weights[16:] == pytest.approx(start[16:])
    again, complete = curvature.improved_weights(case.w, pruned, None, start)
    assert complete and again == pytest.approx(best, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_keeps_the_stored_blocks_only(kind, problem, tmp_path):
    case = problem(2, kind=kind, shared=(1, 0, 1, 1), n=12)
    write_instance(tmp_path / "i.npz", case.instance)
    back = read_instance(tmp_path / "i.npz")
    assert isinstance(back.curvature, SharedBlocks)
    assert back.curvature.shared.tolist() == [1, 0, 1, 1]
    assert back.curvature.block_scale.tolist() == case.instance.curvature.block_scale.tolist()
    arrays = instance_arrays(back)
    assert int(arrays["version"]) == 2
    assert arrays[kind].size == (6 * 5 if kind == "gradients" else 18)  # two stored blocks of three weights
    pruned = np.arange(12) % 2 == 0
    assert evaluate(back, pruned).joint_loss == evaluate(case.instance, pruned).joint_loss


def test_scales_of_one_are_not_written():
    curvature = SharedBlocks(HessianBlocks.from_blocks([np.eye(2)]), [0, 0])
    assert set(curvature.arrays()) == {"hessian", "shared"}


def test_another_damping_reaches_the_stored_gradients(problem):
    case = problem(3, kind="gradients", shared=(0, 0), n=8)
    curvature = case.instance.curvature
    other = curvature.with_damping(0.5)
    assert other.damping == 0.5
    shift = curvature.block_scale[0] * (0.5 - curvature.damping)
    assert other.block(0) == pytest.approx(curvature.block(0) + shift * np.eye(4))


@pytest.mark.parametrize(
    ("shared", "scale", "sentence"),
    [
        ([0, 2], None, "from 0 to 1"),
        ([0, -1], None, "from 0 to 1"),
        ([0, 0], None, "no block uses the stored block 1"),
        ([0.0, 1.0], None, "array of integers"),
        ([], None, "array of integers"),
        ([0, 1], [1.0], "must be float of length 2"),
        ([0, 1], [1, 2], "must be float"),
        ([0, 1], [1.0, 0.0], "from 1e-100 to 1e"),
        ([0, 1], [1.0, np.inf], "from 1e-100 to 1e"),
        ([0, 1], [1.0, np.nan], "from 1e-100 to 1e"),
        ([0, 1], [1.0, 1e300], "got 1 to 1e"),
    ],
)
def test_what_does_not_fit_is_refused(shared, scale, sentence):
    stored = HessianBlocks.from_blocks([np.eye(2), np.eye(3)])
    with pytest.raises(InstanceError, match=sentence):
        SharedBlocks(stored, np.array(shared), None if scale is None else np.array(scale))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shared": np.array([0, 1, 2])}, "`shared` must have shape"),
        ({"shared": np.array([0, 0])}, "`hessian` must have shape|must have shape"),
        ({"shared": np.array([0, 5])}, "`shared` must hold numbers below 2"),
        ({"shared": np.array([1, 1])}, "no block uses the stored block 0"),
        ({"shared": np.array([0, 0]), "block_sizes": np.array([1, 3])}, "must have the same size"),
        ({"shared": np.array([0, 2**63], np.uint64)}, "`shared` must hold numbers below 2"),
        ({"block_scale": np.array([1.0, -1.0])}, "from 1e-100 to 1e"),
        ({"version": np.array(1)}, "`block_scale` needs `version` 2"),
    ],
)
def test_damaged_files_are_refused_in_a_sentence(changes, sentence, problem, tmp_path):
    arrays = instance_arrays(problem(2, kind="hessian", shared=(0, 1), n=4).instance) | changes
    np.savez(tmp_path / "i.npz", **arrays)
    with pytest.raises(InstanceError, match=sentence) as refused:
        read_instance(tmp_path / "i.npz")
    assert str(refused.value).startswith(str(tmp_path / "i.npz"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64, np.int16])
def test_indices_of_any_integer_type_are_read(dtype, problem, tmp_path):
    arrays = instance_arrays(problem(2, kind="hessian", shared=(0, 1, 0), n=6).instance)
    np.savez(tmp_path / "i.npz", **arrays | {"shared": arrays["shared"].astype(dtype)})
    assert read_instance(tmp_path / "i.npz").curvature.shared.tolist() == [0, 1, 0]


def test_scales_without_sharing_are_refused(problem, tmp_path):
    arrays = instance_arrays(problem(2, kind="hessian", shared=(0, 1), n=4).instance)
    del arrays["shared"]
    np.savez(tmp_path / "i.npz", **arrays)
    with pytest.raises(InstanceError, match="`block_scale` is allowed only with `shared`"):
        read_instance(tmp_path / "i.npz")


def test_a_layer_takes_the_memory_of_one_row():
    rng = np.random.default_rng(0)
    factor = GradientFactor(rng.standard_normal((8, 40)), 0.1)
    curvature = SharedBlocks(factor, np.zeros(1000, dtype=np.int64))
    x = rng.standard_normal(40_000)
    expected = x.reshape(1000, 40) @ factor.block(0)
    assert curvature.matmul(x).reshape(1000, 40) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert sum(array.nbytes for array in curvature.arrays().values()) < 16_000
