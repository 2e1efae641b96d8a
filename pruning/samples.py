"""Training samples: those of each stage, and those held out, by which alone something is chosen."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbs_opt.errors import UsageError
from cbs_opt.instances.data import SampleSource
from cbs_opt.typing import BoolArray, IntArray

logger = logging.getLogger("cbs_opt")

HELD_OUT = 5000
"""Samples held out at most, if no number is given; a tenth of the data where they are fewer."""

_READ_BYTES = 1 << 30  # samples of a stage that are read into memory at once


class Mirrored(SampleSource):
    """Images of which some are mirrored, left to right.

    Parameters
    ----------
    source : SampleSource
        Images (m, channels, height, width) with one label each, or without labels.
    which : bool (m,)
        The mirrored ones.
    """

    def __init__(self, source: SampleSource, which: BoolArray) -> None:
        self.name, self.labels = source.name, source.labels
        self._source, self._which = source, which

    def __len__(self) -> int:
        return self._which.size

    def batch(self, start: int, stop: int) -> Any:
        """The images of some samples."""
        x = self._source.batch(start, stop)
        which = torch.from_numpy(self._which[start:stop]).reshape(-1, 1, 1, 1).to(x.device)
        return torch.where(which, x.flip(-1), x)

    def subset(self, indices: IntArray) -> SampleSource:
        """Some of the samples, see `SampleSource.subset`."""
        return Mirrored(self._source.subset(indices), self._which[indices])


def _check_images(source: SampleSource) -> None:
    """Refuse what cannot be mirrored."""
    first, labels = source.batch(0, 1), source.labels
    images = isinstance(first, Tensor) and first.dim() == 4 and not source.borders
    if not images or not (labels is None or (isinstance(labels, Tensor) and labels.dim() == 1)):
        raise UsageError(
            f"{source.name}: `--mirror` is for images (channels, height, width) of one size, with one label each"
        )


@dataclass(frozen=True)
class Pool:
    """Training samples without those held out, drawn without replacement until all have been used.

    Attributes
    ----------
    source : SampleSource
    indices : int64 (k,)
        Which of its samples.
    seed : int
    mirror : bool
        Whether the mirror image of each is a sample of its own.

    Raises
    ------
    UsageError
        For samples that cannot be mirrored.
    """

    source: SampleSource
    indices: IntArray
    seed: int
    mirror: bool = False

    def __post_init__(self) -> None:
        if self.mirror:
            _check_images(self.source)

    def __len__(self) -> int:
        return self.indices.size * (2 if self.mirror else 1)

    def _subset(self, chosen: IntArray) -> SampleSource:
        """The samples of some numbers below the length."""
        source = self.source.subset(self.indices[chosen % self.indices.size])
        return Mirrored(source, chosen >= self.indices.size) if self.mirror else source

    def drawn(self, stage: int, count: int) -> SampleSource:
        """The samples of a stage, 1, 2, …: they depend on the stage and the seed only.

        Stages take consecutive parts of a random order of the pool; a new order follows where one ends. A stage
        that wants more than there are gets all.
        """
        size = len(self)
        count = min(count, size)
        first, end = (stage - 1) * count, stage * count
        orders = {
            turn: np.random.default_rng([self.seed, 1, turn]).permutation(size)
            for turn in range(first // size, (end - 1) // size + 1)
        }
        chosen = np.concatenate(
            [
                order[max(first - turn * size, 0) : min(end - turn * size, size)]
                for turn, order in sorted(orders.items())
            ]
        )
        return self._subset(chosen)


def divided(
    source: SampleSource, held_out: int | None, seed: int, mirror: bool = False
) -> tuple[Pool, SampleSource | None]:
    """Hold some samples out, drawn at random, and keep the others for the stages.

    Parameters
    ----------
    source : SampleSource
    held_out : int, optional
        How many: a tenth of all, at most `HELD_OUT`, by default; none where there are no labels.
    seed : int
    mirror : bool
        Of the `Pool`.

    Raises
    ------
    UsageError
        When none would be left, or they cannot be mirrored.
    """
    count = len(source)
    number = min(HELD_OUT, count // 10) if held_out is None else held_out
    if source.labels is None:
        number = 0
    if number >= count:
        raise UsageError(
            f"{source.name}: {number} of {count} samples are to be held out, which leaves none to prune with: "
            "lower `--held-out`"
        )
    order = np.random.default_rng([seed, 0]).permutation(count).astype(np.int64)
    held, rest = np.sort(order[:number]), np.sort(order[number:])
    return Pool(source, rest, seed, mirror), source.subset(held) if number else None


def in_memory(source: SampleSource) -> SampleSource:
    """The samples read, where they are not too large for it, else as they are."""
    first = source.batch(0, 1)
    if getattr(first, "nbytes", _READ_BYTES) * len(source) > _READ_BYTES or source.borders:
        return source
    return source.loaded()
