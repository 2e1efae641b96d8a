"""The solvers.

- `problem`: the presolved, scaled problems on which the solvers work;
- `paper`: saliency scores and the methods of the CBS paper;
- `selection`: relaxation, lower bound and search for the selection loss;
- `joint`: elimination, swap search and lower bound for the joint loss;
- `layers`: layers whose rows share one Hessian;
- `trees`: the branch-and-bound engine; `exact`: the exact solvers built on it, and enumeration;
- `mip`: models for HiGHS, Pyomo and other solvers; `kernels`: compiled inner loops.

The package imports the core, `cbs_opt`, and neither `cbs_opt.instances` nor `cbs_opt.bench`. The module of a
solver is imported when the solver is requested: `cbs-solve --solver magnitude` loads neither torch
nor numba.
"""

MODULES = {
    "random": "cbs_opt.solvers.paper.saliency",
    "magnitude": "cbs_opt.solvers.paper.saliency",
    "obd": "cbs_opt.solvers.paper.saliency",
    "obs": "cbs_opt.solvers.paper.saliency",
    "rmp": "cbs_opt.solvers.paper.rmp",
    "ls": "cbs_opt.solvers.paper.ls",
    "cbs": "cbs_opt.solvers.paper.cbs",
    "search": "cbs_opt.solvers.selection.search",
    "relax": "cbs_opt.solvers.selection.relax",
    "backward": "cbs_opt.solvers.joint.backward",
    "joint": "cbs_opt.solvers.joint.swap_search",
    "highs": "cbs_opt.solvers.mip.highs",
    "pyomo": "cbs_opt.solvers.mip.pyomo_solver",
    "exact": "cbs_opt.solvers.exact.solver",
    "brute": "cbs_opt.solvers.exact.brute",
}
"""The module of each solver of the package."""
