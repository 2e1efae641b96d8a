from __future__ import annotations

import errno
import hashlib
import mmap
import zipfile

import numpy as np
import pytest

from cbs_opt import (
    Instance,
    InstanceError,
    Solution,
    SolutionError,
    evaluate,
    read_instance,
    read_solution,
    write_instance,
    write_solution,
)
from cbs_opt.files import npz

CASES = {
    "hessian": {"kind": "hessian", "blocks": 2},
    "inverse hessian": {"kind": "inverse_hessian", "blocks": 3, "groups": "layers", "n": 9},
    "gradients": {"kind": "gradients", "linear": True, "fixed": True, "dtype": np.float32},
    "one weight": {"kind": "gradients", "n": 1, "budget": 0},
}
METADATA = {"network": "ä ½ ᵀ", "tensors": [{"name": "fc", "shape": [2, 4], "offset": 0}], "damping": 1e-5}


@pytest.fixture(params=CASES)
def instance(request, problem, with_instance):
    return with_instance(problem(1, **CASES[request.param]), metadata=METADATA).instance


def assert_same(a: Instance, b: Instance):
    assert np.array_equal(a.weights, b.weights)
    assert a.curvature.kind == b.curvature.kind
    assert np.array_equal(a.curvature.block_sizes, b.curvature.block_sizes)
    if a.curvature.kind == "gradients":
        assert np.array_equal(a.curvature.gradients, b.curvature.gradients)
        assert a.curvature.gradients.dtype == b.curvature.gradients.dtype
        assert a.curvature.damping == b.curvature.damping
    else:
        assert np.array_equal(a.curvature.flat, b.curvature.flat)
        assert a.curvature.flat.dtype == b.curvature.flat.dtype
    assert a.budget.total == b.budget.total
    for x, y in (
        (a.budget.groups, b.budget.groups),
        (a.budget.group_budgets, b.budget.group_budgets),
        (a.linear, b.linear),
        (a.fixed, b.fixed),
    ):
        assert (x is None) == (y is None)
        assert x is None or (np.array_equal(x, y) and x.dtype == y.dtype)
    assert dict(a.metadata) == dict(b.metadata)


def test_instance_comes_back(instance, tmp_path):
    path = tmp_path / "a.npz"
    write_instance(path, instance)
    back = read_instance(path)
    assert_same(instance, back)
    assert back.path == path
    assert back.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_same_instance_same_bytes(instance, tmp_path):
    write_instance(tmp_path / "a.npz", instance)
    write_instance(tmp_path / "b.npz", read_instance(tmp_path / "a.npz"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_numpy_reads_what_we_write_and_members_are_aligned(instance, tmp_path):
    path = tmp_path / "a.npz"
    write_instance(path, instance)
    with np.load(path, allow_pickle=False) as file:
        assert str(file["format"]) == "cbs-instance"
        assert int(file["version"]) == 1
        assert np.array_equal(file["weights"], instance.weights)
        assert int(file["budget"]) == instance.budget.total
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        data = path.read_bytes()
        for info in archive.infolist():
            start = data.index(b"\x93NUMPY", info.header_offset)
            assert start % 64 == 0, info.filename
            assert info.compress_type == zipfile.ZIP_STORED


def owner(array):
    """What holds the memory of an array in the end."""
    while getattr(array, "base", None) is not None:
        array = array.base
    return array


def test_compressed_arrays_are_mapped_from_a_temporary_file(instance, tmp_path, monkeypatch):
    path, packed = tmp_path / "i.npz", tmp_path / "packed.npz"
    write_instance(path, instance)
    with np.load(path) as arrays:
        np.savez_compressed(packed, **arrays)
    monkeypatch.setattr(npz, "SPILL_BYTES", 1)
    found = read_instance(packed)
    assert_same(read_instance(path), found)
    large = found.curvature.gradients if found.curvature.kind == "gradients" else found.curvature.flat
    while not isinstance(large, np.memmap):
        large = large.base
    damaged = bytearray(packed.read_bytes())
    at = damaged.index(b"weights.npy") + 60
    damaged[at : at + 8] = bytes(8)
    packed.write_bytes(damaged)
    with pytest.raises(InstanceError, match="is damaged"):
        read_instance(packed)


def test_an_address_space_that_is_too_small_is_no_damage(instance, tmp_path, monkeypatch):
    path = tmp_path / "i.npz"
    write_instance(path, instance)

    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(npz, "MAP_BYTES", 1)
    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(InstanceError, match=r"i.npz: does not fit into memory, or into what `ulimit -v` leaves"):
        read_instance(path)


def test_memory_mapped_equals_in_memory(instance, tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    write_instance(path, instance)
    in_memory = read_instance(path)
    monkeypatch.setattr(npz, "MAP_BYTES", 1)
    mapped = read_instance(path)
    assert_same(in_memory, mapped)
    large = mapped.curvature.gradients if mapped.curvature.kind == "gradients" else mapped.curvature.flat
    assert isinstance(owner(large), mmap.mmap)
    assert not isinstance(owner(in_memory.weights), mmap.mmap)
    assert not large.flags.writeable
    pruned = np.arange(instance.n) % 2 == 0
    assert evaluate(mapped, pruned).selection_loss == evaluate(in_memory, pruned).selection_loss
    assert evaluate(mapped, pruned).joint_loss == evaluate(in_memory, pruned).joint_loss


def test_compressed_and_fortran_ordered_members_are_read(problem, tmp_path, monkeypatch):
    case = problem(2, n=6, m=5)
    given = case.instance
    for name, save in (("plain", np.savez), ("compressed", np.savez_compressed)):
        path = tmp_path / f"{name}.npz"
        save(
            path,
            format="cbs-instance",
            version=1,
            weights=given.weights,
            block_sizes=np.array([6], dtype=np.uint16),
            gradients=np.asfortranarray(given.curvature.gradients),
            damping=given.curvature.damping,
            budget=np.uint8(3),
            metadata="{}",
        )
        for limit in (npz.MAP_BYTES, 1):
            monkeypatch.setattr(npz, "MAP_BYTES", limit)
            assert_same(read_instance(path), given)


@pytest.mark.parametrize("with_weights", [True, False])
def test_solution_comes_back(problem, tmp_path, with_weights):
    write_instance(tmp_path / "i.npz", problem(1).instance)
    instance = read_instance(tmp_path / "i.npz")
    pruned = np.arange(8) < 4
    weights = evaluate(instance, pruned).weights if with_weights else None
    result = {"objective": 1e-300, "bound": None, "text": "½", "history": [[0.1, 1, 2.0, None]]}
    written = Solution(pruned, instance.sha256, weights, result)
    write_solution(tmp_path / "s.npz", written)
    back = read_solution(tmp_path / "s.npz", instance)
    assert np.array_equal(back.pruned, pruned)
    assert back.pruned.dtype == np.bool_
    assert back.instance_sha256 == instance.sha256
    assert dict(back.result) == result
    assert back.weights is None if weights is None else np.array_equal(back.weights, weights)
    write_solution(tmp_path / "t.npz", written)
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "t.npz").read_bytes()


def test_solution_of_another_instance_is_refused(problem, tmp_path):
    write_instance(tmp_path / "i.npz", problem(1).instance)
    write_instance(tmp_path / "j.npz", problem(2).instance)
    write_instance(tmp_path / "k.npz", problem(2, n=9).instance)
    i, j, k = (read_instance(tmp_path / f"{name}.npz") for name in "ijk")
    pruned = np.arange(8) < 4
    write_solution(tmp_path / "s.npz", Solution(pruned, i.sha256))
    with pytest.raises(SolutionError, match="belongs to another instance"):
        read_solution(tmp_path / "s.npz", j)
    with pytest.raises(SolutionError, match=r"`pruned` must have shape \(9,\)"):
        read_solution(tmp_path / "s.npz", k)
    write_solution(tmp_path / "anonymous.npz", Solution(pruned))
    assert read_solution(tmp_path / "anonymous.npz", j).pruned.sum() == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, {1, 2}, b"bytes"])
def test_what_json_cannot_hold_is_refused_and_nothing_written(problem, with_instance, tmp_path, value):
    case = with_instance(problem(1), metadata={"x": value})
    with pytest.raises(InstanceError, match="`metadata`"):
        write_instance(tmp_path / "i.npz", case.instance)
    with pytest.raises(SolutionError, match="`result`"):
        write_solution(tmp_path / "s.npz", Solution(np.ones(3, dtype=bool), result={"x": value}))
    assert list(tmp_path.iterdir()) == []


def test_many_weights_of_single_precision_take_four_bytes_each(problem, tmp_path, monkeypatch):
    monkeypatch.setattr("cbs_opt.files.instance_file._MANY_WEIGHTS", 4)
    instance = problem(3, n=8).instance
    single = Instance(instance.weights.astype(np.float32), instance.curvature, instance.budget)
    for name, given, kind in (("double", instance, np.float64), ("single", single, np.float32)):
        write_instance(tmp_path / f"{name}.npz", given)
        with np.load(tmp_path / f"{name}.npz") as file:
            assert file["weights"].dtype == kind
        np.testing.assert_array_equal(read_instance(tmp_path / f"{name}.npz").weights, given.weights)
    huge = Instance(instance.weights * 1e300, instance.curvature, instance.budget)
    write_instance(tmp_path / "huge.npz", huge)
    np.testing.assert_array_equal(read_instance(tmp_path / "huge.npz").weights, huge.weights)
