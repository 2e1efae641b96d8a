"""Every way in which a file can be wrong: one sentence that names the file and the field."""

from __future__ import annotations

import json
import re
import zipfile

import numpy as np
import pytest

from cbs_opt import InstanceError, SolutionError, read_instance, read_solution, write_instance
from cbs_opt.cli.solve import main

REMOVE = object()


@pytest.fixture
def arrays():
    """A valid instance with every optional key."""
    rng = np.random.default_rng(0)
    return {
        "format": np.array("cbs-instance"),
        "version": np.array(1),
        "weights": rng.standard_normal(4),
        "block_sizes": np.array([3, 1]),
        "budget": np.array(2),
        "gradients": rng.standard_normal((5, 4)),
        "damping": np.array(0.1),
        "groups": np.array([0, 0, 1, 1]),
        "group_budgets": np.array([1, 1]),
        "linear": rng.standard_normal(4),
        "fixed": np.array([1, 0, 0, -1], dtype=np.int8),
        "metadata": np.array("{}"),
    }


DENSE = {"gradients": REMOVE, "damping": REMOVE}
EYES = np.concatenate([np.eye(3).ravel(), [1.0]])


def dense(index, value):
    flat = EYES.copy()
    flat[index] = value
    return flat


SIZED = {"version": np.array(2), "groups": REMOVE, "group_sizes": np.array([2, 2])}


def crossed(groups=(0, 1, 0, 1), budgets=(1, 1), **changes):
    groups = groups if groups is REMOVE else np.array(groups)
    budgets = budgets if budgets is REMOVE else np.array(budgets)
    return {"version": np.array(3), "cross_groups": groups, "cross_group_budgets": budgets} | changes


BEYOND = "`cross_groups` must be in [0, 1]"

BAD = {
    "cross groups in version 2": (crossed(version=np.array(2)), "`cross_group_budgets` needs `version` 3, got 2"),
    "cross groups alone": (crossed(budgets=REMOVE), "`cross_group_budgets` is missing"),
    "cross group budgets alone": (crossed(REMOVE), "`cross_groups` is missing"),
    "cross groups without groups": (
        crossed(groups=(0, 1, 0, 1)) | {"groups": REMOVE, "group_budgets": REMOVE},
        "`cross_groups` is allowed only with `groups`",
    ),
    "cross groups too few": (crossed((0, 1, 0)), "`cross_groups` must have shape (4,)"),
    "cross groups fractional": (crossed((0.0, 1.0, 0.0, 1.0)), "`cross_groups` must be integer"),
    "cross groups negative": (crossed((0, 1, 0, -1)), BEYOND),
    "cross groups beyond": (crossed((0, 1, 0, 2)), BEYOND),
    "cross groups huge": (crossed(np.array([0, 1, 0, 2**64 - 1], dtype=np.uint64)), BEYOND),
    "cross groups that form no tile": (crossed((0, 1, 0, 0)), "must form tiles"),
    "cross group budgets many": (crossed(budgets=(1, 1, 0, 0, 0)), "at most 4 entries"),
    "cross group budgets matrix": (crossed(budgets=((1,), (1,))), "must have shape"),
    "cross group budgets negative": (crossed(budgets=(3, -1)), "`cross_group_budgets[0]` must be in [0, 2]"),
    "cross group budgets with another sum": (crossed(budgets=(1, 0)), "must sum to `budget` = 2, got 1"),
    "cross groups that fixed weights exclude": (
        crossed(fixed=np.array([1, 0, 1, 0], dtype=np.int8)),
        "pruned in cross group 0, the budget is 1",
    ),
    "group sizes in version 1": (SIZED | {"version": np.array(1)}, "`group_sizes` needs `version` 2"),
    "group sizes and groups": ({"version": np.array(2), "group_sizes": np.array([4])}, "exclude each other"),
    "group sizes alone": (SIZED | {"group_budgets": REMOVE}, "`group_sizes` is allowed only with `group_budgets`"),
    "group sizes of zero": (SIZED | {"group_sizes": np.array([0, 4])}, "must hold numbers between 1 and 4"),
    "group sizes with another sum": (SIZED | {"group_sizes": np.array([2, 1])}, "`group_sizes` must sum to 4"),
    "a group size that does not divide": (SIZED | {"group_sizes": np.array([3])}, "one number that divides it"),
    "group sizes of many": (SIZED | {"group_sizes": np.ones(5, np.int64)}, "at most 4 entries"),
    "group sizes of other budgets": (SIZED | {"group_budgets": np.array([1, 1, 0])}, "must have 1 or 2 entries"),
    "format missing": ({"format": REMOVE}, "`format` is missing"),
    "format of a solution": ({"format": np.array("cbs-solution")}, "`format` must be 'cbs-instance'"),
    "format no text": ({"format": np.array(3)}, "`format` must be one text"),
    "version missing": ({"version": REMOVE}, "`version` is missing"),
    "version newer": ({"version": np.array(4)}, "`version` is 4"),
    "version zero": ({"version": np.array(0)}, "`version` must be at least 1"),
    "version text": ({"version": np.array("1")}, "`version` must be integer"),
    "version vector": ({"version": np.array([1])}, "`version` must have shape"),
    "weights missing": ({"weights": REMOVE}, "`weights` is missing"),
    "weights integers": ({"weights": np.arange(4)}, "`weights` must be float32 or float64"),
    "weights half": ({"weights": np.ones(4, dtype=np.float16)}, "`weights` must be float32 or float64"),
    "weights complex": ({"weights": np.ones(4, dtype=complex)}, "`weights` must be float32 or float64"),
    "weights matrix": ({"weights": np.ones((2, 2))}, "`weights` must have shape"),
    "weights empty": ({"weights": np.ones(0)}, "`weights` must hold at least one"),
    "weights NaN": ({"weights": np.array([1, np.nan, 1, 1])}, "`weights` has NaN"),
    "weights infinite": ({"weights": np.array([1, np.inf, 1, 1])}, "`weights` has NaN or infinite"),
    "weights too many": ({"weights": np.ones(5)}, "`linear` must have shape (5,)"),
    "block_sizes missing": ({"block_sizes": REMOVE}, "`block_sizes` is missing"),
    "block_sizes floats": ({"block_sizes": np.array([3.0, 1.0])}, "`block_sizes` must be integer"),
    "block_sizes sum": ({"block_sizes": np.array([3, 2])}, "`block_sizes` must sum to 4"),
    "block_sizes zero": ({"block_sizes": np.array([4, 0])}, "`block_sizes` must hold numbers between"),
    "block_sizes negative": ({"block_sizes": np.array([5, -1])}, "`block_sizes` must hold numbers between"),
    "block_sizes empty": ({"block_sizes": np.array([], dtype=int)}, "`block_sizes` must hold numbers between"),
    "block_sizes overflow": (
        {"block_sizes": np.array([2**63, 2**63, 4], dtype=np.uint64)},
        "`block_sizes` must hold numbers between",
    ),
    "no curvature": (DENSE, "exactly one of"),
    "two curvatures": ({"hessian": EYES}, "exactly one of"),
    "damping missing": ({"damping": REMOVE}, "`damping` is required with `gradients`"),
    "damping with dense": ({"gradients": REMOVE, "hessian": EYES}, "`damping` is required with `gradients`"),
    "damping negative": ({"damping": np.array(-0.1)}, "`damping` must be a finite number"),
    "damping NaN": ({"damping": np.array(np.nan)}, "`damping` must be a finite number"),
    "damping vector": ({"damping": np.array([0.1])}, "`damping` must have shape ()"),
    "gradients NaN": ({"gradients": np.full((5, 4), np.nan)}, "`gradients` has NaN"),
    "gradients without rows": ({"gradients": np.ones((0, 4))}, "`gradients` must have shape"),
    "gradients vector": ({"gradients": np.ones(20)}, "`gradients` must have shape (any, 4)"),
    "gradients transposed": ({"gradients": np.ones((4, 5))}, "`gradients` must have shape (any, 4)"),
    "hessian size": (DENSE | {"hessian": np.eye(4).ravel()}, "`hessian` must have shape (10,)"),
    "hessian matrix": (DENSE | {"hessian": np.eye(4)}, "`hessian` must have shape"),
    "hessian asymmetric": (DENSE | {"hessian": dense(1, 0.5)}, "`hessian`: block 0 must be symmetric"),
    "hessian NaN": (DENSE | {"hessian": dense(9, np.nan)}, "`hessian`: block 1 has NaN"),
    "inverse asymmetric": (
        DENSE | {"inverse_hessian": dense(1, 0.5)},
        "`inverse_hessian`: block 0 must be symmetric",
    ),
    "inverse singular": (
        DENSE | {"inverse_hessian": dense(9, 0.0)},
        "`inverse_hessian`: block 1 must be positive definite",
    ),
    "inverse infinite": (
        DENSE | {"inverse_hessian": dense(0, np.inf)},
        "`inverse_hessian`: block 0 has NaN or infinite",
    ),
    "budget missing": ({"budget": REMOVE}, "`budget` is missing"),
    "budget negative": ({"budget": np.array(-1)}, "`budget` must not be negative"),
    "budget too large": (
        {"budget": np.array(5), "groups": REMOVE, "group_budgets": REMOVE},
        "`budget` must be in [0, 4], got 5",
    ),
    "budget float": ({"budget": np.array(2.0)}, "`budget` must be integer"),
    "budget vector": ({"budget": np.array([2])}, "`budget` must have shape ()"),
    "groups alone": ({"group_budgets": REMOVE}, "`group_budgets` is missing"),
    "group_budgets alone": ({"groups": REMOVE}, "`groups` is missing"),
    "groups short": ({"groups": np.array([0, 0, 1])}, "`groups` must have shape (4,)"),
    "groups unknown": ({"groups": np.array([0, 0, 1, 2])}, "`groups` must be in [0, 1]"),
    "groups negative": ({"groups": np.array([0, 0, 1, -1])}, "`groups` must be in [0, 1]"),
    "groups floats": ({"groups": np.zeros(4)}, "`groups` must be integer"),
    "group_budgets sum": ({"group_budgets": np.array([1, 2])}, "`group_budgets` must sum to `budget` = 2"),
    "group_budgets size": ({"group_budgets": np.array([3, -1])}, "`group_budgets[0]` must be in [0, 2]"),
    "linear short": ({"linear": np.ones(3)}, "`linear` must have shape (4,)"),
    "linear NaN": ({"linear": np.array([0, 0, 0, np.nan])}, "`linear` has NaN"),
    "fixed int64": ({"fixed": np.array([1, 0, 0, -1])}, "`fixed` must be int8"),
    "fixed two": ({"fixed": np.array([2, 0, 0, 0], dtype=np.int8)}, "`fixed` must hold only"),
    "fixed -128": ({"fixed": np.array([-128, 0, 0, 0], dtype=np.int8)}, "`fixed` must hold only"),
    "fixed contradicts": (
        {"fixed": np.array([1, 1, 0, 0], dtype=np.int8)},
        "`fixed` contradicts the budget",
    ),
    "metadata missing": ({"metadata": REMOVE}, "`metadata` is missing"),
    "metadata no JSON": ({"metadata": np.array("{")}, "`metadata` must be JSON text"),
    "metadata list": ({"metadata": np.array("[]")}, "`metadata` must be a JSON object"),
    "metadata NaN": ({"metadata": np.array('{"a": NaN}')}, "`metadata` must be JSON text"),
    "metadata huge number": ({"metadata": np.array('{"a": 1e999}')}, "`metadata` must be JSON text"),
    "metadata deep": ({"metadata": np.array('{"a":' + "[" * 100_000)}, "`metadata` must be JSON text"),
    "metadata bytes": ({"metadata": np.array(b"{}")}, "`metadata` must be one text"),
    "metadata lone surrogate": ({"metadata": np.array("\ud800")}, "`metadata` is damaged"),
    "unknown key": ({"wieghts": np.ones(4)}, "`wieghts` is not a known key"),
    "pickled objects": ({"weights": np.array([1, None, {}, []], dtype=object)}, "`weights` holds pickled"),
    "structured": ({"weights": np.zeros(4, dtype=[("a", "f8")])}, "`weights` must be float32 or float64"),
}


def assert_refused(path, text, capsys):
    with pytest.raises(InstanceError) as refusal:
        read_instance(path)
    sentence = str(refusal.value)
    assert sentence.startswith(f"{path}: ")
    assert sentence.count(str(path)) == 1
    assert text in sentence
    assert "\n" not in sentence
    assert main([str(path)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert without_addresses(err) == without_addresses(f"cbs-solve: {sentence}\n")


def without_addresses(text):
    return re.sub("0x[0-9a-f]+", "0x", text)


def save(path, arrays, changes):
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not REMOVE})
    return path


def test_the_file_that_is_spoilt_below_is_good(arrays, tmp_path):
    assert read_instance(save(tmp_path / "good.npz", arrays, {})).n == 4


@pytest.mark.parametrize("case", BAD)
def test_bad_member(case, arrays, tmp_path, capsys):
    changes, text = BAD[case]
    assert_refused(save(tmp_path / "bad.npz", arrays, changes), text, capsys)


def test_not_an_archive(tmp_path, capsys):
    for name, content in (("empty.npz", b""), ("text.npz", b"weights\n1 2 3\n"), ("zip.npz", b"PK\x03\x04")):
        path = tmp_path / name
        path.write_bytes(content)
        assert_refused(path, "is not an .npz archive, or it is truncated", capsys)
    np.save(tmp_path / "array.npy", np.ones(3))
    assert_refused(tmp_path / "array.npy", "is not an .npz archive", capsys)


def test_no_such_file(tmp_path, capsys):
    assert_refused(tmp_path / "missing.npz", "no such file", capsys)
    assert_refused(tmp_path / "no" / "folder.npz", "no such file", capsys)
    assert_refused(tmp_path, "is not a file", capsys)
    assert main([str(tmp_path / ("x" * 5000))]) == 3
    assert re.search(r"x … \(\d+ characters\)\n$", capsys.readouterr().err)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.999])
def test_truncated(arrays, tmp_path, capsys, kept):
    data = save(tmp_path / "good.npz", arrays, {}).read_bytes()
    (tmp_path / "bad.npz").write_bytes(data[: int(kept * len(data))])
    assert_refused(tmp_path / "bad.npz", "is not an .npz archive, or it is truncated", capsys)


def test_empty_archive_and_foreign_members(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    assert_refused(tmp_path / "empty.npz", "`format` is missing", capsys)
    with zipfile.ZipFile(tmp_path / "docs.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert_refused(tmp_path / "docs.npz", "holds 'readme.txt', which is no array", capsys)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_twice(arrays, tmp_path, capsys):
    path = save(tmp_path / "bad.npz", arrays, {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("weights.npy", archive.read("weights.npy"))
    assert_refused(path, "holds `weights` twice", capsys)


def rewritten(path, member, data, compression=zipfile.ZIP_STORED):
    """The archive with one member replaced by raw bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members[member] = data
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def header(descr, shape, order="False", data=b""):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x09\x00\x10\x00\x00\x00" + b" " * 16,
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"\x93NUMPY\x01\x00\x04\x00None",
        b"not an array at all",
        header("'<f8'", "(4,)"),
        header("'<f8'", "(4,)", data=bytes(33)),
        header("'<f8'", "(-4,)", data=bytes(32)),
        header("'<f8'", "(10**30,)"),
        header("'<f8'", f"({10**30},)"),
        header("'<f8'", f"({2**62}, {2**62})"),
        header("'<f8'", "(4.0,)", data=bytes(32)),
        header("'<f8'", "4", data=bytes(32)),
        header("'nonsense'", "(4,)", data=bytes(32)),
        header("()", "(4,)", data=bytes(32)),
        header("[()]", "(4,)", data=bytes(32)),
        header("[('a',)]", "(4,)", data=bytes(32)),
        header("None", "(4,)", data=bytes(32)),
        header("'O'", "(4,)", data=b"cos\nsystem\n(S'true'\ntR." + bytes(16)),
        header("'<f8'", "(" + "(" * 200 + ")" * 200 + ")", data=bytes(32)),
        header("__import__('os').getcwd()", "(4,)", data=bytes(32)),
    ],
    ids=range(23),
)
def test_lying_array_headers(arrays, tmp_path, capsys, data):
    path = rewritten(save(tmp_path / "bad.npz", arrays, {}), "weights.npy", data)
    assert_refused(path, "`weights`", capsys)


def test_compressed_member_that_claims_a_terabyte(arrays, tmp_path, capsys):
    lying = header("'<f8'", f"({2**35}, 4)", data=bytes(1 << 20))
    path = rewritten(save(tmp_path / "bomb.npz", arrays, {}), "gradients.npy", lying, zipfile.ZIP_DEFLATED)
    assert_refused(path, "`gradients` is damaged: its header announces 1099511627776 bytes", capsys)


def test_directory_that_tells_the_same_lie_as_the_header(arrays, tmp_path, capsys):
    lying = header("'<f8'", f"({2**26}, 4)", data=bytes(1 << 20))
    path = rewritten(save(tmp_path / "bomb.npz", arrays, {}), "gradients.npy", lying, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"gradients.npy"))
    size = len(lying) - (1 << 20) + 2**31
    data[entry + 24 : entry + 28] = size.to_bytes(4, "little")
    path.write_bytes(data)
    assert_refused(path, "its compressed members would expand to 2.1 GB", capsys)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_damaged_compressed_member(arrays, tmp_path, capsys, method):
    path = rewritten(
        save(tmp_path / "bad.npz", arrays, {}), "budget.npy", header("'<i8'", "()", data=bytes(8)), method
    )
    if method != zipfile.ZIP_DEFLATED:  # their decompressors expand without limits
        assert_refused(path, f"is compressed by method {method}", capsys)
        return
    data = bytearray(path.read_bytes())
    start = data.index(b"weights.npy") + len(b"weights.npy")
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    assert_refused(path, "`weights` is damaged", capsys)


SOLUTION = {
    "format": np.array("cbs-solution"),
    "version": np.array(1),
    "instance_sha256": np.array(""),
    "pruned": np.array([True, False, True]),
    "weights": np.array([0.0, 1.0, 0.0]),
    "result": np.array("{}"),
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": np.array("cbs-instance")}, "`format` must be 'cbs-solution'"),
        ({"version": np.array(7)}, "`version` is 7"),
        ({"pruned": REMOVE}, "`pruned` is missing"),
        ({"pruned": np.array([1, 0, 1])}, "`pruned` must be bool"),
        ({"pruned": np.array([[True]])}, "`pruned` must have shape"),
        ({"weights": np.ones(2)}, "`weights` must have shape (3,)"),
        ({"weights": np.array([0, np.nan, 0])}, "`weights` has NaN"),
        ({"weights": np.array([0, 1, 0])}, "`weights` must be float"),
        ({"instance_sha256": REMOVE}, "`instance_sha256` is missing"),
        ({"instance_sha256": np.array(5)}, "`instance_sha256` must be one text"),
        ({"result": np.array("no")}, "`result` must be JSON text"),
        ({"result": np.array("3")}, "`result` must be a JSON object"),
        ({"result": np.array('{"objective": Infinity}')}, "`result` must be JSON text"),
        ({"extra": np.array(1)}, "`extra` is not a known key"),
    ],
)
def test_bad_solution(changes, text, tmp_path):
    path = save(tmp_path / "s.npz", SOLUTION, changes)
    with pytest.raises(SolutionError) as refusal:
        read_solution(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert text in str(refusal.value)
    assert read_solution(save(path, SOLUTION, {})).pruned.tolist() == [True, False, True]


def test_the_longest_word_of_a_file_is_not_repeated(arrays, tmp_path, capsys):
    path = save(tmp_path / "bad.npz", arrays, {"k" * 10_000: np.array(1), "format": np.array("f" * 10_000)})
    assert main([str(path)]) == 3
    assert len(capsys.readouterr().err) < 600
    path = save(tmp_path / "bad.npz", arrays, {"k" * 10_000: np.array(1)})
    assert main([str(path)]) == 3
    assert len(capsys.readouterr().err) < 600


def test_metadata_may_hold_anything_that_json_can(arrays, tmp_path):
    content = {"a": [1, 2.5, None, True, "\n\x1b[31m"], "b": {"c": -0.0}}
    path = save(tmp_path / "good.npz", arrays, {"metadata": np.array(json.dumps(content))})
    assert dict(read_instance(path).metadata) == content
    write_instance(tmp_path / "again.npz", read_instance(path))
    assert dict(read_instance(tmp_path / "again.npz").metadata) == content
