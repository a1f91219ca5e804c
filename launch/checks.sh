#!/usr/bin/env bash
# All checks, in an environment that has the dev extra: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

"$PYTHON" -m ruff check
"$PYTHON" -m ruff format --check
"$PYTHON" -m mypy
# Half of the tests wait for processes that they start, so some at a time; -n 0 among the arguments undoes it.
exec "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
