"""The problems as models for the solvers of others.

- `highs`, `pyomo_solver`: the solvers of these names; `start`: their first incumbent and the scaled problem;
- `selection_model`, `joint_model`: the models; `selection_outer`, `joint_outer`: MILPs with tangents;
- `text_formats`: LP, MPS, QPLIB, UBQP and QUBO files.

No other folder of `solvers` imports it.
"""
