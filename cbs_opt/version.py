"""The version of the package; also in `pyproject.toml`."""

__version__ = "0.2.0"
