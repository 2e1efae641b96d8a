"""Writes a pruned network as an ONNX file; its zeros are stored as ordinary numbers."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbs_opt.errors import OutputError, UsageError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.instances.batches import arguments, placed, reason
from cbs_opt.instances.modes import evaluation_mode, single_precision


def check_onnx() -> None:
    """Raise `UsageError` unless the package that torch needs to write ONNX is installed."""
    if importlib.util.find_spec("onnx") is None:
        raise UsageError('ONNX files need the package onnx: pip install "cbs-opt[onnx]"')


@contextmanager
def _no_stdout() -> Iterator[None]:
    """Nothing is written to standard output, by C++ neither: torch prints the graph that it cannot write."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        kept = None
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):  # noqa: PTH123  # no path of a user
        if kept is not None:
            os.dup2(nothing.fileno(), 1)
        try:
            yield
        finally:
            if kept is not None:
                os.dup2(kept, 1)
                os.close(kept)


def write_onnx(path: Path | str, model: nn.Module, inputs: Any) -> None:
    """Write a network as it runs on some inputs; the number of samples stays free.

    Parameters
    ----------
    path : Path or str
    model : torch.nn.Module
        Half precision is written as float32.
    inputs : Tensor or Bundle (m, …)
        Samples to trace the network with.

    Raises
    ------
    UsageError
        Without the package onnx.
    OutputError
        When torch cannot write this network, or the file cannot be written.
    """
    check_onnx()
    buffer = io.BytesIO()
    with evaluation_mode(model), single_precision(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args, kwargs = arguments(placed(inputs, model))
        names = [f"input_{k}" for k in range(len(args))] if len(args) > 1 else ["input"]
        names = names[: len(args)] + list(kwargs)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # its fused layers have no operators in ONNX
        try:
            with _no_stdout():
                torch.onnx.export(
                    model,
                    args,
                    buffer,  # type: ignore[arg-type]
                    kwargs=kwargs or None,
                    input_names=names,
                    dynamic_axes={name: {0: "samples"} for name in names},
                    dynamo=False,
                )
        except Exception as error:  # operators that ONNX lacks, control flow that a trace does not follow
            raise OutputError(f"{path}: torch cannot write this network as ONNX: {reason(error)}") from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
