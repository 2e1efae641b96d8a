"""Instance and solution files: `.npz`, version 1, without pickled objects."""

from cbs_opt.files.instance_file import read_instance, write_instance
from cbs_opt.files.solution_file import read_solution, write_solution

__all__ = ["read_instance", "read_solution", "write_instance", "write_solution"]
