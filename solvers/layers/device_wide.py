"""Layers on a card: ADMM with thresholding, exchanges of many weights at once, refits of all rows together.

Room: layers, for `solve`. The methods are those of `wide`, `wide_admm` and `large`, with torch; single precision.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch

from cbs_opt.curvature.device_update import conjugate_gradients
from cbs_opt.device import Card, DeviceError
from cbs_opt.interrupt import Interrupted, checkpoint, interruptible
from cbs_opt.solvers.device.thresholds import smallest
from cbs_opt.solvers.layers.incumbent import Incumbent
from cbs_opt.solvers.layers.large import ITERATIONS, MOST_MOVES, REFIT, SAMPLES, SHARE
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.solvers.layers.wide import BRIEF, GAIN, LONGER, MORE, PATIENT, QUICK, SETTLED
from cbs_opt.solvers.layers.wide_admm import AGAIN, MOST_ITERATIONS, RHO, column_norms, growth, is_settled
from cbs_opt.typing import BoolArray

logger = logging.getLogger("cbs_opt")

_LONGEST = 96  # iterations between two changes of ρ at most


class DeviceLayer:
    """A layer on a card, with columns scaled to a unit diagonal of S.

    Attributes
    ----------
    S : float32 (K, K)
    W, B : float32 (rows, K)
        Weights times √S_ii, and W S.
    scale : float64 (rows,)
    locked : int8 (rows, K) or None
    """

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.layer, self.device = layer, device
        norm = column_norms(layer)
        inverse = torch.tensor(1.0 / norm, device=device)
        S = torch.tensor(layer.hessian, device=device) * inverse * inverse[:, None]
        self.S = S.to(torch.float32)
        self.S.diagonal().fill_(1.0)
        self.W = torch.tensor((layer.weights * norm).astype(np.float32), device=device)
        self.B = self.W @ self.S
        self.scale = torch.tensor(layer.scale, device=device)
        self.locked = None if layer.locked is None else torch.tensor(layer.locked, device=device)

    def losses(self, X: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Doubled losses of scaled weights of some rows, less the scale of the row, float64 (rows,)."""
        change = X - (self.W if rows is None else self.W[rows])
        return (change * (change @ self.S)).sum(1, dtype=torch.float64)

    def refit(
        self, pruned: torch.Tensor, start: torch.Tensor, iterations: int, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Better scaled weights of rows with given masks, float32 (rows, K), by conjugate gradients."""
        checkpoint()
        kept = (~pruned).to(torch.float32)
        X = start * kept
        residual = (self.B if rows is None else self.B[rows]) - X @ self.S
        return X + conjugate_gradients(self.S, residual, kept, iterations, REFIT)

    def shifted_inverse(self, rho: float) -> torch.Tensor:
        """(S + ρI)⁻¹, float32 (K, K)."""
        checkpoint()
        shifted = self.S.clone()
        shifted.diagonal().add_(rho)
        L, info = torch.linalg.cholesky_ex(shifted)
        if int(info):
            raise np.linalg.LinAlgError("a stored Hessian is not positive semidefinite")
        return torch.cholesky_inverse(L)


class DeviceWideSearch:
    """`WideSearch` on a card: quick answers, ADMM with growing patience, exchanges until they gain little.

    Parameters
    ----------
    layers : list of Layer
    budget : LayerBudget
    incumbent : Incumbent
    should_stop : callable
    remaining : callable
        Seconds, infinite without a limit.
    card : Card
    max_rounds : int, optional
        Runs of ADMM and exchanges of all rows.
    """

    def __init__(
        self,
        layers: list[Layer],
        budget: LayerBudget,
        incumbent: Incumbent,
        should_stop: Callable[[], bool],
        remaining: Callable[[], float],
        card: Card,
        max_rounds: int | None = None,
    ) -> None:
        self.layers, self.budget, self.incumbent = layers, budget, incumbent
        self.should_stop, self.remaining, self.device = should_stop, remaining, card.device
        self.rounds_left = np.inf if max_rounds is None else max_rounds
        self.spent: list[tuple[int, float]] = []
        self.there: list[DeviceLayer] = []
        self.best: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        self.state: tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], float] | None = None

    def run(self, starts: list[list[BoolArray]]) -> bool:
        """Search from feasible masks; False if it was stopped before all of these had been evaluated."""
        compared = False
        try:
            with interruptible(self.should_stop):
                self.bring()
                for masks in starts:
                    there = [torch.tensor(mask, device=self.device) for mask in masks]
                    weights = [layer.W for layer in self.there]
                    for iterations in (BRIEF, LONGER):
                        parts = zip(self.there, there, weights, strict=True)
                        weights = [layer.refit(mask, x, iterations) for layer, mask, x in parts]
                        self.offer(self.objective(weights), there, weights)
                compared = True
                self._search()
        except Interrupted:
            pass
        except np.linalg.LinAlgError as error:
            logger.warning(f"layers: {error}; the search ends here")
        if self.best is not None:  # the evaluator then starts near the best weights
            self.incumbent.adopt(*([part.cpu().numpy() for part in parts] for parts in self.best))
        return compared

    def bring(self) -> None:
        """Bring the layers to the card."""
        self.there = [DeviceLayer(layer, self.device) for layer in self.layers]

    def objective(self, weights: list[torch.Tensor]) -> float:
        """½ Σ s_r times the doubled losses of scaled weights; `DeviceError` where that is not a number."""
        pairs = zip(self.there, weights, strict=True)
        value = 0.5 * sum(float((layer.scale * layer.losses(x)).sum()) for layer, x in pairs)
        if not np.isfinite(value):
            raise DeviceError("the loss of a layer is not a number")
        return value

    def offer(self, value: float, masks: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        """Offer masks that are on the card, and remember their scaled weights."""
        if value < self.incumbent.objective:
            self.incumbent.offer(value, [mask.cpu().numpy() for mask in masks])
            self.best = masks, weights

    def _search(self) -> None:
        best: tuple[float, list[torch.Tensor], list[torch.Tensor]] | None = None
        hold = QUICK
        while self.rounds_left >= 1 and hold <= _LONGEST and self._affords(hold):
            self.rounds_left -= 1
            began = time.perf_counter()
            masks, weights = self.admm(hold, again=best is not None)
            weights = [
                layer.refit(mask, x, LONGER) for layer, mask, x in zip(self.there, masks, weights, strict=True)
            ]
            value = self.objective(weights)
            self.spent.append((hold, time.perf_counter() - began))
            logger.info(f"ADMM, ρ held for {hold} iterations: loss {value:.6e} after {self.spent[-1][1]:.2f} s")
            self.offer(value, masks, weights)
            gained = np.inf if best is None else best[0] - value
            if best is None or gained > 0:
                best = value, masks, weights
            if gained < SETTLED * value:
                break
            hold = max(PATIENT, MORE * hold)
        if best is not None:
            self._exchange(best[1], best[2])

    def _affords(self, hold: int) -> bool:
        """Whether a run with so much patience takes at most half of the time that is left, by the last run."""
        if not self.spent:
            return True
        before, seconds = self.spent[-1]
        return seconds * hold / before <= 0.5 * self.remaining()

    def admm(self, hold: int, again: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Masks and their scaled weights; ρ changes every `hold` iterations. See `wide_admm.WideAdmm`.

        From magnitude, or `again` from where the last run ended, with a lower ρ.
        """
        layers = self.there
        if again and self.state is not None:
            masks, D, U, rho = self.state
            U, rho = [u / AGAIN for u in U], AGAIN * rho
        else:
            masks, rho = self.threshold([layer.W for layer in layers]), RHO
            D = [torch.where(mask, 0.0, layer.W) for mask, layer in zip(masks, layers, strict=True)]
            U = [torch.zeros_like(d) for d in D]
        inverses = [layer.shifted_inverse(rho) for layer in layers]
        kept = max(1, sum(int((~mask).sum()) for mask in masks))
        before = masks
        for step in range(1, MOST_ITERATIONS + 1):
            checkpoint()
            for k, layer in enumerate(layers):
                U[k] = torch.addmm(U[k], layer.B + rho * (D[k] - U[k]), inverses[k])
            masks = self.threshold(U)
            for k, mask in enumerate(masks):
                D[k] = torch.where(mask, 0.0, U[k])
                U[k] = U[k] - D[k]
            if step % hold:
                continue
            changed = sum(int((mask != old).sum()) for mask, old in zip(masks, before, strict=True))
            before = masks
            if is_settled(step, changed, kept):
                break
            if (factor := growth(changed, kept)) > 1:
                rho *= factor
                U = [u / factor for u in U]
                inverses.clear()
                inverses += (layer.shifted_inverse(rho) for layer in layers)
        self.state = masks, D, U, rho
        return list(masks), list(D)

    def threshold(self, Z: list[torch.Tensor]) -> list[torch.Tensor]:
        """The feasible masks that remove the least of Z, weighted by the rows, bool (rows, K)."""
        costs = [layer.scale.to(torch.float32)[:, None] * z * z for layer, z in zip(self.there, Z, strict=True)]
        locked = [layer.locked for layer in self.there]
        if self.budget.total is not None:
            flat = torch.cat([cost.view(-1) for cost in costs])[None]
            fixed = None
            if any(part is not None for part in locked):
                parts = zip(locked, costs, strict=True)
                fixed = torch.cat(
                    [(torch.zeros_like(c, dtype=torch.int8) if p is None else p).view(-1) for p, c in parts]
                )[None]
            total = torch.tensor([self.budget.total], device=self.device)
            chosen = smallest(flat, total, fixed)[0]
            pieces = torch.split(chosen, [cost.numel() for cost in costs])
            return [part.view(cost.shape) for part, cost in zip(pieces, costs, strict=True)]
        out = []
        for k, cost in enumerate(costs):
            if self.budget.per_row is not None:
                out.append(smallest(cost, torch.tensor(self.budget.per_row[k], device=self.device), locked[k]))
                continue
            assert self.budget.pattern is not None
            n, m = self.budget.pattern
            fixed = None if (part := locked[k]) is None else part.view(-1, m)
            counts = torch.full((cost.numel() // m,), n, device=self.device)
            out.append(smallest(cost.view(-1, m), counts, fixed).view(cost.shape))
        return out

    def _exchange(self, masks: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        engines = [
            _Exchange(layer, self.budget.pattern, mask, x)
            for layer, mask, x in zip(self.there, masks, weights, strict=True)
        ]
        value = self.objective([engine.X for engine in engines])
        while self.rounds_left >= 1:
            self.rounds_left -= 1
            improved = sum(engine.round() for engine in engines)
            before, value = value, self.objective([engine.X for engine in engines])
            self.offer(value, [engine.pruned for engine in engines], [engine.X for engine in engines])
            if not improved or before - value < GAIN * before:
                return


class _Exchange:
    """`large.BulkExchange` on a card: the cheapest removals of each row for its best returns, kept if it gains."""

    def __init__(
        self, layer: DeviceLayer, pattern: tuple[int, int] | None, pruned: torch.Tensor, start: torch.Tensor
    ) -> None:
        self.layer, self.pattern, self.pruned = layer, pattern, pruned.clone()
        self.X = layer.refit(pruned, start, ITERATIONS)
        self.losses = layer.losses(self.X)
        kept = (~pruned).sum(1)
        self.moves = (SHARE * kept).clamp_min(1.0).to(torch.int64)
        inverse = layer.shifted_inverse(0.0)
        self.upper = inverse.diagonal().clamp_min(1.0).log()
        self.alpha, self.beta = self._exponents()

    def _exponents(self) -> tuple[float, float]:
        """Of the estimates of prices, from exact prices on a few rows."""
        layer, found = self.layer, []
        open_ = (self.pruned.any(1) & ~self.pruned.all(1)).nonzero()[:, 0].cpu().numpy()
        for r in open_[np.linspace(0, max(0, open_.size - 1), min(SAMPLES, open_.size)).astype(np.int64)]:
            checkpoint()
            kept, out = ((~self.pruned[r]).nonzero()[:, 0], self.pruned[r].nonzero()[:, 0])
            L, info = torch.linalg.cholesky_ex(layer.S[kept][:, kept])
            if int(info):
                continue
            T, S = torch.cholesky_inverse(L), layer.S[out][:, kept]
            a = (1.0 - ((S @ T) * S).sum(1)).clamp_min(1e-6)
            t_level = float(T.diagonal().log().mean()) / max(float(self.upper[kept].mean()), 1e-9)
            a_level = 1.0 + float(a.log().mean()) / max(float(self.upper[out].mean()), 1e-9)
            share = np.log(kept.numel() / layer.layer.columns)
            found.append([np.log(np.clip(x, 1e-3, 1)) / share for x in (t_level, 1.0 - a_level)])
        if not found:
            return 0.5, 0.5
        alpha, beta = np.median(np.array(found), axis=0)
        return float(alpha), float(beta)

    def round(self, iterations: int = 8) -> int:
        """One exchange in every row that still has moves; the number of rows that improved."""
        layer = self.layer
        rows = (self.moves > 0).nonzero()[:, 0]
        if not rows.numel():
            return 0
        X, old = self.X[rows], self.pruned[rows]
        residual = layer.B[rows] - X @ layer.S
        share = (1.0 - old.to(torch.float32).mean(1)).clamp_min(1e-6)[:, None]
        t = torch.exp(share**self.alpha * self.upper)
        a = torch.exp(-(share**self.beta) * self.upper)
        cost = torch.where(old, torch.inf, X * X / t)
        gain = torch.where(old, residual * residual / a, -torch.inf)
        if layer.locked is not None:
            fixed = layer.locked[rows] != 0
            cost, gain = cost.masked_fill(fixed, torch.inf), gain.masked_fill(fixed, -torch.inf)
        out, back = self._pairs(cost, gain, self.moves[rows])
        new = (old | out) & ~back
        tried = out.any(1)
        if not bool(tried.any()):
            self.moves[rows] = 0
            return 0
        start = torch.where(new, 0.0, X) + torch.where(back, 0.5 * residual / a, 0.0)
        where = rows[tried]
        moved = layer.refit(new[tried], start[tried], iterations, where)
        losses = layer.losses(moved, where)
        better = losses < self.losses[where] * (1 - 1e-6)
        accepted = where[better]
        self.X[accepted], self.losses[accepted] = moved[better], losses[better]
        self.pruned[accepted] = new[tried][better]
        grown = (self.moves[accepted].to(torch.float64) * 1.3).ceil().clamp_max(MOST_MOVES).to(torch.int64)
        self.moves[accepted] = grown
        self.moves[where[~better]] //= 2
        self.moves[rows[~tried]] = 0
        return int(accepted.numel())

    def _pairs(
        self, cost: torch.Tensor, gain: torch.Tensor, moves: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, back = (torch.zeros_like(cost, dtype=torch.bool) for _ in range(2))
        if self.pattern is not None:
            cells = (cost.shape[0], -1, self.pattern[1])
            costs, leave = cost.view(cells).min(2)
            gains, enter = gain.view(cells).max(2)
            first = self.pattern[1] * torch.arange(leave.shape[1], device=cost.device)
            leave, enter = leave + first, enter + first
            benefit = torch.nan_to_num(gains - costs, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
            rank = torch.argsort(torch.argsort(-benefit, dim=1), dim=1)
            chosen = (rank < moves[:, None]) & (benefit > 0)
        else:
            size = int(min(int(moves.max()), cost.shape[1] - 1))
            costs, leave = torch.topk(cost, size, dim=1, largest=False)
            gains, enter = torch.topk(gain, size, dim=1)
            chosen = (gains > costs) & (torch.arange(size, device=cost.device) < moves[:, None])
        row, pair = chosen.nonzero(as_tuple=True)
        out[row, leave[row, pair]], back[row, enter[row, pair]] = True, True
        return out, back


def memory_of(layers: list[Layer]) -> float:
    """Bytes that the search takes on a card, roughly."""
    return 4.0 * sum(14.0 * layer.weights.size + 6.0 * layer.columns**2 for layer in layers)


def cost_on_cpu(layers: list[Layer]) -> float:
    """Operations of the first ADMM, in single precision: some sixty iterations, twenty changes of ρ."""
    return float(sum(120.0 * layer.rows * layer.columns**2 + 40.0 * layer.columns**3 for layer in layers))
