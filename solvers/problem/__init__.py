"""The presolved, scaled problems in connected components, and the conversion to and from instances.

- `selection_problem`, with `presolve` and `columns`: min ½ yᵀQy + cᵀy, and products with Q, not formed;
- `joint_problem`: the joint problem of the undecided weights in dense blocks; `decided`: which are decided before;
- `threaded_factor`: products with a large gradient factor, in threads.

All solvers but those of `paper` may import it; it imports `kernels`.
"""
