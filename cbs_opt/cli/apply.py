"""`cbs-apply`: a solution back into the checkpoint that its instance came from."""

from __future__ import annotations

import argparse
import logging
import math
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
    add(
        "--checkpoint-key",
        metavar="KEY",
        help="which of its dictionaries; default: as exported",
    )
    add("--masks", metavar="FILE.safetensors", type=Path, help="write the masks alone, by name of tensor")
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
    from cbs_opt.instances.tensors import names_of, read_places

    sha256 = checkpoint_sha256(options.checkpoint)
    _check_hash(instance, options, sha256)
    key = _checkpoint_key(options, instance)
    places = read_places(instance)
    tensors = read_checkpoint(options.checkpoint, set(names_of(places)), key)
    hidden = [place.name for place in places if not any(name in tensors for name in (place.name, *place.aliases))]
    if hidden and options.network is not None:
        tensors |= _through_network(options, instance, hidden, key)
    try:
        changed = pruned_tensors(instance, solution, tensors)
    except InstanceError as error:
        raise InstanceError(f"{options.instance}, {options.checkpoint}: {error}") from None
    layers = layer_masks(instance, solution.pruned)
    network, scores = _scores(options, instance, changed, interrupts)

    there = {name: tensor for name, tensor in changed.items() if name in tensors}
    write_checkpoint(options.output, there, options.checkpoint, key)
    logger.info(f"{options.output}: written")
    if options.masks is not None:
        from cbs_opt.instances.masks import write_masks

        write_masks(options.masks, layers)
        logger.info(f"{options.masks}: written")
    zeros = [_zeros(place.name, place.aliases, tensors, changed) for place in places]
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
        "zeros_before": sum(before for before, _ in zeros),
        "zeros_after": sum(after for _, after in zeros),
        "sparsity": sum(after for _, after in zeros) / instance.n,
        "layers": [
            {
                "name": m.name,
                "aliases": list(m.aliases),
                "shape": list(m.pruned.shape),
                "pruned": m.count,
                "zeros_before": before,
                "zeros_after": after,
                "sparsity": after / m.pruned.size,
            }
            for m, (before, after) in zip(layers, zeros, strict=True)
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
        common.say(_text(content) + "\n")
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
    load_checkpoint(network.model, options.checkpoint, _checkpoint_key(options, instance))
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
        _take(network, instance, changed)
        scores["after"] = evaluate(
            network.model,
            source,
            device=device,
            should_stop=interrupts,
            progress=lambda done: tell(len(source) + done),
        )
    return spec, scores


def _take(network: Network, instance: Instance, changed: dict[str, Tensor]) -> None:
    """Put the pruned tensors into the network; a parametrisation that cannot hold them is removed."""
    from cbs_opt.instances.plain import effective_tensors, set_effective
    from cbs_opt.instances.tensors import read_places

    known = effective_tensors(network.model)
    for place in read_places(instance):
        if place.name not in known:
            raise InstanceError(f"the instance prunes {place.name}, which is no parameter of {network.name}")
        set_effective(network.model, place.name, changed[place.name])


def _through_network(
    options: argparse.Namespace, instance: Instance, names: Sequence[str], key: str | None
) -> dict[str, Tensor]:
    """Effective values of tensors that the checkpoint stores in a form of which only the network knows."""
    from cbs_opt.instances.checkpoints import load_checkpoint
    from cbs_opt.instances.networks import load_network
    from cbs_opt.instances.plain import effective_tensors

    network = load_network(options.network, *_normalisation(options, instance))
    load_checkpoint(network.model, options.checkpoint, key)
    known = effective_tensors(network.model)
    return {name: known[name] for name in names if name in known}


def _zeros(
    name: str, aliases: Sequence[str], before: dict[str, Tensor], after: dict[str, Tensor]
) -> tuple[int, int]:
    """How many weights of a tensor are zero before and after."""
    old = next(before[each] for each in (name, *aliases) if each in before)
    return int((old.float() == 0).sum()), int((after[name].float() == 0).sum())


def _checkpoint_key(options: argparse.Namespace, instance: Instance) -> str | None:
    """The dictionary of the checkpoint: as given, or as the exporter noted it."""
    noted = instance.metadata.get("checkpoint")
    key = noted.get("key") if isinstance(noted, dict) else None
    return options.checkpoint_key or (key if isinstance(key, str) else None)


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
    # A checkpoint in shards becomes a folder of shards.
    folder = options.checkpoint.is_dir() or options.checkpoint.name.endswith(".index.json")
    if folder and options.output.exists() and not options.output.is_dir():
        raise UsageError(f"{options.output}: must be a folder, as the checkpoint is one of shards")
    source = options.checkpoint if options.checkpoint.is_dir() else options.checkpoint.parent
    if folder and options.output.resolve() == source.resolve():
        raise UsageError(f"{options.output}: is an input; the output would overwrite it")
    common.check_outputs(
        (options.instance, options.solution, options.checkpoint, options.data),
        (
            None if folder else options.output,
            options.picture,
            options.masks,
            None if options.json == "-" else options.json,
        ),
    )
    if options.picture is not None:
        from cbs_opt.instances.mask_pictures import check_picture

        check_picture(options.picture)


def _text(content: dict[str, Any]) -> str:
    """The report for a person."""
    n = content["instance"]["n"]
    rows = [
        (
            " = ".join((layer["name"], *layer["aliases"])),
            " × ".join(map(str, layer["shape"])),
            math.prod(layer["shape"]),
            layer["zeros_before"],
            layer["pruned"],
            layer["zeros_after"],
        )
        for layer in content["layers"]
    ]
    rows.append(("all", "", n, content["zeros_before"], content["pruned_count"], content["zeros_after"]))
    wide = max(len("layer"), *(len(row[0]) for row in rows)), max(len("shape"), *(len(row[1]) for row in rows))
    digits = max(len("weights"), len(f"{n:,}"))
    old = content["zeros_before"] > 0  # a column of its own only where there were zeros before
    head = f"{'layer':<{wide[0]}}  {'shape':<{wide[1]}}  {'weights':>{digits}}  "
    head += f"{'zero before':>{max(digits, 11)}}  " if old else ""
    lines = [f"{head}{'pruned':>{digits}}  sparsity"]
    for name, shape, size, zeros_before, pruned, zeros_after in rows:
        line = f"{name:<{wide[0]}}  {shape:<{wide[1]}}  {size:>{digits},}  "
        line += f"{zeros_before:>{max(digits, 11)},}  " if old else ""
        lines.append(f"{line}{pruned:>{digits},}  {zeros_after / size:>8.2%}")
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
