"""Waits until its parent ends, however it ends, and gives GPU clocks and power limits back. Started by clocks.py.

Try: python -m pdbench.power.clock_guard '{"unlock": [0], "limits_w": []}' < /dev/null
"""

import json
import os
import select
import signal
import sys

from pdbench.power.clocks import restore


def main() -> int:
    """Exit code 0 when everything was given back."""
    orders = json.loads(sys.argv[1])
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("ready", flush=True)
    # A forked child of the parent may hold the pipe open after it, so the parent's own life is watched as well.
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], 0.5)[0] and not os.read(sys.stdin.fileno(), 4096):
            break
    problems = restore(orders["unlock"], orders["limits_w"])
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
