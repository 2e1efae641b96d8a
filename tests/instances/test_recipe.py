"""Options of an export: what they default to, what they refuse, the budgets they make."""

import numpy as np
import pytest

pytest.importorskip("torch")

from cbs_opt import UsageError
from cbs_opt.instances.recipe import Recipe, nm_budget, scratch


@pytest.mark.parametrize(
    ("given", "form", "rule", "dtype"),
    [
        ({}, "gradients", "full", "float32"),
        ({"blocks": "layer"}, "inverse-hessian", "layer", "float64"),
        ({"blocks": "layer", "curvature": "gradients"}, "gradients", "layer", "float32"),
        ({"curvature": "hessian"}, "hessian", "layer", "float64"),
        ({"blocks": 500, "dtype": "float32"}, "inverse-hessian", 500, "float32"),
        ({"source": "reconstruction"}, "inverse-hessian", "row", "float64"),
        ({"source": "kfac"}, "hessian", "row", "float64"),
    ],
)
def test_defaults(given, form, rule, dtype):
    recipe = Recipe(**given)
    assert (recipe.form, recipe.block_rule, recipe.entry) == (form, rule, np.dtype(dtype))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "loss"}, "`source` must be one of fisher, reconstruction, kfac, got 'loss'"),
        ({"curvature": "inverse"}, "`curvature` must be one of"),
        ({"blocks": 0}, "`blocks` must be"),
        ({"blocks": "all"}, "`blocks` must be"),
        ({"batch": 0}, "`batch` must be a whole number of at least 1, got 0"),
        ({"layers": {"fc1": -1}}, "`layers`: the sparsity of 'fc1' must be a fraction between 0 and 1"),
        ({"nm": 3}, "`nm` must be two whole numbers, such as (2, 4), got 3"),
        ({"damping": 10**400}, "`damping` must be a finite number ≥ 0"),
        ({"sparsity": "much"}, "`sparsity` must be between 0 and 1, got much"),
        ({"damping": 1e-5, "relative_damping": 0.1}, "exclude each other"),
        ({"damping": -1.0}, "`damping` must be a finite number ≥ 0"),
        ({"relative_damping": float("nan")}, "`relative_damping` must be"),
        ({"sparsity": 1.5}, "`sparsity` must be between 0 and 1, got 1.5"),
        ({"nm": (5, 4)}, "N:M must have 0 ≤ N ≤ M"),
        ({"nm": (2, 4), "sparsity": 0.5}, "goes without `sparsity`"),
        ({"nm": (2, 4), "nm_along": "all"}, "`nm_along` must be one of inputs, outputs, both, got 'all'"),
        ({"nm_along": "both"}, "`nm_along` is for N:M patterns: give `nm` too"),
        ({"nm": (2, 4), "per_layer": True}, "goes without `sparsity`"),
        ({"dtype": "float16"}, "`dtype` must be one of"),
        ({"source": "reconstruction", "curvature": "gradients"}, "has no gradients"),
        ({"source": "reconstruction", "blocks": "full"}, "a block for each output row"),
        ({"source": "reconstruction", "first_order": True}, "no first-order term"),
        ({"source": "reconstruction", "batch": 2}, "`batch` is for gradients"),
    ],
)
def test_options_that_make_no_sense(wrong, message):
    with pytest.raises(UsageError) as refusal:
        Recipe(**wrong)
    assert message in str(refusal.value)


def test_blocks_of_layers_that_are_too_large_become_gradients(caplog):
    shapes = [(200, 100), (50, 200)]  # dense blocks: 4 GB
    recipe = Recipe(blocks="layer", memory=10**8)
    assert recipe.fitting(shapes, 100, None).form == "gradients"
    assert recipe.fitting(shapes, 100, None).sizes(shapes) == [20_000, 10_000]
    assert Recipe(blocks="layer", memory=10**8).fitting([(10, 10)], 100, None).form == "inverse-hessian"
    for other in (Recipe(blocks="layer", curvature="hessian", memory=10**8), Recipe(blocks=15_000, memory=10**8)):
        with pytest.raises(UsageError, match="memory has"):
            other.fitting(shapes, 100, None)
    with pytest.raises(UsageError, match="gradients take"):
        Recipe(blocks="layer", memory=10**6).fitting(shapes, 100, None)


def test_one_budget_and_one_for_every_layer():
    shapes = [(3, 5), (2, 4)]
    assert Recipe().budget(shapes).total == 21  # ⌈0.9 · 23⌉
    assert Recipe(sparsity=0.29).budget([(100,)]).total == 29  # 0.29 · 100 is a little more than 29 in binary
    budget = Recipe(sparsity=0.5, per_layer=True).budget(shapes)
    assert budget.group_budgets.tolist() == [8, 4]
    assert budget.groups.tolist() == [0] * 15 + [1] * 8


def test_a_pattern_runs_along_the_inputs():
    budget = nm_budget([(2, 6), (2, 4, 1, 2)], 1, 4)
    linear, convolution = budget.groups[:12].reshape(2, 6), budget.groups[12:].reshape(2, 4, 1, 2)
    assert linear.tolist() == [[0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 3, 3]]
    for row in range(2):
        for place in range(2):
            (group,) = set(convolution[row, :, 0, place].tolist())
            assert np.count_nonzero(budget.groups == group) == 4
    assert budget.group_budgets.tolist() == [3, 1, 3, 1, 3, 3, 3, 3]  # of two that are left one goes
    assert budget.total == 20


def test_a_transposable_pattern_has_it_along_both_sides():
    budget = Recipe(nm=(1, 4), nm_along="both").budget([(4, 8), (8, 4, 1, 2)])
    pruned = budget.cheapest(np.random.default_rng(0).random(32 + 64))
    matrix, convolution = pruned[:32].reshape(4, 8), pruned[32:].reshape(8, 4, 1, 2)
    assert (matrix.reshape(4, 2, 4).sum(2) == 3).all() and (matrix.sum(0) == 3).all()
    assert (convolution.sum(1) == 3).all()  # at every place of the kernel
    assert (convolution.reshape(2, 4, 4, 1, 2).sum(1) == 3).all()
    assert [tiles.index.shape for tiles in budget.tiles] == [(6, 4, 4)]
    assert budget.total == 3 * 96 // 4
    assert nm_budget([(4, 8), (8, 4, 1, 2)], 1, 4).groups.tolist() == budget.groups.tolist()
    other = nm_budget([(4, 8), (8, 4, 1, 2)], 1, 4, along="outputs")
    assert other.groups.tolist() == budget.cross_groups.tolist()


@pytest.mark.parametrize(("rows", "columns"), [(10, 8), (4, 7), (3, 3), (1, 8), (5, 1), (9, 11)])
@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (3, 4), (4, 4), (0, 4)])
def test_ends_of_a_transposable_pattern(rows, columns, nm, caplog):
    """The last tiles lose what the rules of both sides allow, shared evenly; there always is a selection."""
    keep, of = nm
    budget = Recipe(nm=nm, nm_along="both").budget([(rows, columns)], ["a"])
    pruned = budget.cheapest(np.random.default_rng(rows).random(rows * columns)).reshape(rows, columns)
    assert budget.is_met_by(pruned.ravel())
    along = [nm_budget([(rows, columns)], keep, of, along=side) for side in ("inputs", "outputs")]
    assert (budget.group_budgets <= along[0].group_budgets).all()
    assert (budget.cross_group_budgets <= along[1].group_budgets).all()
    for r in range(0, rows, of):
        for c in range(0, columns, of):
            tile = pruned[r : r + of, c : c + of]
            a, b = tile.shape
            assert tile.sum() == min(a * (b * (of - keep) // of), b * (a * (of - keep) // of))
            assert np.ptp(tile.sum(0)) <= 1 and np.ptp(tile.sum(1)) <= 1
    warnings = caplog.text.count("the last tiles are smaller, and lose fewer weights")
    assert warnings == (rows % of > 0) + (columns % of > 0)


def test_what_does_not_fit_is_refused_with_what_would(tmp_path):
    shapes = [(300, 400), (50, 60)]
    with pytest.raises(UsageError, match=r"the blocks take 115 GB, of which memory has 1 GB: --blocks 500 \(.*\)"):
        Recipe(blocks="layer", memory=10**9).check_fits(shapes, 100, None)
    with pytest.raises(UsageError, match=r"--curvature gradients \(49.2 MB\) would do"):
        Recipe(blocks="layer", memory=10**9).check_fits(shapes, 100, None)
    with pytest.raises(UsageError, match=r"a block of 3000 weights needs 0.368 GB of memory, 0.2 GB .*--blocks 2"):
        Recipe(blocks=3000, memory=2 * 10**8).check_fits([(100, 400)], 1000, tmp_path)
    Recipe(blocks=500, memory=10**9).check_fits(shapes, 100, None)
    Recipe(memory=1).check_fits(shapes, 100, tmp_path)  # gradients go to the disk piece by piece


def test_scratch_space_moves_to_the_disk(tmp_path):
    small = scratch((3, 4), np.dtype(np.float32), 48, tmp_path)
    large = scratch((3, 4), np.dtype(np.float32), 47, tmp_path)
    assert not isinstance(small, np.memmap) and isinstance(large, np.memmap)
    large[:] = 7.0
    assert large.sum() == 84 and not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="the gradients take"):
        scratch((10**9, 10**9), np.dtype(np.float32), 47, tmp_path)


def test_shorter_groups_of_a_pattern_are_told(caplog):
    recipe = Recipe(nm=(2, 4))
    recipe.budget([(3, 8), (2, 6)], ["a", "b"])
    assert "'b' (6)" in caplog.text
    assert "'a'" not in caplog.text


def test_whole_numbers_of_numpy_are_whole_numbers():
    recipe = Recipe(batch=np.int64(2), blocks=np.int32(4), keep=np.int64(3))
    assert recipe.block_rule == 4
    assert recipe.sizes([(2, 5)]) == [4, 4, 2]
