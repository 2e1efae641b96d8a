"""Certificate files: what is written is read, and what is damaged is refused in one sentence."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from cbs_opt.errors import OutputError, SolutionError
from cbs_opt.files.certificate_file import Certificate, is_certificate, read_certificate, write_certificate


@pytest.fixture
def certificate():
    """Three nodes over two weights; it need not prove anything here."""
    return Certificate(
        instance_sha256="ab" * 32,
        objective_kind="selection",
        budget=1,
        damping=1e-3,
        pruned=np.array([True, False]),
        objective=2.0,
        bound=1.5,
        pieces=np.zeros(2, np.int32),
        tree_piece=np.zeros(1, np.int32),
        tree_count=np.full(1, -1, np.int32),
        tree_nodes=np.full(1, 3, np.int64),
        branch=np.array([0, -1, -1], np.int32),
        how=np.array([17, 2, 1], np.uint8),
        fixed_counts=np.zeros(3, np.int32),
        fixings=np.zeros(0, np.int32),
        diagonals=np.array([0.5, -0.5]),
        product_counts=np.ones(1, np.int32),
        products=np.array([1, 0], np.int32),
        product_prices=np.array([0.125]),
        codes=np.array([128], np.uint8),
        numbers=np.array([0.25], np.float32),
    )


def test_round_trip(certificate, tmp_path):
    path = tmp_path / "c.npz"
    write_certificate(path, certificate)
    assert is_certificate(path)
    again = read_certificate(path)
    for field in fields(certificate):
        assert np.array_equal(getattr(certificate, field.name), getattr(again, field.name)), field.name
    first = path.read_bytes()
    write_certificate(path, again)
    assert path.read_bytes() == first


def test_version_1_has_no_products(certificate, tmp_path):
    path = tmp_path / "c.npz"
    write_certificate(path, certificate)
    first = dict.fromkeys(("product_counts", "products", "product_prices"))
    again = read_certificate(rewritten(path, version=np.array(1, np.int64), **first))
    assert again.product_counts.tolist() == [0]
    assert again.products.size == again.product_prices.size == 0
    with pytest.raises(SolutionError, match="is not a known key"):
        write_certificate(path, certificate)
        read_certificate(rewritten(path, version=np.array(1, np.int64)))


def rewritten(path, **changes):
    """The file with some members replaced, None for left out."""
    with np.load(path) as npz:
        arrays = dict(npz)
    for key, value in changes.items():
        arrays.pop(key, None)
        if value is not None:
            arrays[key] = value
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": np.array(3)}, "`version` is 3"),
        ({"format": np.array("cbs-solution")}, "`format` must be 'cbs-certificate'"),
        ({"how": None}, "`how` is missing"),
        ({"more": np.zeros(1)}, "`more` is not a known key"),
        ({"branch": np.zeros(3)}, "`branch` must be integer"),
        ({"branch": np.zeros(3, np.int64)}, "`branch` must be int32"),
        ({"how": np.zeros(2, np.uint8)}, "`how` must be as long as `branch`"),
        ({"tree_count": np.zeros(2, np.int32)}, "`tree_count` must be as long as `tree_piece`"),
        ({"pieces": np.zeros(3, np.int32)}, r"`pieces` must have shape \(2,\)"),
        ({"numbers": np.array([None])}, "pickled"),
        ({"claim": np.array("[1]")}, "`claim` must be a JSON object"),
        ({"claim": np.array('{"objective_kind": "best"}')}, "`objective_kind` must be"),
        ({"claim": np.array('{"objective_kind": "joint", "budget": 1.5}')}, "`budget` must be a whole number"),
        (
            {"claim": np.array('{"objective_kind": "joint", "budget": 1, "objective": "1"}')},
            "`objective` must be a number",
        ),
    ],
)
def test_bad_files(certificate, tmp_path, changes, sentence):
    path = tmp_path / "c.npz"
    write_certificate(path, certificate)
    with pytest.raises(SolutionError, match=sentence) as refusal:
        read_certificate(rewritten(path, **changes))
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_flipped_bit_of_the_data_is_seen(certificate, tmp_path):
    """The checksums of the archive cover the arrays, whatever the checker would say."""
    path = tmp_path / "c.npz"
    write_certificate(path, certificate)
    whole = path.read_bytes()
    at = whole.index(certificate.numbers.tobytes())
    for bit in range(8):
        broken = bytearray(whole)
        broken[at] ^= 1 << bit
        path.write_bytes(broken)
        with pytest.raises(SolutionError, match="`numbers` is damaged"):
            read_certificate(path)


def test_writing_where_nothing_can_be(certificate, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_certificate(tmp_path / "no" / "c.npz", certificate)
