#!/usr/bin/env bash
# All checks, in an environment that has what they need: lint, format, types, tests. With --quick only the tests that
# need neither frameworks, nor a browser, nor much time. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE # thousands of processes would each compile every file that they import

"$PYTHON" -m ruff check
"$PYTHON" -m ruff format --check
"$PYTHON" -m mypy
# Most tests wait for processes that they start, so two at a time for each core; -n 0 among the arguments undoes it.
cores="$(env -u OMP_NUM_THREADS nproc)"
tests=("$PYTHON" -m pytest -n "$((cores < 4 ? 2 * cores : 8))" --dist worksteal)
if [[ "${1:-}" == --quick ]]; then
    exec "${tests[@]}" --form quick "${@:2}"
elif (($#)); then
    exec "${tests[@]}" "$@"
fi
# In two runs: most tests have processes that no framework has been imported into.
"${tests[@]}" --form quick
exec "${tests[@]}" --form rest
