"""`cbs-export`: from a trained network and its data to an instance file."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbs_opt.cli import common
from cbs_opt.cli.arguments import add_loss_options, number_option, whole_option
from cbs_opt.cli.network_options import (
    add_budget_options,
    add_log_options,
    add_network_options,
    blocks_option,
    read_network,
)
from cbs_opt.cli.work_progress import WorkProgress
from cbs_opt.errors import UsageError
from cbs_opt.version import __version__
from cbs_opt.view.text import count

if TYPE_CHECKING:
    from cbs_opt.instances.export import Export
    from cbs_opt.instances.networks import Network
    from cbs_opt.instances.recipe import Recipe

logger = logging.getLogger("cbs_opt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return common.run_main("cbs-export", _main, arguments)


def export_parser() -> common.Parser:
    """The parser of `cbs-export`."""
    parser = common.Parser(
        "cbs-export",
        "Convert a trained network to an instance: its weights, the curvature of its loss on samples, a budget.",
    )
    add = parser.add_argument
    add_network_options(parser)
    add("-o", "--output", type=Path, required=True, metavar="INSTANCE.npz", help="the file to write")
    add("--split", choices=("train", "test"), default="train", help="default: train")
    add("--samples", type=whole_option(1), default=1000, metavar="M", help="drawn at random; default: 1000")
    add(
        "--batch",
        type=whole_option(1),
        default=1,
        metavar="B",
        help="each row is the mean gradient of B samples; default: 1",
    )
    add(
        "--source",
        choices=("fisher", "reconstruction", "kfac"),
        default="fisher",
        help="what H measures: the loss by its gradients, each layer's output, or that weighted by the loss's "
        "gradients; default: fisher",
    )
    add(
        "--fisher",
        choices=("empirical", "sampled", "exact"),
        help="labels of the gradients of kfac: those of the data, drawn from the network's predictions, or all "
        "classes by their probabilities; default: empirical",
    )
    add(
        "--temperature",
        type=number_option(0),
        default=1.0,
        metavar="T",
        help="of these probabilities, for sampled and exact: above 1, unlikely classes count more; default: 1",
    )
    add(
        "--curvature",
        choices=("gradients", "hessian", "inverse-hessian"),
        help="form in which H is stored; default: gradients for one full block, hessian for kfac, "
        "inverse-hessian otherwise",
    )
    add(
        "--blocks",
        type=blocks_option,
        metavar="full|layer|row|SIZE",
        help="blocks of H; default: full for gradients, layer for dense blocks, row for reconstruction and kfac",
    )
    add_loss_options(parser)
    add(
        "--damping",
        type=number_option(0),
        metavar="L",
        help="added to the diagonal of H (kfac: of XXᵀ/m); default: 1e-5",
    )
    add(
        "--relative-damping",
        type=number_option(0),
        metavar="F",
        help="the same, as a multiple of the mean diagonal entry; default for kfac: 0.01",
    )
    add(
        "--dtype",
        choices=("float32", "float64"),
        help="of the stored curvature; default: float32 for gradients, float64 for blocks",
    )
    add("--first-order", action="store_true", help="also store the mean gradient")
    add_budget_options(parser)
    add("--memory", type=number_option(0), metavar="GB", help="memory to use; default: half of the free memory")
    add(
        "--seed",
        type=whole_option(0),
        default=0,
        metavar="N",
        help="of the draw of samples, and of labels; default: 0",
    )
    add_log_options(parser)
    return parser


def _main(arguments: list[str]) -> int:
    options = export_parser().parse_args(arguments)
    common.start_logging(options.quiet, options.verbose)
    _check_output(options)

    from cbs_opt.instances.data import open_samples
    from cbs_opt.instances.export import Export
    from cbs_opt.instances.networks import is_factory
    from cbs_opt.instances.scores import torch_device

    device = torch_device(options.device)
    recipe = _recipe(options)
    network = read_network(options)
    names = options.tensors or (None if is_factory(options.network) else network.prunable)
    limit = options.samples - options.samples % options.batch
    if limit == 0:
        raise UsageError(f"`--samples` {options.samples} is less than one `--batch` of {options.batch}")
    source = open_samples(options.data, network, options.split, limit, options.seed)
    with Interrupts() as interrupts, WorkProgress(quiet=options.quiet) as progress:
        job = Export(
            network.model,
            source.inputs,
            source.labels,
            names,
            recipe,
            exclude=options.exclude,
            loss=options.loss or network.loss,
            metric=options.metric or network.metric,
            output_key=options.output_key or network.output_key,
            device=device.type,
            metadata=_origin(options, network),
            progress=progress,
            should_stop=interrupts,
        )
        interrupts.job = job
        logger.info(
            f"cbs-export {__version__}: {network.name}: {job.weights.size} weights in {len(job.names)} tensors, "
            f"{count(len(job.sizes), 'block')}, {job.samples} samples, {device.type}"
        )
        started = time.perf_counter()
        job.write(options.output)
    facts = job.facts
    dense = ""
    if "dense_loss" in facts:
        dense = f"dense network on {len(source)} samples: {facts['loss']} {facts['dense_loss']:.6f}"
        if "dense_accuracy" in facts:
            dense += f", accuracy {facts['dense_accuracy']:.4f}"
        elif "dense_metric" in facts:
            dense += f", {facts['dense_metric']} {facts['dense_value']:.4f}"
        dense += "\n"
    stored = "" if job.stored == len(job.sizes) else f" ({job.stored} stored)"
    if options.quiet:
        return common.EXIT_OK
    common.say(
        f"{options.output}: {job.weights.size} weights, {job.recipe.form.replace('-', ' ')} in "
        f"{count(len(job.sizes), 'block')}{stored}, {job.budget.total} to prune ({_share(job, options)})\n"
        f"{dense}"
        f"{options.output.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s\n"
    )
    return common.EXIT_OK


def _share(job: Export, options: argparse.Namespace) -> str:
    """The share of the weights that are pruned, and whether it is the default."""
    given = (options.sparsity, options.sparsity_per_layer, options.nm, options.keep)
    default = ", the default" if all(value is None for value in given) else ""
    return f"{job.budget.total / job.weights.size:.1%}{default}"


def _check_output(options: argparse.Namespace) -> None:
    common.check_outputs((options.checkpoint, options.data), (options.output,))
    if options.output.exists() and not options.output.is_file():
        raise UsageError(f"{options.output}: must be a file")


def _recipe(options: argparse.Namespace) -> Recipe:
    from cbs_opt.instances.budgets import read_rules
    from cbs_opt.instances.recipe import Recipe

    return Recipe(
        source=options.source,
        curvature=options.curvature,
        blocks=options.blocks,
        batch=options.batch,
        damping=options.damping,
        relative_damping=options.relative_damping,
        dtype=options.dtype,
        sparsity=options.sparsity,
        per_layer=options.per_layer,
        nm=options.nm,
        layers=None if options.sparsity_per_layer is None else read_rules(options.sparsity_per_layer),
        keep_at_least=options.keep_at_least,
        first_order=options.first_order,
        keep_mask=options.keep_mask,
        nm_along=options.nm_along,
        fisher=options.fisher,
        seed=options.seed,
        temperature=options.temperature,
        memory=None if options.memory is None else int(options.memory * 1e9),
        keep=options.keep,
    )


def _origin(options: argparse.Namespace, network: Network) -> dict[str, Any]:
    """The part of the metadata that describes the origin of weights and samples, without folders."""
    origin: dict[str, Any] = {
        "network": network.name,
        "data": f"brought by {network.name}" if options.data is None else Path(options.data).name,
        "split": options.split,
        "seed": options.seed,
    }
    if options.checkpoint is not None:
        from cbs_opt.instances.checkpoints import checkpoint_sha256

        origin["checkpoint"] = {
            "file": options.checkpoint.name,
            "sha256": checkpoint_sha256(options.checkpoint),
        }
        if options.checkpoint_key is not None:
            origin["checkpoint"]["key"] = options.checkpoint_key
    for key in ("loss", "metric", "output_key"):
        # Code runs only if it is named explicitly: what a factory declares is read from it again.
        if isinstance(value := getattr(options, key), str):
            origin[f"declared_{key}"] = value
    normalisation = {key: getattr(options, key) for key in ("mean", "std") if getattr(options, key) is not None}
    if normalisation:
        origin["normalisation"] = normalisation
    return origin


class Interrupts(common.Interrupts):
    """A first signal while gradients are collected keeps those collected; any other signal ends the command.

    The end is a `KeyboardInterrupt`, so that no temporary file stays behind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.job: Export | None = None

    def __enter__(self) -> Interrupts:
        super().__enter__()
        return self

    def _handle(self, number: int, frame: object) -> None:
        if self.asked or self.job is None or not self.job.collecting:
            os.write(2, b"interrupted: nothing is written\n")
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"interrupted: continuing with the gradients so far; once more to quit and write nothing\n")


if __name__ == "__main__":
    sys.exit(main())
