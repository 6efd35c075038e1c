#!/bin/sh
# main.py for every combination of lists of options; ./main.sh --help explains. PYTHON=... picks the interpreter.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" -m experiments.sweep main "$@"
