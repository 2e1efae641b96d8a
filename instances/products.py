"""The inputs that each weight of a network multiplies, observed at the calls of torch, not at the layers.

In a forward pass every call of torch is inspected. A call that multiplies by a weight, or by a part or the
transpose of one, is reported with the matrix of inputs of that product. It therefore does not matter which layer
owns the weight, how often it is used, or whether the layer is called at all (`MultiheadAttention` never calls its
`out_proj`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cbs_opt.instances.patches import convolution_patches, transposed_patches
from cbs_opt.instances.recurrent import RECURRENT, recurrent_inputs
from cbs_opt.instances.tensors import Layout
from cbs_opt.instances.views import NotFollowed, is_view, is_wrapped, memory_of, part_of


@dataclass(frozen=True)
class Product:
    """A call in which rows of a weight are multiplied by inputs.

    Attributes
    ----------
    name : str
        Of the weight.
    first, last : int
        Its rows first … last − 1, in the order of the instance.
    outputs : callable
        Brings a tensor of the shape of the call's result, or its gradient, to (last − first, places), the rows'
        outputs; to (K, places) where there are `counts`.
    inputs : callable, or None
        Gives the Tensor (K, places) of what the rows are multiplied by; None where there are `counts`.
    counts : callable, or None
        Gives the Tensor (last − first,) of what the product adds to every diagonal entry of a row: how often a row
        of an embedding was read, or the squares of what a row was multiplied by, where the product runs across the
        rows. Takes None, or a factor for each place, Tensor (places,).
    across : bool
        Whether the weight was multiplied from the other side than its layout says.
    """

    name: str
    first: int
    last: int
    outputs: Callable[[Tensor], Tensor]
    inputs: Callable[[], Tensor] | None
    counts: Callable[[Tensor | None], Tensor] | None = None
    across: bool = False


def columns_of(a: Tensor) -> Tensor:
    """Inputs or outputs (…, K) as (K, places)."""
    return a.reshape(-1, a.shape[-1]).T


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
            self._names.setdefault(memory_of(tensor), []).append(name)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the call, and inspect it if one of its arguments is a weight."""
        kwargs = kwargs or {}
        title = getattr(func, "__name__", "")
        if title in _HARMLESS:
            return func(*args, **kwargs)
        met = self.names_in(args, kwargs)
        result = func(*args, **kwargs)
        if met and not is_view(result, args):
            self._followed: set[str] = set()
            reason = f"torch's '{title}' does not multiply by it"
            try:
                if is_wrapped(result):
                    raise NotFollowed("it is multiplied inside torch.vmap or another transform of torch.func")
                self._follow(title, args, kwargs)
            except NotFollowed as error:
                reason = str(error)
            except Exception as error:  # whatever a user's network does that no handler expects
                reason = f"{type(error).__name__} in torch's '{title}'"
            for name in met - self._followed:
                self._refuse(name, reason)
            return self.result_of(result)
        return result

    def result_of(self, result: Any) -> Any:
        """What a call by weights returns to the network, after its products have been reported."""
        return result

    def _follow(self, title: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Report the products of a call."""
        if title in RECURRENT:
            for matrix, inputs in recurrent_inputs(title, args):
                self.met(matrix, lambda inputs=inputs: inputs.T, _unknown)  # type: ignore[misc]
            return
        handler = _HANDLERS.get(title)
        if handler is None:
            raise NotFollowed(f"it goes through torch's '{title}'")
        handler(self, *args, **kwargs)

    def _tell(self, product: Product) -> None:
        self._report(product)
        self._followed.add(product.name)

    def names_in(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[str]:
        """The weights among the arguments of a call."""
        return {name for value in (*args, *kwargs.values()) for name in self._met(value)}

    def _met(self, value: Any) -> list[str]:
        if isinstance(value, Tensor):
            name = self._name(value)
            return [] if name is None else [name]
        if isinstance(value, list | tuple):
            return [name for part in value for name in self._met(part)]
        return []

    def _name(self, tensor: Tensor) -> str | None:
        """The weight that a tensor is, or is a view of: several may lie in one piece of memory."""
        for name in self._names.get(memory_of(tensor), ()):
            start = self._weights[name][0].storage_offset()
            if start <= tensor.storage_offset() < start + self._weights[name][0].numel():
                return name
        return None

    def met(
        self,
        matrix: Tensor,
        inputs: Callable[[], Tensor],
        outputs: Callable[[Tensor], Tensor] = columns_of,
        *,
        transposed: bool = False,
    ) -> None:
        """Report a product matrix · inputs, or inputsᵀ · matrix with `transposed`, where the matrix is a weight's.

        Parameters
        ----------
        matrix : Tensor
            A weight as it is stored, a range of its rows, or its transpose.
        inputs : callable
            Gives the inputs (K, places); only asked for where they are wanted.
        outputs : callable, optional
            Brings a tensor of the shape of the call's result to (outputs, places); by default the outputs are its
            last axis.
        transposed : bool
        """
        name = self._name(matrix)
        if name is None:
            return
        weight, layout = self._weights[name]
        first, last, flipped = part_of(matrix, weight, stacked=layout.stacked)
        if layout.inputs_first and layout.stacked:
            _, inputs_of, outputs_of = weight.shape
            if first % inputs_of or last - first != inputs_of:
                raise NotFollowed("a part of its inputs is multiplied alone")
            first = first // inputs_of * outputs_of
            last = first + outputs_of
        elif layout.inputs_first:
            if (first, last) != (0, weight.shape[0]):
                raise NotFollowed("a part of its inputs is multiplied alone")
            first, last = 0, layout.rows
        if (flipped != transposed) == layout.inputs_first:
            self._tell(Product(name, first, last, outputs, inputs))
        else:  # Σ_j (Σ_r δ_rj x_r)²: of each row's own terms x_r² is what all its weights share
            squares = inputs().detach().double().square()

            def counts(factors: Tensor | None) -> Tensor:
                return squares.sum(1) if factors is None else squares @ factors

            self._tell(Product(name, first, last, outputs, None, counts, across=True))

    def linear(self, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """A · weightᵀ."""
        self.met(weight, lambda: columns_of(a))

    def matmul(self, a: Tensor, b: Tensor, **_: Any) -> None:
        """A · b, where either may be the weight, or a stack of matrices."""
        if self._name(b) is not None:
            if b.dim() == 2:
                self.met(b, lambda: columns_of(a), transposed=True)
            else:
                for k, matrix in _stack(b):
                    self.met(
                        matrix,
                        lambda k=k: columns_of(_item(a, k)),  # type: ignore[misc]
                        lambda result, k=k: columns_of(_item(result, k)),  # type: ignore[misc]
                        transposed=True,
                    )
        if self._name(a) is not None:
            if a.dim() == 2:
                self.met(a, lambda: _first(b, b.dim()), lambda result: _first(result, b.dim()))
            elif b.dim() == 1:
                raise NotFollowed("a stack of matrices is multiplied by a vector")
            else:
                for k, matrix in _stack(a):
                    self.met(
                        matrix,
                        lambda k=k: _first(_item(b, k), 2),  # type: ignore[misc]
                        lambda result, k=k: _first(_item(result, k), 2),  # type: ignore[misc]
                    )

    def addmm(self, added: Tensor, a: Tensor, b: Tensor, **scales: Any) -> None:
        """Added + a · b."""
        if scales.get("alpha", 1) != 1:
            raise NotFollowed("its product is scaled")
        self.matmul(a, b)

    def einsum(self, equation: Any, *operands: Any) -> None:
        """A sum of products of two tensors, of which one is a weight or a stack of matrices."""
        tensors = (
            list(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Tensor) else list(operands)
        )
        if not isinstance(equation, str) or len(tensors) != 2:
            raise NotFollowed("it goes through an einsum that is not of two tensors")
        own = [self._name(tensor) is not None for tensor in tensors]
        if all(own):
            raise NotFollowed("both factors of an einsum are weights")
        first, second, out = labels_of(equation, [tensor.dim() for tensor in tensors])
        (weight, of_weight), (other, of_other) = (
            ((tensors[0], first), (tensors[1], second)) if own[0] else ((tensors[1], second), (tensors[0], first))
        )
        shared = [label for label in of_weight if label in of_other]
        batch = [label for label in shared if label in out]
        inputs = [label for label in shared if label not in out]
        rows = [label for label in of_weight if label in out and label not in of_other]
        if len(batch) + len(inputs) + len(rows) != len(of_weight) or not inputs:
            raise NotFollowed("it is summed in an einsum before it multiplies")
        if not batch and weight.dim() == 3 and of_weight[0] in rows:  # each matrix of a stack by itself
            batch, rows = [of_weight[0]], rows[1:]
        places = [label for label in out if label not in of_weight]

        for at in product(*(range(weight.shape[of_weight.index(label)]) for label in batch)):
            here = dict(zip(batch, at, strict=True))

            def part(tensor: Tensor, labels: str, *axes: list[str], here: dict[str, int] = here) -> Tensor:
                return _part(tensor, labels, here, axes)

            matrix = part(weight, of_weight, rows, inputs)
            if memory_of(matrix) != memory_of(weight):
                raise NotFollowed("a part of it is used in an order of its own")
            self.met(
                matrix,
                lambda part=part: part(other, of_other, inputs, places),  # type: ignore[misc]
                lambda result, part=part: part(result, out, rows, places),  # type: ignore[misc]
            )

    def grouped(self, a: Tensor, b: Tensor, *, offs: Tensor | None = None, **_: Any) -> None:
        """Groups of rows of a, ending at `offs`, each times a matrix of the stack b."""
        if offs is None:
            self.matmul(a, b)
            return
        if a.dim() != 2 or b.dim() != 3 or self._name(a) is not None:
            raise NotFollowed("its products are grouped along their inputs")
        ends = [0, *offs.tolist()]
        for matrix, first, last in zip(b, ends, ends[1:], strict=False):

            def group(rows: Tensor, part: slice = slice(first, last)) -> Tensor:
                return columns_of(rows[part])

            self.met(matrix, lambda group=group: group(a), group, transposed=True)  # type: ignore[misc]

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
            a,
            lambda own: convolution_patches(
                own, weight.shape[2:], _each(stride, dims), pads, _each(dilation, dims), 1
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
            a,
            lambda own: transposed_patches(own, weight.shape[2:], steps, pads, more, spaces, 1),
            groups,
            inputs_first=True,
        )

    def _grouped(
        self,
        weight: Tensor,
        a: Tensor,
        patches: Callable[[Tensor], Tensor],
        groups: int,
        *,
        inputs_first: bool = False,
    ) -> None:
        """Report a product for each group of channels of a, whose patches are made when they are asked for."""
        name = self._name(weight)
        if name is None:
            raise NotFollowed("another argument of a convolution depends on it")
        whole, layout = self._weights[name]
        if part_of(weight, whole) != (0, whole.shape[0], False) or layout.inputs_first != inputs_first:
            raise NotFollowed("it is convolved in another order than its layer stores it")
        if inputs_first and layout.groups != groups:
            raise NotFollowed(f"it is convolved in {groups} groups, its layer says {layout.groups}")
        rows, channels, dims = layout.rows // groups, a.shape[1] // groups, weight.dim() - 2

        def inputs(g: int) -> Tensor:
            own = patches(a[:, g * channels : (g + 1) * channels])
            return own.squeeze(1).transpose(0, 1).flatten(1)

        def outputs(result: Tensor) -> Tensor:
            return result.unsqueeze(0).movedim(-dims - 1, 0).flatten(1)

        for g in range(groups):
            part = slice(g * rows, (g + 1) * rows)
            self._tell(
                Product(
                    name,
                    part.start,
                    part.stop,
                    lambda result, part=part: outputs(result)[part],  # type: ignore[misc]
                    partial(inputs, g),
                )
            )

    def embedding(self, indices: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        """Rows of the weight by their numbers."""
        name = self._name(weight)
        if name is None or part_of(weight, self._weights[name][0]) != (0, weight.shape[0], False):
            raise NotFollowed("it is looked up in parts")
        if self._weights[name][1].inputs_first:
            raise NotFollowed("it is looked up by columns")

        def counts(factors: Tensor | None) -> Tensor:
            return torch.bincount(indices.flatten(), factors, minlength=weight.shape[0]).double()

        self._tell(Product(name, 0, weight.shape[0], columns_of, None, counts))

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
                self.met(options[f"{kind}_proj_weight"], lambda a=a: columns_of(a), _unknown)  # type: ignore[misc]
        elif in_proj_weight is not None:
            thirds = (query, key, value)
            if query is key and key is value:
                self.met(in_proj_weight, lambda: columns_of(query), _unknown)
            else:
                for k, a in enumerate(thirds):
                    rows = in_proj_weight[k * embed_dim : (k + 1) * embed_dim]
                    self.met(rows, lambda a=a: columns_of(a), _unknown)  # type: ignore[misc]

        def heads_outputs() -> Tensor:
            # With the identity as projection the function gives what the projection multiplies.
            identity = torch.eye(out_proj_weight.shape[1], dtype=out_proj_weight.dtype, device=query.device)
            options["need_weights"] = False
            outputs: Tensor = functional.multi_head_attention_forward(
                query, key, value, embed_dim, heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
                dropout, identity, None, **options,
            )[0]  # fmt: skip
            return columns_of(outputs)

        self.met(out_proj_weight, heads_outputs, _unknown)

    def cell(self, a: Tensor, states: Any, first: Tensor, second: Tensor, *biases: Any) -> None:
        """One step of a recurrent cell."""
        hidden = states[0] if isinstance(states, list | tuple) else states
        self.met(first, lambda: columns_of(a), _unknown)
        self.met(second, lambda: columns_of(hidden), _unknown)


_HANDLERS: dict[str, Callable[..., None]] = {
    "linear": Products.linear,
    "matmul": Products.matmul,
    "__matmul__": Products.matmul,
    "mm": Products.matmul,
    "mv": Products.matmul,
    "bmm": Products.matmul,
    "baddbmm": Products.addmm,
    "einsum": Products.einsum,
    "_grouped_mm": Products.grouped,
    "grouped_mm": Products.grouped,
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


def _first(a: Tensor, dims: int) -> Tensor:
    """What a matrix times a vector (K,), `dims` 1, or a stack of matrices (…, K, N) meets, as (K, places)."""
    return a.unsqueeze(-1) if dims == 1 else a.movedim(-2, 0).flatten(1)


def _stack(stack: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The matrices of (E, K, N) by their number; −1 for the only one, which any number of others may meet."""
    if stack.dim() != 3:
        raise NotFollowed("it is a stack of stacks of matrices")
    if stack.shape[0] == 1:
        yield -1, stack[0]
        return
    yield from enumerate(stack)


def _item(a: Tensor, k: int) -> Tensor:
    """What meets the matrix k of a stack, of (…, E, K, N): (…, K, N)."""
    if k < 0 or a.dim() < 3:
        return a
    return a.select(-3, k if a.shape[-3] > 1 else 0)


def labels_of(equation: str, dims: Sequence[int]) -> list[str]:
    """The labels of the operands and of the result of an einsum, an ellipsis written out by capital letters.

    Raises
    ------
    NotFollowed
        For an operand that names an axis twice.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    free = [letter for letter in ascii_letters[::-1] if letter not in equation]
    most = max((dim - len(own) + 3 for own, dim in zip(operands, dims, strict=True) if "..." in own), default=0)
    spread = "".join(free[:most])
    made = [
        own.replace("...", spread[most - (dim - len(own) + 3) :]) for own, dim in zip(operands, dims, strict=True)
    ]
    if arrow:
        out = out.replace("...", spread)
    else:
        every = "".join(made)
        out = spread + "".join(sorted(label for label in {*every} - {*spread} if every.count(label) == 1))
    if any(len({*own}) < len(own) for own in made):
        raise NotFollowed("an einsum takes a diagonal")
    return [*made, out]


def _part(tensor: Tensor, labels: str, here: Mapping[str, int], axes: Sequence[Sequence[str]]) -> Tensor:
    """The entries at some labels, with the axes of the others in groups, and all others summed."""
    names = list(labels)
    for label, index in here.items():
        if label in names:
            tensor = tensor.select(names.index(label), index if tensor.shape[names.index(label)] > 1 else 0)
            names.remove(label)
    wanted = [label for group in axes for label in group]
    gone = [names.index(label) for label in names if label not in wanted]
    if gone:
        tensor = tensor.sum(gone)
        names = [label for label in names if label in wanted]
    tensor = tensor.permute([names.index(label) for label in wanted])
    shape, at = [], 0
    for group in axes:
        shape.append(math.prod(tensor.shape[at : at + len(group)]))
        at += len(group)
    return tensor.reshape(shape)


def _unknown(result: Tensor) -> Tensor:
    """Outputs of products within a call of torch: `unfused` forms of these calls show them."""
    raise NotFollowed("its outputs are hidden within a call of torch")


def _each(value: Any, dims: int) -> Sequence[int]:
    values = [int(value)] * dims if isinstance(value, int) else [int(v) for v in value]
    return values * dims if len(values) == 1 else values
