#!/usr/bin/env bash
# Lint, types and all tests but the slow ones, with set-up: bash scripts/test.sh [--all] [PYTEST ARGUMENT...]
# All of it on the oldest jax (Python 3.11), and those of the kernels and the core again on the newest, with the newest
# Python that is here; --all: also on a jax between. Where there is no Python 3.11, all of it on the newest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$repo"

between=""
if [ "${1:-}" = --all ]; then
    between=yes
    shift
fi
arguments=("$@")
core=(tests/kernels tests/aot tests/cache tests/compression tests/policies tests/generation tests/engine)
[[ "$*" != *tests/* ]] || core=()
environments="${JAXKV_VENV:-$repo/.venv-test}"
tested=""

# test_on JAX LIBTPU PYTHON-VERSION...: on the first of the Pythons that is here, if any; the first time whole.
test_on() {
    local jax="$1" libtpu="$2" python venv
    python="$(find_python "${@:3}")" || return 0
    if [ -z "$tested" ]; then
        venv="$environments"
        ensure_venv "$venv" "$python" "test,lint,reference" "jax==$jax" "jaxlib==$jax"
        ensure_compilers "$venv" "$jax" "$libtpu"
        "$venv/bin/ruff" check .
        "$venv/bin/ruff" format --check .
        "$venv/bin/pyright" --pythonpath "$venv/bin/python"
        "$venv/bin/python" -m pytest -n 2 --dist worksteal -m "not slow" "${arguments[@]}"
    else
        venv="$environments-$jax"
        ensure_venv "$venv" "$python" "test" "jax==$jax" "jaxlib==$jax"
        ensure_compilers "$venv" "$jax" "$libtpu"
        "$venv/bin/python" -m pytest -n 2 --dist worksteal -m "not slow and not once" "${core[@]}" "${arguments[@]}"
    fi
    tested="${tested:+$tested, }$("$venv/bin/python" -c "import sys; print('Python %d.%d' % sys.version_info[:2])") with jax $jax"
}

test_on 0.10.2 0.0.42.1 3.11
test_on 0.12.0.1 0.0.50.1 3.14 3.13 3.12
[ -z "$between" ] || test_on 0.11.2 0.0.48.1 3.12
if [ -z "$tested" ]; then
    echo "tests need Python 3.11 to 3.14 with venv; none was found on PATH" >&2
    exit 1
fi
echo "tests passed on $tested"
