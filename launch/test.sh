#!/usr/bin/env bash
# Set up .venv, and run all checks (launch/checks.sh): ./launch/test.sh; or those that need neither the frameworks nor
# a browser: ./launch/test.sh --quick. Further arguments go to pytest: ./launch/test.sh --quick -k config -x
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [[ "${1:-}" == --quick ]]; then set_up dev; else set_up full; fi

PYTHON="$VENV_PYTHON" exec "$ROOT/launch/checks.sh" "$@"
