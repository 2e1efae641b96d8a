"""A damaged file is refused in one sentence or reads to the same content; nothing else can happen."""

from __future__ import annotations

import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt import InstanceError, SolutionError, read_instance, read_solution, write_instance
from cbs_opt.cli.solve import main
from cbs_opt.files import npz


@pytest.fixture(scope="module")
def originals(problem, tmp_path_factory):
    """Bytes of valid files: written by us, and compressed as NumPy does."""
    folder = tmp_path_factory.mktemp("corruption")
    ours = folder / "ours.npz"
    write_instance(ours, problem(1, n=4, m=2, groups="layers", linear=True, fixed=True).instance)
    files = {"ours": ours.read_bytes()}
    with zipfile.ZipFile(ours) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / "deflate", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return files | {"deflate": (folder / "deflate").read_bytes()}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "file.npz"


def content(instance):
    """Everything that an instance says, in comparable form."""
    curvature, budget = instance.curvature, instance.budget
    numbers = curvature.gradients if curvature.kind == "gradients" else curvature.flat
    arrays = (instance.weights, numbers, curvature.block_sizes, budget.groups, budget.group_budgets)
    return (
        curvature.kind,
        getattr(curvature, "damping", None),
        budget.total,
        dict(instance.metadata),
        *(None if a is None else (a.shape, a.tobytes()) for a in (*arrays, instance.linear, instance.fixed)),
    )


def outcome(path, data):
    """The content of damaged data, or None where it is refused as it should be."""
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return content(read_instance(path))
        except InstanceError as refusal:
            sentence = str(refusal)
            assert sentence.startswith(f"{path}: ")
            assert "\n" not in sentence
            assert len(sentence) < 500
            return None


def flips(data, seed, every=1):
    """Bytes in turn, each changed to a random other value."""
    rng = np.random.default_rng(seed)
    changes = rng.integers(1, 256, len(data))
    for position in range(seed % every, len(data), every):
        damaged = bytearray(data)
        damaged[position] ^= int(changes[position])
        yield position, bytes(damaged)


@pytest.mark.parametrize("name", ["ours", "deflate"])
def test_bytes_changed(name, originals, scratch):
    data = originals[name]
    expected = outcome(scratch, data)
    assert expected is not None
    refused = 0
    tried = 0
    for position, damaged in flips(data, 5, every=4 if name == "ours" else 3):
        tried += 1
        found = outcome(scratch, damaged)
        assert found is None or found == expected, f"byte {position} changed the content"
        refused += found is None
    assert refused > tried // 4  # most of a file is data, headers and checksums; padding is not checked


def test_bytes_changed_when_memory_mapped(originals, scratch, monkeypatch):
    monkeypatch.setattr(npz, "MAP_BYTES", 1)
    data = originals["ours"]
    expected = outcome(scratch, data)
    for position, damaged in flips(data, 6, every=5):
        found = outcome(scratch, damaged)
        assert found is None or found == expected, f"byte {position} changed the content"


def test_data_that_only_the_checksum_guards_when_memory_mapped(problem, tmp_path, monkeypatch):
    # Longer than what zipfile reads ahead with the header: the mapped data must be checked by itself.
    write_instance(tmp_path / "large.npz", problem(1, n=40, m=60).instance)
    data = (tmp_path / "large.npz").read_bytes()
    monkeypatch.setattr(npz, "MAP_BYTES", 1)
    assert outcome(tmp_path / "same.npz", data) is not None
    start = data.index(b"gradients.npy")
    for position in range(start + 8_000, start + 19_000, 1_000):
        damaged = bytearray(data)
        damaged[position] ^= 1
        assert outcome(tmp_path / "damaged.npz", bytes(damaged)) is None


@pytest.mark.parametrize("name", ["ours", "deflate"])
def test_truncations(name, originals, scratch):
    data = originals[name]
    for length in range(0, len(data), 23):
        assert outcome(scratch, data[:length]) is None, f"a file of {length} bytes was accepted"


@settings(max_examples=250)
@given(st.data())
def test_many_kinds_of_damage(originals, scratch, data):
    original = originals[data.draw(st.sampled_from(sorted(originals)))]
    damaged = bytearray(original)
    places = st.integers(0, len(original))
    for _ in range(data.draw(st.integers(1, 4))):
        start, stop = sorted((data.draw(places), data.draw(places)))
        other = data.draw(places)
        match data.draw(st.sampled_from(["cut", "zero", "ones", "insert", "copy", "double", "bits", "append"])):
            case "cut":
                del damaged[start:stop]
            case "zero":
                damaged[start:stop] = bytes(len(damaged[start:stop]))
            case "ones":
                damaged[start : start + 8] = b"\xff" * len(damaged[start : start + 8])
            case "insert":
                damaged[start:start] = data.draw(st.binary(max_size=30))
            case "copy":
                damaged[start:stop] = original[other : other + stop - start]
            case "double":
                damaged += original[start:stop]
            case "bits":
                for position in data.draw(st.lists(st.integers(0, max(len(damaged) - 1, 0)), max_size=8)):
                    if position < len(damaged):
                        damaged[position] ^= 1 << (other % 8)
            case "append":
                damaged += data.draw(st.binary(max_size=100))
    found = outcome(scratch, bytes(damaged))
    assert found is None or found == outcome(scratch, original)


def members_of(data, scratch):
    scratch.write_bytes(data)
    with np.load(scratch) as file:
        return {key: file[key] for key in file.files}


ARRAYS = st.sampled_from(
    [
        np.array(np.nan),
        np.array(-1),
        np.array(2**62),
        np.array(2**64 - 1, dtype=np.uint64),
        np.array("x"),
        np.array(b"x"),
        np.array([]),
        np.array([None, 1], dtype=object),
        np.array({"a": 1}, dtype=object),
        np.zeros((2, 2)),
        np.full(4, np.inf),
        np.full(4, -(2**63)),
        np.full(4, 2**63, dtype=np.uint64),
        np.ones(4, dtype=bool),
        np.ones(4, dtype=np.complex64),
        np.ones(4, dtype=np.longdouble),
        np.array(["1", "2", "3", "4"]),
        np.zeros(4, dtype="datetime64[s]"),
        np.zeros(4, dtype="V8"),
        np.zeros(4, dtype=[("a", "f8"), ("b", "O")]),
        np.zeros((0, 4)),
        np.zeros((4, 0)),
        np.full((2, 4), 1e308),
        np.full(4, 5e-324),
        np.full(4, -1e308),
    ]
)


@settings(max_examples=150)
@given(st.data())
def test_members_replaced_leave_a_sentence_or_a_sound_result(originals, scratch, capsys_free, data):
    arrays = members_of(originals["ours"], scratch)
    changed = data.draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=2, unique=True))
    for key in changed:
        match data.draw(st.sampled_from(["replace", "drop", "shape", "dtype", "spoil"])):
            case "replace":
                arrays[key] = data.draw(ARRAYS)
            case "drop":
                del arrays[key]
            case "shape":
                arrays[key] = np.repeat(np.atleast_1d(arrays[key]), data.draw(st.integers(0, 3)), axis=0)
            case "dtype" if arrays[key].dtype.kind in "fiu":
                kind = data.draw(st.sampled_from(["f2", ">f8", "i1", "u8", "c16", "?"]))
                with np.errstate(all="ignore"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    arrays[key] = arrays[key].astype(kind)
            case "spoil" if arrays[key].dtype.kind == "f":
                arrays[key] = arrays[key] * data.draw(st.sampled_from([np.nan, np.inf, 1e200, -1.0, 0.0]))
    with np.errstate(all="ignore"):
        np.savez(scratch, **arrays)
    code, out, err = capsys_free(["--solver", "magnitude", "-q", str(scratch)])
    assert "Traceback" not in err
    assert "unexpected" not in err
    assert code in (0, 3, 4)
    if code:
        assert out == ""
        assert err.startswith("cbs-solve: ")
        assert err.count("\n") == 1
    else:
        instance = read_instance(scratch)
        assert f"pruned          {instance.budget.total} of {instance.n} weights" in out
        assert "nan" not in out
        assert "inf" not in out


@pytest.fixture(scope="module")
def capsys_free():
    """Run `main` and catch what it prints; of module scope, as hypothesis asks."""
    import contextlib
    import io

    def call(arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")
            code = main(arguments)
        return code, out.getvalue(), err.getvalue()

    return call


def test_solutions_are_read_with_the_same_care(repository, tmp_path):
    data = (repository / "tests" / "data" / "v1" / "solution.npz").read_bytes()
    path = tmp_path / "s.npz"

    def found(damaged):
        path.write_bytes(damaged)
        try:
            solution = read_solution(path)
        except SolutionError as refusal:
            assert str(refusal).startswith(f"{path}: ")
            assert "\n" not in str(refusal)
            return None
        return (
            solution.pruned.tobytes(),
            solution.weights.tobytes(),
            solution.instance_sha256,
            dict(solution.result),
        )

    expected = found(data)
    for position, damaged in flips(data, 7, every=3):
        assert found(damaged) in (None, expected), f"byte {position} changed the content"
