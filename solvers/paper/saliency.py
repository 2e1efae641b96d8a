"""The baselines that score every weight separately and prune the lowest scores."""

from __future__ import annotations

import abc

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.losses import joint_loss, selection_loss
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import OBJECTIVES, Capabilities, Context, Solver
from cbs_opt.typing import FloatArray


class SaliencySolver(Solver):
    """Prune the weights with the lowest scores, in every group according to its budget."""

    supports = Capabilities(objectives=frozenset(OBJECTIVES), cross_groups=True)

    @abc.abstractmethod
    def scores(self, instance: Instance, context: Context) -> FloatArray:
        """The score of each weight, float64 (n,)."""

    def run(self, instance: Instance, context: Context) -> Status:
        """Sort once: O(n log n) after the scores; with cross groups a flow in every tile."""
        pruned = instance.budget.cheapest(self.scores(instance, context), instance.fixed)
        loss = selection_loss if context.objective == "selection" else joint_loss
        context.monitor.advance()
        context.monitor.report(loss(instance, pruned), pruned)
        return Status.CONVERGED


@register("random")
class Random(SaliencySolver):
    """Scores drawn at random."""

    summary = "uniformly random selection"

    def scores(self, instance: Instance, context: Context) -> FloatArray:
        """Uniform numbers from the seed."""
        return context.rng().random(instance.n)


@register("magnitude")
class Magnitude(SaliencySolver):
    """|w|: magnitude pruning."""

    summary = "smallest |w|"

    def scores(self, instance: Instance, context: Context) -> FloatArray:
        """|w_i|."""
        return np.abs(instance.weights)


@register("obd")
class OptimalBrainDamage(SaliencySolver):
    """½ w² H_ii, the loss of each weight alone (LeCun, Denker, Solla: Optimal Brain Damage, 1989)."""

    summary = "smallest ½ w² H_ii (Optimal Brain Damage)"

    def scores(self, instance: Instance, context: Context) -> FloatArray:
        """½ w_i² H_ii − g_i w_i; optimal where H is diagonal."""
        scores = 0.5 * instance.weights**2 * instance.curvature.diagonal()
        return scores if instance.linear is None else scores - instance.linear * instance.weights


@register("obs")
class OptimalBrainSurgeon(SaliencySolver):
    """w² / 2[H⁻¹]_ii, the loss of each weight alone after the best update (the choice of WoodFisher).

    Hassibi, Stork: Second order derivatives for network pruning: Optimal Brain Surgeon, 1992; Singh, Alistarh:
    WoodFisher, 2020.
    """

    summary = "smallest w² / 2[H⁻¹]_ii (Optimal Brain Surgeon, WoodFisher)"
    supports = Capabilities(objectives=frozenset(OBJECTIVES), cross_groups=True, indefinite=False)

    def scores(self, instance: Instance, context: Context) -> FloatArray:
        """(w_i − [H⁻¹g]_i)² / 2[H⁻¹]_ii, up to a constant; needs H to be invertible."""
        curvature = instance.curvature
        shifted = instance.weights.copy()
        if instance.linear is not None:
            nothing = np.zeros(instance.n, dtype=bool)
            for k in range(curvature.number_of_blocks):
                part = curvature.block_slice(k)
                shifted[part] += curvature.best_update(k, shifted[part], nothing[part], instance.linear[part])
        return shifted**2 / (2.0 * curvature.inverse_diagonal())
