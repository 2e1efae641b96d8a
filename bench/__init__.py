"""How we know: benchmark runs and their reports, measurements, and the pictures and tables made of them.

This room imports all the others; importing it loads nothing. `runs` makes rows and keeps them, `reports` makes
tables and pictures of them: the command `cbs-bench` is their front door. The other modules are commands of their
own, each for one question. `python -m cbs_opt.bench.exact`, `trajectories` and `losses` print and draw rows of
`runs`; `quality`, `accuracy`, `startup`, `scale` and `best_known` measure what a row does not hold.
"""
