#!/usr/bin/env bash
# Build the sdist and the wheels into dist/, and check them. docs/releasing.md says what else a release needs.
set -euo pipefail

case "${1:-}" in
-h | --help)
    cat <<'HELP'
usage: ./launch/release.sh [build|check]

build   makes dist/: the sdist, and from it a wheel for Linux on x86_64 and one on aarch64, whose C is compiled by zig for
        glibc 2.17; then auditwheel and twine judge them
check   installs this machine's wheel into a new environment, with no compiler to be found, and runs what README shows first;
        and builds a wheel from the sdist
Without an argument both are done. Nothing is uploaded.

environment:
    PYTHON      interpreter (default: .venv/bin/python of this repository, else python3). A torch that it has is used
    MACHINES    of wheels (default: x86_64 aarch64)
HELP
    exit
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo "$PWD/.venv/bin/python" || echo python3)}"
MACHINES="${MACHINES:-x86_64 aarch64}"
GLIBC=2.17
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

say() { echo "release: $*" >&2; }

tools() { # into an environment of their own
    say "installing the tools"
    "$PYTHON" -m venv "$work/tools"
    "$work/tools/bin/pip" install --quiet --disable-pip-version-check build hatchling ziglang auditwheel twine
}

build() {
    rm -rf dist
    "$work/tools/bin/python" -m build --no-isolation --sdist --outdir dist .
    mkdir "$work/source"
    tar -xzf dist/distnorm-*.tar.gz -C "$work/source" --strip-components 1
    local machine wheel
    for machine in $MACHINES; do
        say "building for $machine"
        CC="$work/tools/bin/python -m ziglang cc -target $machine-linux-gnu.$GLIBC" \
            DISTNORM_WHEEL_PLATFORM="manylinux_${GLIBC/./_}_$machine" \
            "$work/tools/bin/python" -m build --no-isolation --wheel --outdir dist "$work/source"
        wheel="$(echo dist/*"_$machine.whl")"
        "$work/tools/bin/python" -m auditwheel show "$wheel" | tee "$work/verdict"
        if ! grep -q "manylinux_${GLIBC/./_}_$machine" "$work/verdict"; then
            say "$wheel doesn't keep to glibc $GLIBC"
            exit 1
        fi
    done
    "$work/tools/bin/python" -m twine check --strict dist/*
}

# A new environment; the torch that $PYTHON has is lent to it, since it is large.
environment() {
    "$PYTHON" -m venv "$1"
    if "$PYTHON" -c 'import torch' 2>/dev/null; then
        "$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' \
            >"$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
    fi
}

check() {
    local wheel
    wheel="$(echo dist/distnorm-*_"$(uname -m)".whl)"
    say "installing $wheel where there is no compiler"
    environment "$work/clean"
    "$work/clean/bin/pip" install --quiet --disable-pip-version-check "$wheel"
    "$PYTHON" - README.md >"$work/snippet.py" <<'PY'
import re, sys

print(re.search(r"```python\n(.*?)```", open(sys.argv[1], encoding="utf-8").read(), re.S)[1])
print("from distnorm.kernels import native\nassert native.library() is not None\nprint(distnorm.__file__)")
PY
    (
        cd "$work" # not the checkout
        bare=(env -i PATH="$work/clean/bin" HOME="$work" DISTNORM_CACHE="$work/cache")
        "${bare[@]}" distnorm --version
        "${bare[@]}" python -W error::UserWarning:distnorm snippet.py
        [[ ! -e "$work/cache" ]] # nothing was compiled
    )
    say "building from the sdist"
    "$work/tools/bin/pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/again" dist/distnorm-*.tar.gz
    CC=false "$work/tools/bin/pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/pure" dist/distnorm-*.tar.gz
    ls "$work/again" "$work/pure"
    [[ -e "$(echo "$work"/pure/*-none-any.whl)" ]]
    say "all is well"
}

tools
case "${1:-all}" in
build) build ;;
check) check ;;
all)
    build
    check
    ;;
*)
    say "expected build or check, found $1"
    exit 2
    ;;
esac
