"""A network with the images of one seed in memory: exports instances, and scores weights."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cbs_opt.bench.paper.study import Source, Study
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instance import Instance
from cbs_opt.typing import FloatArray

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from cbs_opt.instances.data import SampleSource
    from cbs_opt.instances.networks import Network
    from cbs_opt.instances.tensors import Place


@dataclass(frozen=True)
class Files:
    """The user's files.

    Attributes
    ----------
    checkpoint : Path or None
        None for a factory that brings its weights.
    data, test_data : str or None
        Training and test images, see `cbs_opt.instances.data`; None for those of a factory. Test images default to
        the test split of `data`.
    """

    checkpoint: Path | None
    data: str | None
    test_data: str | None = None


class Figures(NamedTuple):
    """Accuracy, between 0 and 1, and mean cross entropy."""

    accuracy: float
    loss: float


class Staged(NamedTuple):
    """A network that `cbs_opt.prune` made.

    Attributes
    ----------
    choice, test : Figures
    predicted : float or None
        Of one shot; stages predict one step each.
    images : int
        Training images that it saw, those of the choice included.
    seconds : float
        Of the processor, exports and choices included; the export of one shot only where it is made.
    status : str
    """

    choice: Figures
    test: Figures
    predicted: float | None
    images: int
    seconds: float
    status: str


class _Images(NamedTuple):
    """Samples for the curvature, for choices among pruned networks, and for their scores.

    `drawn` are all training images in the order of the seed, the first `pool` of which are not of the choice.
    """

    drawn: SampleSource
    pool: int
    training: SampleSource
    choice: SampleSource
    test: SampleSource


class Subject:
    """A network, its training images of one seed, and its test images.

    Parameters
    ----------
    study : Study
    files : Files
    seed : int

    Attributes
    ----------
    network : Network
        With its trained weights.

    Raises
    ------
    UsageError, InstanceError
        For files that are missing or do not fit the network or the study.
    """

    def __init__(self, study: Study, files: Files, seed: int) -> None:
        import copy

        self.study, self.seed = study, seed
        self.network = open_network(study, files)
        self._scratch: Module = copy.deepcopy(self.network.model)
        self._images = _images(study, files, self.network, seed)
        self._models: dict[str, Instance | None] = {}

    @cached_property
    def places(self) -> list[Place]:
        """The tensors that are pruned."""
        from cbs_opt.instances.plan import make_plan

        network = self.network
        names = network.prunable
        return make_plan(network.model, names, None, source="fisher", run=lambda model: ()).places

    @cached_property
    def dense_test(self) -> Figures:
        """The dense network on the test images."""
        return score(self.network.model, self._images.test)

    @cached_property
    def dense_choice(self) -> Figures:
        """The dense network on the training images of the choice."""
        return score(self.network.model, self._images.choice)

    @property
    def test_images(self) -> int:
        """How many there are."""
        return len(self._images.test)

    def export(self, source: Source) -> Instance:
        """The instance of a source, from the first of the training images.

        Raises
        ------
        InstanceError
            Where a tensor has no place in it: methods of a study prune the same weights.
        """
        from cbs_opt.instances.export import export

        samples, network = self._images.training, self.network
        options = json.loads(source.options)
        instance = export(
            network.model,
            samples.batch(0, source.images),
            samples.labels[: source.images],
            network.prunable,
            loss=network.loss,
            metric=network.metric,
            output_key=network.output_key,
            seed=self.seed,
            **options,
        )
        if instance.n != (n := sum(place.layout.size for place in self.places)):
            raise InstanceError(f"source '{source.name}' takes {instance.n} of the {n} weights: all are needed")
        return instance

    def prune(self, sparsity: float, options: str) -> Staged:
        """Prune by `cbs_opt.prune`, with the training images of the choice held out.

        Parameters
        ----------
        sparsity : float
        options : str
            JSON, of `cbs_opt.pruning.method.Method`. The quadratic model of one shot is made once for all
            sparsities.
        """
        from cbs_opt.pruning.method import Method
        from cbs_opt.pruning.run import Run

        network, images = self.network, self._images
        method = Method(sparsity=sparsity, seed=self.seed, threads=self.study.threads, **json.loads(options))
        clock = time.process_time()
        run = Run(
            network.model,
            images.drawn.subset(np.arange(images.pool)),
            method,
            names=network.prunable,
            loss=network.loss,
            metric=network.metric,
            output_key=network.output_key,
            held_out=images.choice,
            first_model=self._models.get(options),
        )
        found = run()
        self._models[options] = run.first_model
        seconds = time.process_time() - clock
        of_loss = run.first_model is not None and "temperature" not in run.first_model.metadata
        predicted = found.stages[0].predicted_change if len(found.stages) == 1 and of_loss else None
        choice, test = score(found.model, images.choice), score(found.model, images.test)
        return Staged(choice, test, predicted, found.seen + found.held_out, seconds, found.stages[-1].status)

    def on_test(self, weights: FloatArray) -> Figures:
        """Score weights, float64 (n,), on the test images."""
        return self._score(weights, self._images.test)

    def on_choice(self, weights: FloatArray) -> Figures:
        """Score weights, float64 (n,), on the training images of the choice."""
        return self._score(weights, self._images.choice)

    def _score(self, weights: FloatArray, samples: SampleSource) -> Figures:
        import torch

        parameters: dict[str, Tensor] = dict(self._scratch.named_parameters())
        with torch.no_grad():
            for place in self.places:
                values = torch.from_numpy(place.tensor(np.asarray(weights, dtype=np.float32)))
                parameters[place.name].copy_(values)
        return score(self._scratch, samples)


def open_network(study: Study, files: Files) -> Network:
    """The study's network with the weights of the checkpoint."""
    from cbs_opt.instances.networks import trained_network

    return trained_network(study.network, files.checkpoint, files.data, mean=study.mean, std=study.std)


def score(model: Module, samples: SampleSource) -> Figures:
    """Accuracy and mean cross entropy of a network.

    Raises
    ------
    UsageError
        For samples without labels of classes.
    """
    from cbs_opt.instances.scores import evaluate

    found = evaluate(model, samples)
    if found is None or found.accuracy is None:
        raise UsageError("the samples have no labels of classes: accuracy needs them")
    return Figures(found.accuracy, found.loss)


def _images(study: Study, files: Files, network: Network, seed: int) -> _Images:
    """Draw the training images by the seed, and read all that the study needs."""
    from cbs_opt.instances.data import HeldSource, open_samples

    drawn = open_samples(files.data, network, "train", None, seed)
    count, shared = len(drawn), study.training_images
    if shared is not None and count <= shared:
        raise UsageError(
            f"{files.data}: holds {count} images, of which the study takes {shared} for training: none is left to "
            "score with"
        )
    last = count if shared is None else shared
    if last < study.images:
        raise UsageError(
            f"{files.data}: holds {last} training images, the study takes {study.images}: lower `images` of its "
            "sources or `choice_images`"
        )

    def held(name: str, start: int, stop: int) -> HeldSource:
        return HeldSource(name, drawn.batch(start, stop), drawn.labels[start:stop])

    if shared is None:
        read = open_samples(files.test_data or files.data, network, "test").read()
        test = HeldSource("the test images", read.inputs, read.labels)
    else:
        test = held("the test images", shared, count)
    training = held("the training images", 0, max(study.source_images, 1))  # pictures cannot be none
    choice = held("the training images", last - study.choice_images, last)
    return _Images(drawn, last - study.choice_images, training, choice, test)
