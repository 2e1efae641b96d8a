"""Small files that announce large contents are refused before these are read; large ones are shown by outline."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import numpy as np
import pytest

import cbs_opt
from cbs_opt import InstanceError, read_instance, write_instance
from cbs_opt.cli import info
from cbs_opt.curvature.outline import CurvatureOutline
from cbs_opt.files import zip_limits
from cbs_opt.files.instance_file import read_outline


def npy(descr, shape, data=b""):
    out = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, fields)
    return out.getvalue() + data


def small(instance_file, tmp_path, omit, compression=zipfile.ZIP_DEFLATED):
    """An archive with the members of an instance but one."""
    path = tmp_path / "bomb.npz"
    archive = zipfile.ZipFile(path, "w", compression)
    with zipfile.ZipFile(instance_file) as source:
        for name in source.namelist():
            if name != f"{omit}.npy":
                archive.writestr(name, source.read(name))
    return path, archive


@pytest.mark.parametrize("key", ["weights", "gradients", "metadata", "group_budgets", "block_sizes"])
def test_members_that_expand_are_refused_unread(key, instance_file, tmp_path, monkeypatch):
    monkeypatch.setattr(zip_limits, "_SMALL", 1 << 20)
    size = 1 << 22  # bytes
    descr, shape = (f"<U{size // 4}", ()) if key == "metadata" else ("<f8", (size // 8,))
    path, archive = small(instance_file, tmp_path, key)
    with archive:
        archive.writestr(f"{key}.npy", npy(descr, shape, bytes(size)))
    with pytest.raises(InstanceError, match=r"bomb.npz: its compressed members would expand to 0.0 GB"):
        read_instance(path)


@pytest.mark.parametrize(
    ("packed", "expanded", "match"),
    [
        (10**9, 10**9, "is damaged: it announces 10000"),
        (2**32 - 2, None, "is damaged: it announces 42949"),  # the archive would be read to its end, and beyond
        (None, 10, "is damaged: 'weights.npy' is stored in another number of bytes than it holds"),
        (None, 10**9, "is damaged: 'weights.npy' is stored in another number of bytes than it holds"),
    ],
)
def test_sizes_that_the_file_cannot_have_are_refused(instance_file, tmp_path, packed, expanded, match):
    path, archive = small(instance_file, tmp_path, None, zipfile.ZIP_STORED)
    archive.close()
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"weights.npy"))
    for place, size in ((entry + 20, packed), (entry + 24, expanded)):
        if size is not None:
            data[place : place + 4] = struct.pack("<I", size)
    path.write_bytes(data)
    with pytest.raises(InstanceError, match=match):
        read_instance(path)


def test_headers_that_expand_are_refused_unread(instance_file, tmp_path):
    path, archive = small(instance_file, tmp_path, "linear")
    with archive, archive.open("linear.npy", "w") as member:
        member.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 20) + b" " * (1 << 20))
    with pytest.raises(InstanceError, match="`linear` is damaged: its header is longer than 10000 bytes"):
        read_instance(path)


def test_many_members_and_other_compressions_are_refused(instance_file, tmp_path):
    path, archive = small(instance_file, tmp_path, None)
    with archive:
        for k in range(300):
            archive.writestr(f"a{k}.npy", b"")
    with pytest.raises(InstanceError, match=r"holds 3\d\d members; at most 200"):
        read_instance(path)
    path, archive = small(instance_file, tmp_path, None, zipfile.ZIP_LZMA)
    archive.close()
    with pytest.raises(InstanceError, match="is compressed by method 14"):
        read_instance(path)
    path, archive = small(instance_file, tmp_path, None)
    with archive:
        archive.writestr("two\nlines.npy", b"", zipfile.ZIP_LZMA)
    with pytest.raises(InstanceError, match=r"'two\\nlines.npy' is compressed by method 14"):
        read_instance(path)


def test_counts_are_bounded_by_the_weights(instance_file, tmp_path):
    for key in ("group_budgets", "block_sizes"):
        path, archive = small(instance_file, tmp_path, key)
        with archive:
            archive.writestr(f"{key}.npy", npy("<i8", (10_000,), bytes(80_000)))
        with pytest.raises(InstanceError, match=f"`{key}` must have at most"):
            read_instance(path)


def test_dense_blocks_of_another_size_are_refused_unread(tmp_path):
    instance = cbs_opt.library("mlp-output-12")
    write_instance(tmp_path / "good.npz", instance)
    key = instance.curvature.kind
    path, archive = small(tmp_path / "good.npz", tmp_path, key)
    with archive:
        archive.writestr(f"{key}.npy", npy("<f8", (145,), bytes(145 * 8)))
    with pytest.raises(InstanceError, match=rf"`{key}` must have shape \(144,\), got \(145,\)"):
        read_instance(path)


@pytest.mark.parametrize("name", ["mlp-output-12", "mlp-hidden-rows"])
def test_an_outline_has_all_but_the_values(name):
    path = cbs_opt.files.library_path(name)
    whole, outline = read_instance(path), read_outline(path)
    assert isinstance(outline.curvature, CurvatureOutline)
    assert outline.curvature.kind == whole.curvature.kind
    assert outline.curvature.number_of_stored == whole.curvature.number_of_stored
    np.testing.assert_array_equal(outline.curvature.block_sizes, whole.curvature.block_sizes)
    np.testing.assert_array_equal(outline.weights, whole.weights)
    assert (outline.budget.total, outline.metadata) == (whole.budget.total, whole.metadata)
    with pytest.raises(cbs_opt.SolverError, match="read it with `read_instance`"):
        cbs_opt.solve(outline, "obd")


def test_large_files_are_shown_by_outline(instance_file, monkeypatch, capsys):
    monkeypatch.setattr(info, "LARGE_BYTES", 100)
    assert info.main([str(instance_file), "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert not content["verified"]
    assert info.main([str(instance_file)]) == 0
    assert "`--verify` checks them" in capsys.readouterr().out
    assert info.main([str(instance_file), "--verify", "--json", "-"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["verified"]
    assert {key: value for key, value in content.items() if key not in ("verified", "sha256")}.items() <= {
        key: value for key, value in verified.items() if key != "verified"
    }.items()
