#!/bin/sh
# The tests of kernels with another Triton: tests/kernels/other_triton.sh 3.6.0 [pytest's arguments]
#
# Installs it into a folder of this user's cache, which comes before the packages of the interpreter that PYTHON names
# (the default is .venv's). Triton before 3.7 gets a numpy below 2.4 there: its interpreter fails on later ones
# (triton#9171).
set -eu
version=${1:?which version of Triton, such as 3.6.0}
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
at=${XDG_CACHE_HOME:-$HOME/.cache}/dltrain-triton-$version
numpy=
case $version in [0-2].* | 3.[0-6] | 3.[0-6].*) numpy='numpy<2.4' ;; esac
if [ ! -e "$at/.made" ]; then
    echo "installing Triton $version into $at ..." >&2
    "$python" -m pip --disable-pip-version-check install --quiet --upgrade --no-deps --target "$at" "triton==$version" $numpy
    touch "$at/.made"
fi
cd "$root"
PYTHONPATH=$at TRITON_CACHE_DIR=$at/.cache OMP_NUM_THREADS=1 exec "$python" -m pytest "${@:-tests/kernels}"
