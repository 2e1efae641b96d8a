"""The problems as models for the solvers of others: HiGHS, Pyomo, text formats."""
