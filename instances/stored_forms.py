"""Tensors that a checkpoint stores as others: masks, weight_norm, spectral_norm, parametrisations.

They are recognised by name: `a.weight_orig` with `a.weight_mask` is `a.weight`, pruned by `torch.nn.utils.prune`.
A `Form` computes the effective tensor, and the stored ones that produce a new value of it, so that a network which
loads them computes with exactly that value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Stored = Mapping[str, Tensor]

_SMALLEST = 1e-12
_BETTER = 0.4  # of a cosine


@dataclass(frozen=True)
class Form:
    """How one effective tensor is stored.

    Attributes
    ----------
    name : str
        Of the effective tensor.
    parts : tuple of str
        Names of the stored tensors.
    kind : str
    value : callable or None
        From the stored tensors, in the order of `parts`, to the effective one; None if only the network can
        compute it.
    encode : callable or None
        From a new value and the old stored tensors to new ones, or None where none produce it.
    """

    name: str
    parts: tuple[str, ...]
    kind: str
    value: Callable[..., Tensor] | None
    encode: Callable[..., tuple[Tensor, ...] | None] | None


_BESIDE = re.compile(r"(?P<path>(?:.*\.)?)_(?P<leaf>weight|bias)_mask")  # as WoodFisher's checkpoints have them
_OTHER = re.compile(r"(?P<path>.*?)parametrizations\.(?P<leaf>[^.]+)\.(?P<rest>.+)")


def stored_forms(names: Iterable[str]) -> list[Form]:
    """The forms that a set of names shows."""
    names = list(names)
    known, forms = set(names), []
    for name in names:
        for endings, kind, value, encode in _PAIRS:
            if not name.endswith(endings[0]):
                continue
            stem = name.removesuffix(endings[0])
            parts = tuple(f"{stem}{ending}" for ending in endings)
            if all(part in known for part in parts):
                forms.append(Form(stem, parts, kind, value, encode))
                known -= set(parts)
                break
    for name in names:
        if match := _BESIDE.fullmatch(name):
            stem = f"{match['path']}{match['leaf']}"
            if stem in known:
                forms.append(Form(stem, (stem, name), "mask", _masked, _encode_mask))
    by_leaf: dict[str, list[str]] = {}
    for name in names:
        if name in known and (match := _OTHER.fullmatch(name)):
            by_leaf.setdefault(f"{match['path']}{match['leaf']}", []).append(name)
    for stem, parts_left in by_leaf.items():
        path, _, leaf = stem.rpartition(".")
        base = f"{path}.parametrizations.{leaf}." if path else f"parametrizations.{leaf}."
        inner = {part.removeprefix(base): part for part in parts_left}
        forms.append(_parametrised(stem, inner))
    return forms


def _parametrised(stem: str, inner: Mapping[str, str]) -> Form:
    """A form of `torch.nn.utils.parametrize`, from its parts by their last names."""
    for keys, kind, value, encode in (
        (("original", "0.mask"), "mask", _masked, _encode_mask),
        (("original0", "original1"), "weight_norm", _normed, _encode_norm),
        (("original", "0._u", "0._v"), "spectral_norm", _spectral, _encode_spectral),
        (("original",), "a mask or another parametrisation", None, None),
    ):
        if set(keys) == set(inner):
            return Form(stem, tuple(inner[key] for key in keys), kind, value, encode)
    return Form(stem, tuple(inner.values()), "a parametrisation of its own", None, None)


def _masked(original: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask == 0, torch.zeros_like(original), original * mask.to(original.dtype))


def _encode_mask(new: Tensor, original: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return new.to(original.dtype), (new != 0).to(mask.dtype)


def _norm_axis(g: Tensor, v: Tensor) -> int | None:
    """The axis along which norms are kept; None for one norm of everything."""
    if v.dim() < 2 or g.dim() not in (0, v.dim()):
        raise ValueError("its gain does not fit its direction")
    if g.numel() == 1:
        return None
    axes = [axis for axis in range(v.dim()) if g.shape[axis] > 1]
    if len(axes) != 1 or g.shape[axes[0]] != v.shape[axes[0]]:
        raise ValueError("its gain does not fit its direction")
    return axes[0]


def _norms(v: Tensor, g: Tensor) -> Tensor:
    axis = _norm_axis(g, v)
    others = [other for other in range(v.dim()) if other != axis]
    norms: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=True)
    return norms.reshape(g.shape) if axis is None else norms


def _normed(g: Tensor, v: Tensor) -> Tensor:
    norms = _norms(v, g)
    return v * (g / torch.where(norms == 0, torch.ones_like(norms), norms))


def _encode_norm(new: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    norms = _norms(new.to(v.dtype), g)
    # A direction of length zero would be divided by it: where all is pruned the gain alone is zero.
    return norms.to(g.dtype), torch.where(norms == 0, v, new.to(v.dtype))


def _sigma(weight: Tensor, u: Tensor, v: Tensor) -> tuple[int, float]:
    """The axis of the weight that comes first in the matrix W, and u·(W v).

    For a square weight the shapes leave it open. u points along W v where it is a singular vector: the second
    axis, that of transposed convolutions, is taken where it fits much better than the first.
    """
    found = []
    for axis in range(min(2, weight.dim())):
        matrix = weight.movedim(axis, 0).flatten(1).double()
        if tuple(matrix.shape) == (u.numel(), v.numel()):
            product = matrix @ v.double()
            sigma = float(u.double() @ product)
            cosine = abs(sigma) / max(float(u.double().norm() * product.norm()), _SMALLEST)
            found.append((cosine - (_BETTER if axis == 1 else 0.0), axis, sigma))
    if not found:
        raise ValueError("its singular vectors do not fit its shape")
    _, axis, sigma = max(found)
    return axis, sigma


def _spectral(original: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return original / _sigma(original, u, v)[1]


def _encode_spectral(new: Tensor, original: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    # In evaluation mode the layer divides by u·(W v): a multiple of u makes that 1. Training renews u anyway.
    axis, _ = _sigma(original, u, v)
    sigma = float(u.double() @ (new.movedim(axis, 0).flatten(1).double() @ v.double()))
    return None if abs(sigma) < _SMALLEST else (new.to(original.dtype), u / sigma, v)


_PAIRS: tuple[
    tuple[tuple[str, ...], str, Callable[..., Tensor], Callable[..., tuple[Tensor, ...] | None]], ...
] = (
    (("_orig", "_mask"), "mask", _masked, _encode_mask),
    (("_g", "_v"), "weight_norm", _normed, _encode_norm),
    (("_orig", "_u", "_v"), "spectral_norm", _spectral, _encode_spectral),
)


def effective(tensors: Stored, wanted: Collection[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Form]]:
    """The tensors with each form replaced by its effective value, and the forms by name.

    Parameters
    ----------
    tensors : mapping of str to Tensor
    wanted : collection of str, optional
        Names of effective tensors: only these are looked for.

    Returns
    -------
    tensors : dict
        A form whose value only the network knows is left as its parts are.
    forms : dict
    """
    out, forms = dict(tensors), {}
    for form in stored_forms(tensors):
        if wanted is not None and form.name not in wanted:
            continue
        if form.value is not None:
            parts = [tensors[part] for part in form.parts]
            narrow = [part.is_floating_point() and part.dtype.itemsize < 4 for part in parts]
            try:
                value = form.value(*[p.float() if n else p for p, n in zip(parts, narrow, strict=True)])
            except (RuntimeError, ValueError, IndexError):  # names that only look like a form
                continue
            for part in form.parts:
                del out[part]
            out[form.name] = value.to(parts[-1 if form.kind == "weight_norm" else 0].dtype)
        forms[form.name] = form
    return out, forms


def encoded(form: Form, new: Tensor, tensors: Stored) -> dict[str, Tensor] | None:
    """The stored tensors that produce a new effective value, by name; None where none do."""
    if form.encode is None:
        return None
    parts = form.encode(new, *[tensors[part] for part in form.parts])
    return None if parts is None else dict(zip(form.parts, parts, strict=True))
