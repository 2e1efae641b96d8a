"""Forged certificates of every kind that the format can express: all are refused, each for its reason.

Each claims that a selection which is not optimal is, and would prove it if one rule of soundness of
`cbs_opt.certificate` were not kept; the numbers are those of the rules there.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from cbs_opt import Budget, HessianBlocks, Instance, evaluate
from cbs_opt import certificate as checking
from cbs_opt import certificate_tree as checking_tree
from cbs_opt.certificate import verify
from cbs_opt.files.certificate_file import COUNT, INHERIT, LEAF, NOTHING, POINT, SINGLE, VALUE

KINDS = ("selection", "joint")


@pytest.fixture
def bad(forging):
    """`bad(kind)`: an instance of four weights, its worst selection, and a diagonal that is valid at the root."""

    def make(kind, **options):
        instance = forging.instance(2, **options)
        every, values = forging.ranked(instance, kind)
        assert values[0] < 0.8 * values[-1]
        H = instance.curvature.block(0)
        return instance, every[-1], [0.9 * float(np.linalg.eigvalsh(H)[0])] * instance.n

    return make


def decisions(pruned):
    """Fixings that leave one selection."""
    return [(i, int(value)) for i, value in enumerate(pruned)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_tree_is_accepted(kind, forging):
    """The writer of forgeries can write a proof too, of the optimum and of nothing else."""
    instance = forging.instance(2)
    every, values = forging.ranked(instance, kind)
    tree = forging.exhaustive(kind, range(4), [2])
    found = verify(instance, forging.forge(instance, kind, every[0], [(0, -1, tree)]))
    assert found.optimal
    assert found.bound == pytest.approx(values[0], rel=1e-12)
    assert (found.nodes, found.leaves) == (len(tree), sum(node.branch == LEAF for node in tree))
    for other in every[1:]:
        forging.refused(instance, forging.forge(instance, kind, other, [(0, -1, tree)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_decided_by_bounds_that_do_not_hold(kind, count, forging, bad):
    """Two nodes: a point, weights decided "by their bounds", a leaf."""
    instance, pruned, diagonal = bad(kind)
    valid = diagonal if kind == "joint" else None
    for at in range(4):
        fixings = [decisions(pruned)[(at + k) % 4] for k in range(count)]
        # All else is decided by branching, honestly.
        rest = [i for i in range(4) if i not in {i for i, _ in fixings}]
        below = forging.exhaustive(kind, rest, [int(pruned[rest].sum())])
        point = list(pruned.astype(float)) if kind == "selection" else [0.0] * 4
        root = forging.Node(POINT, SINGLE, fixings, point, valid)
        forging.refused(instance, forging.forge(instance, kind, pruned, [(0, -1, [root, *below])]))
        if kind == "joint" or valid is None:
            root = forging.Node(INHERIT, SINGLE, fixings)
            forging.refused(instance, forging.forge(instance, kind, pruned, [(0, -1, [root, *below])]))
            root = forging.Node(NOTHING, SINGLE, fixings)
            forging.refused(instance, forging.forge(instance, kind, pruned, [(0, -1, [root, *below])]))


@pytest.mark.parametrize("kind", KINDS)
def test_each_side_of_a_decision_answers_for_itself(kind, forging, bad):
    """One weight decided against the optimum, at the point that is best for the claim; kept and pruned."""
    instance, _, diagonal = bad(kind)
    every, _ = forging.ranked(instance, kind)
    valid = diagonal if kind == "joint" else None
    for i in range(4):
        value = int(not every[0][i])
        claimed = next(pruned for pruned in every if pruned[i] == value)
        rest = [k for k in range(4) if k != i]
        for point in ([0.0] * 4, [1.0] * 4, list(claimed.astype(float)), list(every[0].astype(float)), [0.5] * 4):
            root = forging.Node(POINT, SINGLE, [(i, value)], point, valid)
            tree = [root, *forging.exhaustive(kind, rest, [2 - value])]
            forging.refused(instance, forging.forge(instance, kind, claimed, [(0, -1, tree)]))
    forging.refused(
        instance,
        forging.forge(instance, "joint", every[1], [(0, -1, [forging.Node(VALUE, SINGLE, [(0, 1)]),
                                                             *forging.exhaustive("joint", [1, 2, 3], [1])])]),
        "prunes a weight without a point",
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_that_leave_selections_out(kind, forging, bad):
    instance, pruned, diagonal = bad(kind)
    Node, forge = forging.Node, forging.forge
    forging.refused(instance, forge(instance, kind, pruned, []))
    forging.refused(instance, forge(instance, kind, pruned, [(0, -1, [Node(NOTHING)])]))
    forging.refused(instance, forge(instance, kind, pruned, [(0, -1, [Node(INHERIT)])]))
    forging.refused(instance, forge(instance, kind, pruned, [(0, -1, [Node(VALUE)])]))
    for code in (*range(5, 16), *range(21, 256)):
        forged = forge(
            instance, kind, pruned, [(0, -1, [Node(NOTHING, diagonal=diagonal if code & 16 else None)])]
        )
        forging.refused(instance, replace(forged, how=np.array([code], np.uint8)), "`how` must be one of|codes")
    # Every weight decided by branching, the child with the optimum left out.
    tree = forging.exhaustive(kind, range(4), [2])
    forging.refused(instance, forge(instance, kind, pruned, [(0, -1, [Node(NOTHING, SINGLE), *tree[1:]])]),
            "not connected|not open")  # fmt: skip
    forging.refused(instance, forge(instance, kind, pruned, [(0, -1, tree[:-1])]), "ends before")
    forging.refused(instance, forge(instance, kind, pruned, [(0, -1, [*tree, Node(NOTHING)])]), "not connected")
    best = forging.ranked(instance, kind)[0][0]
    forging.refused(
        instance, forge(instance, kind, pruned, [(0, -1, forging.exhaustive(kind, range(4), [2], without=best))])
    )


def test_counted_leaves(forging, monkeypatch):
    """A leaf that is counted proves the optimum, and nothing else; it decides nothing and must have a choice."""
    Node, forge = forging.Node, forging.forge
    instance = forging.instance(3, n=5, budget=2)
    every, values = forging.ranked(instance, "joint")
    found = verify(instance, forge(instance, "joint", every[0], [(0, -1, [Node(COUNT)])]))
    assert found.optimal
    assert found.bound == pytest.approx(values[0], rel=1e-9)
    for other in every[1:]:
        forging.refused(instance, forge(instance, "joint", other, [(0, -1, [Node(COUNT)])]))
    # Below a branch: what the other child would have to count is missing.
    first = int(np.flatnonzero(every[0])[0])
    forging.refused(instance, forge(instance, "joint", every[-1], [(0, -1, [Node(NOTHING, first), Node(COUNT),
                    Node(NOTHING)])]))  # fmt: skip
    one_fixing = [Node(COUNT, SINGLE, [(0, 0)]), Node(COUNT)]
    forging.refused(instance, forge(instance, "joint", every[0], [(0, -1, one_fixing)]), "decides nothing")
    decided = forging.exhaustive("joint", range(5), [2])
    counted = [Node(COUNT) if node.how == VALUE else node for node in decided]
    forging.refused(instance, forge(instance, "joint", every[0], [(0, -1, counted)]), "a choice in exactly one")
    forging.refused(instance, forge(instance, "selection", every[0], [(0, -1, [Node(COUNT)])]), "of the joint")
    grouped = forging.instance(3, n=5, budget=2, groups=(np.array([0, 0, 0, 1, 1]), np.array([1, 1])))
    best = forging.ranked(grouped, "joint")[0][0]
    forging.refused(grouped, forge(grouped, "joint", best, [(0, -1, [Node(COUNT)])]), "a choice in exactly one")
    large = forging.instance(3, n=40, budget=20)
    some = np.arange(40) < 20
    forging.refused(large, forge(large, "joint", some, [(0, -1, [Node(COUNT)])]), "more than")
    monkeypatch.setattr(checking_tree, "MOST_OF_CERTIFICATE", 9)
    forging.refused(instance, forge(instance, "joint", every[0], [(0, -1, [Node(COUNT)])]), "more than 9")


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_that_cannot_be_made(kind, forging, bad):
    """Weights that are decided already, twice, or that are not there."""
    instance, pruned, diagonal = bad(kind)
    Node, forge = forging.Node, forging.forge
    valid = diagonal if kind == "joint" else None
    leaf = Node(VALUE)
    for weight in (4, 10**6, -3):
        forging.refused(
            instance, forge(instance, kind, pruned, [(0, -1, [Node(NOTHING, weight), leaf, leaf])]), "not open"
        )
    for fixings in ([(4, 0)], [(-1, 1)]):
        root = Node(POINT, SINGLE, fixings, [0.0] * 4, valid)
        forging.refused(instance, forge(instance, kind, pruned, [(0, -1, [root, leaf])]), "not open")
    root = Node(POINT, SINGLE, [(0, 0), (0, 1)], [0.0] * 4, valid)
    forging.refused(instance, forge(instance, kind, pruned, [(0, -1, [root, leaf])]), "decides one weight twice")
    again = [Node(NOTHING, 0), Node(NOTHING, 0), leaf, leaf, leaf]
    forging.refused(instance, forge(instance, kind, pruned, [(0, -1, again)]), "not open")
    below = [Node(POINT, 0, [(0, 0)], [0.0] * 4, valid), leaf, leaf]
    forging.refused(instance, forge(instance, kind, pruned, [(0, -1, below)]), "not open")
    if kind == "joint":
        return  # where the budget settles weights by itself
    # A node that has no selection may not decide on the strength of that.
    tree = [Node(NOTHING, 0), Node(NOTHING, 1), Node(NOTHING, 2), Node(NOTHING, LEAF, [(3, 0)])]
    forging.refused(
        instance, forge(instance, kind, pruned, [(0, -1, [*tree, leaf, leaf, leaf])]), "without a selection"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_another_length(kind, forging, bad):
    instance, pruned, diagonal = bad(kind)
    valid = diagonal if kind == "joint" else None
    root = forging.Node(POINT, LEAF, [], [0.5, 0.25, 0.75, 0.5], valid)
    whole = forging.forge(instance, kind, pruned, [(0, -1, [root])], bound=-1e300)
    assert verify(instance, whole).bound >= 0
    forging.refused(instance, replace(whole, numbers=whole.numbers[:-1]), "`numbers` ends too early")
    forging.refused(instance, replace(whole, numbers=np.append(whole.numbers, 0.5)), "more than the trees use")
    forging.refused(instance, replace(whole, codes=np.append(whole.codes, np.uint8(0))), "more than the trees use")
    forging.refused(instance, replace(whole, codes=whole.codes[:0]), "`codes` ends too early")
    forging.refused(instance, replace(whole, diagonals=np.append(whole.diagonals, 1.0)), "more than the trees use")
    forging.refused(instance, replace(whole, fixings=np.zeros(1, np.int32)), "more than the trees use")
    forging.refused(instance, replace(whole, fixed_counts=np.full(1, -1, np.int32)), "`fixings` ends too early")
    forging.refused(instance, replace(whole, fixed_counts=np.full(1, 1, np.int32)), "`fixings` ends too early")
    for nodes in (0, -1, 2):
        forging.refused(
            instance, replace(whole, tree_nodes=np.array([nodes], np.int64)), "`tree_nodes` does not fit"
        )
    for value in (np.nan, np.inf, -np.inf):
        forging.refused(instance, replace(whole, numbers=whole.numbers * value), "`numbers` has NaN or infinite")
        if valid is not None:
            forging.refused(
                instance, replace(whole, diagonals=whole.diagonals * value), "`diagonals` has NaN or infinite"
            )
    if valid is not None:
        forging.refused(instance, replace(whole, diagonals=whole.diagonals[1:]), "`diagonals` ends too early")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1.2, 10.0, 1e6, 1e12, 1e100])
def test_diagonals_that_the_curvature_does_not_allow(kind, factor, forging, bad):
    """D ⪯ Q does not hold: what is missing is taken off, or the diagonal is refused."""
    instance, pruned, _ = bad(kind)
    H, w = instance.curvature.block(0), instance.weights
    matrix = H if kind == "joint" else H * w[:, None] * w
    diagonal = [factor * float(d) for d in np.diag(matrix)]
    for point in (list(pruned.astype(float)), [0.5] * 4, [0.0] * 4):
        root = forging.Node(POINT, LEAF, [], point, diagonal)
        with np.errstate(all="ignore"):
            forging.refused(
                instance,
                forging.forge(instance, kind, pruned, [(0, -1, [root])]),
                "prove a bound|semidefinite is not",
            )


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("positive", [True, False])
def test_multipliers_of_products(size, positive, forging, bad):
    """A negative one is refused; any positive one leaves a bound that is true, below decisions too."""
    instance, pruned, _ = bad("selection")
    Node = forging.Node
    values = forging.ranked(instance, "selection")[1]
    pairs = list(itertools.combinations(range(4), 2))
    products = [(i, j, size if positive else -size) for i, j in pairs]
    for diagonal in ([0.0] * 4, [-4 * size] * 4):
        for point in ([0.5] * 4, [0.0] * 4, list(pruned.astype(float))):
            leaf = Node(POINT, LEAF, [], point, diagonal, products)
            forged = forging.forge(instance, "selection", pruned, [(0, -1, [leaf])])
            forging.refused(instance, forged, "prove a bound|must be positive|semidefinite is not")
            # Weight 0 pruned below the frame: its products with the others count, once.
            root = Node(POINT, 0, [], point, diagonal, products)
            kept = forging.exhaustive("selection", [1, 2, 3], [2])
            below = [Node(POINT, LEAF, [], point[1:])]
            forged = forging.forge(instance, "selection", pruned, [(0, -1, [root, *kept, *below])])
            forging.refused(instance, forged, "prove a bound|must be positive|semidefinite is not")
            if positive and size <= 1.0:
                assert verify(instance, replace(forged, bound=-1e300)).bound <= values[0] * (1 + 1e-12)


def test_products_that_there_are_not(forging, bad):
    instance, pruned, diagonal = bad("selection")
    Node, forge = forging.Node, forging.forge

    def forged(products, kind="selection", how=POINT):
        root = Node(how, LEAF, [], [0.5] * 4, diagonal, products)
        return forge(instance, kind, pruned, [(0, -1, [root])], bound=-1e300)

    whole = forged([(0, 1, 1e-3), (2, 1, 1e-3)])
    assert verify(instance, whole).bound >= 0  # accepted
    for products in ([(0, 0, 1e-3)], [(0, 1, 1e-3), (1, 0, 1e-3)], [(0, 1, 1e-3), (0, 1, 1e-3)]):
        forging.refused(instance, forged(products), "each pair once")
    for products in ([(0, 4, 1e-3)], [(-1, 2, 1e-3)]):
        forging.refused(instance, forged(products), "not open")
    for price in (0.0, -1e-9, np.nan, np.inf):
        forging.refused(instance, forged([(0, 1, price)]), "must be positive and finite")
    forging.refused(instance, forged([(0, 1, 1e-3)], "joint"), "only the selection problem")
    forging.refused(instance, replace(whole, product_counts=np.array([3], np.int32)), "`products` ends too early")
    forging.refused(instance, replace(whole, product_counts=np.array([1], np.int32)), "more than the trees use")
    forging.refused(instance, replace(whole, product_counts=np.array([-1], np.int32)), "ends too early")
    forging.refused(instance, replace(whole, product_counts=whole.product_counts[:0]), "ends too early")
    forging.refused(instance, replace(whole, product_prices=whole.product_prices[:1]), "ends too early")
    # A pair of a weight that is decided above the frame.
    tree = [Node(NOTHING, 0), Node(POINT, LEAF, [], [0.5] * 3, diagonal[:3], [(0, 1, 1e-3)]), Node(NOTHING)]
    forging.refused(instance, forge(instance, "selection", pruned, [(0, -1, tree)]), "not open")


@pytest.mark.parametrize("number", [1e15, 1e16, 1e17, -1e17, 1e30, 1e150])
def test_points_whose_sums_are_lost_in_rounding(number, forging):
    """An entry so large that 1 − x is −x: a diagonal that needs exact sums must not profit."""
    instance = Instance(np.ones(2), HessianBlocks.from_blocks([np.array([[1.0, 0.2], [0.2, 2.0]])]), Budget(1))
    Node = forging.Node
    pruned = np.array([False, True])
    tree = [Node(NOTHING, 1), Node(POINT, LEAF, [], [number], [1e6]), Node(POINT, LEAF, [], [0.0])]
    forging.refused(instance, forging.forge(instance, "selection", pruned, [(0, -1, tree)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-300, 1e8, 1e160, 1e308])
def test_points_of_any_size(kind, size, forging, bad):
    """Overflow proves nothing."""
    instance, pruned, diagonal = bad(kind)
    valid = diagonal if kind == "joint" else None
    for signs in ([1, 1, 1, 1], [-1, 1, -1, 1], [-1, -1, -1, -1]):
        root = forging.Node(POINT, LEAF, [], [size * s for s in signs], valid)
        with np.errstate(all="ignore"):
            forging.refused(instance, forging.forge(instance, kind, pruned, [(0, -1, [root])]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raised", [2e-9, 1e-8, 1e-6, 1e-3, 0.2])
def test_a_raised_bound_of_a_stopped_run(kind, raised, forging, bad):
    """Well below the objective, so that only the leaves can contradict; what is reported is what they prove."""
    instance, _, _ = bad(kind)
    every, values = forging.ranked(instance, kind)
    forged = forging.forge(instance, kind, every[-1], [(0, -1, forging.exhaustive(kind, range(4), [2]))])
    proven = verify(instance, replace(forged, bound=0.0)).bound
    assert proven == pytest.approx(values[0], rel=1e-12)
    assert proven < 0.8 * values[-1]
    assert verify(instance, replace(forged, bound=proven * (1 + 1e-10))).bound == proven
    forging.refused(instance, replace(forged, bound=proven * (1 + raised)))
    for bound in (np.inf, np.nan):
        forging.refused(instance, replace(forged, bound=bound))


@pytest.mark.parametrize("kind", KINDS)
def test_negative_losses(kind, forging):
    """With a first-order term a loss may be negative: zero is no bound then."""
    instance = forging.instance(5, linear=True)
    every, values = forging.ranked(instance, kind)
    assert values[0] < 0
    better = every[np.argmax(values > values[0])]
    forging.refused(instance, forging.forge(instance, kind, better, []))
    forging.refused(instance, forging.forge(instance, kind, every[0], [], bound=0.0), "prove a bound")
    found = verify(
        instance, forging.forge(instance, kind, every[0], [(0, -1, forging.exhaustive(kind, range(4), [2]))])
    )
    assert found.optimal
    assert found.bound == pytest.approx(values[0], rel=1e-12)


def test_claims_that_are_not_so(forging, bad):
    instance, pruned, _ = bad("selection")
    tree = [(0, -1, forging.exhaustive("selection", range(4), [2]))]
    forged = forging.forge(instance, "selection", pruned, tree, bound=0.0)
    assert verify(instance, forged).objective == forged.objective
    for factor in (1 + 2e-7, 1 - 2e-7, 0.5, np.nan):
        forging.refused(instance, replace(forged, objective=forged.objective * factor), "has the loss")
    forging.refused(instance, replace(forged, objective_kind="joint"), "has the loss")
    forging.refused(instance, replace(forged, budget=1), "--budget 1")
    forging.refused(instance, replace(forged, damping=0.1), "--damping 0.1")
    flipped = pruned.copy()
    flipped[0] = ~flipped[0]
    forging.refused(instance, replace(forged, pruned=flipped), "does not meet the budget")
    forging.refused(instance, replace(forged, pruned=np.append(pruned, False)), "shape")
    forging.refused(
        replace(instance, sha256="1" * 64), replace(forged, instance_sha256="2" * 64), "another instance"
    )
    # Another instance without a hash: the proof is of this one or of none.
    heavier = replace(instance, weights=2 * instance.weights)
    forging.refused(heavier, forged, "has the loss")


def test_what_fixed_and_budgets_leave_open(forging):
    """Weights that `fixed` decides cost what they cost, and are no part of a tree."""
    fixed = np.array([1, 0, 0, -1, 0], np.int8)
    for kind in KINDS:
        instance = forging.instance(7, n=5, budget=2, fixed=fixed)
        every, values = forging.ranked(instance, kind)
        pieces = np.array([-1, 0, 0, -1, 0], np.int32)
        tree = forging.exhaustive(kind, [1, 2, 4], [1])
        found = verify(instance, forging.forge(instance, kind, every[0], [(0, -1, tree)], pieces=pieces))
        assert found.optimal
        assert found.bound == pytest.approx(values[0], rel=1e-12)
        worst = forging.forge(instance, kind, every[-1], [(0, -1, tree)], pieces=pieces, bound=0.0)
        assert verify(instance, worst).bound == pytest.approx(values[0], rel=1e-12)
        forging.refused(instance, forging.forge(instance, kind, every[1], [(0, -1, tree)], pieces=pieces))
        for wrong in ([0, 0, 0, -1, 0], [-1, -1, 0, -1, 0], [-1, 0, 0, 0, 0]):
            forged = forging.forge(instance, kind, every[1], [(0, -1, tree)], pieces=np.array(wrong, np.int32))
            forging.refused(instance, forged, "`pieces` does not name")
        forged = forging.forge(instance, kind, every[1], [(0, -1, tree)], pieces=2 * pieces + 1)
        forging.refused(instance, forged, "`pieces` skips a number")
        root = forging.Node(NOTHING, 0)
        forged = forging.forge(instance, kind, every[1], [(0, -1, [root, *tree, *tree])], pieces=pieces)
        forging.refused(instance, forged, "not open")


def test_budgets_of_groups_hold(forging):
    """A leaf that no selection of the groups reaches may be called so; one that a selection reaches may not."""
    groups = (np.array([0, 1, 0, 1]), np.array([1, 1]))
    for kind in KINDS:
        instance = forging.instance(3, groups=groups)
        every, values = forging.ranked(instance, kind)
        assert len(every) == 4
        of = {0: 0, 1: 1, 2: 0, 3: 1}
        tree = forging.exhaustive(kind, range(4), [1, 1], of)
        found = verify(instance, forging.forge(instance, kind, every[0], [(0, -1, tree)]))
        assert found.bound == pytest.approx(values[0], rel=1e-12)
        forging.refused(instance, forging.forge(instance, kind, every[-1], [(0, -1, tree)]))
        tree = forging.exhaustive(kind, range(4), [1, 1], of, without=every[0])
        forging.refused(instance, forging.forge(instance, kind, every[-1], [(0, -1, tree)]))
        pieces = np.array([0, 1, 0, 1], np.int32)
        forging.refused(
            instance, forging.forge(instance, kind, every[-1], [], pieces=pieces), "groups couple all weights"
        )


def test_what_is_kept_by_its_price_answers_for_itself(forging, bad):
    """Joint: a weight is kept because pruning it too would cost too much; that has to be so."""
    instance, _, _ = bad("joint")
    every, _ = forging.ranked(instance, "joint")
    for i in np.flatnonzero(every[0]):
        claimed = next(pruned for pruned in every if not pruned[i])
        rest = [k for k in range(4) if k != i]
        tree = [forging.Node(VALUE, SINGLE, [(int(i), 0)]), *forging.exhaustive("joint", rest, [2])]
        forging.refused(instance, forging.forge(instance, "joint", claimed, [(0, -1, tree)]))


def test_what_the_budget_prunes_cannot_be_kept(forging):
    """Keep weight 2 and the budget prunes 0 and 1, the optimum: a node that keeps 0 there must answer for it."""
    H = np.array([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])
    instance = Instance(np.array([1.0, 1.0, 9.0]), HessianBlocks.from_blocks([H]), Budget(2))
    Node = forging.Node
    tree = [
        Node(NOTHING, 2),
        Node(VALUE, SINGLE, [(0, 0)]),
        Node(NOTHING),
        Node(NOTHING, 0),
        Node(VALUE),
        Node(VALUE),
    ]
    forging.refused(instance, forging.forge(instance, "selection", np.array([False, True, True]), [(0, -1, tree)]))


def test_blocks_that_are_too_large(forging, bad, monkeypatch):
    for kind in KINDS:
        instance, pruned, _ = bad(kind)
        monkeypatch.setattr(checking, "MAX_WEIGHTS", 3)
        forging.refused(instance, forging.forge(instance, kind, pruned, []), "at most 3 can be checked")
        monkeypatch.setattr(checking, "MAX_WEIGHTS", 4000)


def test_a_singular_hessian_has_no_joint_proof(forging):
    instance = Instance(np.ones(3), HessianBlocks.from_blocks([np.ones((3, 3))]), Budget(1))
    pruned = np.array([True, False, False])
    assert evaluate(instance, pruned).joint_loss == 0
    root = forging.Node(POINT, LEAF, [], [0.0] * 3, [1e-3] * 3)
    forging.refused(
        instance, forging.forge(instance, "joint", pruned, [(0, -1, [root])], bound=1e-9), "singular|prove a bound"
    )
