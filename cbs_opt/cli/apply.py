"""`cbs-apply`: a solution back into the checkpoint that its instance came from."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbs_opt.cli import common
from cbs_opt.cli.arguments import number_option, whole_option
from cbs_opt.cli.report import write_json
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files import read_instance, read_solution
from cbs_opt.files.library_file import resolve
from cbs_opt.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cbs_opt.instances.masks import LayerMask
    from cbs_opt.instances.networks import Network
    from cbs_opt.instances.scores import Score

logger = logging.getLogger("cbs_opt")

SCHEMA = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return common.run_main("cbs-apply", _main, arguments)


def _parser() -> common.Parser:
    parser = common.Parser(
        "cbs-apply", "Prune a checkpoint as a solution says, and compare the network before and after."
    )
    add = parser.add_argument
    add("instance", metavar="INSTANCE.npz", type=Path)
    add("solution", metavar="SOLUTION.npz", type=Path)
    add("--checkpoint", metavar="IN", type=Path, required=True, help="the checkpoint that was exported")
    add("-o", "--output", metavar="OUT", type=Path, required=True, help="pruned checkpoint, of the same container")
    add("--data", metavar="PATH", help="images and labels to score on: file, folder, or digits")
    add("--split", choices=("test", "train"), default="test", help="which of them; default: test")
    add("--samples", metavar="N", type=whole_option(1), help="score on N of them; default: all")
    add("--seed", metavar="N", type=whole_option(0), help="draw the N at random; default: the first N")
    add(
        "--network",
        metavar="NAME|module:factory",
        help="default: what the instance says; a factory is code, and runs only when it is named here",
    )
    add("--mean", metavar="X", type=number_option(), nargs="+", help="normalisation in place of the network's")
    add("--std", metavar="X", type=number_option(), nargs="+", help="likewise")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--picture", metavar="MASKS.png", type=Path, help="draw the mask of every layer; .png, .svg or .pdf")
    add("--json", metavar="FILE|-", help="write the report as JSON; - for stdout, and nothing else there")
    add("-q", "--quiet", action="store_true", help="log warnings only")
    add("-v", "--verbose", action="store_true", help="log more")
    return parser


class Interrupts(common.Interrupts):
    """The first signal ends the scoring; the pruned checkpoint is still written."""

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            os._exit(common.EXIT_KILLED)
        self.asked = True
        os.write(2, b"interrupted: scoring ends, the output is written; once more to quit and write nothing\n")


def _main(arguments: list[str]) -> int:
    with Interrupts() as interrupts:
        options = _parser().parse_args(arguments)
        if options.quiet and options.verbose:
            raise UsageError("`-q` and `-v` exclude each other")
        common.start_logging(options.quiet, options.verbose)
        _check_outputs(options)
        return _apply(options, interrupts)


def _apply(options: argparse.Namespace, interrupts: common.Interrupts) -> int:
    instance = read_instance(resolve(options.instance))
    solution = read_solution(options.solution, instance)
    if not solution.instance_sha256:
        logger.warning(f"{options.solution}: does not say which instance it is for: only its size is checked")

    from cbs_opt.instances.apply import layer_masks, pruned_tensors
    from cbs_opt.instances.checkpoints import checkpoint_sha256, read_checkpoint, write_checkpoint

    sha256 = checkpoint_sha256(options.checkpoint)
    _check_hash(instance, options, sha256)
    tensors = read_checkpoint(options.checkpoint)
    try:
        changed = pruned_tensors(instance, solution, tensors)
    except InstanceError as error:
        raise InstanceError(f"{options.instance}, {options.checkpoint}: {error}") from None
    layers = layer_masks(instance, solution.pruned)
    network, scores = _scores(options, instance, changed, interrupts)

    write_checkpoint(options.output, changed, options.checkpoint)
    logger.info(f"{options.output}: written")
    if options.picture is not None:
        from cbs_opt.instances.mask_pictures import draw_masks

        draw_masks(options.picture, layers, network or "")
        logger.info(f"{options.picture}: drawn")
    content = {
        "schema": SCHEMA,
        "instance": {"path": str(options.instance), "sha256": instance.sha256, "n": instance.n},
        "solution": {"path": str(options.solution), "instance_sha256": solution.instance_sha256 or None},
        "checkpoint": {"path": str(options.checkpoint), "sha256": sha256},
        "output": {"path": str(options.output), "sha256": checkpoint_sha256(options.output)},
        "network": network,
        "updated": solution.weights is not None,
        "pruned_count": int(solution.pruned.sum()),
        "sparsity": float(solution.pruned.mean()),
        "layers": [
            {"name": m.name, "shape": list(m.pruned.shape), "pruned": m.count, "sparsity": m.sparsity}
            for m in layers
        ],
        "data": options.data,
        "split": options.split,
        "before": None,
        "after": None,
        **{when: asdict(score) for when, score in scores.items() if score is not None},
    }
    if options.json not in (None, "-"):
        write_json(options.json, content)
    if options.json == "-":
        write_json("-", content)
    else:
        common.say(_text(content, layers) + "\n")
    return common.EXIT_OK


def _scores(
    options: argparse.Namespace, instance: Instance, changed: dict[str, Tensor], interrupts: common.Interrupts
) -> tuple[str | None, dict[str, Score | None]]:
    """The network's name, where it is known, and its score before and after, where there is data."""
    from cbs_opt.instances.networks import is_factory, load_network, network_names

    said = instance.metadata.get("network")
    spec = options.network or (said if isinstance(said, str) else None)
    if options.network is None and options.data is None:
        return spec, {}
    if spec is None:
        raise UsageError(f"{options.instance}: does not name its network: give it with `--network`")
    if options.network is None and is_factory(spec):
        raise UsageError(
            f"{options.instance}: its network '{spec}' is a factory, which is code: repeat it as "
            f"`--network {spec}` to run it"
        )
    try:
        network = load_network(spec, *_normalisation(options, instance))
    except UsageError as error:
        if options.network is not None or spec in network_names():
            raise
        raise UsageError(f"{options.instance}: {error}; `--network` overrides what the instance says") from None

    from cbs_opt.instances.checkpoints import load_checkpoint
    from cbs_opt.instances.data import open_samples
    from cbs_opt.instances.scores import evaluate, torch_device

    device = torch_device(options.device)
    load_checkpoint(network.model, options.checkpoint)
    if options.data is None and network.data is None and network.test_data is None:
        logger.info("no `--data`: accuracy and loss are not measured")
        return spec, {}
    source = open_samples(options.data, network, options.split, options.samples, options.seed)
    logger.info(f"{len(source)} samples of {source.name}, {options.split} split, on {device}")
    scores: dict[str, Score | None] = {}
    with _bar(options.quiet, 2 * len(source)) as tell:
        scores["before"] = evaluate(
            network.model, source, device=device, should_stop=interrupts, progress=lambda done: tell(done)
        )
        _take(network, changed)
        scores["after"] = evaluate(
            network.model,
            source,
            device=device,
            should_stop=interrupts,
            progress=lambda done: tell(len(source) + done),
        )
    return spec, scores


def _take(network: Network, changed: dict[str, Tensor]) -> None:
    import torch

    parameters = dict(network.model.named_parameters())
    with torch.no_grad():
        for name, tensor in changed.items():
            if name not in parameters:
                raise InstanceError(f"the instance prunes {name}, which is no parameter of {network.name}")
            parameters[name].copy_(tensor)


def _normalisation(options: argparse.Namespace, instance: Instance) -> tuple[Any, Any]:
    """Mean and standard deviation as given, or as the exporter noted them."""
    given = (options.mean, options.std)
    noted = instance.metadata.get("normalisation")
    noted = noted if isinstance(noted, dict) else {}
    mean, std = (
        new if new is not None else noted.get(key) for key, new in zip(("mean", "std"), given, strict=True)
    )
    return mean, std


def _check_hash(instance: Instance, options: argparse.Namespace, sha256: str) -> None:
    noted = instance.metadata.get("checkpoint")
    expected = noted.get("sha256") if isinstance(noted, dict) else None
    if not isinstance(expected, str):
        logger.warning(
            f"{options.instance}: does not say which checkpoint it came from: only names, shapes and values are "
            "compared"
        )
    elif expected != sha256:
        raise InstanceError(
            f"{options.checkpoint}: its SHA-256 is {sha256[:12]}…, the instance was exported from "
            f"{expected[:12]}…: they do not belong together"
        )


def _check_outputs(options: argparse.Namespace) -> None:
    """Find out before the work whether its results can be written."""
    common.check_outputs(
        (options.instance, options.solution, options.checkpoint, options.data),
        (options.output, options.picture, None if options.json == "-" else options.json),
    )
    if options.picture is not None:
        from cbs_opt.instances.mask_pictures import check_picture

        check_picture(options.picture)


def _text(content: dict[str, Any], layers: list[LayerMask]) -> str:
    """The report for a person."""
    rows = [(m.name, " × ".join(map(str, m.pruned.shape)), m.count, m.pruned.size) for m in layers]
    rows.append(("all", "", content["pruned_count"], content["instance"]["n"]))
    wide = max(len("layer"), *(len(row[0]) for row in rows)), max(len("shape"), *(len(row[1]) for row in rows))
    digits = max(len("weights"), len(f"{rows[-1][3]:,}"))
    lines = [f"{'layer':<{wide[0]}}  {'shape':<{wide[1]}}  {'weights':>{digits}}  {'pruned':>{digits}}  sparsity"]
    for name, shape, pruned, size in rows:
        lines.append(
            f"{name:<{wide[0]}}  {shape:<{wide[1]}}  {size:>{digits},}  {pruned:>{digits},}  {pruned / size:>8.2%}"
        )
    before, after = content["before"], content["after"]
    lines.append("")
    if before is not None and after is not None:
        over = f"{after['samples']} samples, {content['split']} split"
        if before["samples"] != after["samples"]:
            over = f"interrupted: {before['samples']} samples before, {after['samples']} after"
        lines.append(f"accuracy  {before['accuracy']:.2%} before, {after['accuracy']:.2%} after  ({over})")
        lines.append(f"loss      {before['loss']:.4f} before, {after['loss']:.4f} after")
    updated = "pruned, and the kept weights updated" if content["updated"] else "pruned"
    lines.append(f"written   {content['output']['path']}  ({updated})")
    return "\n".join(lines)


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


if __name__ == "__main__":
    sys.exit(main())
