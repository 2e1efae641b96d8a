"""The house: which rooms there are, who may import whom, and what stays outside until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib

import pytest

ROOMS = ("cbs_opt", "solvers", "instances", "pruning", "bench")
FORBIDDEN = {
    "cbs_opt": {"solvers", "instances", "pruning", "bench"},
    "solvers": {"instances", "pruning", "bench"},
    "instances": {"solvers", "pruning", "bench"},
    "pruning": {"solvers", "bench"},
    "bench": set(),
}
REACH_ACROSS = ("cbs_opt/cli/", "cbs_opt/networks.py", "cbs_opt/registry.py", "cbs_opt/tiles.py")
"""Where the core may import another room, inside functions."""
HEAVY = {"torch", "scipy", "numba", "pyomo", "matplotlib", "highspy", "sklearn"}


def sources(repository, room):
    return sorted((repository / room).rglob("*.py"))


def name_of(repository, path):
    """The dotted name under which a file of the repository is imported."""
    parts = path.relative_to(repository).with_suffix("").parts
    parts = parts if parts[0] == "cbs_opt" else ("cbs_opt", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    first, _, rest = module.partition(".")
    if first in ROOMS[1:]:
        return first
    second = rest.partition(".")[0]
    return second if first == "cbs_opt" and second in ROOMS[1:] else first


def imports(tree):
    """Each import: the module, the line, and whether it happens when the file is imported."""

    def walk(node, at_import):
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if isinstance(child, ast.Import):
                yield from ((alias.name, child, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    yield f"{'.' * child.level}{child.module or child.names[0].name}", child, at_import
                else:
                    yield from ((f"{child.module}.{alias.name}", child, at_import) for alias in child.names)
            if not typing_only:
                yield from walk(child, at_import and not inside)

    yield from walk(tree, True)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_whom_they_may(room, repository):
    wrong = []
    for path in sources(repository, room):
        place = path.relative_to(repository).as_posix()
        for module, node, at_import in imports(ast.parse(path.read_text(encoding="utf-8"))):
            across = room_of(module) in FORBIDDEN[room]
            if across and not (not at_import and place.startswith(REACH_ACROSS)):
                wrong.append(f"{place}:{node.lineno} imports {module}")
            if module.startswith(".") or module.partition(".")[0] in ROOMS[1:]:
                wrong.append(f"{place}:{node.lineno} must import by the full name under cbs_opt, not {module}")
    assert wrong == []


def test_nobody_imports_the_estimator(repository):
    """It needs scikit-learn, which is an extra."""
    for room in ROOMS:
        for path in sources(repository, room):
            found = [module for module, _, _ in imports(ast.parse(path.read_text(encoding="utf-8")))]
            assert not [module for module in found if module.startswith("cbs_opt.estimator")], path


def test_the_check_above_sees_imports_of_every_form():
    tree = ast.parse(
        "import cbs_opt.bench\n"
        "from cbs_opt import solvers\n"
        "if x:\n    from cbs_opt.solvers.paper.ls import LocalSearch\n"
        "def f():\n    from cbs_opt.instances import zoo\n"
        "from . import a\n"
    )
    found = [(module, room_of(module), at_import) for module, _, at_import in imports(tree)]
    assert found == [
        ("cbs_opt.bench", "bench", True),
        ("cbs_opt.solvers", "solvers", True),
        ("cbs_opt.solvers.paper.ls.LocalSearch", "solvers", True),
        ("cbs_opt.instances.zoo", "instances", False),
        (".a", "", True),
    ]


def test_every_package_is_listed_for_installation(repository):
    table = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    there = {
        name_of(repository, path): path.parent.relative_to(repository).as_posix()
        for room in ROOMS
        for path in sources(repository, room)
        if path.name == "__init__.py"
    }
    assert set(table["packages"]) == set(there)
    assert table["package-dir"] == there


def test_every_folder_with_code_is_a_package(repository):
    folders = {path.parent for room in ROOMS for path in sources(repository, room)}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_tests_have_no_packages(repository):
    assert list((repository / "tests").rglob("__init__.py")) == []


def modules_after(code, process_environment):
    script = f"import sys\n{code}\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=process_environment,
        timeout=60,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_is_light(process_environment):
    loaded = modules_after("import cbs_opt", process_environment)
    assert "numpy" in loaded
    assert loaded & HEAVY == set()


def test_magnitude_loads_neither_torch_nor_numba(process_environment, instance_file):
    code = (
        "from cbs_opt.cli.solve import main\n"
        f"code = main([{str(instance_file)!r}, '--solver', 'magnitude', '-q', '--json', '/dev/null'])\n"
        "assert code == 0, code"
    )
    loaded = modules_after(code, process_environment)
    assert loaded & {"torch", "numba", "pyomo", "matplotlib", "sklearn"} == set()


def test_rooms_are_found_under_one_name_only(process_environment):
    code = (
        "import cbs_opt.solvers, cbs_opt.instances, cbs_opt.bench\n"
        "assert 'solvers' not in sys.modules and 'bench' not in sys.modules"
    )
    modules_after(code, process_environment)


STAIRS = {
    "kernels": set(),
    "device": {"kernels"},
    "problem": {"kernels"},
    "trees": {"kernels", "problem"},
    "layers": {"kernels", "device", "problem"},
    "paper": {"device"},
    "selection": {"kernels", "device", "problem", "trees", "layers"},
    "joint": {"kernels", "device", "problem", "trees", "layers"},
    "exact": {"kernels", "problem", "trees", "selection", "joint"},
    "mip": {"kernels", "problem", "trees", "selection", "joint"},
}
"""Rooms of solvers/, and those that each may import, inside functions too; only rooms above it in this table."""


def imported_files(tree, files):
    """Modules of `files` that a module imports, however."""
    for module, node, _ in imports(tree):
        if module in files:
            yield module, node
        elif module.rpartition(".")[0] in files:
            yield module.rpartition(".")[0], node


def solver_files(repository):
    return {name_of(repository, path): path for path in sources(repository, "solvers")}


def test_stairs_between_the_rooms_of_solvers_lead_one_way(repository):
    folder = repository / "solvers"
    assert {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()} == STAIRS.keys()
    above = set()
    for room, allowed in STAIRS.items():
        assert allowed <= above, f"{room} stands above {sorted(allowed - above)} in the table"
        above.add(room)
    files = solver_files(repository)
    wrong = []
    for path in (path for path in files.values() if path.parent != folder):
        for module, node in imported_files(ast.parse(path.read_text(encoding="utf-8")), files):
            room = module.split(".")[2] if module.count(".") > 1 else "solvers itself"
            if room not in {path.parent.name, *STAIRS[path.parent.name]}:
                wrong.append(f"{path.relative_to(repository)}:{node.lineno} imports {module}")
    assert wrong == []


def test_modules_of_solvers_import_each_other_in_no_circle(repository):
    files = solver_files(repository)
    left = {
        name: {module for module, _ in imported_files(ast.parse(path.read_text(encoding="utf-8")), files)}
        for name, path in files.items()
    }
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


PUBLIC_IN_SPITE = {"_replace", "_make", "_fields", "_asdict", "_exit"}
"""Documented names of the standard library: of named tuples and `os`."""

OF_OTHER_LIBRARIES = {
    "_actions",  # argparse: the options of a parser
    "_forward_hooks",  # torch, with all that follow: what a module holds itself
    "_forward_pre_hooks",
    "_parameters",
    "_buffers",
    "_tensor_name",
    "_BatchNorm",
}
"""Private names without a public way to the same end."""


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(tree):
    """Each private name that a module takes from elsewhere, with its line: imported, or read from an object.

    What the module itself defines or assigns is its own; so is what a class inherits, read from `self`, `cls` or
    `super()`. A private name of an imported module is never its own.
    """
    own, modules = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            own |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                yield from ((alias.name, node.lineno) for alias in node.names if is_private(alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in PUBLIC_IN_SPITE:
            holder = ast.unparse(node.value)
            if holder in modules or (holder not in {"self", "cls", "super()"} and node.attr not in own):
                yield node.attr, node.lineno


def test_private_names_stay_in_their_module(repository):
    wrong = []
    for room in ROOMS:
        for path in sources(repository, room):
            place = path.relative_to(repository).as_posix()
            taken = private_names(ast.parse(path.read_text(encoding="utf-8")))
            wrong += [f"{place}:{line} takes {name}" for name, line in taken if name not in OF_OTHER_LIBRARIES]
    assert wrong == []


def test_the_check_above_sees_private_names_of_every_form():
    tree = ast.parse(
        "from cbs_opt.solvers.trees import best_first as queue\n"
        "from cbs_opt.solvers.trees.best_first import _A\n"
        "class B(Base):\n"
        "    def f(self, other):\n"
        "        self._mine = self._inherited + super()._inherited\n"
        "        return other._mine, other._foreign, self.worker._foreign, queue._mine, other._replace(x=1)\n"
    )
    assert sorted(private_names(tree)) == [("_A", 2), ("_foreign", 6), ("_foreign", 6), ("_mine", 6)]


def test_compiled_functions_have_files_of_their_own(repository):
    """In solvers/, only kernels import numba; mypy checks all other files, strictly."""
    kernels, others = set(), set()
    for path in sources(repository, "solvers"):
        (kernels if path.parent.name == "kernels" or path.stem.endswith("kernels") else others).add(path)
    compilers = {"compiled", "entry", "entry_fast", "inner", "inner_fast"}  # decorators that some kernels share
    for path in others:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module, node, _ in imports(tree):
            assert module.partition(".")[0] != "numba", f"{path}:{node.lineno}"
            assert module.split(".")[-1] not in compilers, f"{path}:{node.lineno}"
    table = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    unchecked = {name for entry in table["overrides"] if entry.get("ignore_errors") for name in entry["module"]}
    assert unchecked == {"cbs_opt.solvers.kernels.*"} | {
        name_of(repository, path) for path in kernels if path.parent.name != "kernels"
    }
    for path in {path for room in ROOMS for path in sources(repository, room)} - kernels:
        assert "# mypy: " not in path.read_text(encoding="utf-8"), path


def test_one_place_decides_where_compiled_functions_are_kept(repository):
    """numba's own cache fails where neither the package nor a home can be written; see `kernels.compilation`."""
    allowed = repository / "solvers" / "kernels" / "compilation.py"
    rooms = ("cbs_opt", "solvers", "instances", "pruning", "bench")
    files = [path for room in rooms for path in (repository / room).rglob("*.py")]
    assert len(files) > 300
    words = ("njit", "numba.jit", "numba.vectorize", "numba.guvectorize", "numba.cfunc")
    assert [str(path) for path in files if path != allowed and any(w in path.read_text() for w in words)] == []
