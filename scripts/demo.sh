#!/usr/bin/env bash
# The main job, with set-up: a real model answers over a real document, full cache beside compressed.
#   bash scripts/demo.sh [--question "…"] [--ratio 8] [--document FILE]
# Needs Python 3.11 to 3.14, of which it takes the newest, and the package index; fetches a model of 93 MB the first time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

environment="${JAXKV_DEMO_VENV:-$repo/.venv}"
ensure_venv "$environment" "$(find_any_python)" "plot"
exec "$environment/bin/python" "$repo/scripts/demo.py" "$@"
