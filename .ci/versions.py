"""Does `cbs-solve` work with the versions that this interpreter has? Prints them at the end."""

import platform
import tempfile
from pathlib import Path

import numba
import numpy as np
import scipy

import cbs_opt
from cbs_opt.cli.solve import main


def run(*arguments: object) -> None:
    """Run `cbs-solve`, which must succeed."""
    code = main([str(argument) for argument in arguments])
    assert code == 0, (arguments, code)


work = Path(tempfile.mkdtemp())
proof, solution = work / "proof.npz", work / "solution.npz"
run("library:digits-mlp", "--solver", "search", "--time-limit", 60, "--update", "--solution", solution, "-q")
run("library:digits-mlp", "--check", solution)
run("library:mlp-output-40", "--solver", "exact", "--set", f"certificate={proof}", "-q")
run("library:mlp-output-40", "--check", proof)
run("library:mlp-output-40", "--solver", "joint", "--set", "proof=0", "--set", "patience=50", "-q")
for solver in ("magnitude", "obd", "obs", "rmp", "ls", "cbs"):
    run("library:mlp-hidden-rows", "--solver", solver, "-q")

root = Path(cbs_opt.__file__).resolve().parent.parent
golden = [path for path in sorted((root / "tests" / "data").rglob("*.npz")) if path.stem != "solution"]
assert golden
for path in golden:
    assert np.isfinite(cbs_opt.solve(cbs_opt.read_instance(path), "obd").selection_loss)

versions = f"NumPy {np.__version__}, SciPy {scipy.__version__}, numba {numba.__version__}"
print(f"Python {platform.python_version()}, {versions}")  # noqa: T201
