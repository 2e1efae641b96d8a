"""Running statistics of batch norms, re-estimated on training samples of the pruned network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from cbs_opt.instances.batches import checked_call, on_cpu_instead, placed
from cbs_opt.instances.data import SampleSource
from cbs_opt.instances.modes import evaluation_mode, single_precision
from cbs_opt.pruning.network import norms_of

MOST = 2000
"""Samples used at most."""

BATCH = 500
"""Samples that go through the network at a time: means and variances of larger batches are averaged."""


@torch.no_grad()
def reestimate(model: nn.Module, source: SampleSource) -> None:
    """Replace running means and variances of all batch norms by those of the samples.

    Only batch norms are in training mode; all other layers, such as dropout, stay in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    source : SampleSource
        Training samples; two or more. Labels are not used.

    Notes
    -----
    The first `MOST` samples, in equal batches of at most `BATCH`, whose statistics are averaged. Where the memory
    of a card is too short for a batch the CPU does it: smaller batches have other statistics.
    """
    norms = [norm for _, norm in norms_of(model)]
    momenta = [norm.momentum for norm in norms]
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(single_precision(model))
        for norm in norms:
            norm.train()
        try:
            try:
                _average(model, norms, source)
            except torch.OutOfMemoryError:
                on_cpu_instead(model)
                _average(model, norms, source)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _average(model: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm], source: SampleSource) -> None:
    """Run the samples through the network; the statistics begin anew with the first batch."""
    # Equal batches: a small last one would have a noisy variance.
    used = min(len(source), MOST)
    pieces = -(-used // BATCH)
    done = 0
    for inputs, _ in source.batches(-(-used // pieces)):
        if done >= used:
            break
        x = placed(inputs, model)
        done += len(inputs)
        for norm in norms:
            norm.momentum = len(inputs) / done  # 1 for the first batch: the old ones go
        checked_call(model, x, source.name)
