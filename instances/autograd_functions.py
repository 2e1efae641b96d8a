"""Products of weights inside a user's `torch.autograd.Function`, whose forward pass records no graph.

Such a function runs twice: once as it is, which gives its results and what its own backward pass says about its
arguments, and once more with a graph, from the products within to the same results. The results that the network
goes on with belong to both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import CheckpointFunction

_BASE: Any = torch.autograd.Function.__mro__[1]  # what `Function.apply` calls, also where a user has kept it
_LOCK = threading.Lock()
_users = 0


class _Here(threading.local):
    watcher: Any = None


_here = _Here()


class _Joined(torch.autograd.Function):
    """A result, and the same result from a graph of its own: gradients go to both."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, again: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0]


class _Context(FunctionCtx):
    """What a forward pass may do with its context when nobody goes back."""

    def __init__(self, needs: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs)


@contextmanager
def functions_seen(watcher: Any) -> Iterator[None]:
    """Let functions that are called in this thread run with a graph as well.

    Parameters
    ----------
    watcher : object
        With `seen`, a list that grows with the products; `muted`, whether it ignores them; `hidden`, the name of
        a function whose products have no graph; and `is_weight` of a tensor.
    """
    global _users
    with _LOCK:
        if _users == 0:
            _BASE.apply = classmethod(_apply)
        _users += 1
    before, _here.watcher = _here.watcher, watcher
    try:
        yield
    finally:
        _here.watcher = before
        with _LOCK:
            _users -= 1
            if _users == 0:
                del _BASE.apply


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    plain: Callable[..., Any] = super(_BASE, cls).apply
    watcher = _here.watcher
    if watcher is None or watcher.muted or cls is _Joined:
        return plain(*args, **kwargs)
    if cls is CheckpointFunction:  # takes no gradients by its inputs, and computes nothing of its own
        function, _, *inputs = args
        return function(*inputs)
    count = len(watcher.seen)
    try:
        again = _with_graph(cls, args, kwargs, watcher.is_weight)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a user's function does with a graph
        del watcher.seen[count:]
        watcher.hidden = cls.__name__
        try:
            return plain(*args, **kwargs)
        finally:
            watcher.hidden = None
    watcher.muted = True
    try:
        results = plain(*args, **kwargs)
    finally:
        watcher.muted = False
    if len(watcher.seen) == count:
        return results
    needed = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)

    def joined(result: Any, other: Any) -> Any:
        if not isinstance(result, Tensor) or not isinstance(other, Tensor) or not other.requires_grad:
            return result
        if needed and not result.requires_grad:  # a result that the function says has no gradient
            return result
        return _Joined.apply(result, other)  # type: ignore[no-untyped-call]

    if isinstance(results, tuple):
        return tuple(joined(*pair) for pair in zip(results, again, strict=True))
    return joined(results, again)


def _with_graph(cls: Any, args: Sequence[Any], kwargs: Any, is_weight: Callable[[Tensor], bool]) -> Any:
    """The results of a function's forward pass, with the graph from the products within."""

    def copied(arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        return arg.detach() if is_weight(arg) else arg.detach().clone()  # which the function may change in place

    copies = [copied(arg) for arg in args]
    lead = []
    if cls.setup_context is torch.autograd.Function.setup_context:
        lead = [_Context([isinstance(arg, Tensor) and arg.requires_grad for arg in args])]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        return cls.forward(*lead, *copies, **kwargs)
