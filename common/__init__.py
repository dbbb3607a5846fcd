"""What the training scripts share. Imports nothing from `kernels` or from a script."""

# An older Python reads this file and the scripts: neither may use what it does not know.
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:3]))
    print("error: Python 3.11 or newer is needed, this is " + found, file=sys.stderr)
    raise SystemExit(2)
