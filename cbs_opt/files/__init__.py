"""Instance, solution and certificate files: `.npz` without pickled objects; and the shipped instances."""

from cbs_opt.files.instance_file import write_instance
from cbs_opt.files.library_file import (
    BestKnown,
    LibraryEntry,
    library,
    library_entries,
    library_entry,
    library_names,
    library_path,
)
from cbs_opt.files.solution_file import read_solution, write_solution
from cbs_opt.files.text_instance import read_instance

__all__ = [
    "BestKnown",
    "LibraryEntry",
    "library",
    "library_entries",
    "library_entry",
    "library_names",
    "library_path",
    "read_instance",
    "read_solution",
    "write_instance",
    "write_solution",
]
