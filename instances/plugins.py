"""A user's own code, named on a command line: `module:name`, `./file.py:name` or a Windows path."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from cbs_opt.errors import UsageError
from cbs_opt.instances.batches import reason

_SPEC = re.compile(r"(?P<module>.*):(?P<name>[^:]*)", re.DOTALL)  # the last colon: 'C:\\nets.py:make' has two


def is_object(spec: str) -> bool:
    """Whether `spec` names a user's object: loading it runs code."""
    return _SPEC.fullmatch(spec) is not None


def load_object(spec: str, what: str) -> Any:
    """Import a module, from the current directory too or from a file, and get a function of it.

    Parameters
    ----------
    spec : str
        `module:name`, or the path of a `.py` file instead of the module.
    what : str
        The option, for error messages.

    Raises
    ------
    UsageError
        When the module cannot be found or fails, or has no such function.
    """
    with _importable(spec):
        return _loaded(spec, f"{what} ")


def call_object(spec: str) -> Any:
    """Import a module as `load_object` does, and call its function without arguments."""
    with _importable(spec):
        return _loaded(spec, "")()


def _loaded(spec: str, what: str) -> Any:
    module_name, name = _parts(spec)
    file = _file(module_name)
    module = importlib.import_module(module_name) if file is None else _module_of(spec, file)
    found = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"{what}{spec}: the module has no function '{name}'")
    return found


def _parts(spec: str) -> tuple[str, str]:
    match = _SPEC.fullmatch(spec)
    module_name, name = (match["module"], match["name"]) if match else ("", "")
    if not module_name or not name.isidentifier():
        raise UsageError(f"'{spec}' must be module:factory, such as 'mynet:make' or './mynet.py:make'")
    return module_name, name


def _file(module_name: str) -> Path | None:
    is_path = module_name.endswith(".py") or "/" in module_name or "\\" in module_name
    return Path(module_name) if is_path else None


@contextmanager
def _importable(spec: str) -> Iterator[None]:
    """The folder of a file, or the current one, first on the path; errors of the code in one sentence."""
    # The folder of a file comes first on the path, as for a script, so that modules next to it can be imported.
    file = _file(_parts(spec)[0])
    folder = str(Path.cwd() if file is None else file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        raise UsageError(f"{spec}: there is no module '{error.name}' here or among the installed ones") from error
    except Exception as error:
        raise UsageError(f"{spec}: fails with {reason(error)}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _module_of(spec: str, file: Path) -> ModuleType:
    """The module in a file, imported once: a pickled or compared class must be the same in every call."""
    if file.suffix != ".py":
        file = file.with_name(file.name + ".py")
    if not file.is_file():
        raise UsageError(f"{spec}: there is no file '{file}'")
    file = file.resolve()
    for module in list(sys.modules.values()):
        origin = getattr(module, "__file__", None)
        if isinstance(origin, str) and Path(origin) == file and module.__name__ != "__main__":
            return module
    name = file.stem
    if name in sys.modules or not name.isidentifier():
        name = f"{file.stem}_{abs(hash(str(file))):x}"
    location = importlib.util.spec_from_file_location(name, file)
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    sys.modules[name] = module
    try:
        location.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
