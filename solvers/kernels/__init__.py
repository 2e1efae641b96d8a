"""The inner loops: numba on the CPU, and a plain NumPy twin of each as the oracle of the tests.

A kernel takes flat arrays and scalars, holds no Python objects, releases the interpreter lock and does a bounded
amount of work per call, so that its caller can ask the clock. Only `cbs_opt.solvers` imports this room.
"""
