"""Measurements on one card: `python -m cbs_opt.bench.gpu`; see docs/gpu.md.

Room: bench. `run` starts every part in a process of its own, so that one that fails or hangs takes no other with
it; `parts` and `solver_parts` measure; `table` writes what was found.
"""
