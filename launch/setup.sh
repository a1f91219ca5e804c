# shellcheck shell=bash
# Sourced by the other scripts. Needs python3 (3.10 or newer) with venv and pip, nothing else.
#
#   set_up        leaves a .venv in the repository that has distnorm and what it and `distnorm report` need
#   set_up dev    ... and what the quick form of the checks needs
#   set_up full   ... and what all tests need: the frameworks, gigabytes of them, and DeepSpeed; as root on Debian also chromium
#
# A torch (2.6 or newer) that python3 can already import is used as it is. Otherwise the version in constraints.txt is
# installed. A second call for no more returns at once: a stamp in .venv records what it was made from.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"

# On a terminal pip shows what it downloads; elsewhere only what goes wrong.
PROGRESS=(--quiet)
if [[ -t 2 ]]; then PROGRESS=(--progress-bar on); fi

say() { echo "set-up: $*" >&2; }

fail() {
    say "$*"
    exit 1
}

# The installed version of torch if it can be used, nothing otherwise.
usable_torch() {
    "$1" - 2>/dev/null <<'PY' || true
import importlib.metadata

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6):
    print(importlib.metadata.version("torch"))
PY
}

# Whether the torch that is installed names the Triton that it needs, as those for CUDA do.
needs_triton() {
    "$1" -c 'import importlib.metadata as m; exit(not any(r.startswith("triton") for r in m.requires("torch") or []))'
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Where the packages of an interpreter are that is itself in a venv: --system-site-packages doesn't reach those.
outer_site_packages() {
    "$1" -c 'import sys, sysconfig; print(sysconfig.get_path("purelib") if sys.prefix != sys.base_prefix else "")'
}

make_venv() {
    local python outer="" options=(--clear)
    python="$(find_python)" || fail "python3 must be 3.10 or newer; found: $(python3 --version 2>&1 || true)"
    if [[ -n "$(usable_torch "$python")" ]]; then
        say "using the torch of $python"
        options+=(--system-site-packages)
        outer="$(outer_site_packages "$python")"
    fi
    say "making $VENV with $("$python" --version)"
    "$python" -m venv "${options[@]}" "$VENV" || fail "$python -m venv failed (on Debian: apt install python3-venv)"
    if [[ -n "$outer" ]]; then
        echo "$outer" >"$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    fi
}

# What the environment is made from: another tree, interpreter, dependency or constraint makes another fingerprint.
fingerprint() {
    "$VENV_PYTHON" - "$ROOT" <<'PY'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
files = [root / "pyproject.toml", root / "launch" / "constraints.txt"]
print(hashlib.sha256(repr([sys.version, str(root), *(f.read_bytes() for f in files)]).encode()).hexdigest())
PY
}

install() {
    local extras torch constraints
    case "$1" in
    run) extras="[report]" ;;
    dev) extras="[dev]" ;;
    full) extras="[dev,frameworks]" ;;
    *) fail "set_up: expected run, dev or full, found '$1'" ;;
    esac
    constraints="$(mktemp)"
    torch="$(usable_torch "$VENV_PYTHON")"
    if [[ -n "$torch" ]]; then
        say "torch $torch is there"
        { grep -Ev '^(torch|triton)==' "$ROOT/launch/constraints.txt"; echo "torch==$torch"; } >"$constraints"
        if ! needs_triton "$VENV_PYTHON"; then grep '^triton==' "$ROOT/launch/constraints.txt" >>"$constraints"; fi
    else
        say "torch will be installed, which can take minutes"
        cp "$ROOT/launch/constraints.txt" "$constraints"
    fi
    say "installing distnorm$extras and what it needs"
    "$VENV_PYTHON" -m pip install "${PROGRESS[@]}" --no-input --no-compile --disable-pip-version-check \
        --constraint "$constraints" --editable "$ROOT$extras" || fail "pip could not install distnorm$extras"
    if [[ "$1" == full ]]; then
        install_deepspeed "$constraints"
        install_browser
    fi
    rm -f "$constraints"
}

# DeepSpeed's build imports torch, so it can't be isolated from it; no operator of its own is compiled.
install_deepspeed() {
    say "installing deepspeed"
    local pip=("$VENV_PYTHON" -m pip install "${PROGRESS[@]}" --no-input --no-compile --disable-pip-version-check --constraint "$1")
    "${pip[@]}" setuptools wheel || fail "pip could not install setuptools and wheel"
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "${pip[@]}" --no-build-isolation deepspeed ||
        fail "pip could not install deepspeed"
}

# A browser for the tests that look at a report, where apt can install one. Without it they are skipped, and say so.
install_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null; then return; fi
    done
    if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
        say "NO BROWSER: tests of the report's page will be skipped; install chromium to run them"
        return
    fi
    say "installing chromium for the tests of the report's page"
    if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
        >/dev/null 2>&1; then
        say "NO BROWSER: apt-get could not install chromium; tests of the report's page will be skipped"
    fi
}

set_up() {
    local kind="${1:-run}" stamp had
    if ! is_new_enough "$VENV_PYTHON"; then
        make_venv # none yet, or one that an interruption, or an upgrade of python3, has left broken
    fi
    stamp="$(fingerprint)"
    for had in full dev run; do # each has what those after it have
        if [[ "$(cat "$VENV/.set-up-$had" 2>/dev/null)" == "$stamp" ]]; then return; fi
        if [[ "$had" == "$kind" ]]; then break; fi
    done
    if ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        "$VENV_PYTHON" -m ensurepip >/dev/null || fail "$VENV has no pip (on Debian: apt install python3-venv)"
    fi
    install "$kind"
    echo "$stamp" >"$VENV/.set-up-$kind"
    say "done"
}
