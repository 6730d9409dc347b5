#!/usr/bin/env bash
# Run the tests; makes its own environment. `tests/run.sh --full` adds the long checks.
# Other arguments go to pytest: `tests/run.sh tests/test_config.py -k override`.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment deepspeed,eval,dev

full=" and not full"
arguments=()
for argument in "$@"; do
  if [ "$argument" = --full ]; then full=""; else arguments+=("$argument"); fi
done
python -m ruff check .
python -m ruff format --check .
python -m mypy
if [ ${#arguments[@]} -gt 0 ]; then
  if [ -n "$full" ]; then arguments+=(-m "not full"); fi
  exec python -m pytest "${arguments[@]}"
fi
# Two files at a time on a thread each; then, alone, what measures when and how processes end.
status=0
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -m "not alone$full" || status=$?
python -m pytest -m "alone$full" || status=$?
exit $status
