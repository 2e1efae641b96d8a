"""The tree of a certificate in memory, and how it becomes the streams of the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cbs_opt.certificate_bounds import Part, Products
from cbs_opt.files.certificate_file import FRAME, INHERIT, LEAF, POINT, SINGLE
from cbs_opt.typing import BoolArray, FloatArray

_STREAMS = (
    "branch",
    "how",
    "fixed_counts",
    "fixings",
    "diagonals",
    "product_counts",
    "products",
    "product_prices",
    "codes",
    "numbers",
)


class Node:
    """A node of the tree as the certificate holds it; bounded by the last point above it until more is known."""

    __slots__ = ("bounded_by", "branch", "children", "codes", "diagonal", "fixings", "numbers", "products")

    def __init__(self) -> None:
        self.bounded_by, self.branch = INHERIT, LEAF
        self.children: list[Node] = []
        self.fixings: list[tuple[int, int]] = []
        self.codes: BoolArray | None = None
        self.numbers: FloatArray | None = None
        self.diagonal: FloatArray | None = None
        self.products: Products | None = None

    @property
    def is_blank(self) -> bool:
        """Whether nothing is known at it or below it."""
        return self.bounded_by == INHERIT and self.branch == LEAF and not self.fixings and self.diagonal is None

    def become(self, other: Node) -> None:
        """Take everything over."""
        for name in self.__slots__:
            setattr(self, name, getattr(other, name))

    def only_child(self) -> Node:
        """Make it a node with one child, and give that."""
        self.branch, self.children = SINGLE, [Node()]
        return self.children[0]

    def preorder(self) -> Iterator[Node]:
        """All nodes, the child that keeps the weight first."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack += reversed(node.children)


def flatten(node: Node, part: Part) -> dict[str, list[Any]]:
    """The streams of a tree, as `Certificate` names them; weights as indices of the instance."""
    out: dict[str, list[Any]] = {key: [] for key in _STREAMS}
    for each in node.preorder():
        out["branch"].append(each.branch if each.branch < 0 else int(part.index[each.branch]))
        out["how"].append(each.bounded_by + (FRAME if each.diagonal is not None else 0))
        out["fixed_counts"].append(len(each.fixings))
        out["fixings"] += [2 * int(part.index[i]) + y for i, y in each.fixings]
        if each.diagonal is not None:
            out["diagonals"].append(each.diagonal)
            out["product_counts"].append(0 if each.products is None else each.products[0].size)
            if each.products is not None:
                first, second, price = each.products
                out["products"].append(part.index[np.column_stack([first, second])].ravel())
                out["product_prices"].append(price)
        if each.bounded_by == POINT:
            out["codes"].append(each.codes)
            out["numbers"].append(each.numbers)
    return out
