"""The inner loops, compiled by numba.

`selection_numba`, `joint_numba` and `sweeps_numba` have plain NumPy twins, with which the tests compare them. The
kernels of the trees (`selection_tree`, `joint_tree` and what they call) are compared with enumeration, through the
solvers.

A kernel takes flat arrays and scalars, holds no Python objects, releases the interpreter lock and does a bounded
amount of work per call, so that its caller can ask the clock. Only `cbs_opt.solvers` imports this room.
"""
