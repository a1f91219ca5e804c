#!/usr/bin/env bash
# Set up .venv, and run all checks (launch/checks.sh): ./launch/test.sh; or those that need neither gigabytes of frameworks
# nor a browser, nor much time: ./launch/test.sh --quick. Further arguments go to pytest: ./launch/test.sh --quick -k config -x
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
case "${1:-}" in
--quick) set_up dev ;;
*) set_up full ;;
esac

PYTHON="$VENV_PYTHON" exec "$ROOT/launch/checks.sh" "$@"
