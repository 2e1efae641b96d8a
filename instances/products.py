"""The inputs that each weight of a network multiplies, observed at the calls of torch, not at the layers.

In a forward pass every call of torch is inspected. A call that multiplies by a weight, or by a part or the
transpose of one, is reported with the matrix of inputs of that product. It therefore does not matter which layer
owns the weight, how often it is used, or whether the layer is called at all (`MultiheadAttention` never calls its
`out_proj`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cbs_opt.instances.patches import convolution_patches, transposed_patches
from cbs_opt.instances.recurrent import RECURRENT, recurrent_inputs
from cbs_opt.instances.tensors import Layout


@dataclass(frozen=True)
class Product:
    """A call in which rows of a weight are multiplied by inputs.

    Attributes
    ----------
    name : str
        Of the weight.
    first, last : int
        Its rows first … last − 1, in the order of the instance.
    inputs : Tensor (K, places), or None
        None for a look-up.
    counts : Tensor (last − first,), or None
        What the product adds to every diagonal entry of a row: how often a row of an embedding was read, or the
        squares of what a row was multiplied by, where the product runs across the rows.
    across : bool
        Whether the weight was multiplied from the other side than its layout says.
    """

    name: str
    first: int
    last: int
    inputs: Tensor | None
    counts: Tensor | None = None
    across: bool = False


class NotFollowed(Exception):  # noqa: N818  (no error of the user's)
    """A call that multiplies in a way that cannot be followed."""


class Products(TorchFunctionMode):
    """Report what weights multiply, while the block runs.

    Parameters
    ----------
    weights : mapping of str to (Tensor, Layout)
        Of the network, by name.
    report : callable
        Gets every `Product`.
    refuse : callable
        Gets the name of a weight and why one of its uses cannot be followed.
    """

    def __init__(
        self,
        weights: Mapping[str, tuple[Tensor, Layout]],
        report: Callable[[Product], None],
        refuse: Callable[[str, str], None],
    ) -> None:
        super().__init__()
        self._weights, self._report, self._refuse = weights, report, refuse
        self._names: dict[tuple[str, int], list[str]] = {}
        for name, (tensor, _) in weights.items():
            self._names.setdefault(_memory(tensor), []).append(name)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the call, and inspect it if one of its arguments is a weight."""
        kwargs = kwargs or {}
        title = getattr(func, "__name__", "")
        if title in _HARMLESS:
            return func(*args, **kwargs)
        met = {name for value in (*args, *kwargs.values()) for name in self._met(value)}
        result = func(*args, **kwargs)
        if met and not _is_view(result, args):
            self._followed: set[str] = set()
            reason = f"torch's '{title}' does not multiply by it"
            try:
                self._follow(title, args, kwargs)
            except NotFollowed as error:
                reason = str(error)
            except Exception as error:  # whatever a user's network does that no handler expects
                reason = f"{type(error).__name__} in torch's '{title}'"
            for name in met - self._followed:
                self._refuse(name, reason)
        return result

    def _follow(self, title: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Report the products of a call."""
        if title in RECURRENT:
            for matrix, inputs in recurrent_inputs(title, args):
                self.met(matrix, lambda inputs=inputs: inputs.T)  # type: ignore[misc]
            return
        handler = _HANDLERS.get(title)
        if handler is None:
            raise NotFollowed(f"it goes through torch's '{title}'")
        handler(self, *args, **kwargs)

    def _tell(self, product: Product) -> None:
        self._followed.add(product.name)
        self._report(product)

    def _met(self, value: Any) -> list[str]:
        if isinstance(value, Tensor):
            name = self._name(value)
            return [] if name is None else [name]
        if isinstance(value, list | tuple):
            return [name for part in value for name in self._met(part)]
        return []

    def _name(self, tensor: Tensor) -> str | None:
        """The weight that a tensor is, or is a view of: several may share memory."""
        for name in self._names.get(_memory(tensor), ()):
            start = self._weights[name][0].storage_offset()
            if start <= tensor.storage_offset() < start + self._weights[name][0].numel():
                return name
        return None

    def met(self, matrix: Tensor, inputs: Callable[[], Tensor], *, transposed: bool = False) -> None:
        """Report a product matrix · inputs, or inputsᵀ · matrix with `transposed`, where the matrix is a weight's.

        Parameters
        ----------
        matrix : Tensor
            A weight as it is stored, a range of its rows, or its transpose.
        inputs : callable
            Gives the inputs (K, places); only asked for where they are wanted.
        transposed : bool
        """
        name = self._name(matrix)
        if name is None:
            return
        weight, layout = self._weights[name]
        first, last, flipped = _part(matrix, weight)
        if layout.inputs_first:
            if (first, last) != (0, weight.shape[0]):
                raise NotFollowed("a part of its inputs is multiplied alone")
            first, last = 0, layout.rows
        if (flipped != transposed) == layout.inputs_first:
            self._tell(Product(name, first, last, inputs()))
        else:  # Σ_j (Σ_r δ_rj x_r)²: of each row's own terms x_r² is what all its weights share
            squares = inputs().double().square().sum(1)
            self._tell(Product(name, first, last, None, squares, across=True))

    def linear(self, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """A · weightᵀ."""
        self.met(weight, lambda: _columns(a))

    def matmul(self, a: Tensor, b: Tensor, **_: Any) -> None:
        """A · b, where either may be the weight."""
        if self._name(b) is not None:
            if b.dim() != 2:
                raise NotFollowed("it is a stack of matrices")
            self.met(b, lambda: _columns(a), transposed=True)
        if self._name(a) is not None:
            if a.dim() != 2:
                raise NotFollowed("it is a stack of matrices")
            self.met(a, lambda: b.unsqueeze(-1) if b.dim() == 1 else b.movedim(-2, 0).flatten(1))

    def addmm(self, added: Tensor, a: Tensor, b: Tensor, **scales: Any) -> None:
        """Added + a · b."""
        if scales.get("alpha", 1) != 1:
            raise NotFollowed("its product is scaled")
        self.matmul(a, b)

    def bilinear(self, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Σ_ij a_i weight_oij b_j."""
        self.met(weight, lambda: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2).flatten(0, -2).T)

    def convolution(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        """A convolution; each group of channels has its own inputs."""
        dims = weight.dim() - 2
        a = a.unsqueeze(0) if a.dim() == dims + 1 else a
        pads = padding if isinstance(padding, str) else _each(padding, dims)
        self._grouped(
            weight,
            lambda: convolution_patches(
                a, weight.shape[2:], _each(stride, dims), pads, _each(dilation, dims), groups
            ),
            groups,
        )

    def transposed(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> None:
        """A transposed convolution, whose weight is (inputs, outputs per group, …)."""
        dims = weight.dim() - 2
        a = a.unsqueeze(0) if a.dim() == dims + 1 else a
        steps, pads, more, spaces = (_each(value, dims) for value in (stride, padding, output_padding, dilation))
        self._grouped(
            weight,
            lambda: transposed_patches(a, weight.shape[2:], steps, pads, more, spaces, groups),
            groups,
            inputs_first=True,
        )

    def _grouped(
        self, weight: Tensor, patches: Callable[[], Tensor], groups: int, *, inputs_first: bool = False
    ) -> None:
        name = self._name(weight)
        if name is None:
            raise NotFollowed("another argument of a convolution depends on it")
        whole, layout = self._weights[name]
        if _part(weight, whole) != (0, whole.shape[0], False) or layout.inputs_first != inputs_first:
            raise NotFollowed("it is convolved in another order than its layer stores it")
        if inputs_first and layout.groups != groups:
            raise NotFollowed(f"it is convolved in {groups} groups, its layer says {layout.groups}")
        rows = layout.rows // groups
        for g, inputs in enumerate(patches().permute(1, 2, 0, 3).flatten(2)):
            self._tell(Product(name, g * rows, (g + 1) * rows, inputs))

    def embedding(self, indices: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        """Rows of the weight by their numbers."""
        name = self._name(weight)
        if name is None or _part(weight, self._weights[name][0]) != (0, weight.shape[0], False):
            raise NotFollowed("it is looked up in parts")
        if self._weights[name][1].inputs_first:
            raise NotFollowed("it is looked up by columns")
        counts = torch.bincount(indices.flatten(), minlength=weight.shape[0]).double()
        self._tell(Product(name, 0, weight.shape[0], None, counts))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim: int,
        heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        **options: Any,
    ) -> None:
        """Projections of queries, keys and values, and of the heads' outputs."""
        separate = options.get("use_separate_proj_weight", False)
        if separate:
            for kind, a in (("q", query), ("k", key), ("v", value)):
                self.met(options[f"{kind}_proj_weight"], lambda a=a: _columns(a))  # type: ignore[misc]
        elif in_proj_weight is not None:
            thirds = (query, key, value)
            if query is key and key is value:
                self.met(in_proj_weight, lambda: _columns(query))
            else:
                for k, a in enumerate(thirds):
                    rows = in_proj_weight[k * embed_dim : (k + 1) * embed_dim]
                    self.met(rows, lambda a=a: _columns(a))  # type: ignore[misc]

        def heads_outputs() -> Tensor:
            # With the identity as projection the function gives what the projection multiplies.
            identity = torch.eye(out_proj_weight.shape[1], dtype=out_proj_weight.dtype, device=query.device)
            options["need_weights"] = False
            outputs: Tensor = functional.multi_head_attention_forward(
                query, key, value, embed_dim, heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
                dropout, identity, None, **options,
            )[0]  # fmt: skip
            return _columns(outputs)

        self.met(out_proj_weight, heads_outputs)

    def cell(self, a: Tensor, states: Any, first: Tensor, second: Tensor, *biases: Any) -> None:
        """One step of a recurrent cell."""
        hidden = states[0] if isinstance(states, list | tuple) else states
        self.met(first, lambda: _columns(a))
        self.met(second, lambda: _columns(hidden))


_HANDLERS: dict[str, Callable[..., None]] = {
    "linear": Products.linear,
    "matmul": Products.matmul,
    "__matmul__": Products.matmul,
    "mm": Products.matmul,
    "mv": Products.matmul,
    "__rmatmul__": lambda self, b, a: Products.matmul(self, a, b),
    "addmm": Products.addmm,
    "bilinear": Products.bilinear,
    "embedding": Products.embedding,
    "multi_head_attention_forward": Products.attention,
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), Products.cell),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), Products.convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), Products.transposed),
}

# What is asked about a tensor rather than computed from it.
_HARMLESS = frozenset(
    ("__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "data_ptr", "__len__",
     "untyped_storage", "storage_offset", "requires_grad_", "element_size", "is_complex", "__hash__", "__repr__",
     "_is_view", "is_same_size", "nelement", "get_device", "register_hook", "detach", "ndimension")
)  # fmt: skip


def _memory(tensor: Tensor) -> tuple[str, int]:
    """The memory of which a tensor is a view."""
    try:
        return str(tensor.device), tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    except (RuntimeError, NotImplementedError):  # sparse tensors, and others without memory of their own
        return "none", id(tensor)


def _is_view(result: Any, args: Sequence[Any]) -> bool:
    """Whether a call only created a view of a tensor: the use of that view is what counts."""
    results = result if isinstance(result, list | tuple) else (result,)
    tensors = [part for part in results if isinstance(part, Tensor)]
    if not tensors or not args or not isinstance(args[0], Tensor):
        return not tensors
    return all(_memory(part) == _memory(args[0]) for part in tensors)


def _part(matrix: Tensor, weight: Tensor) -> tuple[int, int, bool]:
    """Which rows of a weight a view of it holds, and whether it is transposed."""
    shapes = [weight]
    if weight.dim() != 2 and weight.is_contiguous():
        shapes.append(weight.flatten(1))  # a convolution with kernels of one place, written as a product
    for whole in shapes:
        for flipped in (False, True) if whole.dim() == 2 == matrix.dim() else (False,):
            part = matrix.T if flipped else matrix
            offset, step = part.storage_offset() - whole.storage_offset(), max(whole.stride(0), 1)
            if _same_rows(part, whole) and offset % step == 0:
                return offset // step, offset // step + part.shape[0], flipped
    raise NotFollowed("a part of it is used in an order of its own")


def _same_rows(part: Tensor, whole: Tensor) -> bool:
    """Whether the rows of both have the same shape and steps in memory."""
    if part.dim() != whole.dim() or part.shape[1:] != whole.shape[1:]:
        return False
    steps = zip(part.shape, part.stride(), whole.stride(), strict=True)
    return all(length == 1 or a == b for length, a, b in steps)


def _columns(a: Tensor) -> Tensor:
    """Inputs (…, K) as (K, places)."""
    return a.reshape(-1, a.shape[-1]).T


def _each(value: Any, dims: int) -> Sequence[int]:
    values = [int(value)] * dims if isinstance(value, int) else [int(v) for v in value]
    return values * dims if len(values) == 1 else values
