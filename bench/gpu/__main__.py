"""Runs `cbs_opt.bench.gpu.run`."""

import sys

from cbs_opt.bench.gpu.run import main

sys.exit(main())
