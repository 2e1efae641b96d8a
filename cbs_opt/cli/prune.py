"""`cbs-prune`: from a trained network to a pruned one, in one shot or in stages."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbs_opt.cli import common
from cbs_opt.cli.arguments import add_engine_options, add_loss_options, number_option, whole_option
from cbs_opt.cli.network_options import (
    add_budget_options,
    add_log_options,
    add_network_options,
    blocks_option,
    read_network,
)
from cbs_opt.cli.report import write_json
from cbs_opt.cli.work_progress import WorkProgress
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.version import __version__

if TYPE_CHECKING:
    from cbs_opt.instances.networks import Network
    from cbs_opt.instances.scores import Score
    from cbs_opt.pruning.method import Method
    from cbs_opt.pruning.outcome import Pruned

logger = logging.getLogger("cbs_opt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return common.run_main("cbs-prune", _main, arguments)


def prune_parser() -> common.Parser:
    """The parser of `cbs-prune`."""
    parser = common.Parser(
        "cbs-prune", "Prune a trained network, in one shot or in stages, and write its checkpoint."
    )
    add = parser.add_argument
    add_network_options(parser)
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="the pruned checkpoint")
    add_budget_options(parser)
    add(
        "--accuracy-drop",
        type=number_option(0),
        metavar="POINTS",
        help="find the largest sparsity, at most `--sparsity`, that costs at most this much on the samples held "
        "out: points of accuracy and the like, percent of perplexity, error or loss",
    )
    add("--stages", type=whole_option(1), default=1, metavar="N", help="default: 1, one shot")
    add(
        "--schedule",
        choices=("cubic", "exponential", "linear"),
        default="cubic",
        help="how sparsity grows; default: cubic",
    )
    add(
        "--final-stages",
        type=whole_option(1),
        default=1,
        metavar="N",
        help="how many of the stages have the final sparsity; default: 1",
    )
    add("--source", choices=("kfac", "fisher", "reconstruction"), default="kfac", help="of H; default: kfac")
    add(
        "--fisher",
        choices=("exact", "sampled", "empirical"),
        help="labels of kfac; default: exact, sampled where there are many classes",
    )
    add(
        "--temperature",
        type=number_option(0),
        metavar="T",
        help="of the class probabilities of kfac: above 1, unlikely classes count more; default: 4; 1 with "
        "`--targets loss` or without class scores",
    )
    add("--samples", type=whole_option(1), metavar="M", help="training samples of each stage, drawn anew for each")
    add("--mirror", action="store_true", help="the mirror image of each training image is a sample of its own")
    add("--batch", type=whole_option(1), metavar="B", help="fisher: samples of a mini-batch")
    add(
        "--targets",
        choices=("loss", "dense", "none"),
        help="first-order term: of the loss, or outputs of the dense network's layers; default: none in one shot, "
        "in stages loss for fisher and dense for the others",
    )
    add(
        "--sequential", action="store_true", help="layer after layer, each with the inputs that the pruned give it"
    )
    add("--blocks", type=blocks_option, metavar="full|layer|row|SIZE", help="blocks of H")
    add("--curvature", choices=("gradients", "hessian", "inverse-hessian"), help="form of H")
    add("--damping", type=number_option(0), nargs="+", metavar="L", help="of H; of several the best is taken")
    add(
        "--relative-damping",
        type=number_option(0),
        nargs="+",
        metavar="F",
        help="the same as multiples of the mean diagonal entry",
    )
    add(
        "--update-scale",
        type=number_option(0),
        nargs="+",
        metavar="X",
        help="the update of the kept weights is multiplied by this; of several the best is taken; default: 1, "
        "for fisher with the gradient of the loss 0.1 0.3 1",
    )
    add(
        "--first-order-scale",
        type=number_option(0),
        nargs="+",
        metavar="X",
        help="the gradient of `--targets loss` is multiplied by this; of several the best is taken; default: 1, "
        "for kfac 0.02 0.05 0.1",
    )
    add(
        "--refit",
        choices=("auto", "yes", "no"),
        help="fit the kept weights, layer after layer, to the outputs of the dense network; auto, the default for "
        "kfac and reconstruction: where it lowers the loss on the samples held out",
    )
    add(
        "--gauss-newton",
        type=whole_option(0),
        metavar="N",
        help="after each stage, at most N steps of all kept weights together towards the outputs of the dense "
        "network, each on new samples and only as far as it lowers the loss on those held out; default: for kfac "
        "4 divided by the stages, at least 1, fewer where they would take long, else 0",
    )
    add("--no-update", action="store_true", help="kept weights stay as they are")
    add(
        "--masks",
        choices=("grow", "return"),
        help="whether pruned weights may return in later stages; default: grow for fisher, return for the others",
    )
    add(
        "--recalibrate-bn",
        choices=("auto", "yes", "no"),
        default="auto",
        help="re-estimate the statistics of batch norms; auto: where it lowers the loss on the samples held out",
    )
    add(
        "--split",
        choices=("global", "layer", "normalised", "auto"),
        default="global",
        help="one budget, the same share of each layer, one budget for relative errors, or the best of these",
    )
    add("--held-out", type=whole_option(0), metavar="N", help="training samples for all choices; default: a tenth")
    add("--solver", metavar="NAME", help="see cbs-solve --list-solvers")
    add("--objective", choices=("selection", "joint"))
    add(
        "--time-limit",
        type=number_option(0),
        metavar="S",
        help="seconds of each solve; default: 10 to 30, in stages 5 to 10, by the number of weights",
    )
    add("--max-iterations", type=whole_option(0), metavar="N", help="of each solve, in place of seconds")
    add_loss_options(parser)
    add("--seed", type=whole_option(0), default=0, metavar="N", help="of all draws; default: 0")
    add("--threads", type=whole_option(1), metavar="N", help="of the solver; default: all cores")
    add_engine_options(parser)
    add("--memory", type=number_option(0), metavar="GB", help="memory to use; default: half of the free memory")
    add("--test-data", metavar="PATH", help="score the dense and the pruned network on the test split of this")
    add("--state", type=Path, metavar="FILE", help="written after every stage; the same command continues from it")
    add("--picture", type=Path, metavar="FILE.png", help="draw loss and sparsity over the stages")
    add("--table", type=Path, metavar="FILE.csv", help="write the stages")
    add("--json", metavar="FILE|-", help="write the report as JSON; - for stdout, and nothing else there")
    add_log_options(parser)
    return parser


_INTERRUPTED = "the network of the last stage is written; once more to quit at once"


def _main(arguments: list[str]) -> int:
    options = prune_parser().parse_args(arguments)
    common.start_logging(options.quiet, options.verbose)
    state = options.state
    if state is None and options.stages > 1:
        state = _own_state(options.output)
    _check_outputs(options, state)
    _tell_other_state(options, state)
    method = _method(options)

    from cbs_opt.instances.data import open_samples
    from cbs_opt.instances.networks import is_factory
    from cbs_opt.pruning.run import Run
    from cbs_opt.pruning.search import TRIALS, sparsest

    with common.Interrupts(_INTERRUPTED) as interrupts, WorkProgress(quiet=options.quiet) as progress:
        network = read_network(options)
        declared = {
            "loss": options.loss or network.loss,
            "metric": options.metric or network.metric,
            "output_key": options.output_key or network.output_key,
        }
        run = Run(
            network.model,
            open_samples(options.data, network, "train", None, None),
            method,
            names=options.tensors or (None if is_factory(options.network) else network.prunable),
            exclude=options.exclude,
            device=options.device,
            state=state,
            trials=1 if options.accuracy_drop is None else TRIALS,
            progress=progress,
            should_stop=interrupts,
            **declared,
        )
        logger.info(
            f"cbs-prune {__version__}: {network.name}: {run.n} weights in {len(run.names)} tensors, "
            f"{run.budget.total} to prune, {method.stages} stage{'s' if method.stages > 1 else ''}, "
            f"{len(run.pool)} training samples and {run.held_out} held out"
        )
        pruned = run() if options.accuracy_drop is None else sparsest(run, options.accuracy_drop)
        if not pruned.stages:
            common.say(f"{_reason(options, pruned)}: nothing is written\n")
            return common.EXIT_NONE
        _write_checkpoint(options, pruned)
        tested = _tested(options, network, pruned, declared, interrupts)
    content = _report(options, network, pruned, tested)
    if options.table is not None:
        pruned.write_csv(options.table)
    if options.picture is not None:
        pruned.plot(options.picture)
    if state is not None and options.state is None and not pruned.interrupted:
        state.unlink(missing_ok=True)
    if options.json is not None:
        write_json(options.json, content)
    if options.json != "-" and not options.quiet:
        common.say(_text(options, pruned, tested))
    return common.EXIT_OK


def _own_state(output: Path) -> Path | None:
    """Where stages are stored unless a file is given; None for `.`, which is refused as the output."""
    return output.with_name(f"{output.name}.state") if output.name else None


def _tell_other_state(options: argparse.Namespace, state: Path | None) -> None:
    """Warn of the state of an earlier run in stages that a run in one shot does not read."""
    other = _own_state(options.output) if state is None else None
    if other is not None and other.exists():
        logger.warning(
            f"{other}: the state of a run in stages, which one shot neither continues nor removes: give its "
            "`--stages` to continue, or remove the file"
        )


def _reason(options: argparse.Namespace, pruned: Pruned) -> str:
    if pruned.interrupted:
        return "interrupted before the first stage ended"
    return f"no sparsity costs at most {options.accuracy_drop:g}"


def _check_outputs(options: argparse.Namespace, state: Path | None) -> None:
    checkpoint = options.checkpoint
    folder = checkpoint is not None and (checkpoint.is_dir() or checkpoint.name.endswith(".index.json"))
    outputs = (
        None if folder else options.output,
        options.table,
        options.picture,
        None if options.json == "-" else options.json,
    )
    common.check_outputs((checkpoint, options.data, options.test_data), (*outputs, state))
    if options.picture is not None:
        from cbs_opt.instances.mask_pictures import check_picture

        check_picture(options.picture)
    if checkpoint is None and options.output.suffix not in (".pt", ".pth", ".safetensors"):
        raise UsageError(f"{options.output}: without `--checkpoint` the output must be .pt, .pth or .safetensors")


def _method(options: argparse.Namespace) -> Method:
    from cbs_opt.instances.budgets import read_rules
    from cbs_opt.pruning.method import Method

    if options.no_update and options.update_scale is not None:
        raise UsageError("`--no-update` and `--update-scale` exclude each other")
    rules = options.sparsity_per_layer
    return Method(
        sparsity=options.sparsity,
        keep=options.keep,
        stages=options.stages,
        schedule=options.schedule,
        final_stages=options.final_stages,
        source=options.source,
        fisher=options.fisher,
        temperature=options.temperature,
        samples=options.samples,
        mirror=options.mirror,
        batch=options.batch,
        targets=options.targets,
        sequential=options.sequential,
        damping=options.damping,
        relative_damping=options.relative_damping,
        first_order_scale=options.first_order_scale,
        update_scale=0.0 if options.no_update else options.update_scale,
        refit=options.refit,
        gauss_newton=options.gauss_newton,
        curvature=options.curvature,
        blocks=options.blocks,
        solver=options.solver,
        objective=options.objective,
        time_limit=options.time_limit,
        max_iterations=options.max_iterations,
        masks=options.masks,
        recalibrate_bn=options.recalibrate_bn,
        split=options.split,
        held_out=options.held_out,
        per_layer=options.per_layer,
        layers=None if rules is None else read_rules(rules),
        nm=options.nm,
        nm_along=options.nm_along,
        keep_at_least=options.keep_at_least,
        keep_mask=options.keep_mask,
        seed=options.seed,
        threads=options.threads,
        engine=options.engine,
        workers=options.workers,
        memory=None if options.memory is None else int(options.memory * 1e9),
    )


def _write_checkpoint(options: argparse.Namespace, pruned: Pruned) -> None:
    """The file in the format of the checkpoint, or the state of the model where there is none."""
    from cbs_opt.instances.checkpoints import read_checkpoint, write_checkpoint, write_state_dict

    if options.checkpoint is None:
        write_state_dict(options.output, pruned.model.state_dict())
        return
    aliases = {layer.name: layer.aliases for layer in pruned.layers}
    tensors = {
        alias: tensor for name, tensor in pruned.changed.items() for alias in (name, *aliases.get(name, ()))
    }
    there = read_checkpoint(options.checkpoint, set(tensors), options.checkpoint_key)
    write_checkpoint(
        options.output,
        {name: tensor for name, tensor in tensors.items() if name in there},
        options.checkpoint,
        options.checkpoint_key,
    )


def _tested(
    options: argparse.Namespace,
    network: Network,
    pruned: Pruned,
    declared: dict[str, Any],
    interrupts: common.Interrupts,
) -> tuple[Score, Score] | None:
    """Scores of the dense and the pruned network on test data, where there are any."""
    if options.test_data is None and network.test_data is None:
        return None
    from cbs_opt.instances.data import open_samples
    from cbs_opt.instances.scores import evaluate, torch_device

    try:
        source = open_samples(options.test_data, network, "test")
        scores = [
            evaluate(model, source, device=torch_device(options.device), should_stop=interrupts, **declared)
            for model in (network.model, pruned.model)
        ]
    except (InstanceError, UsageError) as error:  # the network is written, and its report is still to come
        logger.warning(f"the test data are not scored: {error}")
        return None
    return None if scores[0] is None or scores[1] is None else (scores[0], scores[1])


def _report(
    options: argparse.Namespace, network: Network, pruned: Pruned, tested: tuple[Score, Score] | None
) -> dict[str, Any]:
    return {
        **pruned.to_dict(),
        "network": network.name,
        "checkpoint": None if options.checkpoint is None else str(options.checkpoint),
        "output": str(options.output),
        "test": None if tested is None else {"before": asdict(tested[0]), "after": asdict(tested[1])},
    }


def _text(options: argparse.Namespace, pruned: Pruned, tested: tuple[Score, Score] | None) -> str:
    text = pruned.summary() + "\n"
    if tested is not None:
        before, after = tested
        shown = f"loss {before.loss:.4f} → {after.loss:.4f}"
        if before.value is not None and after.value is not None:
            shown += f", {before.metric} {before.value:.4g} → {after.value:.4g}"
        text += f"test data ({after.samples} samples): {shown}\n"
    return text + f"written: {options.output}\n"


if __name__ == "__main__":
    sys.exit(main())
