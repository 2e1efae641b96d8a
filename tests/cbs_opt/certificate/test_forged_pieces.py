"""Forged certificates of several pieces under one budget: the joined table and what it rests on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cbs_opt import Budget, HessianBlocks, Instance
from cbs_opt import certificate as checking
from cbs_opt.certificate import verify
from cbs_opt.files.certificate_file import LEAF, NOTHING, POINT, SINGLE

KINDS = ("selection", "joint")


@pytest.fixture
def two_pieces(forging, monkeypatch):
    """Two dense blocks of three weights under one budget, none of which the check may enumerate."""
    monkeypatch.setattr(checking, "SMALL", 2)
    rng = np.random.default_rng(1)
    blocks = [G.T @ G / 3 for G in (rng.normal(size=(5, 3)) + 0.5 for _ in range(2))]
    instance = Instance(rng.normal(size=6) + 1, HessianBlocks.from_blocks(blocks), Budget(3))
    pieces = np.array([0, 0, 0, 1, 1, 1], np.int32)

    def trees(kind, entries):
        at = {0: [0, 1, 2], 1: [3, 4, 5]}
        return [(piece, count, forging.exhaustive(kind, at[piece], [count])) for piece, count in entries]

    return instance, pieces, trees


ENTRIES = [(piece, count) for piece in (0, 1) for count in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_the_joined_table(kind, forging, two_pieces):
    """Each number of a piece has a tree of its own; without it, it counts with the cheap bound."""
    instance, pieces, trees = two_pieces
    every, values = forging.ranked(instance, kind)

    def forged(entries, pruned):
        return forging.forge(instance, kind, pruned, trees(kind, entries), pieces=pieces)

    found = verify(instance, forged(ENTRIES, every[0]))
    assert found.optimal
    assert found.bound == pytest.approx(values[0], rel=1e-12)
    assert (found.pieces, found.trees) == (2, 8)
    forging.refused(instance, forged(ENTRIES, every[1]))
    forging.refused(instance, forged(ENTRIES + ENTRIES, every[1]))
    at = [int(every[0][:3].sum()), int(every[0][3:].sum())]
    for piece in (0, 1):
        left_out = [entry for entry in ENTRIES if entry != (piece, at[piece])]
        forging.refused(instance, forged(left_out, every[1]))
        forging.refused(instance, forged([entry for entry in ENTRIES if entry[0] == piece], every[1]))
    # A tree under the name of another number, or of another piece.
    honest = forged(ENTRIES, every[1])
    for at in range(8):
        for count in (0, 1, 2, 3):
            other = honest.tree_count.copy()
            other[at] = count
            forging.refused(
                instance, replace(honest, tree_count=other), "prove a bound|not open|ends before|not connected"
            )
        other = honest.tree_piece.copy()
        other[at] = 1 - other[at]
        forging.refused(instance, replace(honest, tree_piece=other), "prove a bound|not open")
    for count in (-1, 4, 100):
        other = honest.tree_count.copy()
        other[0] = count
        forging.refused(instance, replace(honest, tree_count=other), "does not fit piece 0")
    for piece in (-1, 2):
        other = honest.tree_piece.copy()
        other[0] = piece
        forging.refused(instance, replace(honest, tree_piece=other), "`tree_piece` must be in")
    single = forging.instance(2)
    pruned = forging.ranked(single, kind)[0][-1]
    forging.refused(
        single,
        forging.forge(single, kind, pruned, [(0, 2, forging.exhaustive(kind, range(4), [2]))]),
        "does not fit piece",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tree_says_of_other_numbers(kind, forging, two_pieces):
    """Diagonals that need exact sums, and frames below decisions, hold for the tree's own number only.

    The optimum prunes nothing of piece 0, which costs nothing: a bound above zero for that number is false.
    """
    instance, pieces, trees = two_pieces
    instance = replace(instance, weights=np.array([30.0, -40.0, 50.0, 1.0, -1.0, 0.5]))
    every, _ = forging.ranked(instance, kind)
    assert not every[0][:3].any()
    claimed = every[1]
    Node = forging.Node
    honest = [entry for entry in ENTRIES if entry != (0, 0)]
    found = verify(instance, forging.forge(instance, kind, every[0], trees(kind, ENTRIES), pieces=pieces))
    assert found.optimal
    if kind == "selection":
        off_sums = [1e4, -2.5e4, -2.5e4]
        root = Node(POINT, SINGLE, [], [1.0, 0.0, 0.0], off_sums)
        forged = {1: [root, *forging.exhaustive(kind, range(3), [1])]}
    else:
        forged = {
            1: [Node(NOTHING, 0), *forging.exhaustive(kind, [1, 2], [1]), Node(POINT, LEAF, [], [], [])],
            3: [Node(POINT, LEAF, [], [], [])],
        }
    for count, tree in forged.items():
        rest = [entry for entry in honest if entry != (0, count)]
        for first in (True, False):
            all_of = [(0, count, tree), *trees(kind, rest)] if first else [*trees(kind, rest), (0, count, tree)]
            forging.refused(instance, forging.forge(instance, kind, claimed, all_of, pieces=pieces))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_that_a_term_joins(kind, forging, two_pieces):
    instance, _, _ = two_pieces
    every, _ = forging.ranked(instance, kind)
    for cut in ([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]):
        forged = forging.forge(instance, kind, every[-1], [], pieces=np.array(cut, np.int32))
        forging.refused(instance, forged, "splits block")
    # Several blocks may be one piece.
    one = np.zeros(6, np.int32)
    tree = [(0, -1, forging.exhaustive(kind, range(6), [3]))]
    assert verify(instance, forging.forge(instance, kind, every[0], tree, pieces=one)).optimal
    forging.refused(instance, forging.forge(instance, kind, every[1], tree, pieces=one))


@pytest.mark.parametrize("kind", KINDS)
def test_enumerated_pieces(kind, forging):
    """Small pieces need no tree, and prove the optimum and nothing above it."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        blocks = [G.T @ G / 3 for G in (rng.normal(size=(5, 3)) + 0.5 for _ in range(2))]
        linear = rng.normal(size=6) if seed % 2 else None
        fixed = np.array([1, 0, 0, 0, 0, -1], np.int8) if seed % 3 == 2 else None
        instance = Instance(
            rng.normal(size=6), HessianBlocks.from_blocks(blocks), Budget(3), linear=linear, fixed=fixed
        )
        every, values = forging.ranked(instance, kind)
        pieces = np.array([0, 0, 0, 1, 1, 1], np.int32)
        if fixed is not None:
            pieces[fixed != 0] = -1
        found = verify(instance, forging.forge(instance, kind, every[0], [], pieces=pieces))
        assert found.bound == pytest.approx(values[0], rel=1e-12)
        forging.refused(instance, forging.forge(instance, kind, every[1], [], pieces=pieces))
