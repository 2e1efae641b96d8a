"""What `cbs-apply` measures: the network before and after, and with magnitude pruning at the same budget."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cbs_opt.cli import common
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray

if TYPE_CHECKING:
    from torch import Tensor

    from cbs_opt.instances.data import SampleSource
    from cbs_opt.instances.networks import Network
    from cbs_opt.instances.scores import Score

logger = logging.getLogger("cbs_opt")

Tensors = dict[str, "Tensor"]


def magnitude_at(instance: Instance, pruned: BoolArray) -> BoolArray:
    """The smallest weights, as many as a selection prunes, of each group as many; bool (n,)."""
    same = instance.budget.of_part(slice(None), pruned)
    fixed = instance.fixed
    if fixed is not None and not ((fixed == 0) | ((fixed == 1) == pruned)).all():
        fixed = None  # the selection does not keep to it either
    return same.cheapest(np.abs(instance.weights), fixed)


@dataclass
class Scores:
    """What was measured.

    Attributes
    ----------
    network : str or None
        Its name, where it is known.
    before : Score or None
    after, magnitude : list of Score or None
        For each solution, and for magnitude pruning at the same budget.
    worries : list of str
        Warnings for the report.
    model : Network or None
        With the weights that were evaluated last.
    source : SampleSource or None
    """

    network: str | None
    before: Score | None = None
    after: list[Score | None] = field(default_factory=list)
    magnitude: list[Score | None] = field(default_factory=list)
    worries: list[str] = field(default_factory=list)
    model: Network | None = None
    source: SampleSource | None = None


class Scoring:
    """The network and the data of one `cbs-apply`, opened when they are needed.

    Parameters
    ----------
    options : argparse.Namespace
    instance : Instance
    interrupts : callable
        Whether scoring is to end.
    """

    def __init__(self, options: argparse.Namespace, instance: Instance, interrupts: common.Interrupts) -> None:
        self._options, self._instance, self._stop = options, instance, interrupts
        said = instance.metadata.get("network")
        self.result = Scores(options.network or (said if isinstance(said, str) else None))
        self._saved: Tensors | None = None
        self._own: Tensors = {}

    def open(self) -> None:
        """Load the network and its data, unless neither is needed."""
        options = self._options
        nothing = options.network is None and options.data is None and options.onnx is None
        if nothing or (options.no_score and options.onnx is None):
            return
        network = self._network()
        self.result.model = network
        if options.data is None and network.data is None and network.test_data is None:
            if options.onnx is not None:
                raise UsageError("`--onnx` traces the network with a sample: name data with `--data`")
            logger.info("no `--data`: accuracy and loss are not measured")
            return
        from cbs_opt.instances.data import open_samples

        self.result.source = open_samples(options.data, network, options.split, options.samples, options.seed)

    def _network(self) -> Network:
        from cbs_opt.instances.checkpoints import load_checkpoint
        from cbs_opt.instances.networks import is_factory, load_network, network_names

        options, spec = self._options, self.result.network
        if spec is None:
            raise UsageError(f"{options.instance}: does not name its network: give it with `--network`")
        if options.network is None and is_factory(spec):
            raise UsageError(
                f"{options.instance}: its network '{spec}' is a factory, which is code: repeat it as "
                f"`--network {spec}` to run it"
            )
        try:
            network = load_network(spec, *normalisation(options, self._instance))
        except UsageError as error:
            if options.network is not None or spec in network_names():
                raise
            raise UsageError(f"{options.instance}: {error}; `--network` overrides the instance") from None
        load_checkpoint(network.model, options.checkpoint, checkpoint_key(options, self._instance))
        return network

    def measure(self, candidates: Sequence[Tensors], magnitude: Sequence[Tensors]) -> None:
        """Score the network before, with the tensors of every candidate, and with magnitude pruning for each."""
        network, source = self.result.model, self.result.source
        if network is None or source is None or self._options.no_score:
            return
        if source.labels is None:
            logger.warning(f"{source.name}: has no labels: nothing is scored")
            return
        from cbs_opt.instances.scores import torch_device, worries

        device = torch_device(self._options.device)
        logger.info(f"{len(source)} samples of {source.name}, {self._options.split} split, on {device}")
        rounds: list[Tensors] = [{}, *candidates, *magnitude]
        with _bar(self._options.quiet, len(rounds) * len(source)) as tell:
            scores: list[Score | None] = []
            for number, tensors in enumerate(rounds):
                self.take(tensors)
                start = number * len(source)
                try:
                    scores.append(self._score(device, partial(_shifted, tell, start)))
                except InstanceError as error:
                    raise InstanceError(f"{error} (`--no-score` writes the checkpoint without scores)") from error
                except UsageError as error:
                    if number or self._declared() != (None, None, None) or self._options.data is not None:
                        raise
                    logger.warning(f"nothing is scored: {error}")
                    return
        self.result.before, self.result.after = scores[0], scores[1 : 1 + len(candidates)]
        self.result.magnitude = scores[1 + len(candidates) :]
        for after in self.result.after:
            for text in worries(self.result.before, after, network.classes):
                logger.warning(text)
                self.result.worries.append(text)

    def _declared(self) -> tuple[Any, Any, Any]:
        """Loss, metric and relevant part of the output: from the command line, the factory, or the instance."""
        network, noted = self.result.model, self._instance.metadata
        found = []
        for key in ("loss", "metric", "output_key"):
            value = getattr(self._options, key) or getattr(network, key)
            if value is None and isinstance(noted.get(f"declared_{key}"), str):
                value = noted[f"declared_{key}"]
                if key != "output_key" and ":" in value:
                    raise UsageError(
                        f"{self._options.instance}: its {key} '{value}' is code: repeat it as `--{key} {value}` "
                        "to "
                        "run it"
                    )
            found.append(value)
        return found[0], found[1], found[2]

    def _score(self, device: Any, tell: Callable[[int], None]) -> Score | None:
        from cbs_opt.instances.scores import evaluate

        assert self.result.model is not None and self.result.source is not None
        loss, metric, key = self._declared()
        return evaluate(
            self.result.model.model,
            self.result.source,
            loss=loss,
            metric=metric,
            output_key=key,
            device=device,
            should_stop=self._stop,
            progress=tell,
        )

    def take(self, tensors: Tensors) -> None:
        """Give the network these tensors, and its own for all others."""
        import torch

        from cbs_opt.instances.plain import effective_tensors, set_effective
        from cbs_opt.instances.tensors import read_places

        network = self.result.model
        if network is None:
            return
        if self._saved is None:
            self._saved = {name: tensor.detach().clone() for name, tensor in network.model.state_dict().items()}
            self._own = {name: tensor.clone() for name, tensor in effective_tensors(network.model).items()}
        with torch.no_grad():
            for name, tensor in network.model.state_dict().items():
                if name in self._saved:  # a parametrisation that could not hold pruned values is gone by now
                    tensor.copy_(self._saved[name])
        for place in read_places(self._instance):
            if place.name not in self._own:
                raise InstanceError(f"the instance prunes {place.name}, which is no parameter of {network.name}")
            set_effective(network.model, place.name, tensors.get(place.name, self._own[place.name]))


def checkpoint_key(options: argparse.Namespace, instance: Instance) -> str | None:
    """The dictionary of the checkpoint: as given, or as the exporter noted it."""
    noted = instance.metadata.get("checkpoint")
    key = noted.get("key") if isinstance(noted, dict) else None
    return options.checkpoint_key or (key if isinstance(key, str) else None)


def normalisation(options: argparse.Namespace, instance: Instance) -> tuple[Any, Any]:
    """Mean and standard deviation as given, or as the exporter noted them."""
    given = (options.mean, options.std)
    noted = instance.metadata.get("normalisation")
    noted = noted if isinstance(noted, dict) else {}
    mean, std = (
        new if new is not None else noted.get(key) for key, new in zip(("mean", "std"), given, strict=True)
    )
    return mean, std


def score_lines(content: dict[str, Any]) -> list[str]:
    """Metric and loss of the report."""
    before, after, magnitude = (content.get(key) for key in ("before", "after", "magnitude"))
    if before is None or after is None:
        return []
    over = f"{after['samples']} samples, {content['split']} split"
    if before["samples"] != after["samples"]:
        over = f"interrupted: {before['samples']} samples before, {after['samples']} after"

    def line(name: str, show: Callable[[dict[str, Any]], str], more: str) -> str:
        added = f", {show(magnitude)} by magnitude" if magnitude is not None else ""
        return f"{name:<9} {show(before)} before, {show(after)} after{added}{more}"

    lines = []
    if before["metric"] is not None:
        shares = ("accuracy", "mean-iou")
        percent = before["metric"] in shares or before["metric"].startswith("top-")

        def value(score: dict[str, Any]) -> str:
            number = score["value"]
            return "nan" if number is None else f"{number:.2%}" if percent else f"{number:.4g}"

        lines.append(line(before["metric"], value, f"  ({over})"))
        over = ""
    lines.append(line("loss", lambda score: f"{score['loss']:.4f}", f"  ({over})" if over else ""))
    return lines


def trial_line(trial: dict[str, Any]) -> str:
    """One of several solutions, as text."""
    if "score" not in trial:
        return f"{trial['sparsity']:>7.2%} pruned: not scored  ({trial['solution']})"

    def value(score: dict[str, Any]) -> float:
        return float(score["loss"] if score["value"] is None else score["value"])

    name = trial["score"]["metric"] or "loss"
    added = f", {value(trial['magnitude']):.4f} by magnitude" if "magnitude" in trial else ""
    return f"{trial['sparsity']:>7.2%} pruned: {name} {value(trial['score']):.4f}{added}  ({trial['solution']})"


def _shifted(tell: Callable[[int], None], start: int, done: int) -> None:
    tell(start + done)


@contextmanager
def _bar(quiet: bool, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's stderr, else nothing."""
    if quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scoring", total=total)
        yield lambda done: progress.update(task, completed=done)
