#!/usr/bin/env bash
# Run the tests; makes its own environment. `tests/run.sh --full` adds the long checks.
# Other arguments go to pytest: `tests/run.sh tests/test_config.py -k override`.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment deepspeed,eval,dev

select=(-m "not full")
arguments=()
for argument in "$@"; do
  if [ "$argument" = --full ]; then select=(); else arguments+=("$argument"); fi
done
python -m ruff check .
python -m ruff format --check .
exec python -m pytest "${select[@]}" "${arguments[@]}"
