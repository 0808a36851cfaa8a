"""paced.py SECONDS RECIPE ...: the recipe with so long a pause after each step, for something to happen in."""

import runpy
import sys
import time

from dltrain import Run

pause, step = float(sys.argv[1]), Run.step


def slow_step(run: Run):
    time.sleep(pause)
    return step(run)


Run.step = slow_step  # type: ignore[method-assign]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
