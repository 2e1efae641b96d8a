"""Forged certificates, written node by node, and losses in rational arithmetic to compare the checker with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from cbs_opt import Budget, HessianBlocks, Instance
from cbs_opt.certificate import verify
from cbs_opt.errors import SolutionError
from cbs_opt.files.certificate_file import FRAME, LEAF, NOTHING, VALUE, Certificate
from cbs_opt.losses import joint_loss, selection_loss


@dataclass
class Node:
    """A node as the file holds it: `point` is over the undecided weights, `diagonal` over the open ones.

    `products`, of a node with a diagonal: (weight, weight, multiplier).
    """

    how: int
    branch: int = LEAF
    fixings: list[tuple[int, int]] = field(default_factory=list)
    point: list[float] | None = None
    diagonal: list[float] | None = None
    products: list[tuple[int, int, float]] = field(default_factory=list)


def forge(instance, kind, pruned, trees, **claims):
    """A certificate that claims `pruned` to be optimal; trees are (piece, count, nodes in preorder)."""
    nodes = [node for _, _, tree in trees for node in tree]
    bits, numbers = [], []
    for node in nodes:
        point = np.array([] if node.point is None else node.point, float)
        number = point != 0 if kind == "joint" else (point != 0) & (point != 1)
        bits.append(number)
        if kind == "selection":
            bits.append(point == 1)
        numbers.append(point[number])
    fixings = [2 * i + value for node in nodes for i, value in node.fixings]
    diagonals = [d for node in nodes if node.diagonal is not None for d in node.diagonal]
    frames = [node for node in nodes if node.diagonal is not None]
    products = [product for node in frames for product in node.products]
    loss = (joint_loss if kind == "joint" else selection_loss)(instance, pruned)
    made = {
        "instance_sha256": "",
        "objective_kind": kind,
        "budget": instance.budget.total,
        "damping": None,
        "pruned": pruned,
        "objective": loss,
        "bound": loss,
        "pieces": np.zeros(instance.n, np.int32),
        "tree_piece": np.array([piece for piece, _, _ in trees], np.int32),
        "tree_count": np.array([count for _, count, _ in trees], np.int32),
        "tree_nodes": np.array([len(tree) for _, _, tree in trees], np.int64),
        "branch": np.array([node.branch for node in nodes], np.int32),
        "how": np.array([node.how + FRAME * (node.diagonal is not None) for node in nodes], np.uint8),
        "fixed_counts": np.array([len(node.fixings) for node in nodes], np.int32),
        "fixings": np.array(fixings, np.int32),
        "diagonals": np.array(diagonals, np.float64),
        "product_counts": np.array([len(node.products) for node in frames], np.int32),
        "products": np.array([i for product in products for i in product[:2]], np.int32),
        "product_prices": np.array([product[2] for product in products], np.float64),
        "codes": np.packbits(np.concatenate([np.zeros(0, bool), *bits])),
        "numbers": np.concatenate([np.zeros(0), *numbers]),
    }
    return Certificate(**made | claims)


def exhaustive(kind, weights, left, groups=None, without=None):
    """An honest tree in preorder that branches until one selection is left at each leaf.

    `left` weights are to be pruned in each group; the leaf of `without`, bool (n,), denies that there is one.
    Groups without a choice are settled for the checker in the joint problem, and branched on in the other.
    """
    groups = dict.fromkeys(weights, 0) if groups is None else groups

    def below(state):
        free = [[i for i in weights if groups[i] == a and i not in state] for a in range(len(left))]
        need = [left[a] - sum(state[i] for i in state if groups[i] == a) for a in range(len(left))]
        if any(not 0 <= k <= len(at) for k, at in zip(need, free, strict=True)):
            return [Node(NOTHING)]
        settled = [k in (0, len(at)) if kind == "joint" else not at for k, at in zip(need, free, strict=True)]
        if all(settled):
            ones = {i for i in weights if state.get(i, need[groups[i]] > 0)}
            denied = without is not None and ones == {i for i in weights if without[i]}
            return [Node(NOTHING if denied else VALUE)]
        i = next(at[0] for at, done in zip(free, settled, strict=True) if not done)
        return [Node(NOTHING, i), *below(state | {i: 0}), *below(state | {i: 1})]

    return below({})


def refused(instance, certificate, sentence="prove a bound"):
    """The check refuses a certificate, in one sentence that matches."""
    with pytest.raises(SolutionError, match=sentence) as refusal:
        verify(instance, certificate)
    assert "\n" not in str(refusal.value)


def dense_instance(seed=0, n=4, budget=2, linear=False, groups=None, fixed=None):
    """One dense block, well conditioned."""
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(n + 2, n)) + 0.5
    return Instance(
        rng.normal(size=n) + 1.0,
        HessianBlocks.from_blocks([G.T @ G / n]),
        Budget(budget) if groups is None else Budget(budget, *groups),
        linear=rng.normal(size=n) if linear else None,
        fixed=fixed,
    )


def selections(instance):
    """All feasible selections, bool (R, n)."""
    every = np.array(list(itertools.product([False, True], repeat=instance.n)))
    return np.array([pruned for pruned in every if instance.admits(pruned)])


def ranked(instance, kind):
    """All feasible selections, the best first, and their losses."""
    loss = joint_loss if kind == "joint" else selection_loss
    every = selections(instance)
    values = np.array([loss(instance, pruned) for pruned in every])
    order = np.argsort(values, kind="stable")
    return every[order], values[order]


def fractions(array):
    """The floats of an array as they are, in nested lists."""
    return np.vectorize(Fraction, otypes=[object])(np.asarray(array, float))


def exact_quadratic(Q, c, y):
    """½ yᵀQy + cᵀy without rounding; y may be fractional."""
    Q, c, y = fractions(Q), fractions(c), fractions(y)
    return y @ Q @ y / 2 + c @ y


def exact_joint(H, w, g, pruned):
    """min gᵀδ + ½ δᵀHδ over δ = −w on the pruned weights, without rounding."""
    H, w, g = fractions(H), fractions(w), fractions(g)
    kept, P = np.flatnonzero(~pruned), np.flatnonzero(pruned)
    delta = np.array([Fraction(0)] * w.size, object)
    delta[P] = -w[P]
    if kept.size:
        delta[kept] = exact_solve(
            H[np.ix_(kept, kept)], -(H[np.ix_(kept, P)] @ delta[P] if P.size else 0) - g[kept]
        )
    return g @ delta + delta @ H @ delta / 2


def exact_solve(A, b):
    """Gauss's elimination of a positive definite system."""
    A, b = A.copy(), b.copy()
    for k in range(b.size):
        for i in range(k + 1, b.size):
            factor = A[i, k] / A[k, k]
            A[i] = A[i] - factor * A[k]
            b[i] = b[i] - factor * b[k]
    x = b.copy()
    for k in reversed(range(b.size)):
        x[k] = (b[k] - A[k, k + 1 :] @ x[k + 1 :]) / A[k, k]
    return x


@pytest.fixture(scope="session")
def forging():
    """What writes forged certificates."""
    return SimpleNamespace(
        Node=Node, refused=refused, forge=forge, exhaustive=exhaustive, instance=dense_instance, ranked=ranked
    )


@pytest.fixture(scope="session")
def rational():
    """Losses without rounding."""
    return SimpleNamespace(quadratic=exact_quadratic, joint=exact_joint, selections=selections)
