"""The solvers.

Each folder imports only from those above it in this list, and not from all of them: `tests/cbs_opt/test_house.py`
holds the exact table.

=========  ============================================================================================
kernels    compiled inner loops
device     the inner loops on a card
problem    the presolved, scaled problems in connected components
trees      the branch-and-bound engine
layers     layers whose rows share one Hessian
paper      the methods of the CBS paper and its baselines; imports `device` alone
selection  heuristics and bounds for the selection objective: `search`, `relax`
joint      heuristics and bounds for the joint objective: `joint`, `backward`
exact      the registered solvers that prove or enumerate: `exact`, `brute`; certificates
mip        models for the solvers of others: `highs`, `pyomo`, text formats
=========  ============================================================================================

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
"""The module of each solver of the package."""
