#!/usr/bin/env bash
# Part of a release: bandit over the code, and pip-audit over what is installed. pip-audit asks an index of known weaknesses, so
# this needs a network, and isn't among the checks. Both get an environment of their own, and change nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
"$PYTHON" -m venv "$tools/venv"
"$tools/venv/bin/pip" install --quiet --disable-pip-version-check bandit pip-audit

# asserts, random numbers, processes and pickles: SECURITY.md
"$tools/venv/bin/bandit" --quiet --recursive distnorm --skip B101,B403,B404 --exclude distnorm/testing.py,distnorm/kernels/child.py
"$tools/venv/bin/bandit" --quiet --recursive benchmarks launch --skip B101,B311,B404,B603
installed="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$tools/venv/bin/pip-audit" --path "$installed" --skip-editable
