"""paced.py SECONDS RECIPE ...: the recipe with a pause at each step, of at most 0.1 s in a job that was requeued."""

import os
import runpy
import sys
import time

from dltrain import Run

pause, step = min(float(sys.argv[1]), 0.1 if "SLURM_RESTART_COUNT" in os.environ else 9.9), Run.step


def slow_step(run: Run):
    time.sleep(pause)
    return step(run)


Run.step = slow_step  # type: ignore[method-assign]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
