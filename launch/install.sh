# Sourced by the two README commands: makes .venv once and installs what the arguments name into it.
# PYTHON chooses the interpreter; an interrupted or outdated install is simply done again.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "avg_llava_jax needs Python 3.11 or newer; '$python' is $("$python" -V). Set PYTHON=/path/to/python3.11." >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing into .venv (about two minutes the first time) ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
