"""What a study is: a network, methods that prune it, sparsities, seeds, and what was published.

A seed shuffles the training images. Sources take the first ones, as `cbs-export --seed` does; on the last
`choice_images` selections and update scales are chosen, and the increase of the loss is measured. No method sees a
test image. `study_file` reads studies.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

PUBLISHED, OURS = "as published", "ours"
FAMILIES = (PUBLISHED, OURS)
NETWORK, MODEL = "network", "model"
JUDGES = (MODEL, NETWORK)
JUDGED = ("ls", "cbs")
"""Selections that the network's loss can judge."""

PRUNE = "prune"
"""What stands for the solver of methods that `cbs_opt.prune` runs."""

NONE, SINGLE, BEST, SCALED = "none", "single", "best", "scaled"
UPDATES = {
    NONE: "no update",
    SINGLE: "WoodFisher's update: that of each pruned weight alone, added up",
    BEST: "the best update (CBS-U)",
    SCALED: "the best update times the one of .1, .2, … 1 with the least loss on training images",
}


@dataclass(frozen=True)
class Source:
    """Where H comes from: the options of an export.

    Attributes
    ----------
    name : str
    images : int
        Training images that it takes.
    options : str
        Canonical JSON of keyword arguments of `cbs_opt.instances.recipe.Recipe`.
    """

    name: str
    images: int
    options: str


@dataclass(frozen=True)
class Method:
    """One column of the table.

    Attributes
    ----------
    name : str
    family : {"as published", "ours"}
    source : Source
    select : str
        A solver.
    objective : {"selection", "joint"}
    judge : {"model", "network"}
        What chooses among draws and steps: the quadratic model, or the network's loss on training images.
    parameters : str
        Of the solver, canonical JSON.
    update : {"none", "single", "best", "scaled"}
    time_limit : float or None
        Processor seconds of the solver.
    iterations : int or None
    sparsities : tuple of float
    seeds : tuple of int
    published : str or None
        The published column to compare with.
    pruning : str or None
        Options of `cbs_opt.pruning.method.Method` as canonical JSON: the whole method is `cbs_opt.prune`, in one
        shot or in stages, on all training images but those of the choice, which are held out for it.
    """

    name: str
    family: str
    source: Source
    select: str
    objective: str
    judge: str
    parameters: str
    update: str
    time_limit: float | None
    iterations: int | None
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    published: str | None
    pruning: str | None = None

    @property
    def predicts_loss(self) -> bool:
        """Whether its quadratic model is one of the loss: that of the reconstruction error has another unit."""
        options = json.loads(self.source.options if self.pruning is None else self.pruning)
        return bool(options.get("source") != "reconstruction")

    @property
    def settings(self) -> str:
        """All that decides about its results but seed and sparsity, as canonical JSON: the key of its rows."""
        if self.pruning is not None:
            return self.pruning
        content = {
            "source": json.loads(self.source.options) | {"images": self.source.images},
            "judge": self.judge,
            "update": self.update,
            "parameters": json.loads(self.parameters),
        }
        if self.iterations is not None:
            content["iterations"] = self.iterations
        return json.dumps(content, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Study:
    """A study as read.

    Attributes
    ----------
    name, title, network : str
    mean, std : tuple of float or None
        Instead of the network's own normalisation.
    training_images : int or None
        Where training and test images come from one file: so many are for training, the others score.
    choice_images : int
    threads : int
    methods : tuple of Method
    published : mapping of str to mapping of float to float
        Accuracies in per cent by column and sparsity.
    dense : float or None
        The published accuracy of the dense network, in per cent.
    notes : tuple of str
        Sentences for the report.
    """

    name: str
    title: str
    network: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    training_images: int | None
    choice_images: int
    threads: int
    methods: tuple[Method, ...]
    published: Mapping[str, Mapping[float, float]]
    dense: float | None
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """The study as a store keeps it; `Study.from_json` reads it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Study:
        """The study of a store."""
        content = json.loads(text)
        methods = [
            Method(
                **method
                | {
                    "source": Source(**method["source"]),
                    "sparsities": tuple(method["sparsities"]),
                    "seeds": tuple(method["seeds"]),
                }
            )
            for method in content["methods"]
        ]
        published = {
            column: {float(sparsity): value for sparsity, value in values.items()}
            for column, values in content["published"].items()
        }
        lists = {key: None if content[key] is None else tuple(content[key]) for key in ("mean", "std", "notes")}
        return cls(**content | lists | {"methods": tuple(methods), "published": published})

    @property
    def images(self) -> int:
        """Training images that a study needs."""
        return self.source_images + self.choice_images

    @property
    def source_images(self) -> int:
        """The most that a source takes."""
        return max(method.source.images for method in self.methods)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of any method, in the order of the file."""
        return tuple(dict.fromkeys(seed for method in self.methods for seed in method.seeds))

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Of any method, increasing."""
        return tuple(sorted({sparsity for method in self.methods for sparsity in method.sparsities}))
