"""Which tensors of a network are pruned: the weights of layers that multiply their inputs.

Pruned by default are the weights of `Linear`, `Conv1d/2d/3d` and their transposes, `Bilinear`, the matrices of
`RNN`, `LSTM`, `GRU` and their cells, the projections of `MultiheadAttention`, and those of a user's own layers
that are found to compute x·Wᵀ or x·W (such as `Conv1D` of Hugging Face). Embeddings, biases, normalisation scales,
tokens and positions are not pruned: activations are not multiplied by them as a matrix.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product

import torch
from torch import Tensor, nn

from cbs_opt.errors import UsageError
from cbs_opt.instances.plain import plain_model
from cbs_opt.instances.tensors import Layout

logger = logging.getLogger("cbs_opt")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NORMS = re.compile(r"(Layer|Batch|Group|Instance|RMS)\w*Norm|Norm(\dd)?$")
_LISTED = 12


@dataclass(frozen=True)
class Prunable:
    """A tensor that can be pruned.

    Attributes
    ----------
    name : str
        In `model.named_parameters()`; of a parametrised tensor the name of its effective value.
    aliases : tuple of str
        Other names of the same parameter.
    layout : Layout
    """

    name: str
    aliases: tuple[str, ...]
    layout: Layout

    @property
    def names(self) -> tuple[str, ...]:
        """All its names."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class LeftOut:
    """A tensor that is not pruned: its names, why, and how it would be pruned (None: it cannot be)."""

    names: tuple[str, ...]
    reason: str
    tensor: Prunable | None


@dataclass(frozen=True)
class Selection:
    """The tensors of a network that are pruned, and those that are not, in the order of the network."""

    tensors: tuple[Prunable, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the pruned tensors."""
        return tuple(tensor.name for tensor in self.tensors)

    def chosen(self, names: Iterable[str] | None = None, exclude: Iterable[str] | None = None) -> Selection:
        """The part that patterns choose; see `matches` for the patterns.

        Parameters
        ----------
        names : iterable of str, optional
            Tensors to prune, those of `self.tensors` by default. An exact name takes any tensor; a pattern takes
            those of `self.tensors` that it matches, or, where it matches none of them, all others that it does.
        exclude : iterable of str, optional
            Tensors not to prune.

        Raises
        ------
        UsageError
            For a pattern that no tensor of the network matches, a tensor that cannot be pruned, or where nothing
            is left to prune.
        """
        for what, given in (("names", names), ("exclude", exclude)):
            if isinstance(given, str):
                raise UsageError(
                    f"`{what}` must be a sequence of names or patterns, such as ['{given}'], got a text"
                )
        patterns, excluded = (None if names is None else list(names)), list(exclude or ())
        self._check_known(patterns or (), excluded)
        chosen = set(self.tensors)
        if patterns is not None:
            chosen = {tensor for pattern in patterns for tensor in self._hits(pattern)}
        refused = {t for t in chosen if any(_fits(pattern, t.names) for pattern in excluded)}
        kept, left_out = [], []
        for tensor, reason in self._in_order():
            if tensor in chosen - refused:
                kept.append(tensor)
            elif tensor in refused:
                left_out.append(LeftOut(tensor.names, "excluded", tensor))
            else:
                left_out.append(LeftOut(tensor.names, reason or "not among those named", tensor))
        left_out += [left for left in self.left_out if left.tensor is None]
        if not kept:
            raise UsageError("`--tensors` and `--exclude` leave nothing to prune")
        return Selection(tuple(kept), tuple(left_out))

    def without(self, reasons: Mapping[str, str]) -> Selection:
        """Leave more tensors out, for the reasons given by name."""
        kept = tuple(tensor for tensor in self.tensors if tensor.name not in reasons)
        more = [LeftOut(t.names, reasons[t.name], t) for t in self.tensors if t.name in reasons]
        return Selection(kept, (*self.left_out, *more))

    def log(self, frozen: Collection[str] = ()) -> None:
        """Log what is pruned, and what is not, with reasons; `frozen` names tensors that are not trained."""
        for t in self.tensors:
            order = ", stored inputs first" if t.layout.inputs_first else ""
            logger.debug(f"to prune: {' = '.join(t.names)}  {' × '.join(map(str, t.layout.shape))}{order}")
        logger.info(f"to prune: {_listed([' = '.join(t.names) for t in self.tensors])}")
        if frozen:
            still = _listed([name for name in self.names if name in frozen])
            logger.info(
                f"pruned although they are frozen (`requires_grad` is False; --exclude keeps them): {still}"
            )
        by_reason: dict[str, list[str]] = {}
        for left in self.left_out:
            by_reason.setdefault(left.reason, []).append(" = ".join(left.names))
        for reason, names in by_reason.items():
            logger.info(f"left out, {reason}: {_listed(names)}")

    def _in_order(self) -> list[tuple[Prunable, str]]:
        return [(t, "") for t in self.tensors] + [
            (e.tensor, e.reason) for e in self.left_out if e.tensor is not None
        ]

    def _hits(self, pattern: str) -> list[Prunable]:
        every = self._in_order()
        exact = [tensor for tensor, _ in every if pattern in tensor.names]
        if exact:
            return exact
        hits = [tensor for tensor in self.tensors if _fits(pattern, tensor.names)]
        return hits or [tensor for tensor, _ in every if _fits(pattern, tensor.names)]

    def _check_known(self, names: Iterable[str], exclude: Iterable[str]) -> None:
        every = [*(t.names for t in self.tensors), *(left.names for left in self.left_out)]
        for option, patterns in (("--tensors", names), ("--exclude", exclude)):
            for pattern in patterns:
                hits = [own for own in every if _fits(pattern, own)]
                if not hits:
                    raise UsageError(
                        f"`{option}`: the network has no parameter '{pattern}'; it has "
                        f"{_listed(self.names or [own[0] for own in every])}"
                    )
                for left in self.left_out if option == "--tensors" else ():
                    if left.tensor is None and pattern in left.names:
                        raise UsageError(f"`{option}`: '{pattern}' cannot be pruned: it is {left.reason}")


def select(model: nn.Module) -> Selection:
    """The tensors of a network that are pruned by default, with reasons for the others.

    Parameters
    ----------
    model : torch.nn.Module
        Parametrised tensors (weight_norm, masks, …) stand under the name of their effective value.

    Raises
    ------
    UsageError
        When a parameter has no shape yet, or the network is TorchScript.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UsageError(
            "the network is TorchScript, whose layers cannot be looked into: give the Python module; a file of "
            "torch.jit.save does for its checkpoint"
        )
    model = plain_model(model).model
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UsageError(f"'{name}' has no shape yet: let the factory run the network once on a batch")
        names_of.setdefault(parameter, []).append(name)
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, own in module._parameters.items():
            if own is not None:
                owners.setdefault(own, []).append((module, leaf))
    pruned, left_out = [], []
    for parameter, names in names_of.items():
        found = [_judged(owner, leaf, parameter) for owner, leaf in owners[parameter]]
        layouts = {each for each in found if isinstance(each, Layout)}
        reasons = [each for each in found if isinstance(each, str)]
        if len(layouts) == 1 and not reasons:
            pruned.append(Prunable(names[0], tuple(names[1:]), layouts.pop()))
            continue
        reason = reasons[0] if reasons else "shared by layers that store it in different orders"
        if layouts and reasons:
            reason = f"shared with what is {reasons[0]} (its name after --tensors prunes both uses)"
        layout = layouts.pop() if len(layouts) == 1 else Layout(tuple(parameter.shape))
        usable = parameter.is_floating_point() and parameter.numel() > 0 and parameter.dim() > 0
        left_out.append(
            LeftOut(tuple(names), reason, Prunable(names[0], tuple(names[1:]), layout) if usable else None)
        )
    return Selection(tuple(pruned), tuple(left_out))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a tensor.

    A pattern is a name, a name with `*`, `?` and `[…]`, or `re:` and a regular expression. It must fit the whole
    name of the tensor, or of a module to which the tensor belongs: `lm_head` and `re:.*lm_head` both name
    `lm_head.weight`.

    Raises
    ------
    UsageError
        For what is no regular expression.
    """
    parts = name.split(".")
    candidates = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(f"'{pattern}' is no regular expression: {error}") from None
        return any(expression.fullmatch(candidate) for candidate in candidates)
    return any(candidate == pattern or fnmatchcase(candidate, pattern) for candidate in candidates)


def _fits(pattern: str, names: Iterable[str]) -> bool:
    return any(matches(pattern, name) for name in names)


def _judged(owner: nn.Module, leaf: str, parameter: Tensor) -> Layout | str:
    """The layout of a matrix by which a module multiplies; or a description of the parameter."""
    shape = tuple(parameter.shape)
    if not parameter.is_floating_point():
        return f"{str(parameter.dtype).removeprefix('torch.')}, not real floating-point numbers"
    if parameter.numel() == 0:
        return "empty"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "an embedding"
    if len(shape) < 2:
        return "a bias or scale (one axis)"
    if isinstance(owner, (nn.Linear, *_CONVOLUTIONS)):
        return Layout(shape)
    if isinstance(owner, _TRANSPOSED):
        return Layout(shape, inputs_first=True, groups=owner.groups)
    if isinstance(owner, nn.Bilinear) or (isinstance(owner, _RECURRENT) and leaf.startswith("weight")):
        return Layout(shape)
    if isinstance(owner, nn.MultiheadAttention) and leaf in _ATTENTION:
        return Layout(shape)
    if _NORMS.search(type(owner).__name__):
        return "a scale of a normalisation"
    if len(shape) == 2 and leaf == "weight":
        order = _probed(owner, parameter)
        if order is not None:
            return Layout(shape, inputs_first=order)
    return "a parameter of no layer known to multiply by it (its name after --tensors prunes it)"


@torch.no_grad()
def _probed(owner: nn.Module, weight: Tensor) -> bool | None:
    """Whether a user's own layer computes x·W + b (True) or x·Wᵀ + b (False); None for anything else.

    `Conv1D` of Hugging Face and linear layers written by hand are known by what they do with numbers, not by name.
    """
    if any(True for _ in owner.children()):
        return None
    bias = getattr(owner, "bias", None)
    generator = torch.Generator().manual_seed(0)
    training = owner.training
    owner.eval()
    try:
        for inputs_first, lead in product((False, True), ((3,), (1, 3))):
            matrix = weight if inputs_first else weight.T
            x = torch.randn(*lead, matrix.shape[0], generator=generator).to(weight)
            try:
                y = owner(x)
            except Exception:  # whatever a user's module does with inputs that are not its own
                continue
            expected = x @ matrix + (bias if isinstance(bias, Tensor) and bias.shape == matrix.shape[1:] else 0)
            if isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, 1e-2, 1e-5):
                return inputs_first
    finally:
        owner.train(training)
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
