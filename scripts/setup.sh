# Sourced by the other scripts: install the project with the extras in $1 into a virtual environment, made if it is missing:
# .venv with the versions of constraints.txt or, if $2 is "lowest", .venv-lowest with the lowest that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv${2:+-$2}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
PATH="$PWD/$venv/bin:$PATH"
install="python -m pip install --quiet --disable-pip-version-check"
if [ "${2:-}" = lowest ]; then
  $install "uv>=0.5"
  uv pip install --quiet --python "$venv" --resolution lowest-direct --editable ".[$1]"
else
  $install --constraint constraints.txt --editable ".[$1]"
fi
