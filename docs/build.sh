#!/usr/bin/env bash
# Draw the guide's pictures and build the site, with no network and no warning: docs/build.sh [--runs] [--site DIR]
#   --runs      repeat the runs behind the pictures and numbers first (some minutes)
#   --no-draw   leave the pictures as they are
#   --site DIR  where the site goes (build/site)
# Needs the docs extra: pip install -e '.[docs]'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true
site="build/site" draw=yes runs=()
while (($#)); do
    case "$1" in
        --runs) runs=(--runs) ;;
        --no-draw) draw="" ;;
        --site) site="$2" && shift ;;
        *) sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
    esac
    shift
done
[[ -z "$draw" ]] || "$PYTHON" -m docs.pictures.make "${runs[@]}"
"$PYTHON" -m mkdocs build --strict --quiet --site-dir "$(realpath -m "$site")"
echo "$site/index.html"
