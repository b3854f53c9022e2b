#!/usr/bin/env bash
# Lint, types and all tests but the slow ones, with set-up: bash scripts/test.sh [PYTEST ARGUMENT...]
# On Python 3.11 with jax 0.10.2, and those of the kernels and the core again on Python 3.12 with jax 0.11.2 where that
# interpreter exists.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$repo"

first="${JAXKV_VENV:-$repo/.venv-test}"
ran=""
if python="$(find_python 3.11)"; then
    ensure_venv "$first" "$python" "test,lint,reference" "jax==0.10.2" "jaxlib==0.10.2"
    ensure_compilers "$first" 0.10.2 0.0.42.1
    "$first/bin/ruff" check .
    "$first/bin/ruff" format --check .
    "$first/bin/pyright" --pythonpath "$first/bin/python"
    "$first/bin/python" -m pytest -n 2 --dist worksteal -m "not slow" "$@"
    ran="Python 3.11 with jax 0.10.2"
fi
if python="$(find_python 3.12)"; then
    second="$first-312"
    ensure_venv "$second" "$python" "test" "jax==0.11.2" "jaxlib==0.11.2"
    ensure_compilers "$second" 0.11.2 0.0.48.1
    kernels_and_core=(tests/kernels tests/aot tests/cache tests/compression tests/policies tests/generation tests/engine)
    [[ "$*" != *tests/* ]] || kernels_and_core=()
    "$second/bin/python" -m pytest -n 2 --dist worksteal -m "not slow and not once" "${kernels_and_core[@]}" "$@"
    ran="${ran:+$ran, }Python 3.12 with jax 0.11.2"
fi
if [ -z "$ran" ]; then
    echo "tests need Python 3.11 or 3.12; neither was found" >&2
    exit 1
fi
echo "tests passed on $ran"
