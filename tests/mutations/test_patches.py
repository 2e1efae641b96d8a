"""The patches of the mutations fit the code: whoever changes a line that one names adapts it, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_patches_fit_the_code():
    script = Path(__file__).with_name("run.py")
    done = subprocess.run([sys.executable, script, "--list", "--all"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
