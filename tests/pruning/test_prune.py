"""`cbs_opt.prune`: one shot and stages, choices on held-out samples, restarts, stops."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cbs_opt  # noqa: E402
from cbs_opt import InstanceError, SolverError, UsageError  # noqa: E402
from cbs_opt.instances.data import own_source  # noqa: E402
from cbs_opt.pruning import stage  # noqa: E402
from cbs_opt.pruning.method import Method  # noqa: E402
from cbs_opt.pruning.problem import damping_of_layers  # noqa: E402
from cbs_opt.pruning.run import Run  # noqa: E402


def blobs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    centres = 2 * torch.randn(4, 12, generator=torch.Generator().manual_seed(7))
    return centres[y] + 3 * torch.randn(count, 12, generator=generator), y


@pytest.fixture(scope="module")
def trained(train):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))
    x, y = blobs(600)
    return train(model, x, y)


FAST = {"solver": "magnitude", "threads": 1, "gauss_newton": 0}


def loss_of(model, data):
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(data[0]), data[1]))


def zeros_of(model):
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}


METHODS = {
    "one shot, kfac": {},
    "one shot, joint": {"solver": "joint", "time_limit": 0.5, "relative_damping": 0.01},
    "one shot, fisher": {"source": "fisher", "damping": (0.01, 1.0), "update_scale": (0.5, 1.0)},
    "one shot, reconstruction": {"source": "reconstruction", "split": "auto"},
    "stages, targets of the dense network": {"source": "reconstruction", "stages": 2, "relative_damping": 0.01},
    "layer after layer": {"sequential": True, "stages": 2, "relative_damping": 0.01},
    "stages, kfac": {"stages": 3},
    "stages, fisher": {"source": "fisher", "stages": 3, "samples": 160, "batch": 4, "damping": 0.1},
    "stages, masks return": {"source": "fisher", "stages": 3, "samples": 160, "masks": "return", "damping": 0.1},
    "one shot, gradient of the loss": {"targets": "loss", "relative_damping": 0.01},
    "one shot, refitted": {"refit": "yes", "recalibrate_bn": "yes"},
    "one shot, fisher, refitted": {"source": "fisher", "damping": 1.0, "refit": "yes"},
    "no update": {"update_scale": 0.0, "objective": "selection", "solver": "magnitude"},
    "stages, Gauss-Newton": {"stages": 2, "gauss_newton": 1, "relative_damping": 0.01},
    "2:4": {"nm": "2:4", "stages": 2},
    "2:4 both ways": {"nm": "2:4", "nm_along": "both"},
    "2:4 both ways, joint": {"nm": "2:4", "nm_along": "both", "solver": "joint", "max_iterations": 3},
    "2:4 both ways, fisher": {
        "nm": "2:4",
        "nm_along": "both",
        "source": "fisher",
        "damping": 0.1,
        "solver": None,
        "keep_at_least": 2,
    },
    "2:4 both ways, layer after layer": {
        "nm": "2:4",
        "nm_along": "both",
        "sequential": True,
        "stages": 2,
        "final_stages": 2,
        "masks": "grow",
        "solver": "joint",
        "max_iterations": 2,
        "relative_damping": 0.01,
    },
    "per layer": {"per_layer": True, "sparsity": 0.5, "stages": 2, "schedule": "linear"},
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name, trained):
    options = {"sparsity": None if "nm" in METHODS[name] else 0.6, **METHODS[name]}
    before = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    told = []
    pruned = cbs_opt.prune(trained, blobs(600), on_stage=told.append, **(FAST | options))
    assert all(torch.equal(before[key], tensor) for key, tensor in trained.state_dict().items())
    assert tuple(told) == pruned.stages and len(told) == options.get("stages", 1)
    masks, zeros = pruned.masks, zeros_of(pruned.model)
    for key in zeros:
        assert bool((zeros[key] | masks[key]).all()), "a pruned weight is not zero"
    total = sum(int((~mask).sum()) for mask in masks.values())
    assert total == pruned.stages[-1].pruned_count
    wanted = 0.5 if "nm" in options else options["sparsity"]
    assert total == np.ceil(wanted * 384)
    if name == "per layer":
        assert [layer.count for layer in pruned.layers] == [144, 48]
    if "both ways" in name:
        for mask in masks.values():
            tiles = mask.reshape(mask.shape[0] // 4, 4, -1, 4)
            assert (tiles.sum(1) == 2).all() and (tiles.sum(3) == 2).all()
    if name == "2:4":
        assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in masks.values())
    if options.get("update_scale") == 0.0:
        for key, tensor in pruned.model.state_dict().items():
            if key in masks:
                assert torch.equal(tensor, before[key] * masks[key])
    assert pruned.after.loss == pytest.approx(pruned.stages[-1].loss)
    assert np.isfinite(pruned.after.loss)
    assert str(pruned.held_out) in pruned.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 3}, "`stages` and `final_stages` must be equal, got 3 and 1"),
        ({"engine": "processes"}, "the engine processes divides layers with one partition into groups"),
        ({"split": "auto"}, "goes without `nm`"),
        (
            {"keep_at_least": 0.9},
            "`keep_at_least` 0.9 asks for .* and the N:M pattern leaves",
        ),
    ],
)
def test_what_a_transposable_pattern_excludes(options, message, trained):
    with pytest.raises(UsageError, match=message):
        cbs_opt.prune(trained, blobs(600), nm="2:4", nm_along="both", **(FAST | options))


@pytest.mark.parametrize("along", ("inputs", "outputs", "both"))
def test_a_pattern_that_keeps_enough_is_kept(along, trained):
    pruned = cbs_opt.prune(trained, blobs(600), nm="2:4", nm_along=along, keep_at_least=0.3, **FAST)
    for mask in pruned.masks.values():
        kept = {"inputs": mask.reshape(-1, 4).sum(1), "outputs": mask.T.reshape(-1, 4).sum(1)}
        assert all((kept[side] == 2).all() for side in kept if along in (side, "both"))


@pytest.mark.parametrize("options", ({}, {"stages": 2}))
def test_labels_are_not_needed_by_default(options, trained):
    x, _ = blobs(300)
    pruned = cbs_opt.prune(trained, x, 0.6, **(FAST | options))
    assert pruned.sparsity == pytest.approx(0.6, abs=0.01) and pruned.held_out == 0
    with pytest.raises(InstanceError, match="no labels"):
        cbs_opt.prune(trained, x, 0.6, targets="loss", **FAST)


def test_zeros_that_fit_a_transposable_pattern_stay(trained):
    options = {"nm": "2:4", "nm_along": "both", **FAST}
    once = cbs_opt.prune(trained, blobs(600), **options)
    again = cbs_opt.prune(once.model, blobs(600), keep_mask=True, **options)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in once.masks.items())
    with torch.no_grad():
        once.model[0].weight[0] = 0  # a whole row of zeros
    with pytest.raises(UsageError, match="that are zero already leaves no transposable"):
        cbs_opt.prune(once.model, blobs(600), keep_mask=True, **options)


def test_a_model_of_the_loss_predicts_it(trained):
    """At little sparsity predicted and measured loss agree, and the choice is the least of what was tried."""
    options = {"relative_damping": 0.001, "recalibrate_bn": "no", **FAST}
    (stage,) = cbs_opt.prune(trained, blobs(2000), 0.1, temperature=1.0, **options).stages
    assert stage.predicted_loss == pytest.approx(stage.loss, abs=0.02)
    (softened,) = cbs_opt.prune(trained, blobs(2000), 0.1, **options).stages
    assert softened.predicted_loss is None and softened.predicted_change > 0
    several = cbs_opt.prune(trained, blobs(600), 0.8, update_scale=(0.0, 0.5, 1.0), **FAST)
    single = [cbs_opt.prune(trained, blobs(600), 0.8, update_scale=s, **FAST).after.loss for s in (0.0, 0.5, 1.0)]
    assert several.after.loss == pytest.approx(min(single), rel=1e-6)


def test_the_first_order_term_is_followed(trained):
    """From a network that is no minimum a stage without pruning is a step towards it."""

    moved = copy.deepcopy(trained)
    with torch.no_grad():
        moved[0].weight += 0.2 * torch.randn(24, 12, generator=torch.Generator().manual_seed(1))
    data = blobs(1000)
    start = loss_of(moved, data)
    for source, options in {"fisher": {"batch": 4, "damping": 0.1}, "kfac": {"relative_damping": 10.0}}.items():
        kept = {"sparsity": 0.0, "source": source, "update_scale": 0.2, "recalibrate_bn": "no"} | options
        pruned = cbs_opt.prune(moved, data, targets="loss", **kept, **FAST)
        assert loss_of(pruned.model, data) < start
        without = cbs_opt.prune(moved, data, targets="none", **kept, **FAST)
        assert loss_of(without.model, data) == pytest.approx(start, abs=1e-5)


def test_the_best_scale_of_the_gradient_is_taken(trained):
    """Of several scales, and of refitted and other networks, that with the least loss on held-out samples."""
    options = {"targets": "loss", "relative_damping": 0.01, "recalibrate_bn": "no"} | FAST
    scales = (0.01, 0.1, 1.0)
    single = {
        (scale, refit): cbs_opt.prune(
            trained, blobs(600), 0.8, first_order_scale=scale, refit=refit, **options
        ).after.loss
        for scale in scales
        for refit in ("no", "yes")
    }
    pruned = cbs_opt.prune(trained, blobs(600), 0.8, first_order_scale=scales, refit="auto", **options)
    assert pruned.after.loss == pytest.approx(min(single.values()), rel=1e-6)
    (stage,) = pruned.stages
    assert single[stage.first_order_scale, "yes" if stage.refitted else "no"] == pytest.approx(
        stage.loss, rel=1e-6
    )
    assert f"gradient × {stage.first_order_scale:g}" in stage.line() or stage.first_order_scale == 1.0


def test_statistics_are_those_of_the_stage(trained):
    pruned = cbs_opt.prune(trained, blobs(600), 0.5, recalibrate_bn="yes", samples=500, held_out=100, **FAST)
    norm = pruned.model[1]
    x, _ = blobs(600)
    held = np.sort(np.random.default_rng([0, 0]).permutation(600)[:100])
    used = torch.from_numpy(np.setdiff1d(np.arange(600), held))
    with torch.no_grad():
        hidden = pruned.model[0](x[used])
    torch.testing.assert_close(norm.running_mean, hidden.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, hidden.var(0), atol=1e-3, rtol=1e-3)
    assert norm.momentum == trained[1].momentum and not norm.training


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_that_ended_early_continues_to_the_same_network(trained, tmp_path, stop_after):
    options = {"source": "fisher", "stages": 4, "samples": 160, "batch": 4, "damping": (0.1, 1.0)} | FAST
    whole = cbs_opt.prune(trained, blobs(600), 0.8, **options)

    class Killed(BaseException):
        pass

    def kill(stage):
        if stage.stage == stop_after:
            raise Killed

    state = tmp_path / "state"
    with pytest.raises(Killed):
        cbs_opt.prune(trained, blobs(600), 0.8, state=state, on_stage=kill, **options)
    again = cbs_opt.prune(trained, blobs(600), 0.8, state=state, **options)
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[key]), key
    assert [(s.loss, s.damping) for s in again.stages] == [(s.loss, s.damping) for s in whole.stages]
    with pytest.raises(InstanceError, match="state of another run"):
        cbs_opt.prune(trained, blobs(600), 0.7, state=state, **options)
    state.write_bytes(state.read_bytes()[:-3])
    with pytest.raises(InstanceError, match="no state of a run that can be read"):
        cbs_opt.prune(trained, blobs(600), 0.8, state=state, **options)


class Shaped(nn.Module):
    """A function in `forward` that its modules do not show."""

    def __init__(self, layers, shape=torch.relu):
        super().__init__()
        self.layers, self.shape = layers, shape

    def forward(self, x):
        return self.layers(self.shape(x))


@pytest.mark.parametrize("other", ["inputs", "labels", "module", "code"])
def test_a_state_of_other_data_or_of_another_network_is_refused(trained, tmp_path, other):
    options = {"source": "fisher", "stages": 2, "samples": 160, "batch": 4, "state": tmp_path / "state"} | FAST
    (x, y), model = blobs(600), Shaped(trained)
    cbs_opt.prune(model, (x, y), 0.8, **options)
    changed = {
        "inputs": (model, (0.5 * x - 1, y), "the state of another run, with other data"),
        "labels": (model, (x, (y + 1) % 4), "the state of another run, with other data"),
        "module": (Shaped(nn.Sequential(*trained[:2], nn.GELU(), trained[3])), (x, y), "with other options or"),
        "code": (Shaped(trained, torch.tanh), (x, y), "the network before pruning had the loss"),
    }[other]
    with pytest.raises(InstanceError, match=changed[2]):
        cbs_opt.prune(*changed[:2], 0.8, **options)
    assert len(cbs_opt.prune(model, (x, y), 0.8, **options).stages) == 2


class DrawnAnew(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(12), self.y[i]


@pytest.mark.parametrize("changes", [False, True])
def test_a_loader_that_shuffles_or_draws_anew_continues(trained, tmp_path, changes, caplog):
    x, y = blobs(600)
    samples = DrawnAnew(x, y) if changes else torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(samples, batch_size=50, shuffle=True)
    options = {"source": "fisher", "stages": 2, "samples": 160, "batch": 4, "state": tmp_path / "state"} | FAST
    first = cbs_opt.prune(trained, loader, 0.8, **options)
    torch.manual_seed(99)
    with caplog.at_level("INFO", "cbs_opt"):
        again = cbs_opt.prune(trained, loader, 0.8, **options)
    assert "another order than in the stored run, or are drawn anew" in caplog.text
    assert [stage.predicted_change for stage in again.stages] == [stage.predicted_change for stage in first.stages]


@pytest.mark.parametrize("source", ["kfac", "reconstruction"])
@pytest.mark.parametrize("dampings", [(1e-2, 1e-3), (1e-5, 1e-4), (1e-3, 0.0)])
def test_several_dampings_where_inputs_are_dead(trained, source, dampings):
    """What one damping adds and the next takes away leaves rounding on rows that are zero."""
    x, y = blobs(600)
    x[:, 3], x[:, 5] = 0.0, x[:, 4]
    pruned = cbs_opt.prune(trained, (x, y), 0.5, source=source, damping=dampings, **FAST)
    assert pruned.stages[0].damping in dampings
    assert pruned.stages[0].predicted_loss is None or pruned.stages[0].predicted_loss >= 0


def test_a_damping_that_the_solver_refuses_is_left_out(trained, monkeypatch):
    solve = stage.solved

    def refuses(instance, *rest):
        if damping_of_layers(instance).max() == 0:
            raise SolverError("the Hessian is singular")
        return solve(instance, *rest)

    monkeypatch.setattr(stage, "solved", refuses)
    pruned = cbs_opt.prune(trained, blobs(600), 0.5, damping=(0.0, 1e-2), **FAST)
    assert pruned.stages[0].damping == 1e-2
    with pytest.raises(SolverError, match="singular"):
        cbs_opt.prune(trained, blobs(600), 0.5, damping=0.0, **FAST)


def test_the_largest_sparsity_from_python(trained):
    pruned = cbs_opt.prune(trained, blobs(600), 0.99, accuracy_drop=2.0, **FAST)
    assert 0 < pruned.sparsity < 0.99
    assert pruned.before.value - pruned.after.value <= 0.02 + 1e-9
    with pytest.raises(UsageError, match="`accuracy_drop` must be a finite number ≥ 0"):
        cbs_opt.prune(trained, blobs(600), 0.99, accuracy_drop=-1)
    with pytest.raises(UsageError, match="an N:M pattern has its own"):
        cbs_opt.prune(trained, blobs(600), nm="2:4", accuracy_drop=1, **FAST)


def test_a_stop_leaves_the_network_of_the_last_stage(trained):
    options = {"source": "fisher", "stages": 4, "samples": 160, "batch": 4, "damping": 0.1} | FAST
    states = []
    pruned = cbs_opt.prune(
        trained, blobs(600), 0.8, on_stage=states.append, should_stop=lambda: len(states) == 2, **options
    )
    assert pruned.interrupted and len(pruned.stages) == 2
    assert pruned.sparsity == pruned.stages[-1].sparsity < 0.8
    assert "interrupted after stage 2 of 4" in pruned.summary()


def test_magnitude_is_taken_where_it_has_the_lower_loss(trained, caplog):
    with caplog.at_level("INFO", logger="cbs_opt"):
        pruned = cbs_opt.prune(trained, blobs(600), 0.8, solver="random", gauss_newton=0, refit="no", threads=1)
    weights = torch.cat([trained.state_dict()[layer.name].abs().ravel() for layer in pruned.layers])
    gone = torch.cat([torch.from_numpy(layer.pruned).ravel() for layer in pruned.layers])
    assert weights[gone].max() <= weights[~gone].min()
    for layer in pruned.layers:
        kept = torch.from_numpy(~layer.pruned)
        assert torch.equal(pruned.model.state_dict()[layer.name][kept], trained.state_dict()[layer.name][kept])
    assert "magnitude alone has a lower held-out loss" in caplog.text


def test_stages_take_fresh_samples():
    from cbs_opt.instances.data import own_source
    from cbs_opt.pruning.samples import divided

    x = torch.arange(100.0)[:, None]
    pool, held = divided(own_source((x, torch.zeros(100, dtype=torch.int64)), nn.Linear(1, 1), "data"), 10, 3)
    drawn = [pool.drawn(stage, 30).batch(0, 30)[:, 0].tolist() for stage in range(1, 7)]
    assert len(held) == 10
    aside = set(held.batch(0, 10)[:, 0].tolist())
    for first in (0, 3):
        three = [number for part in drawn[first : first + 3] for number in part]
        assert len(set(three)) == 90 and not set(three) & aside
    assert drawn[:3] != drawn[3:]
    assert pool.drawn(2, 30).batch(0, 30)[:, 0].tolist() == drawn[1]
    assert len(pool.drawn(1, 500)) == 90


def test_mirror_images_are_samples_of_their_own():
    from cbs_opt.instances.data import own_source
    from cbs_opt.pruning.samples import divided

    x = torch.rand(50, 1, 2, 3)
    source = own_source((x, torch.arange(50)), nn.Conv2d(1, 1, 1), "data")
    pool, held = divided(source, 10, 3, mirror=True)
    assert len(pool) == 80 and len(held) == 10
    drawn = [pool.drawn(stage, 40).loaded() for stage in (1, 2)]
    images = torch.cat([part.inputs for part in drawn])
    numbers = torch.cat([part.labels for part in drawn])
    assert sorted(numbers.tolist()) == sorted(2 * [k for k in range(50) if k not in held.labels])
    mirrored = torch.tensor([torch.equal(image, x[k].flip(-1)) for image, k in zip(images, numbers, strict=True)])
    assert mirrored.sum() == 40 and len(numbers[mirrored].unique()) == 40
    assert torch.equal(images[~mirrored], x[numbers[~mirrored]])
    assert torch.equal(held.batch(0, 10), x[held.labels])


@pytest.mark.parametrize(
    "data",
    [
        (torch.rand(40, 3), torch.zeros(40, dtype=torch.int64)),
        (torch.rand(40, 1, 4, 4), torch.zeros(40, 4, 4, dtype=torch.int64)),
    ],
)
def test_what_is_no_image_with_a_label_is_not_mirrored(data):
    model = nn.Linear(3, 2) if data[0].dim() == 2 else nn.Conv2d(1, 2, 1)
    with pytest.raises(UsageError, match="`--mirror` is for images"):
        cbs_opt.prune(model, data, 0.5, mirror=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": 0}, "`stages` must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "`seed` must be a whole number of at least 0, got -1"),
        ({"sampels": 3}, "`prune` has no option `sampels`: did you mean `samples`?"),
        ({"sparsity_per_layer": {}}, "`prune` has no option `sparsity_per_layer`: did you mean `layers`?"),
        ({"layers": {"0.weight": 90}}, "`layers`: the sparsity of '0.weight' must be a fraction between 0 and 1"),
        ({"layers": {"0.weight": float("nan")}}, "`layers`: the sparsity of '0.weight' must be a fraction"),
        ({"layers": 0.5}, "`layers` must be a mapping from names or patterns to sparsities, got 0.5"),
        ({"final_stages": 2}, "at most 1, got 2"),
        ({"schedule": "steep"}, "`schedule` must be one of"),
        ({"source": "fisher", "sequential": True}, "`sequential` goes layer by layer"),
        ({"source": "fisher", "targets": "dense"}, "outputs of layers"),
        ({"source": "reconstruction", "targets": "loss"}, "which reconstruction has not"),
        ({"source": "fisher", "batch": 8, "samples": 4}, "less than one `batch`"),
        ({"damping": 1, "relative_damping": 1}, "exclude each other"),
        ({"damping": (0.1, -1)}, "must be finite numbers ≥ 0, got -1"),
        ({"update_scale": ()}, "at least one number"),
        ({"damping": []}, "`damping` must have at least one number"),
        ({"relative_damping": ()}, "`relative_damping` must have at least one number"),
        ({"seed": 2**70}, "`seed` must be a whole number of at most 9223372036854775807"),
        ({"test_data": torch.zeros(3)}, "`prune` has no option `test_data`: did you mean `held_out`?"),
        ({"tensors": ["0.weight"]}, "did you mean `names`?"),
        ({"first_order_scale": 0.1}, "is for `targets` loss, got none"),
        ({"first_order_scale": (), "targets": "loss"}, "at least one number"),
        ({"refit": "perhaps"}, "`refit` must be one of"),
        ({"refit": "yes", "update_scale": 0.0}, "it goes without `update_scale` 0"),
        ({"split": "auto", "per_layer": True}, "goes without"),
        ({"curvature": "inverse-hessian", "damping": (1, 2)}, "several dampings need"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(UsageError) as refusal:
        Method.of(options)
    assert words in str(refusal.value)


@pytest.mark.parametrize("memory", [8, -1, "8 GB", float("nan")])
def test_memory_is_in_bytes(trained, memory):
    data = torch.rand(20, 64), torch.zeros(20, dtype=torch.int64)
    words = "`memory` must be a number of bytes, at least 1000000, got"
    with pytest.raises(UsageError, match=words):
        cbs_opt.prune(trained, data, 0.5, memory=memory)
    with pytest.raises(UsageError, match=words):
        cbs_opt.export(trained, *data, memory=memory)


def test_names_in_a_text(trained):
    data = torch.rand(20, 64), torch.zeros(20, dtype=torch.int64)
    for option in ("names", "exclude"):
        with pytest.raises(UsageError, match=rf"`{option}` must be a sequence .*\['0.weight'\], got a text"):
            cbs_opt.prune(trained, data, 0.5, **{option: "0.weight"})


def test_data_in_place_of_a_sparsity(trained):
    data = torch.rand(20, 64), torch.zeros(20, dtype=torch.int64)
    with pytest.raises(UsageError, match=r"such as 0\.5 or 50%, got tuple"):
        cbs_opt.prune(trained, data, data)


def test_data_without_labels(trained):
    x, _ = blobs(300)
    pruned = cbs_opt.prune(trained, x, 0.5, source="reconstruction", **FAST)
    assert pruned.before is None and pruned.after is None and pruned.sparsity == 0.5
    with pytest.raises(InstanceError, match="no labels"):
        cbs_opt.prune(trained, x, 0.5, source="fisher", **FAST)


def test_small_networks_wait_less():
    assert Method().limited(2000).time_limit == 12.0
    assert Method().limited(10**6).time_limit == 30.0
    assert Method(stages=2).limited(10**6).time_limit == 10.0
    assert Method(max_iterations=3).limited(10**6).time_limit is None
    assert Method(time_limit=0.5).limited(10**6).time_limit == 0.5


def _model_of(model, data, sparsity=0.5, **options):
    """The quadratic model of one shot."""
    method = Method(sparsity=sparsity, held_out=20, samples=100, **FAST, **options)
    run = Run(model, own_source(data, model, "data"), method)
    run()
    return run.first_model


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 4.0),
        ({"fisher": "sampled"}, 4.0),
        ({"temperature": 1.0}, None),
        ({"temperature": 2.5}, 2.5),
        ({"targets": "loss"}, None),
        ({"targets": "loss", "temperature": 2}, 2),
        ({"fisher": "empirical"}, None),
        ({"source": "reconstruction"}, None),
        ({"source": "fisher"}, None),
    ],
)
def test_class_probabilities_of_kfac_are_softened(trained, options, expected):
    made = _model_of(trained, blobs(200), **options)
    assert made.metadata.get("temperature") == expected


def test_the_temperature_goes_where_it_does_not_apply():
    torch.manual_seed(0)
    x, y = torch.randn(200, 6), torch.randint(120, (200,))
    many = nn.Linear(6, 120)
    assert _model_of(many, (x, y)).metadata["temperature"] == 4  # labels are drawn: there are many classes
    assert "temperature" not in _model_of(many, (x, y), fisher="exact").metadata
    with_values = own_source((x, torch.randn(200, 3)), nn.Linear(6, 3), "data")
    run = Run(nn.Linear(6, 3), with_values, Method(sparsity=0.5, samples=100, **FAST), loss="mse")
    assert run().stages[0].predicted_loss is not None and "temperature" not in run.first_model.metadata
    for wrong in (0, -1, float("nan"), "4", 1e39):
        with pytest.raises(UsageError, match=r"`temperature` must be a number from 0.001 to 1000"):
            Method(temperature=wrong)
    assert Method(source="fisher", temperature=1).temperature == 1
    for options, got in (({"source": "fisher"}, "fisher"), ({"fisher": "empirical"}, "empirical")):
        with pytest.raises(UsageError, match=f"`temperature` is of the class probabilities.*got {got}"):
            Method(temperature=2.0, **options)
    for fisher in (None, "sampled"):
        with pytest.raises(UsageError, match=r"`temperature` is of class probabilities, which cross entropy"):
            values = x, torch.randn(200, 3)
            cbs_opt.prune(nn.Linear(6, 3), values, 0.5, loss="mse", fisher=fisher, temperature=2.0, **FAST)


def test_states_of_methods_without_a_temperature_have_none():
    assert "temperature" not in Method(source="fisher").to_dict()
    assert Method().to_dict()["temperature"] is None and Method(temperature=2).to_dict()["temperature"] == 2
