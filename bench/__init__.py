"""How we know: measurements, and the pictures and tables made of them.

This room imports all the others; importing it loads nothing. Every module is a command:
`python -m cbs_opt.bench.trajectories`, `python -m cbs_opt.bench.startup`, `python -m cbs_opt.bench.scale`.
"""
