"""A step of all kept weights together towards the outputs of the dense network.

With kept weights w + d the scores of the network are z + Jd to first order. The step minimises

    D(z₀, z) + gᵀd + ½ dᵀ(JᵀCJ + λK) d

over the kept weights: the Gauss-Newton model [1]_ of how far the scores are from those z₀ of the dense network. g
is the gradient of this distance D by the weights, C its second derivative by the scores. The matrix is never made:
conjugate gradients need its products only, a pass in forward mode and one backward each [2]_. K, the
Kronecker-factored curvature of the rows [3]_, is their preconditioner, and the damping is a multiple of it. Unlike
a quadratic model by rows or layers this one knows how layers depend on each other. No label is used.

For classes D is the Kullback-Leibler divergence of their probabilities at a temperature T, times T² [4]_; for
other outputs half the squared distance.

.. [1] Schraudolph: Fast curvature matrix-vector products for second-order gradient descent, Neural Computation,
   2002.
.. [2] Martens: Deep learning via Hessian-free optimization, ICML 2010.
.. [3] Martens, Grosse: Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML 2015.
.. [4] Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from cbs_opt.curvature import Curvature
from cbs_opt.errors import CbsError, InstanceError, UnboundedError
from cbs_opt.instances.batches import call, checked_call, device_of, moved, placed, reason, slices
from cbs_opt.instances.data import SampleSource
from cbs_opt.instances.fisher_terms import scores_and_places
from cbs_opt.instances.gradients import CHUNK_BYTES, chunk_size
from cbs_opt.instances.kfac import factored
from cbs_opt.instances.losses import ClassLoss, SampleLoss
from cbs_opt.instances.modes import evaluation_mode, fewest, single_precision
from cbs_opt.instances.output_gradients import row_gradients
from cbs_opt.instances.outputs import output_values
from cbs_opt.instances.reconstruction import input_covariances
from cbs_opt.instances.row_blocks import row_blocks
from cbs_opt.instances.substitution import call_with
from cbs_opt.pruning.network import WorkingCopy, norms_of
from cbs_opt.pruning.targets import curvature_of
from cbs_opt.typing import BoolArray, FloatArray

logger = logging.getLogger("cbs_opt")

ITERATIONS = 6
"""Of conjugate gradients. With more, the model is fitted to its samples rather than to the network."""

TEMPERATURE = 2.0
"""Of the class probabilities: above 1, also classes that the dense network holds for unlikely say something."""

DAMPING = 0.1
"""λ as a multiple of what the model's curvature is to K along the first direction."""

PRECONDITIONER_SAMPLES = 300
_ROW_DAMPING = 0.01  # of XXᵀ/m within K, of its mean diagonal

OWN_STEPS = 4
"""How many steps a run takes by itself, over all of its stages at least one each, where they are cheap enough."""

OWN_OPERATIONS = 2e13
"""Floating-point operations that these may take: some minutes of one core."""

_PASSES = 6 * ITERATIONS  # forward passes that a step costs: a product is one in forward mode and one backward

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CHUNK_BYTES = 16 * CHUNK_BYTES  # by an estimate that is several times what a graph holds
_KEPT = 16  # graphs of chunks that are kept from one product to the next


Progress = Callable[[int, int], None]
"""Called with the number of passes done, and of all."""


@dataclass(frozen=True)
class Distance:
    """How far the scores of a network are from those of the dense one.

    The scores are the outputs that the loss is about: all of them, where several could be meant.

    Attributes
    ----------
    loss : SampleLoss
        Whether the outputs are of classes, and where they are.
    """

    loss: SampleLoss

    def scores(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """What is compared, (m, …), and what counts, broadcast over it; for classes (m, C, …) and (m, 1, …)."""
        if isinstance(self.loss, ClassLoss):
            view = scores_and_places(self.loss, outputs, targets)
            return view.scores.float(), view.counted.unsqueeze(1).float()
        z = output_values(outputs, self.loss.output_key).float()
        return z, torch.ones_like(z)

    def residual(self, z: Tensor, dense: Tensor) -> Tensor:
        """The gradient of D by z."""
        if isinstance(self.loss, ClassLoss):
            return TEMPERATURE * (torch.softmax(z / TEMPERATURE, 1) - torch.softmax(dense / TEMPERATURE, 1))
        return z - dense

    def curvature(self, z: Tensor, v: Tensor) -> Tensor:
        """Cv: the second derivative of D by z, times v."""
        if isinstance(self.loss, ClassLoss):
            p = torch.softmax(z / TEMPERATURE, 1)
            return p * (v - (p * v).sum(1, keepdim=True))
        return v

    def drawn(self, z: Tensor, counted: Tensor, generator: torch.Generator) -> Tensor:
        """Numbers whose gradients by z have C as their second moment."""
        if isinstance(self.loss, ClassLoss):
            p = torch.softmax(z.detach() / TEMPERATURE, 1)
            sums = p.movedim(1, -1).cpu().double().cumsum(-1)
            at = torch.rand(sums.shape[:-1], generator=generator, dtype=torch.float64)
            numbers = (sums < at.unsqueeze(-1)).sum(-1).clamp(max=sums.shape[-1] - 1).to(z.device)
            drawn = torch.nn.functional.cross_entropy(z / TEMPERATURE, numbers, reduction="none")
            return TEMPERATURE * (drawn * counted[:, 0]).sum()
        signs = 2.0 * torch.randint(0, 2, z.shape, generator=generator) - 1.0
        return (z * signs.to(z)).sum()


def operations(model: nn.Module, samples: SampleSource, count: int) -> float | None:
    """Floating-point operations of a step on so many samples, from those of one forward pass.

    None where they cannot be counted: torch knows none of its operators, or it cannot run meanwhile.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton, which then reads TRITON_INTERPRET

    few = max(1, min(fewest(model), len(samples)))
    counter = FlopCounterMode(display=False)
    try:
        with evaluation_mode(model), single_precision(model), torch.no_grad(), counter:
            checked_call(model, placed(samples.batch(0, few), model))
    except InstanceError:
        return None
    return _PASSES * count / few * float(counter.get_total_flops()) or None


def preconditioner(copy: WorkingCopy, samples: SampleSource, distance: Distance, seed: int) -> Curvature:
    """K: the Kronecker-factored curvature of the distance around the present weights, by rows.

    Parameters
    ----------
    copy : WorkingCopy
    samples : SampleSource
        The first `PRECONDITIONER_SAMPLES` of them.
    distance : Distance
    seed : int
        Of what is drawn.

    Raises
    ------
    UsageError, InstanceError
        For weights or outputs that cannot be followed.
    """
    layouts = {place.name: place.layout for place in copy.places}
    few = samples.subset(np.arange(min(len(samples), PRECONDITIONER_SAMPLES)))
    generator = torch.Generator().manual_seed(seed)

    def terms(outputs: Any, targets: Any) -> Iterator[Tensor]:
        yield distance.drawn(*distance.scores(outputs, targets), generator)

    gradients = row_gradients(copy.model, few.inputs, few.labels, layouts, terms)
    layers, scales = factored(input_covariances(copy.model, few.inputs, layouts), gradients, dense=False)
    return curvature_of(row_blocks(layers, [_ROW_DAMPING * layer.mean_diagonal for layer in layers], None, scales))


def steps(
    copy: WorkingCopy,
    dense: nn.Module,
    samples: SampleSource,
    pruned: BoolArray,
    distance: Distance,
    K: Curvature,
    progress: Progress = lambda done, total: None,
) -> list[FloatArray]:
    """Directions in which the kept weights should move: those after half of the iterations, and after all.

    Parameters
    ----------
    copy : WorkingCopy
        The pruned network; not changed.
    dense : torch.nn.Module
        Its scores are the targets.
    samples : SampleSource
    pruned : bool (n,)
    distance : Distance
    K : Curvature
        See `preconditioner`; it may be of weights nearby.
    progress : callable, optional
        Called between passes with the number of those done and of all; raises to stop.

    Returns
    -------
    list of float64 (n,)
        0 where pruned. Empty where the network is where it should be.

    Raises
    ------
    CbsError
        For a network that torch cannot differentiate in forward mode.

    Notes
    -----
    Each iteration takes a pass in forward mode and one backward over the samples, about as much as two gradients.
    """
    with ExitStack() as stack:
        for network in (copy.model, dense):
            stack.enter_context(evaluation_mode(network))
            stack.enter_context(single_precision(network))
            stack.enter_context(_norms_as_factors(network))
        stack.enter_context(_plain_attention())
        model = _Model(copy, dense, samples, pruned, distance, progress)
        return _conjugate_gradients(model, K, pruned)


class _Model:
    """Gradient and products of the Gauss-Newton matrix of the samples, over the kept weights."""

    def __init__(
        self,
        copy: WorkingCopy,
        dense: nn.Module,
        samples: SampleSource,
        pruned: BoolArray,
        distance: Distance,
        progress: Progress,
    ) -> None:
        self._copy, self._pruned, self._distance, self._progress = copy, pruned, distance, progress
        self._done, self._passes = 0, 0
        self._names = [place.name for place in copy.places]
        held = dict(copy.model.named_parameters(remove_duplicate=False))
        self._live = {name: held[name].detach().clone().requires_grad_() for name in self._names}
        one = placed(samples.batch(0, fewest(copy.model)), copy.model)
        size = max(len(one), chunk_size(copy.model, one, (), _CHUNK_BYTES))
        inputs, labels = samples.inputs, samples.labels
        self._chunks: list[tuple[Any, Any]] = []
        self._targets: list[Tensor] = []
        count = 0.0
        self._layout = torch.preserve_format
        parts = list(slices(inputs, size))
        # One for the targets, one for the gradient, and one for each product; the first graphs are kept for them.
        self._passes = len(parts) * (2 + ITERATIONS) + max(0, len(parts) - _KEPT) * ITERATIONS
        for part in parts:
            self._check()
            x = placed(inputs[part], copy.model)
            y = None if labels is None else moved(labels[part], device_of(copy.model))
            if not self._chunks:
                self._layout = _faster_layout(copy.model, x)
            x = self._laid_out(x)
            self._chunks.append((x, y))
            with torch.no_grad():
                z, counted = distance.scores(call(dense, x), y)
            self._targets.append(z)
            count += float(counted.sum())
        self._share = 1.0 / max(count, 1.0)
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}

    def _check(self) -> None:
        self._progress(min(self._done, self._passes), self._passes)
        self._done += 1

    def _laid_out(self, x: Any) -> Any:
        return x if self._layout is torch.preserve_format else x.contiguous(memory_format=self._layout)

    def _scores(self, k: int, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = self._chunks[k]
        return self._distance.scores(call_with(self._copy.model, weights, x), y)

    def _graph(self, k: int) -> tuple[Tensor, Tensor]:
        """Scores of a chunk that can be differentiated, and what counts; of the first chunks they are kept."""
        if k in self._graphs:
            return self._graphs[k]
        self._check()
        with torch.enable_grad():
            found = self._scores(k, self._live)
        if k < _KEPT:
            self._graphs[k] = found
        return found

    def _by_weights(self, z: Tensor, v: Tensor) -> FloatArray:
        """Jᵀv of a chunk, float64 (n,), 0 where pruned."""
        live = [self._live[name] for name in self._names]
        found = torch.autograd.grad(z, live, v, retain_graph=True, allow_unused=True)
        flat = []
        for place, tensor, gradient in zip(self._copy.places, live, found, strict=True):
            gradient = torch.zeros_like(tensor) if gradient is None else gradient
            flat.append(place.layout.to_rows(gradient.contiguous().cpu().double().reshape(-1)))
        return np.where(self._pruned, 0.0, torch.cat(flat).numpy())

    def gradient(self) -> FloatArray:
        """The gradient of the mean distance, float64 (n,)."""
        total = np.zeros(self._pruned.size)
        for k, dense in enumerate(self._targets):
            z, counted = self._graph(k)
            total += self._by_weights(z, self._share * counted * self._distance.residual(z.detach(), dense))
        return total

    def product(self, d: FloatArray) -> FloatArray:
        """JᵀCJd, float64 (n,)."""
        total = np.zeros(self._pruned.size)
        weights = {name: tensor.detach() for name, tensor in self._live.items()}
        tangents = {
            place.name: torch.from_numpy(place.tensor(d)).to(weights[place.name]) for place in self._copy.places
        }
        for k in range(len(self._chunks)):
            self._check()
            with torch.no_grad():
                change = jvp(lambda values, k=k: self._scores(k, values)[0], (weights,), (tangents,))[1]
            z, counted = self._graph(k)
            total += self._by_weights(z, self._share * counted * self._distance.curvature(z.detach(), change))
        return total


@contextmanager
def _norms_as_factors(model: nn.Module) -> Iterator[None]:
    """Batch norms in evaluation mode multiply and add, which torch differentiates faster than their own call."""
    changed = [norm for _, norm in norms_of(model) if type(norm) in _NORMS and "forward" not in vars(norm)]
    try:
        for norm in changed:
            vars(norm)["forward"] = partial(_multiply_and_add, norm)
        yield
    finally:
        for norm in changed:
            del vars(norm)["forward"]


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by operators that forward mode knows; fused ones are not among them."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _multiply_and_add(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    assert norm.running_mean is not None and norm.running_var is not None
    factor = torch.rsqrt(norm.running_var + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean * factor
    shift = shift if norm.bias is None else shift + norm.bias
    shape = (1, -1, *(1 for _ in range(x.dim() - 2)))
    return torch.addcmul(shift.detach().reshape(shape), x, factor.detach().reshape(shape))


def _faster_layout(model: nn.Module, x: Any) -> torch.memory_format:
    """Channels last for the images of networks that take them so: convolutions on CPUs are then faster."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] < 2:
        return torch.preserve_format
    try:
        with torch.no_grad():
            call(model, x[: fewest(model)].contiguous(memory_format=torch.channels_last))
    except RuntimeError:  # a view that the other layout does not allow
        return torch.preserve_format
    return torch.channels_last


def _conjugate_gradients(model: _Model, K: Curvature, pruned: BoolArray) -> list[FloatArray]:
    """Preconditioned conjugate gradients from 0."""
    found: list[FloatArray] = []
    d = np.zeros(pruned.size)
    try:
        r = -model.gradient()
        y = _solved(K, pruned, r)
        p, rho, damping = y, float(r @ y), 0.0
        for number in range(1, ITERATIONS + 1):
            if not np.isfinite(rho) or rho <= 0:
                break
            Gp, Kp = model.product(p), np.where(pruned, 0.0, K.matmul(p))
            if number == 1:
                damping = DAMPING * float(p @ Gp) / float(p @ Kp)
            Gp = Gp + damping * Kp
            size = float(p @ Gp)
            if not np.isfinite(size) or size <= 0:
                break
            step = rho / size
            d, r = d + step * p, r - step * Gp
            if number in (ITERATIONS // 2, ITERATIONS):
                found.append(d)
            y = _solved(K, pruned, r)
            before, rho = rho, float(r @ y)
            p = y + rho / before * p
    except UnboundedError:
        logger.debug("the preconditioner is singular")
    except CbsError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CbsError(f"the network cannot be differentiated in forward mode: {reason(error)}") from error
    return found


def _solved(K: Curvature, pruned: BoolArray, r: FloatArray) -> FloatArray:
    """K⁻¹r on the kept weights."""
    return K.best_weights(np.zeros(pruned.size), pruned, -r)
