"""The inner loops, compiled by numba.

`selection_numba`, `joint_numba` and `sweeps_numba` have plain NumPy versions, with which the tests compare them.
The kernels of the trees (`selection_tree`, `joint_tree` and the functions they call) are tested by comparing the
solvers with enumeration.

A kernel takes flat arrays and scalars, uses no Python objects, releases the interpreter lock and does a bounded
amount of work per call, so that its caller can check the clock. Only `cbs_opt.solvers` imports this package.
"""
