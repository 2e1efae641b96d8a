"""The options that `cbs-export` and `cbs-prune` share: network, data, budget; and the network that they name."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cbs_opt.cli.arguments import number_option, share_option, whole_option
from cbs_opt.cli.common import Parser
from cbs_opt.scalars import MOST_WHOLE

if TYPE_CHECKING:
    from cbs_opt.instances.networks import Network

logger = logging.getLogger("cbs_opt")


def add_network_options(parser: Parser) -> None:
    """The network, its checkpoint, its data, and how images are normalised."""
    add = parser.add_argument
    add(
        "network",
        metavar="NETWORK|module:factory",
        help="a network of the package, or a function that returns yours",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help=".safetensors, .npz, a file of torch.save, or a Hugging Face folder",
    )
    add("--checkpoint-key", metavar="KEY", help="which of its dictionaries of tensors, such as state_dict_ema")
    add("--data", metavar="PATH", help="IDX, CIFAR-10 batches, .npz, an image folder, or `digits`")
    add("--mean", type=number_option(), nargs="+", metavar="X", help="of the images, one or one per channel")
    add("--std", type=number_option(), nargs="+", metavar="X", help="of the images, one or one per channel")


def add_budget_options(parser: Parser) -> None:
    """How many weights of which tensors are pruned."""
    add = parser.add_argument
    add("--sparsity", type=share_option, metavar="F", help="prune this fraction; default: 0.9")
    add("--keep", type=whole_option(0), metavar="K", help="keep this many weights in all, instead of a sparsity")
    add(
        "--sparsity-per-layer",
        nargs="+",
        metavar="PATTERN=F|FILE.toml",
        help="sparsity of single layers, such as 'fc.*=0.9'; `--sparsity` applies to all others together",
    )
    add(
        "--keep-at-least",
        type=number_option(0),
        metavar="N",
        help="weights that every layer keeps at least, or below 1 a share of each layer",
    )
    add("--per-layer", action="store_true", help="prune the same fraction of every tensor")
    add(
        "--nm",
        type=pattern_option,
        metavar="N:M",
        help="keep N of every M consecutive inputs, instead of a sparsity",
    )
    add(
        "--nm-along", choices=("inputs", "outputs", "both"), default="inputs",
        help="inputs, as for hardware (default), outputs, or both: transposable, for training with such hardware",
    )  # fmt: skip
    add(
        "--tensors",
        nargs="+",
        metavar="NAME",
        help="what to prune: names, patterns with *, or re:EXPRESSION; default: weights of layers that multiply",
    )
    add("--exclude", nargs="+", metavar="NAME", help="what not to prune: names, patterns, or 're:.*lm_head'")
    add("--keep-mask", action="store_true", help="weights that are already zero stay zero and count as pruned")


def add_log_options(parser: Parser) -> None:
    """The device, and how much is logged."""
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("-q", "--quiet", action="store_true", help="log warnings only, print no report")
    add("-v", "--verbose", action="store_true", help="log more")


def read_network(options: argparse.Namespace) -> Network:
    """The network with its checkpoint, in evaluation mode.

    Raises
    ------
    UsageError
        When a network of the package lacks a checkpoint or data.
    InstanceError
        When the checkpoint does not fit.
    """
    from cbs_opt.instances.networks import trained_network

    network = trained_network(
        options.network,
        options.checkpoint,
        options.data,
        key=options.checkpoint_key,
        mean=options.mean,
        std=options.std,
    )
    if options.checkpoint is None:
        logger.warning(
            f"no `--checkpoint`: the weights are those that {network.name} comes with; cbs-apply will need a file "
            "of them"
        )
    return network


def blocks_option(text: str) -> str | int:
    """The type of an option that takes full, layer, row or a size."""
    if text in ("full", "layer", "row"):
        return text
    try:
        size = int(text)
    except ValueError:
        size = 0
    if not 1 <= size <= MOST_WHOLE:
        raise argparse.ArgumentTypeError(f"must be full, layer, row or a size of at least 1, got '{text[:40]}'")
    return size


def pattern_option(text: str) -> tuple[int, int]:
    """The type of an option that takes N:M."""
    keep, _, of = text.partition(":")
    if not (keep.isdecimal() and of.isdecimal() and max(len(keep), len(of)) <= 9):
        raise argparse.ArgumentTypeError(f"must be N:M, such as 2:4, got '{text[:40]}'")
    return int(keep), int(of)
