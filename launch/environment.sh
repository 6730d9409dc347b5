# Sourced by the shell programs: makes a virtual environment in .venv and puts it first on PATH.
#
#   source launch/environment.sh; prepare_environment [extra,extra,...]
#
# LETIT_PYTHON=/path/to/python uses that interpreter as it is, and installs nothing.

_usable_python() {
  "$1" -c 'import sys, venv, ensurepip; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
    >/dev/null 2>&1
}

_find_python() {
  local candidate
  for candidate in python3 python3.12 python3.11 python3.13 python3.10 python; do
    if command -v "$candidate" >/dev/null && _usable_python "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10 to 3.13 with the venv module found (on Debian: apt-get install python3-venv)" >&2
  return 1
}

prepare_environment() {
  local extras="${1:-}" root python want stamp
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if [ -n "${LETIT_PYTHON:-}" ]; then
    PATH="$(cd "$(dirname "$LETIT_PYTHON")" && pwd):$PATH"
    export PATH
    return
  fi
  if ! [ -x "$root/.venv/bin/python" ]; then
    python="$(_find_python)" || return 1
    echo "making a virtual environment in .venv ($("$python" --version))"
    "$python" -m venv "$root/.venv" || return 1
  fi
  PATH="$root/.venv/bin:$PATH"
  export PATH VIRTUAL_ENV="$root/.venv"
  want="$extras $(cksum <"$root/setup.cfg") $(python --version)"
  stamp="$root/.venv/.installed"
  if ! grep -qxF "$want" "$stamp" 2>/dev/null; then
    echo "installing letit_dist${extras:+[$extras]} and what it needs (a few minutes the first time)"
    python -m pip install --quiet --disable-pip-version-check --editable "$root${extras:+[$extras]}" || return 1
    echo "$want" >>"$stamp"
  fi
}
