"""`python -m cbs_opt.bench.faults`."""

import sys

from cbs_opt.bench.faults.campaign import main

if __name__ == "__main__":
    sys.exit(main())
