#!/usr/bin/env bash
# Set up .venv with the frameworks that distnorm/integrations/ has adapters for, and run the tests that need them.
# Arguments go to pytest.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up full

cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE
exec "$VENV_PYTHON" -m pytest -n auto --maxprocesses 4 --dist worksteal tests/integrations "$@"
