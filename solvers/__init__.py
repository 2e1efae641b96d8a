"""How to solve it: one algorithm a file.

This room imports the core, `cbs_opt`, and neither `cbs_opt.instances` nor `cbs_opt.bench`. A solver's module
is imported when the solver is asked for, and not before: `cbs-solve --solver magnitude` loads neither torch
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
"""Where each solver that comes with the package lives."""
