"""The problems as models for other solvers: HiGHS, Pyomo, text formats."""
