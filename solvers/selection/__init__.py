"""Heuristics and bounds for the selection objective: convex relaxation, concave continuation, tabu search.

- `search`: the solver; `breeding`, `core`, `elites`: its epochs; `sweep_search`, `sweeps`: large problems;
- `relaxation`: the lower bound, by working sets; `relax`: the same as a solver;
- `incumbent`, `swaps`, `repair`: a binary point with its gradient, and what improves it;
- `device_search`, with the other `device_…`: the same on a card.

`exact` and `mip` may import it, for a first incumbent.
"""
