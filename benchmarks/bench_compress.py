"""Speed of the compression kernels against copies, torch eager and `torch.compile`.

A rate counts the float32 bytes that go in or come out, so that it says how long a tensor takes
whatever its codec. `compress_cpu.py` says how it is measured, `compress_gpu.py` the same on a GPU.
Without --quick, `compress_testbed.py` runs whole steps with codecs on a testbed, 5 minutes, and
`compress_training.py` trains with them, which takes most of an hour.
"""

from __future__ import annotations

import argparse
import sys

from common import finish, write_csv
from compress_cpu import measure
from compress_gpu import gpu_rows
from compress_testbed import testbed
from compress_training import training


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="10 repetitions instead of 60, int8 and int4"
    )
    parser.add_argument("--out", metavar="FILE.csv", help="write one row per measured quantity")
    options = parser.parse_args()
    rows, metrics = measure(is_quick=options.quick)
    long = [] if options.quick else [testbed(is_quick=False), training()]
    for more_rows, more_metrics in [gpu_rows(), *long]:
        rows, metrics = [*rows, *more_rows], {**metrics, **more_metrics}
    if options.out:
        write_csv(options.out, rows)
    return finish(metrics)


if __name__ == "__main__":
    sys.exit(main())
