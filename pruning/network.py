"""The network that stages change: a plain copy of the user's, its prunable tensors and batch-norm statistics."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cbs_opt.errors import UsageError
from cbs_opt.instances.masks import LayerMask
from cbs_opt.instances.modes import unwrapped
from cbs_opt.instances.plain import plain_model, set_effective
from cbs_opt.instances.plan import Plan
from cbs_opt.instances.tensors import Place
from cbs_opt.typing import BoolArray, FloatArray

State = dict[str, Tensor]


@dataclass
class WorkingCopy:
    """A network with plain weights that is pruned in place.

    Attributes
    ----------
    model : torch.nn.Module
    places : list of Place
        Its prunable tensors, in the order of an instance.
    statistics : tuple of str
        Names of the running means, variances and counts of its batch norms.
    """

    model: nn.Module
    places: list[Place]
    statistics: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.statistics = statistic_names(self.model)

    @property
    def weights(self) -> FloatArray:
        """Effective values, float64 (n,)."""
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        flat = [p.layout.to_rows(tensors[p.name].detach().cpu().double().reshape(-1)) for p in self.places]
        return torch.cat(flat).numpy()

    def take(self, weights: FloatArray) -> None:
        """Give the prunable tensors these values, float64 (n,).

        Raises
        ------
        UsageError
            When they are too large for the type of a tensor.
        """
        for place in self.places:
            value = torch.from_numpy(place.tensor(weights))
            set_effective(self.model, place.name, value)
            held = dict(self.model.named_parameters(remove_duplicate=False))[place.name]
            if not bool(torch.isfinite(held.float()).all()):
                raise UsageError(f"the updated weights of {place.name} do not fit into the type {held.dtype}")

    def state(self) -> State:
        """Copies of all tensors that pruning changes, on the CPU."""
        named = {**dict(self.model.named_parameters(remove_duplicate=False)), **dict(self.model.named_buffers())}
        names = (*(place.name for place in self.places), *self.statistics)
        return {name: named[name].detach().cpu().clone() for name in names}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Give these tensors back their values."""
        named = {**dict(self.model.named_parameters(remove_duplicate=False)), **dict(self.model.named_buffers())}
        for name, tensor in state.items():
            named[name].copy_(tensor)

    def masks(self, pruned: BoolArray) -> list[LayerMask]:
        """A selection, bool (n,), tensor by tensor."""
        return [LayerMask(place.name, place.tensor(pruned), place.aliases) for place in self.places]


def working_copy(model: nn.Module, plan: Plan) -> WorkingCopy:
    """Copy a network, its computed weights made plain.

    Raises
    ------
    UsageError
        When it cannot be copied.
    """
    try:
        copied = copy.deepcopy(plain_model(unwrapped(model)).model)
    except UsageError:
        raise
    except Exception as error:  # whatever a user's network does when it is copied
        raise UsageError(
            f"the network cannot be copied ({type(error).__name__}: {str(error)[:120]}): give one that can"
        ) from error
    return WorkingCopy(copied.eval(), plan.places)


def norms_of(model: nn.Module) -> list[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    """The batch norms that keep running statistics, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


def statistic_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the buffers of all batch norms that keep running statistics."""
    return tuple(
        f"{name}.{leaf}" if name else leaf
        for name, module in norms_of(model)
        for leaf in ("running_mean", "running_var", "num_batches_tracked")
        if getattr(module, leaf) is not None
    )
