"""The result of pruning a network: the network, its masks, and a record of every stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cbs_opt.files.atomic import write_csv
from cbs_opt.instances.masks import LayerMask, kept_masks
from cbs_opt.instances.scores import Score
from cbs_opt.jsonable import finite
from cbs_opt.view.text import count, short, table

if TYPE_CHECKING:
    from cbs_opt.pruning.method import Method

SCHEMA = 1


@dataclass(frozen=True)
class Stage:
    """The record of a stage.

    Attributes
    ----------
    stage : int
        1, 2, …
    sparsity : float
        Fraction of the prunable weights that are pruned afterwards.
    pruned_count : int
    samples : int
        Training samples of its quadratic model.
    predicted_change : float
        Change of the quadratic model, without its damping, by the change of the weights: of the loss for fisher
        and kfac, with a temperature T of T² times the divergence of the softened class probabilities, of the
        squared errors of the layers for reconstruction.
    predicted_loss : float or None
        The loss on the held-out samples before the stage, and the predicted change; None for reconstruction, for
        kfac at a temperature, towards the outputs of the dense network, or where nothing is held out.
    loss, value : float or None
        Loss and metric on the held-out samples after the stage.
    metric : str or None
    damping, update_scale, split, recalibrated : float, float, str, bool
    first_order_scale, refitted, gauss_newton : float, bool, int
        What was chosen, see `Method`.
    status : str
        Of the solver.
    seconds : float
        By the wall clock.
    """

    stage: int
    sparsity: float
    pruned_count: int
    samples: int
    predicted_change: float
    predicted_loss: float | None
    loss: float | None
    value: float | None
    metric: str | None
    damping: float
    update_scale: float
    split: str
    recalibrated: bool
    status: str
    seconds: float
    first_order_scale: float = 1.0
    refitted: bool = False
    gauss_newton: int = 0

    def line(self) -> str:
        """The stage in one line of text."""
        parts = [f"stage {self.stage}: {self.sparsity:.2%} pruned"]
        if self.loss is not None:
            predicted = "" if self.predicted_loss is None else f" (predicted {self.predicted_loss:.4f})"
            parts.append(f"held-out loss {self.loss:.4f}{predicted}")
            if self.metric is not None and self.value is not None:
                parts.append(f"{self.metric} {self.value:.4f}")
        chosen = [f"damping {self.damping:g}"]
        chosen += [f"gradient × {self.first_order_scale:g}"] if self.first_order_scale != 1.0 else []
        chosen += [f"update × {self.update_scale:g}"] if self.update_scale != 1.0 else []
        chosen += ["refitted"] if self.refitted else []
        chosen += [count(self.gauss_newton, "Gauss-Newton step")] if self.gauss_newton else []
        chosen += [f"split {self.split}"] if self.split != "global" else []
        chosen += ["statistics re-estimated"] if self.recalibrated else []
        return f"{', '.join(parts)}; {', '.join(chosen)}; {self.seconds:.1f} s"


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network.

    Attributes
    ----------
    model : torch.nn.Module
        A copy of the network that was given, pruned; its computed weights are plain.
    layers : list of LayerMask
        What is pruned of every tensor.
    stages : tuple of Stage
    before, after : Score or None
        Of the dense and of the pruned network on the held-out training samples.
    method : Method
        With its defaults.
    seen : int
        Different training samples that were used, those held out not counted.
    held_out : int
        Samples held out.
    interrupted : bool
        Whether a stop came before the last stage.
    changed : dict of str to Tensor
        Every tensor of the model that differs from the network that was given.
    """

    model: nn.Module
    layers: list[LayerMask]
    stages: tuple[Stage, ...]
    before: Score | None
    after: Score | None
    method: Method
    seen: int
    held_out: int
    interrupted: bool
    changed: Mapping[str, Tensor]

    @property
    def masks(self) -> dict[str, Tensor]:
        """By name of tensor, aliases included, bool of the tensor's shape: True where a weight is kept."""
        return kept_masks(self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are pruned."""
        return sum(layer.count for layer in self.layers) / max(sum(layer.pruned.size for layer in self.layers), 1)

    def __repr__(self) -> str:
        loss = "" if self.after is None else f", held-out loss {self.after.loss:.4f}"
        return f"<Pruned: {self.sparsity:.2%} in {len(self.stages)} stage(s){loss}>"

    def summary(self) -> str:
        """Stages, layers and scores as text."""
        rows = [
            (layer.title, " × ".join(map(str, layer.pruned.shape)), f"{layer.pruned.size:,}", f"{layer.count:,}",
             f"{layer.sparsity:.2%}")
            for layer in self.layers
        ]  # fmt: skip
        lines = [stage.line() for stage in self.stages]
        lines += ["", table(("layer", "shape", "weights", "pruned", "sparsity"), rows, left=2)]
        lines += ["", f"{self.sparsity:.2%} pruned, {self.seen} training samples used, {self.held_out} held out"]
        if self.before is not None and self.after is not None:
            shown = f"loss {self.before.loss:.4f} → {self.after.loss:.4f}"
            if self.before.value is not None and self.after.value is not None:
                shown += f", {self.before.metric} {short(self.before.value)} → {short(self.after.value)}"
            lines.append(f"held-out training samples: {shown}")
        if self.interrupted:
            lines.append(f"interrupted after stage {len(self.stages)} of {self.method.stages}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors as JSON types, schema 1; every number is finite."""
        content: dict[str, Any] = finite(
            {
                "schema": SCHEMA,
                "sparsity": self.sparsity,
                "pruned_count": sum(layer.count for layer in self.layers),
                "method": self.method.to_dict(),
                "samples_used": self.seen,
                "samples_held_out": self.held_out,
                "interrupted": self.interrupted,
                "before": None if self.before is None else asdict(self.before),
                "after": None if self.after is None else asdict(self.after),
                "stages": [asdict(stage) for stage in self.stages],
                "layers": [
                    {
                        "name": layer.name,
                        "aliases": list(layer.aliases),
                        "shape": list(layer.pruned.shape),
                        "pruned": layer.count,
                        "sparsity": layer.sparsity,
                    }
                    for layer in self.layers
                ],
            }
        )
        return content

    def write_csv(self, path: Path | str) -> None:
        """A line for every stage, with the columns of `Stage`; unknown values are empty."""
        write_csv(path, Stage.__dataclass_fields__, (asdict(stage).values() for stage in self.stages))

    def plot(self, path: Path | str) -> None:
        """Draw loss and sparsity over the stages, and the sparsity of every layer; see `picture.draw`."""
        from cbs_opt.pruning.picture import draw

        draw(path, self)
