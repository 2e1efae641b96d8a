"""The strongest couplings and their graph against the dense matrix Q."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cbs_opt
from cbs_opt import UsageError, interactions
from cbs_opt.interactions import interaction_graph, strongest_couplings

KINDS = ("hessian", "inverse_hessian", "gradients")


def dense_pairs(given):
    """Every pair with its Q_ij, the strongest first."""
    Q = given.w[:, None] * given.H * given.w
    i, j = np.triu_indices(given.w.size, 1)
    values = Q[i, j]
    order = np.argsort(-np.abs(values), kind="stable")
    return [(int(i[e]), int(j[e]), float(values[e])) for e in order if values[e] != 0.0]


def pairs_of(found):
    return list(zip(found.first.tolist(), found.second.tolist(), found.values.tolist(), strict=True))


def assert_same(found, expected, scale):
    assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
    assert [pair[2] for pair in found] == pytest.approx(
        [pair[2] for pair in expected], rel=1e-7, abs=1e-12 * scale
    )


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    blocks=st.integers(1, 4),
    max_pairs=st.integers(1, 80),
    panel=st.sampled_from([1, 30, 10**6]),
    share=st.floats(0, 1),
)
def test_strongest_couplings_are_those_of_the_dense_matrix(problem, seed, kind, blocks, max_pairs, panel, share):
    given_ = problem(seed, n=13, kind=kind, blocks=blocks)
    everything = dense_pairs(given_)
    # Halfway between two values, so that rounding does not decide.
    position = int(share * (len(everything) - 1))
    threshold = (abs(everything[position][2]) + abs(everything[min(position + 1, len(everything) - 1)][2])) / 2
    above = [pair for pair in everything if abs(pair[2]) > threshold]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interactions, "_PANEL_ENTRIES", panel)
        found = strongest_couplings(given_.instance, threshold * (1 - 1e-9), max_pairs=max_pairs)
        negative = strongest_couplings(given_.instance, cancelling=True, max_pairs=max_pairs)
    if position + 1 < len(everything):
        assert_same(pairs_of(found), above[:max_pairs], given_.scale())
        assert found.complete == (len(above) <= max_pairs)
    cancelling = [pair for pair in everything if pair[2] < 0]
    assert_same(pairs_of(negative), cancelling[:max_pairs], given_.scale())


def test_of_a_large_block_the_weights_with_the_largest_diagonal(problem):
    given_ = problem(3, n=14, kind="gradients")
    Q = given_.w[:, None] * given_.H * given_.w
    largest = {*np.argsort(-Q.diagonal(), kind="stable")[:5].tolist()}
    found = strongest_couplings(given_.instance, max_weights=5)
    assert_same(pairs_of(found), [p for p in dense_pairs(given_) if {p[0], p[1]} <= largest], given_.scale())
    assert not found.complete
    roots = np.sort(np.sqrt(Q.diagonal()))[::-1]
    assert strongest_couplings(given_.instance, roots[0] * roots[5] * 1.001, max_weights=5).complete


def test_graph_says_what_its_nodes_and_edges_are(problem, with_instance):
    tensors = [{"name": "a", "shape": [2, 3], "offset": 0}, {"name": "b", "shape": [6], "offset": 6}]
    given_ = with_instance(problem(4, n=12, blocks=2, linear=True), metadata={"tensors": tensors})
    instance, Q = given_.instance, given_.w[:, None] * given_.H * given_.w
    graph = instance.interaction_graph(isolated=True)
    assert sorted(graph) == list(range(12))
    assert graph.graph == {"threshold": 0.0, "complete": True}
    node = graph.nodes[4]
    alone = np.arange(12) == 4
    assert node["weight"] == given_.w[4]
    assert node["cost"] == pytest.approx(given_.selection_loss(alone))
    assert (node["tensor"], node["index"]) == ("a", (1, 1))
    assert (graph.nodes[8]["tensor"], graph.nodes[8]["index"]) == ("b", (2,))
    for i, j, edge in graph.edges(data=True):
        assert edge["coupling"] == pytest.approx(Q[i, j])
        assert edge["weight"] == abs(edge["coupling"])
        assert graph.nodes[i]["block"] == graph.nodes[j]["block"]
    assert networkx.number_connected_components(graph) == 2
    cut = instance.curvature.offsets[1]
    assert {graph.nodes[i]["block"] for i in range(cut)} == {0}


def test_part_of_a_tensor_is_placed_by_its_positions():
    instance = cbs_opt.library("mlp-output-20")
    graph = interaction_graph(instance, isolated=True)
    positions, columns = instance.metadata["positions"], instance.metadata["shape"][1]
    assert graph.nodes[7]["index"] == (positions[7] // columns, positions[7] % columns)


def test_metadata_that_do_not_fit_name_no_tensor(problem, with_instance):
    for tensors in ([{"name": "a", "shape": [2], "offset": 0}], [{"name": "a"}], 3, None):
        given_ = with_instance(problem(5), metadata={"tensors": tensors})
        graph = given_.instance.interaction_graph()
        assert {data["tensor"] for _, data in graph.nodes(data=True)} == {None}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"threshold": -1.0}, "threshold"),
        ({"threshold": "a"}, "threshold"),
        ({"max_pairs": 0}, "max_pairs"),
        ({"max_weights": 1.5}, "max_weights"),
    ],
)
def test_bad_arguments(problem, options, name):
    with pytest.raises(UsageError, match=f"`{name}` must be"):
        problem(1).instance.interaction_graph(**options)
