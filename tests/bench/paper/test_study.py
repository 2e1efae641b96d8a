"""Studies of pruned networks: what a file may say, and how mistakes in it are told."""

import pytest

from cbs_opt import UsageError
from cbs_opt.bench.paper.rows import plan_study, restricted
from cbs_opt.bench.paper.study import Study
from cbs_opt.bench.paper.study_file import read_study, shipped_studies
from cbs_opt.bench.paper.subject import Files


def test_a_study_survives_its_store(study_file):
    study = read_study(study_file)
    assert Study.from_json(study.to_json()) == study
    assert study.images == 140
    assert study.sparsities == (0.4, 0.8)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("seeds = [0, 1]", "seedz = [0, 1]", "line 5: there is no key `seedz` here; known: title, description"),
        ("choice_images = 60", "", "`choice_images` is missing: a whole number ≥ 1"),
        ("images = 80\n", "", "source 'fisher': `images` must be a whole number ≥ 1, got None"),
        (
            "damping = 1e-3",
            "dampin = 1e-3",
            "line 11: source 'fisher' has no option `dampin`; known: images, source",
        ),
        ("damping = 1e-3", "damping = -1", "source 'fisher': `damping` must be a finite number ≥ 0, got -1"),
        ('source = "kfac"\nselect', 'source = "kfax"\nselect', "there is no source 'kfax'; known: fisher, kfac"),
        ('select = "ls"', 'select = "lz"', "line 58: there is no solver 'lz'; known: random, magnitude"),
        ('select = "ls"', 'select = "obs"', "the network judges ls and cbs only, not 'obs'"),
        ('update = "single"', 'update = "double"', "line 52: `update` must be 'none' or 'single' or 'best' or"),
        ("draws = 4", "drawz = 4", "solver 'cbs' has no parameter 'drawz'; known: draws"),
        ('judge = "network"\nupdate', 'judge = "network"\niterations = 3\nupdate', "end by `parameters`"),
        ('published = "MP"', 'published = "CBS"', "there is no published column 'CBS'; known: MP"),
        ("MP = [90.0, 0.0]", "MP = [90.0]", "the published column 'MP' must have 2 figures in per cent"),
        ('name = "CBS"', 'name = "CBS-S"', "line 39: method 'CBS-S' is here twice"),
        ('family = "ours"\n', "", "a method without `family`: 'as published' or 'ours'"),
        ("stages = 2,", "stagez = 2,", "there is no option `stagez` of pruning; known: sparsity, stages"),
        ("stages = 2,", "stages = 0,", "`stages` must be a whole number of at least 1, got 0"),
        ("stages = 2,", "seed = 2,", "`seed` is set by the study"),
        ("pruning = {", 'source = "fisher"\npruning = {', "`source` is not of a method with `pruning`"),
        ("choice_images = 60", "choice_images = 60\ntraining_images = 100", "must be at least 140, those of"),
    ],
)
def test_mistakes_are_told_in_one_sentence(study_file, old, new, sentence):
    text = study_file.read_text()
    assert old in text
    study_file.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        read_study(study_file)
    assert str(caught.value).startswith(str(study_file))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_one_instance_follow_each_other(study_file):
    plan = plan_study(read_study(study_file), Files(None, None))
    order = [(task.seed, task.method.source.name, task.sparsity) for task in plan.tasks]
    sources = ["fisher", "kfac", "all training images"]
    assert order == sorted(order, key=lambda place: (place[0], sources.index(place[1]), place[2]))
    assert len({task.key for task in plan.tasks}) == len(plan.tasks) == 2 * (4 + 5) + 2 + 1
    assert {task.budget for task in plan.tasks} == {18, 36}  # of 45 weights


def test_a_study_can_be_restricted(study_file):
    study = restricted(read_study(study_file), [3], [0.8], ["CBS", "MP"])
    assert [(m.name, m.seeds, m.sparsities) for m in study.methods] == [
        ("MP", (3,), (0.8,)),
        ("CBS", (3,), (0.8,)),
    ]
    with pytest.raises(UsageError, match="there is no method 'SGD'; known: MP, CBS"):
        restricted(study, methods=["SGD"])


@pytest.mark.parametrize("name", shipped_studies())
def test_what_ships_can_be_read(name):
    study = read_study(name)
    assert study.name == name
    columns = {method.published for method in study.methods if method.published}
    assert columns == set(study.published) >= {"MP", "WF-S", "CBS-S", "WF", "CBS"}
    assert all(set(study.sparsities) <= set(column) for column in study.published.values())


def test_files_are_needed_for_networks_of_the_package():
    with pytest.raises(UsageError, match="`--checkpoint` is needed for 'mlpnet'"):
        plan_study(read_study("mlpnet"), Files(None, None))


def test_reconstruction_predicts_no_loss():
    methods = {method.name: method for method in read_study("mlpnet").methods}
    assert not methods["reconstruction + joint"].predicts_loss
    assert methods["kfac exact + joint"].predicts_loss
    assert methods["60 stages, Fisher"].predicts_loss
