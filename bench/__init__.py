"""Benchmark runs and their reports, measurements, and their figures and tables.

This package may import all others; importing it loads nothing. `runs` produces and stores rows, `reports` makes
tables and figures of them; the command `cbs-bench` does both. The other modules are separate commands. `python -m
cbs_opt.bench.exact`, `trajectories` and `losses` print and draw rows of `runs`; `quality`, `accuracy`, `startup`,
`scale` and `best_known` measure quantities that rows do not contain.
"""
