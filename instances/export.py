"""From a trained network and its data to an instance: `export`, and the class `Export` that `cbs-export` uses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cbs_opt.curvature import Curvature, GradientFactor, HessianBlocks, InverseHessianBlocks, SharedBlocks
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files import read_instance
from cbs_opt.files.atomic import check_writable
from cbs_opt.files.instance_file import instance_arrays
from cbs_opt.files.npz import Content, Stream, json_text, write_npz
from cbs_opt.instance import Instance
from cbs_opt.instances.batches import Samples
from cbs_opt.instances.budgets import keeping
from cbs_opt.instances.curvature import fisher_blocks
from cbs_opt.instances.dense import dense_scores
from cbs_opt.instances.gradients import CHUNK_BYTES, gradient_rows
from cbs_opt.instances.losses import LossLike, SampleLoss, declared
from cbs_opt.instances.metrics import MetricLike
from cbs_opt.instances.modes import fewest, outside_inference
from cbs_opt.instances.plan import make_plan, with_zeros
from cbs_opt.instances.recipe import DAMPING, Along, Fisher, Form, Recipe, Source, one_of, scratch
from cbs_opt.instances.reconstruction import passes
from cbs_opt.instances.row_blocks import RowBlocks
from cbs_opt.instances.row_sources import row_hessians
from cbs_opt.instances.scores import Judge, torch_device
from cbs_opt.instances.tensors import table_of, to_rows
from cbs_opt.linalg import is_positive
from cbs_opt.typing import FloatArray
from cbs_opt.version import __version__

logger = logging.getLogger("cbs_opt")

_LATE = ("groups", "group_budgets", "cross_groups", "cross_group_budgets")  # members after the curvature

Progress = Callable[[str, int, int], None]
"""Called with the current task, the amount done, and the total."""

_CUDA_CHUNK_BYTES = 1 << 30
_LARGEST_PIECE = 1 << 31  # bytes of activations, where rows share their Hessians


def export(
    model: nn.Module,
    inputs: Samples,
    labels: Samples | None,
    names: Sequence[str] | None = None,
    *,
    loss: LossLike | None = None,
    metric: MetricLike | None = None,
    output_key: str | None = None,
    source: Source = "fisher",
    curvature: Form | None = None,
    blocks: str | int | None = None,
    batch: int = 1,
    damping: float | None = None,
    relative_damping: float | None = None,
    dtype: str | None = None,
    sparsity: float | None = None,
    per_layer: bool = False,
    nm: tuple[int, int] | None = None,
    first_order: bool = False,
    memory: int | None = None,
    keep_mask: bool = False,
    nm_along: Along = "inputs",
    layers: Mapping[str, float] | None = None,
    keep_at_least: float | None = None,
    fisher: Fisher | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    exclude: Sequence[str] | None = None,
    device: str = "auto",
    path: Path | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    keep: int | None = None,
) -> Instance:
    """Turn a trained network into an instance.

    Parameters
    ----------
    model : torch.nn.Module
        Any model that takes a batch; used in evaluation mode, and not changed.
    inputs : (m, …)
        Samples, a tensor or anything whose slices are tensors.
    labels : (m, …)
        Targets of the loss: int64 (m,) class numbers for cross entropy.
    names : sequence of str, optional
        Parameters to prune, by their names in `model.named_parameters()` or by patterns; by default the weights
        of all layers that multiply, see `cbs_opt.instances.prunable`.
    loss : str, torch loss or callable, optional
        "cross-entropy", "mse", "bce" and so on, a loss of PyTorch, or a function of (outputs, targets); see
        `cbs_opt.instances.losses`. Cross entropy where outputs and targets are those of a classifier.
    metric : str or callable, optional
        See `cbs_opt.instances.metrics`.
    output_key : str, optional
        The part of a structured output that the loss is about, see `cbs_opt.instances.outputs`.
    source, curvature, blocks, batch, damping, relative_damping, dtype : optional
    sparsity, per_layer, nm, first_order, memory, keep_mask, nm_along, layers, keep_at_least : optional
    fisher, seed, temperature, keep : optional
        See `cbs_opt.instances.recipe.Recipe`.
    exclude : sequence of str, optional
        Names or patterns of what is not to be pruned.
    device : {"auto", "cpu", "cuda"}
        "auto" takes CUDA where there is one.
    path : Path or str, optional
        Write the instance to this file in chunks and read it back: it may then be larger than memory.
    metadata : mapping, optional
        Added to the metadata of the export.
    progress : callable, optional

    Returns
    -------
    Instance

    Raises
    ------
    UsageError
        For options that make no sense, or results that do not fit into memory.
    InstanceError
        For data that do not fit the model, gradients that are not finite, a block without an inverse.
    OutputError
        When `path` cannot be written.

    Examples
    --------
    >>> import torch
    >>> from cbs_opt.instances.export import export
    >>> model = torch.nn.Linear(4, 3)
    >>> export(model, torch.randn(20, 4), torch.randint(3, (20,)), sparsity=0.5).describe()
    '12 weights in 1 block (20 gradients, damping 1e-05), 6 to prune (50.0%)'
    """
    recipe = Recipe(
        source,
        curvature,
        blocks,
        batch,
        damping,
        relative_damping,
        dtype,
        sparsity,
        per_layer,
        nm,
        first_order,
        memory,
        keep_mask,
        nm_along,
        layers,
        keep_at_least,
        fisher,
        seed,
        keep,
        temperature,
    )
    job = Export(
        model,
        inputs,
        labels,
        names,
        recipe,
        loss=loss,
        exclude=exclude,
        metric=metric,
        output_key=output_key,
        device=device,
        metadata=metadata,
        progress=progress,
    )
    if path is None:
        return job.instance()
    job.write(path)
    return read_instance(path)


class Export:
    """One export; its arguments are checked before the work.

    Parameters
    ----------
    model, inputs, labels, names, loss, exclude, device, metadata, progress
        As for `export`.
    recipe : Recipe
    should_stop : callable, optional
        Called between chunks of the gradients; True ends with those collected so far, at least one.
    dense : bool
        Whether nothing of the network was pruned in an earlier stage: then the log names layers that have no
        gradient.
    judge : Judge, optional
        One that has scored such samples in an earlier export of the network: it is not scored again, and what is
        pruned is not logged again. `loss` and `metric` are those of the judge. Tensors that these samples do not
        reach stay.

    Attributes
    ----------
    sizes : list of int
        Of all blocks.
    stored : int
        How many blocks are stored, known after the work: rows of a layer may share one.
    facts : dict
        Results for the metadata: `dense_loss`, `dense_accuracy` of classifiers, `damping`.
    collecting : bool
        Whether gradients are being collected, so that a stop would keep them.

    Raises
    ------
    UsageError, InstanceError
        As for `export`.
    """

    @outside_inference()
    def __init__(
        self,
        model: nn.Module,
        inputs: Samples,
        labels: Samples | None,
        names: Sequence[str] | None,
        recipe: Recipe,
        *,
        loss: LossLike | None = None,
        metric: MetricLike | None = None,
        output_key: str | None = None,
        exclude: Sequence[str] | None = None,
        device: str = "auto",
        metadata: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        judge: Judge | None = None,
        dense: bool = True,
    ) -> None:
        one_of("device", device, ("auto", "cpu", "cuda"))
        self.device = torch_device(device)
        if labels is None and recipe.needs_labels:
            others = "`--fisher sampled` or `exact`" if recipe.source == "kfac" else "`--source reconstruction`"
            others += " without `--first-order`" if recipe.first_order and recipe.source == "kfac" else ""
            raise InstanceError(
                "the data have no labels, which the gradients of the loss need: give (inputs, labels), or take "
                f"{others}, which needs none"
            )
        if labels is not None and len(inputs) != len(labels):
            raise InstanceError(f"there are {len(inputs)} inputs but {len(labels)} labels")
        self.rows = len(inputs) // recipe.batch
        if self.rows < 1:
            raise InstanceError(f"{len(inputs)} samples are too few for a batch of {recipe.batch}")
        if len(inputs) % recipe.batch:
            logger.warning(
                f"{len(inputs)} samples make {self.rows} batches of {recipe.batch}: the last "
                f"{len(inputs) % recipe.batch} are left out"
            )
        self.inputs, self.labels = inputs, labels
        if recipe.source == "fisher" and recipe.batch == 1 and fewest(model) > 1:
            raise UsageError(
                "a batch norm of the network takes its statistics from the batch (it keeps none of its own), "
                "so that single samples have no gradient: use batch means, such as `--batch 50` (from Python "
                "`batch=50`)"
            )
        self._known, self._dense = judge is not None, dense
        plan = make_plan(
            model,
            names,
            exclude,
            source=recipe.source,
            run=lambda network: passes(network, inputs),
            log=not self._known,
            whole=self._known,
        )
        self.model, self.recipe = plan.model, recipe
        self.judge = Judge(loss, metric, output_key) if judge is None else judge
        self._loss_declared = loss is not None
        if labels is None and self.judge.loss is None:
            self.judge.loss = declared("cross-entropy", output_key)  # the network's own classes need no labels
        self.places, self.names, self.weights = plan.places, plan.names, plan.weights
        self.shapes = [place.layout.rows_shape for place in plan.places]
        self.sizes = recipe.sizes(self.shapes)
        self.stored = len(self.sizes)
        self.zeros = int(plan.zeros.sum())
        self.fixed = plan.fixed(recipe.keep_mask)
        log = not self._known
        self.budget = with_zeros(recipe.budget(self.shapes, self.names, log=log), self.fixed, log=log)
        if recipe.keep_at_least is not None:
            sizes = [place.layout.size for place in plan.places]
            least = recipe.keep_at_least
            self.budget, self.fixed = keeping(self.budget, self.weights, sizes, least, self.fixed, log=log)
        if not self._known:
            self._tell_zeros()
        self._extra = dict(metadata or {})
        self._progress: Progress = progress or (lambda what, done, total: None)
        self._should_stop = should_stop
        self._chunk_bytes = _CUDA_CHUNK_BYTES if self.device.type == "cuda" else CHUNK_BYTES
        if recipe.by_rows:  # every piece visits all groups of rows, and nothing is kept of a sample
            self._chunk_bytes = max(self._chunk_bytes, min(_LARGEST_PIECE, recipe.memory_bytes() // 3))
        self._sum = np.zeros(self.weights.size)
        self._squares = 0.0
        self.facts: dict[str, Any] = {}
        self.collecting = False
        # An instance with the curvature still to come: everything else checks itself now.
        stand_in = GradientFactor(np.zeros((1, self.weights.size), np.float32), 0.0, self.sizes)
        self._frame = Instance(self.weights, stand_in, self.budget, fixed=self.fixed)

    @property
    def samples(self) -> int:
        """Number of samples used."""
        return self.rows * self.recipe.batch

    @outside_inference()
    def instance(self) -> Instance:
        """Do the work in memory; gradients that are too many for it lie in a temporary file."""
        recipe = self.recipe
        if recipe.form != "gradients":
            recipe = self.recipe = recipe.fitting(self.shapes, self.samples, None)
        with self._on_device():
            self._judge()
            form: Curvature
            if recipe.form == "gradients":
                G = self._collected(recipe.entry, None)
                form = GradientFactor(G, self._fisher_damping(), self.sizes)
            else:
                rows = self._rows(None) if recipe.by_rows else None
                sizes = self.sizes if rows is None else rows.sizes
                flat = np.empty(sum(b * b for b in sizes), recipe.entry)
                start = 0
                for block in self._blocks(rows, None):
                    flat[start : start + block.size] = block.ravel()
                    start += block.size
                form = (InverseHessianBlocks if recipe.form == "inverse-hessian" else HessianBlocks)(flat, sizes)
                if rows is not None and not rows.plain:
                    form = SharedBlocks(form, rows.shared, rows.scale)
        return Instance(self.weights, form, self.budget, self._linear(), self.fixed, metadata=self._metadata())

    @outside_inference()
    def write(self, path: Path | str) -> None:
        """Do the work and write the file in chunks: at most the gradients and one block are in memory."""
        path = Path(path)
        check_writable(path)
        recipe = self.recipe = self.recipe.fitting(self.shapes, self.samples, path.parent)
        arrays: dict[str, Content] = dict(instance_arrays(self._frame))
        for key in ("gradients", "damping", "metadata"):
            del arrays[key]
        late: dict[str, Content] = {key: arrays.pop(key) for key in _LATE if key in arrays}
        with self._on_device():
            self._judge()
            if recipe.form == "gradients":
                shape = (self.rows, self.weights.size)
                fits = recipe.entry.itemsize * shape[0] * shape[1] <= recipe.memory_bytes()
                if fits or recipe.batch > 1:  # those of mini-batches are scaled when their mean is known
                    arrays["gradients"] = self._collected(recipe.entry, path.parent)
                else:
                    arrays["gradients"] = Stream(recipe.entry, shape, self._streamed())
                arrays["damping"] = lambda: np.array(self._fisher_damping())
            else:
                key = recipe.form.replace("-", "_")
                rows = self._rows(path.parent) if recipe.by_rows else None
                count = sum(b * b for b in (self.sizes if rows is None else rows.sizes))
                arrays[key] = Stream(recipe.entry, (count,), self._blocks(rows, path.parent))
                if rows is not None and not rows.plain:
                    version = max(int(np.asarray(arrays["version"])), SharedBlocks.format_version)
                    arrays["version"] = np.array(version, dtype=np.int64)
                    arrays["shared"] = rows.shared
                    if rows.scaled:
                        arrays["block_scale"] = rows.scale
            arrays |= late
            if recipe.first_order:
                arrays["linear"] = lambda: self._sum / self.rows
            if self.fixed is not None:
                arrays["fixed"] = arrays.pop("fixed")
            arrays["metadata"] = lambda: json_text(self._metadata())
            write_npz(path, arrays)

    # Gradients ----------------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[NDArray[Any]]:
        """Mean gradients in order, in the model's precision, with the sums that the rest needs."""
        done = 0
        silent = list(self.places)
        assert self.labels is not None
        for rows in gradient_rows(
            self.model,
            self.inputs,
            self.labels,
            self.names,
            loss=self._loss(),
            batch=self.recipe.batch,
            chunk_bytes=self._chunk_bytes,
        ):
            piece = to_rows(self.places, rows.numpy())
            if self.recipe.first_order or self.recipe.batch > 1:
                self._sum += piece.sum(axis=0, dtype=np.float64)
            if self.recipe.relative_damping is not None:
                self._squares += float(np.square(piece, dtype=np.float64).sum())
            done += len(piece)
            silent = [place for place in silent if not piece[:, place.part].any()]
            self._progress("gradients", done, self.rows)
            yield piece
        if len(silent) == len(self.places):
            logger.warning(
                "ALL GRADIENTS ARE ZERO: nothing tells the weights apart; check that the loss is that of the "
                "network, "
                "`--loss mse` perhaps, and that its outputs depend on the weights that are pruned"
            )
        elif silent:
            logger.warning(
                f"{', '.join(place.name for place in silent[:6])}: the loss has no gradient there, as under "
                "`torch.no_grad`, or behind `detach`, a choice such as argmax or weights that are zero: these are "
                "pruned first; --exclude (from Python `exclude=`) keeps them"
            )

    def _collected(self, dtype: np.dtype[Any], folder: Path | None) -> NDArray[Any]:
        """G (m, n); fewer rows than asked for when a stop came."""
        G = scratch((self.rows, self.weights.size), dtype, self.recipe.memory_bytes(), folder)
        done = 0
        self.collecting = True
        for piece in self._pieces():
            G[done : done + len(piece)] = piece
            done += len(piece)
            if done < self.rows and self._should_stop():
                logger.warning(f"interrupted: {done} of {self.rows} gradients are used")
                self.facts["interrupted"] = True
                self.rows = done
                break
        self.collecting = False
        self._scale(G[: self.rows])
        return G[: self.rows]

    def _scale(self, G: NDArray[Any]) -> None:
        """Bring mean gradients of B samples to the scale of single ones, in place.

        They have 1/B of the covariance of single gradients and the same mean g, so that √B (ḡ − g) + g has the
        covariance and the mean: H, `linear` and damping then mean the same whatever B is.
        """
        batch = self.recipe.batch
        if batch == 1:
            return
        root, mean = math.sqrt(batch), self._sum / self.rows
        shift = ((root - 1.0) * mean).astype(G.dtype)
        step = max(1, CHUNK_BYTES // max(G[:1].nbytes, 1))
        self._squares = 0.0
        for first in range(0, self.rows, step):
            part = G[first : first + step]
            part *= G.dtype.type(root)
            part -= shift
            if self.recipe.relative_damping is not None:
                self._squares += float(np.square(part, dtype=np.float64).sum())

    def _streamed(self) -> Iterator[NDArray[Any]]:
        """G for a file that has been promised all rows: a stop leaves nothing."""
        for piece in self._pieces():
            if self._should_stop():
                raise KeyboardInterrupt
            yield piece

    # Blocks -------------------------------------------------------------------------------------------------

    def _blocks(self, rows: RowBlocks | None, folder: Path | None) -> Iterator[NDArray[Any]]:
        """The dense blocks as they are stored, each checked as a reader will."""
        recipe, definite = self.recipe, self.recipe.form == "inverse-hessian"
        precision = float(np.finfo(recipe.entry).eps)
        if rows is None:
            G = self._collected(np.dtype(np.float32), folder)
            made = fisher_blocks(G, self._fisher_damping(), self.sizes, inverse=definite)
        else:
            made = rows.matrices(inverse=definite)
        for k, block in enumerate(made):
            stored = block.astype(recipe.entry, copy=False)
            if not is_positive(stored.astype(np.float64, copy=False), definite=definite, precision=precision):
                finer = "" if recipe.entry == np.float64 else " or store float64"
                whose = "" if rows is None else f" of '{rows.stored[k].name}'"
                raise InstanceError(
                    f"block {k}{whose} is not positive in {recipe.entry}: raise the damping{finer}"
                )
            self._progress("blocks", k + 1, self.stored)
            yield stored

    def _rows(self, folder: Path | None) -> RowBlocks:
        """The blocks of all rows; refused when they do not fit after all."""
        rows, self.facts["damping"] = row_hessians(
            self.model,
            self.inputs,
            self.labels,
            {place.name: place.layout for place in self.places},
            self.recipe,
            self._loss() if self.recipe.source == "kfac" else None,
            dense=self._dense,
            chunk_bytes=self._chunk_bytes,
            progress=lambda what, done: self._progress(what, done, self.samples),
        )
        self.recipe.check_fits(self.shapes, self.samples, folder, rows.sizes)
        self.stored = len(rows.stored)
        if self.recipe.first_order:
            self._add_mean_gradient()
        return rows

    def _add_mean_gradient(self) -> None:
        """The mean gradient of the samples, for H that is not made of gradients."""
        assert self.labels is not None
        (mean,) = gradient_rows(
            self.model,
            self.inputs,
            self.labels,
            self.names,
            loss=self._loss(),
            batch=len(self.inputs),
            chunk_bytes=self._chunk_bytes,
        )
        self._sum = self.rows * to_rows(self.places, mean.double().numpy())[0]

    def _fisher_damping(self) -> float:
        if self.recipe.relative_damping is None:
            damping = DAMPING if self.recipe.damping is None else self.recipe.damping
        else:
            damping = self.recipe.relative_damping * self._squares / (self.rows * self.weights.size)
        self.facts["damping"] = damping
        return damping

    # Metadata of the instance -------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Score the dense network, which finds data that do not fit before the long work."""
        if self.labels is None or self._known:
            return
        needed = self.recipe.source != "reconstruction"
        try:
            self.facts |= dense_scores(
                self.model,
                self.inputs,
                self.labels,
                self.judge,
                chunk_bytes=self._chunk_bytes,
                progress=lambda done: self._progress("checking", done, len(self.inputs)),
            )
        except (InstanceError, UsageError) as error:
            if needed or self._loss_declared or str(error).startswith("the network does not take"):
                raise
            logger.info(f"the dense network is not scored: {error}")

    def _loss(self) -> SampleLoss:
        """The loss, each sample of which is a share of the whole."""
        assert self.judge.loss is not None
        if self.judge.loss.of_batches and self.recipe.source == "fisher" and self.recipe.batch == 1:
            raise UsageError(
                f"the loss {self.judge.loss.name} compares the samples of a batch, and single samples have no "
                "gradient: use batch means, such as `--batch 50` (from Python `batch=50`), or `--source kfac`"
            )
        if self.labels is None:
            return self.judge.loss
        return self.judge.loss.over(self.judge.mean_weight)

    def _linear(self) -> FloatArray | None:
        return self._sum / self.rows if self.recipe.first_order else None

    def _metadata(self) -> dict[str, Any]:
        recipe = self.recipe
        loss = "" if self.judge.loss is None else self.judge.loss.name
        fisher = recipe.fisher or "empirical"
        of = "single samples" if recipe.batch == 1 else f"mini-batches of {recipe.batch}"
        softened = "" if recipe.temperature == 1 else f" at temperature {recipe.temperature:g}"
        scaled = "" if recipe.batch == 1 else ", in the scale of single samples"
        hessian = {
            "fisher": f"empirical Fisher of the gradients of {of}{scaled}, {loss}",
            "reconstruction": "XXᵀ/m of each layer's inputs: half the squared error of its output",
            "kfac": f"E[g²] XXᵀ/m of each row's inputs and output gradients, {fisher} Fisher, {loss}{softened}",
        }[recipe.source]
        facts: dict[str, Any] = {
            "network": type(self.model).__name__,
            "tensors": table_of(self.places),
            "zeros_before": self.zeros,
            "source": recipe.source,
            "hessian": hessian,
            "samples": self.samples,
            "batch": recipe.batch,
            "writer": f"cbs-opt {__version__}",
            **self.facts,
        }
        if recipe.source == "kfac":
            facts["fisher"] = fisher
            if fisher == "sampled":
                facts["label_seed"] = recipe.seed
            if recipe.temperature != 1:
                facts["temperature"] = recipe.temperature
        if recipe.relative_damping is not None:
            facts["relative_damping"] = recipe.relative_damping
        if recipe.layers:
            facts["sparsity_per_layer"] = dict(recipe.layers)
        if recipe.keep_at_least is not None:
            facts["keep_at_least"] = recipe.keep_at_least
        if recipe.nm is not None:
            facts["nm"] = f"{recipe.nm[0]}:{recipe.nm[1]}"
            if recipe.nm_along != "inputs":
                facts["nm_along"] = recipe.nm_along
        return facts | self._extra

    def _tell_zeros(self) -> None:
        """Log how many weights are already zero, and whether they stay zero."""
        n, kept = self.weights.size, 0 if self.fixed is None else int((self.fixed == 1).sum())
        if self.zeros > kept and self.zeros >= 0.001 * n:
            logger.warning(
                f"{self.zeros - kept} of {n} weights ({(self.zeros - kept) / n:.1%}) are zero already and may be "
                "moved by an update: --keep-mask keeps them at zero and counts them as pruned"
            )
        if kept:
            logger.info(f"{kept} of {n} weights ({kept / n:.1%}) are zero already and stay zero")

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """The model on the device, and back where it was."""
        before = next(self.model.parameters()).device
        self.model.to(self.device)
        try:
            yield
        finally:
            self.model.to(before)
