#!/usr/bin/env bash
# Install what the tests need and run all of them; arguments go to pytest.
source "$(dirname "$0")/setup.sh" dev,gguf
ruff format --check .
ruff check .
mypy
pytest --numprocesses 2 "$@"
