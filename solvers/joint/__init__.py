"""Heuristics and bounds for the joint objective: elimination with updates, swaps on the loss after the update.

- `swap_search`: the solver `joint`, with `moves`, `tableau` and, for large blocks, `bulk_exchange`;
- `backward`, with `elimination`, `stages` and `thinning`; `forward`: greedy starts from both sides;
- `lagrangian_bound`: the lower bound; `inverse`, `uncoupled`, `rank_deficient`: pieces and special cases.

`exact` and `mip` may import it, for a first incumbent.
"""
