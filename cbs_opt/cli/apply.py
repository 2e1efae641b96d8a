"""`cbs-apply`: writes a solution into the checkpoint from which its instance was exported."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbs_opt.cli import common
from cbs_opt.cli.arguments import add_loss_options, number_option, whole_option
from cbs_opt.cli.report import write_json
from cbs_opt.cli.scoring import (
    Scores,
    Scoring,
    checkpoint_key,
    magnitude_at,
    normalisation,
    score_lines,
    trial_line,
)
from cbs_opt.errors import InstanceError, OutputError, UsageError
from cbs_opt.files import read_instance, read_solution
from cbs_opt.files.library_file import resolve
from cbs_opt.files.paths import real_path
from cbs_opt.instance import Instance
from cbs_opt.solution import Solution

if TYPE_CHECKING:
    from torch import Tensor

    from cbs_opt.instances.scores import Score
    from cbs_opt.instances.tensors import Place

logger = logging.getLogger("cbs_opt")

SCHEMA = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return common.run_main("cbs-apply", _main, arguments)


def _parser() -> common.Parser:
    parser = common.Parser(
        "cbs-apply", "Prune a checkpoint according to a solution, and compare the network before and after."
    )
    add = parser.add_argument
    add("instance", metavar="INSTANCE.npz", type=Path)
    add("solution", metavar="SOLUTION.npz", type=Path, nargs="+", help="several with `--max-drop`")
    add("--checkpoint", metavar="IN", type=Path, required=True, help="the checkpoint that was exported")
    add(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        required=True,
        help="pruned checkpoint, in the file format of the input",
    )
    add("--data", metavar="PATH", help="images and labels to score on: file, folder, or digits")
    add("--split", choices=("test", "train"), default="test", help="which of them; default: test")
    add("--samples", metavar="N", type=whole_option(1), help="score on N of them; default: all")
    add("--seed", metavar="N", type=whole_option(0), help="draw the N at random; default: the first N")
    add(
        "--network",
        metavar="NAME|module:factory",
        help="default: as in the instance; a factory is code, and runs only if it is named here",
    )
    add("--mean", metavar="X", type=number_option(), nargs="+", help="normalisation in place of the network's")
    add("--std", metavar="X", type=number_option(), nargs="+", help="likewise")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add(
        "--checkpoint-key",
        metavar="KEY",
        help="which of its dictionaries; default: as exported",
    )
    add("--masks", metavar="FILE.safetensors", type=Path, help="write only the masks, by tensor name")
    add("--no-update", action="store_true", help="kept weights stay as they are")
    add(
        "--update-scale",
        metavar="X",
        type=number_option(0),
        help="multiply the update of the kept weights by this; default: 1",
    )
    add_loss_options(parser)
    add("--no-score", action="store_true", help="write the checkpoint, and run no network")
    add("--no-magnitude", action="store_true", help="leave out the comparison with magnitude pruning")
    add(
        "--max-drop",
        metavar="POINTS",
        type=number_option(0),
        help="of several solutions select the sparsest that costs at most this much on the data: points of "
        "accuracy and the like, percent of perplexity, error or loss",
    )
    add("--onnx", metavar="FILE.onnx", type=Path, help="also write the pruned network as ONNX")
    add("--picture", metavar="MASKS.png", type=Path, help="draw the mask of every layer; .png, .svg or .pdf")
    add("--json", metavar="FILE|-", help="write the report as JSON; - for stdout, and nothing else there")
    add("-q", "--quiet", action="store_true", help="log warnings only, print no report")
    add("-v", "--verbose", action="store_true", help="log more")
    return parser


_INTERRUPTED = "scoring ends, the output is written; once more to quit and write nothing"


def _main(arguments: list[str]) -> int:
    with common.Interrupts(_INTERRUPTED) as interrupts:
        options = _parser().parse_args(arguments)
        common.start_logging(options.quiet, options.verbose)
        _check_outputs(options)
        return _apply(options, interrupts)


def _apply(options: argparse.Namespace, interrupts: common.Interrupts) -> int:
    instance = read_instance(resolve(options.instance))
    solutions = [read_solution(path, instance) for path in options.solution]
    for path, solution in zip(options.solution, solutions, strict=True):
        if not solution.instance_sha256:
            logger.warning(f"{path}: does not name its instance: only its size is checked")
    solutions = [_scaled(path, s, instance, options) for path, s in zip(options.solution, solutions, strict=True)]

    from cbs_opt.instances.apply import layer_masks, pruned_tensors
    from cbs_opt.instances.checkpoints import checkpoint_sha256, read_checkpoint, write_checkpoint
    from cbs_opt.instances.sizes import sparse_sizes
    from cbs_opt.instances.tensors import names_of, read_places

    sha256 = checkpoint_sha256(options.checkpoint)
    _check_hash(instance, options, sha256)
    key = checkpoint_key(options, instance)
    places = read_places(instance)
    tensors = read_checkpoint(options.checkpoint, set(names_of(places)), key)
    hidden = [place.name for place in places if not any(name in tensors for name in (place.name, *place.aliases))]
    if hidden and options.network is not None:
        tensors |= _through_network(options, instance, hidden, key)
    try:
        candidates = [pruned_tensors(instance, solution, tensors) for solution in solutions]
    except InstanceError as error:
        raise InstanceError(f"{options.instance}, {options.checkpoint}: {error}") from None
    scoring = Scoring(options, instance, interrupts)
    scoring.open()
    magnitude = [
        pruned_tensors(instance, Solution(magnitude_at(instance, each.pruned), instance.sha256 or ""), tensors)
        for each in solutions
        if not options.no_magnitude and not options.no_score
    ]
    scoring.measure(candidates, magnitude)
    scores = scoring.result
    path_of = [
        {
            "solution": str(path),
            "sparsity": float(solution.pruned.mean()),
            **_asdict("score", after),
            **_asdict("magnitude", simple),
        }
        for path, solution, after, simple in zip_longest(
            options.solution, solutions, scores.after, scores.magnitude
        )
    ]
    chosen = 0 if options.max_drop is None else _sparsest(options, solutions, scores)
    if chosen is None:
        return common.EXIT_NONE
    solution, changed = solutions[chosen], candidates[chosen]
    layers = layer_masks(instance, solution.pruned)
    network = scores.network

    there = {name: tensor for name, tensor in changed.items() if name in tensors}
    write_checkpoint(options.output, there, options.checkpoint, key)
    logger.info(f"{options.output}: written")
    if options.masks is not None:
        from cbs_opt.instances.masks import write_masks

        write_masks(options.masks, layers)
        logger.info(f"{options.masks}: written")
    zeros = [_zeros(place, tensors, changed) for place in places]
    if options.picture is not None:
        from cbs_opt.instances.mask_pictures import draw_masks

        draw_masks(options.picture, layers, network or "")
        logger.info(f"{options.picture}: drawn")
    refused = _onnx_error(options, scoring, changed) if options.onnx is not None else None
    content = {
        "schema": SCHEMA,
        "instance": {"path": str(options.instance), "sha256": instance.sha256, "n": instance.n},
        "solution": {"path": str(options.solution[chosen]), "instance_sha256": solution.instance_sha256 or None},
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
        "magnitude": None,
        **_asdict("before", scores.before),
        **_asdict("after", scores.after[chosen] if scores.after else None),
        **_asdict("magnitude", scores.magnitude[chosen] if scores.magnitude else None),
        "warnings": scores.worries,
        "size": asdict(sparse_sizes({place.name: changed[place.name] for place in places})),
    }
    if len(solutions) > 1:
        content["path"] = path_of
    if options.json not in (None, "-"):
        write_json(options.json, content)
    if options.json == "-":
        write_json("-", content)
    elif not options.quiet:
        common.say(_text(content) + "\n")
    if refused is not None:  # the checkpoint is written all the same, and reported
        raise refused
    return common.EXIT_OK


def _onnx_error(options: argparse.Namespace, scoring: Scoring, changed: dict[str, Tensor]) -> OutputError | None:
    """Write the ONNX file; returns the error where torch cannot write the network."""
    from cbs_opt.instances.onnx_file import write_onnx

    model, source = scoring.result.model, scoring.result.source
    assert model is not None and source is not None
    try:
        scoring.take(changed)
        write_onnx(options.onnx, model.model, source.batch(0, 2))
    except OutputError as error:
        return error
    logger.info(f"{options.onnx}: written")
    return None


def _scaled(path: Path, solution: Solution, instance: Instance, options: argparse.Namespace) -> Solution:
    """The solution with the part of its update that was asked for."""
    if options.no_update:
        return replace(solution, weights=None)
    if options.update_scale is None:
        return solution
    if solution.weights is None:
        raise UsageError(f"{path}: has no updated weights for `--update-scale`: solve with `--update`")
    moved = instance.weights + options.update_scale * (solution.weights - instance.weights)
    return replace(solution, weights=np.where(solution.pruned, 0.0, moved))


def _asdict(when: str, score: Score | None) -> dict[str, Any]:
    return {} if score is None else {when: asdict(score)}


def _sparsest(options: argparse.Namespace, solutions: list[Solution], scores: Scores) -> int | None:
    """The number of the sparsest solution that costs at most `--max-drop`, None without one."""
    from cbs_opt.instances.scores import cost

    if scores.before is None:
        raise UsageError(
            "`--max-drop` compares scores on data: give them with `--data`, and the network with `--network`"
        )
    within = []
    lines = []
    for k, (path, solution, after) in enumerate(zip(options.solution, solutions, scores.after, strict=True)):
        price = math.inf if after is None else cost(scores.before, after)
        within += [k] if price <= options.max_drop else []
        lines.append((solution.pruned.mean(), f"{path}: {solution.pruned.mean():.2%} pruned, costs {price:+.2f}"))
    for _, line in sorted(lines):
        logger.info(line)
    if not within:
        prices = [cost(scores.before, after) for after in scores.after if after is not None]
        cheapest = min(prices, default=math.inf)
        common.say(
            f"no solution costs at most {options.max_drop:g}: the cheapest costs {cheapest:.2f}; nothing is "
            "written\n"
        )
        return None
    return max(within, key=lambda k: float(solutions[k].pruned.mean()))


def _through_network(
    options: argparse.Namespace, instance: Instance, names: Sequence[str], key: str | None
) -> dict[str, Tensor]:
    """Effective values of tensors that the checkpoint stores in a form of which only the network knows."""
    from cbs_opt.instances.checkpoints import load_checkpoint
    from cbs_opt.instances.networks import load_network
    from cbs_opt.instances.plain import effective_tensors

    network = load_network(options.network, *normalisation(options, instance))
    load_checkpoint(network.model, options.checkpoint, key)
    known = effective_tensors(network.model)
    return {name: known[name] for name in names if name in known}


def _zeros(place: Place, before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[int, int]:
    """How many weights of a tensor are zero before and after."""
    old = next(before[name] for name in (place.name, *place.aliases) if name in before)
    return int((old.float() == 0).sum()), int((after[place.name].float() == 0).sum())


def _check_hash(instance: Instance, options: argparse.Namespace, sha256: str) -> None:
    noted = instance.metadata.get("checkpoint")
    expected = noted.get("sha256") if isinstance(noted, dict) else None
    if not isinstance(expected, str):
        logger.warning(
            f"{options.instance}: does not name its checkpoint: only names, shapes and values are compared"
        )
    elif expected != sha256:
        raise InstanceError(
            f"{options.checkpoint}: its SHA-256 is {sha256[:12]}…, the instance was exported from "
            f"{expected[:12]}…: they do not belong together"
        )


def _check_outputs(options: argparse.Namespace) -> None:
    """Check before the work that its results can be written."""
    # A checkpoint in shards becomes a folder of shards.
    folder = options.checkpoint.is_dir() or options.checkpoint.name.endswith(".index.json")
    if folder and options.output.exists() and not options.output.is_dir():
        raise UsageError(f"{options.output}: must be a folder, as the checkpoint is one of shards")
    source = options.checkpoint if options.checkpoint.is_dir() else options.checkpoint.parent
    if folder and real_path(options.output) == real_path(source):
        raise UsageError(f"{options.output}: is an input; the output would overwrite it")
    common.check_outputs(
        (options.instance, *options.solution, options.checkpoint, options.data),
        (
            None if folder else options.output,
            options.picture,
            options.onnx,
            options.masks,
            None if options.json == "-" else options.json,
        ),
    )
    if options.no_update and options.update_scale is not None:
        raise UsageError("`--no-update` and `--update-scale` exclude each other")
    if len(options.solution) > 1 and options.max_drop is None:
        raise UsageError("several solutions need `--max-drop`, which selects one of them")
    if options.max_drop is not None and options.no_score:
        raise UsageError("`--max-drop` needs scores: omit `--no-score`")
    if options.onnx is not None:
        from cbs_opt.instances.onnx_file import check_onnx

        check_onnx()
    if options.picture is not None:
        from cbs_opt.instances.mask_pictures import check_picture

        check_picture(options.picture)


def _text(content: dict[str, Any]) -> str:
    """The report as text."""
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
    lines.append("")
    lines += [trial_line(trial) for trial in content.get("path", [])]
    lines += [""] if "path" in content else []
    lines += score_lines(content)
    lines += [f"WARNING   {text}" for text in content["warnings"]]
    size = content["size"]
    lines.append(
        f"size      {_bytes(size['dense'])} of pruned tensors; {_bytes(size['bitmask'])} as bitmaps and "
        f"kept values, "
        f"{_bytes(size['csr'])} as compressed rows"
    )
    updated = "pruned, and the kept weights updated" if content["updated"] else "pruned"
    lines.append(f"written   {content['output']['path']}  ({updated})")
    return "\n".join(lines)


def _bytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


if __name__ == "__main__":
    sys.exit(main())
