#!/usr/bin/env bash
# Set up .venv, and run all checks (launch/checks.sh). Arguments go to pytest: ./launch/test.sh -k config -x
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev

PYTHON="$VENV_PYTHON" exec "$ROOT/launch/checks.sh" "$@"
