"""A user's own code, named on a command line: `module:name`, `./file.py:name` or a Windows path."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from cbs_opt.errors import UsageError
from cbs_opt.instances.batches import reason

_SPEC = re.compile(r"(?P<module>.+):(?P<name>[^:\\/]+)")


def load_object(spec: str, what: str) -> Any:
    """Import a module, from the current directory too, and get an object of it.

    Parameters
    ----------
    spec : str
        `module:name`, or the path of a `.py` file in place of the module.
    what : str
        The option, for error messages.

    Raises
    ------
    UsageError
        When the module cannot be found or fails, or has no such object.
    """
    match = _SPEC.fullmatch(spec)
    if match is None or not match["name"].isidentifier():
        raise UsageError(f"'{spec}' must be module:function, 'mynet:make' or './mynet.py:make' say")
    module = _imported(match["module"], spec)
    try:
        return getattr(module, match["name"])
    except AttributeError:
        raise UsageError(f"{what} {spec}: the module has no function '{match['name']}'") from None


def _imported(module: str, spec: str) -> ModuleType:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        path = Path(module.replace("\\", "/")).resolve()
        if not path.is_file():
            raise UsageError(f"{spec}: there is no file {module}")
        known = sys.modules.get(path.stem)
        if known is not None and getattr(known, "__file__", None) == str(path):
            return known
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None and found.loader is not None
        made = importlib.util.module_from_spec(found)
        sys.modules[path.stem] = made
        sys.path.insert(0, str(path.parent))
        try:
            found.loader.exec_module(made)
        except BaseException:
            del sys.modules[path.stem]
            raise
        finally:
            sys.path.remove(str(path.parent))
        return made
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        raise UsageError(f"{spec}: there is no module '{error.name}' here or among the installed ones") from error
    except Exception as error:
        raise UsageError(f"{spec}: fails with {reason(error)}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
