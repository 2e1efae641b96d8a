"""How to solve it: one algorithm a file.

This room imports the core, `cbs_opt`, and neither `cbs_opt.instances` nor `cbs_opt.bench`. A solver's module
is imported when the solver is asked for, and not before: `cbs-solve --solver magnitude` loads neither torch
nor numba.
"""

MODULES = {
    "random": "cbs_opt.solvers.saliency",
    "magnitude": "cbs_opt.solvers.saliency",
    "obd": "cbs_opt.solvers.saliency",
    "obs": "cbs_opt.solvers.saliency",
    "rmp": "cbs_opt.solvers.rmp",
    "ls": "cbs_opt.solvers.ls",
    "cbs": "cbs_opt.solvers.cbs",
    "search": "cbs_opt.solvers.search",
    "relax": "cbs_opt.solvers.relax",
    "backward": "cbs_opt.solvers.backward",
    "joint": "cbs_opt.solvers.joint",
    "highs": "cbs_opt.solvers.exact.highs",
    "pyomo": "cbs_opt.solvers.exact.pyomo_solver",
    "exact": "cbs_opt.solvers.exact.solver",
    "brute": "cbs_opt.solvers.brute",
}
"""Where each solver that comes with the package lives."""
