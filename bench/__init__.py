"""Benchmark runs and their reports, measurements, and their figures and tables.

This package may import all others; importing it loads nothing. `runs` produces and stores rows, `reports` makes
tables and figures of them; the command `cbs-bench` does both. The other modules are separate commands for one
measurement each: `python -m cbs_opt.bench.exact`, `accuracy`, `joint`, `quality`, `trajectories`,
`startup`, `scale`, `losses`, `best_known`.
"""
