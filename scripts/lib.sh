# Set-up shared by the scripts: a Python that runs, and a virtual environment with this project in it.

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# find_python VERSION...: prints the path of a Python of the first of these versions (3.11) that really runs, or fails.
find_python() {
    local version candidate
    for version in "$@"; do
        for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
            if "$candidate" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" \
                2>/dev/null; then
                echo "$candidate"
                return 0
            fi
        done
    done
    return 1
}

# find_any_python: the newest of those that jaxkv supports, on which the newest jax runs.
find_any_python() {
    find_python 3.14 3.13 3.12 3.11 && return 0
    echo "jaxkv needs Python 3.11 to 3.14 with venv; none was found on PATH" >&2
    return 1
}

# ensure_venv DIRECTORY PYTHON EXTRAS [REQUIREMENT...]: makes the environment, or brings it up to date.
ensure_venv() {
    local directory="$1" python="$2" extras="$3" wanted
    shift 3
    wanted="$("$python" -c "import sys; print(sys.version)" && cat "$repo/pyproject.toml" && echo "$repo" "$extras" "$@")" \
        || return
    if [ "$(cat "$directory/.installed" 2>/dev/null)" = "$wanted" ] && "$directory/bin/python" -c "" 2>/dev/null; then
        return 0
    fi
    echo "installing into $directory (once)" >&2
    # Each step says whether it failed: a caller without set -e must not take what is half installed for installed.
    "$python" -m venv --clear "$directory" \
        && "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$repo[$extras]" "$@" \
        && echo "$wanted" >"$directory/.installed"
}

# ensure_compilers DIRECTORY JAX LIBTPU: adds the compilers for TPUs and for NVIDIA GPUs, in these versions, for the tests
# that compile for machines that aren't here. Elsewhere than on Linux x86_64 there are none, and those tests are skipped.
ensure_compilers() {
    local directory="$1" jax="$2" libtpu="$3" wanted
    if [ "$(uname -sm)" != "Linux x86_64" ]; then
        echo "no compilers for TPUs and GPUs on $(uname -sm): tests that need them are skipped" >&2
        return 0
    fi
    wanted="$jax $libtpu $("$directory/bin/python" -c "import sys; print(sys.version)")" || return
    if [ "$(cat "$directory/.compilers" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    echo "installing compilers into $directory (once)" >&2
    local install=("$directory/bin/python" -m pip install --quiet --disable-pip-version-check)
    # Without the dependencies of the second two: their driver libraries aren't needed.
    "${install[@]}" "libtpu==$libtpu" "nvidia-cuda-nvcc>=13,<14" \
        && "${install[@]}" --no-deps "jax-cuda13-plugin==$jax" "jax-cuda13-pjrt==$jax" \
        && echo "$wanted" >"$directory/.compilers"
}
