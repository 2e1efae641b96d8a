"""The inner loops in numba. Those of search and sweeps have plain NumPy versions, the reference of their tests.

A kernel takes flat arrays and scalars, uses no Python objects, releases the interpreter lock and does a bounded
amount of work per call, so that its caller can check the clock. Only `cbs_opt.solvers` imports this package.
"""
