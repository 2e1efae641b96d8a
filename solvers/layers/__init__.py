"""Layers whose rows share one Hessian: heuristics, exact refits and bounds on plain arrays.

A layer is a weight matrix W (rows, K), one stored Hessian S (K, K) and a scale s_r > 0 for each row, so that row r
has the Hessian H_r = s_r S. `solve.solve_layers` minimises Σ_r ½ (ŵ_r − w_r)ᵀ H_r (ŵ_r − w_r) over the kept
weights and their values (`joint`), or ½ w_Pᵀ H w_P over the pruned set P alone (`selection`), under one budget
over all layers, a budget for each row, or N:M.

- `solve`: the entry point; `layered_instance`: from an instance and back; `problem`: layers, budgets, losses;
- `joint`, `selection`, with `rows` and `starts`: rows on their own tableaus; `parallel`, `distributed`: workers;
- `wide`, `wide_admm`, `large`: long rows, by ADMM and exchanges in bulk; `device_wide`: the same on a card;
- `bound`, with `bound_rows` and `relaxation`: lower bounds; `allocation`, `price_curves`: one budget over rows.

`selection` and `joint` may import it; it imports `kernels`, `device` and `problem`.
"""
