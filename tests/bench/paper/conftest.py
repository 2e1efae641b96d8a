"""A tiny network in a module of its own, and a study of it."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

NETWORK = """
import torch
from torch import nn


def make():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(260, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:200]), y[:200]).backward()
        optimizer.step()
    return model, (x[:200], y[:200]), (x[200:], y[200:])
"""

STUDY = """
title = "A tiny network"
network = "./tiny_net.py:make"
sparsities = [0.4, 0.8]
seeds = [0, 1]
choice_images = 60
notes = ["A note."]

[sources.fisher]
images = 80
damping = 1e-3

[sources.kfac]
source = "kfac"
fisher = "exact"
images = 40

[published]
dense = 95.0
sparsities = [0.4, 0.8]
MP = [90.0, 0.0]

[[methods]]
name = "MP"
family = "as published"
source = "fisher"
select = "magnitude"
published = "MP"

[[methods]]
name = "CBS-S"
family = "as published"
source = "fisher"
select = "cbs"
judge = "network"
parameters = { draws = 4, epsilon = 1e-4 }

[[methods]]
name = "CBS"
family = "as published"
source = "fisher"
select = "cbs"
judge = "network"
parameters = { draws = 4, epsilon = 1e-4 }
update = "best"

[[methods]]
name = "WF"
family = "as published"
source = "fisher"
select = "obs"
update = "single"

[[methods]]
name = "LS, scaled"
family = "as published"
source = "fisher"
select = "ls"
judge = "network"
update = "scaled"
sparsities = [0.8]

[[methods]]
name = "kfac"
family = "ours"
source = "kfac"
select = "obs"
update = "best"
seeds = [0]

[[methods]]
name = "two stages"
family = "ours"
pruning = { source = "fisher", stages = 2, samples = 40, batch = 4, relative_damping = 0.1 }
sparsities = [0.8]
seeds = [0]
"""


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    """A study of a tiny network, in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_net.py").write_text(NETWORK)
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return path
