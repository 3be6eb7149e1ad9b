#!/usr/bin/env bash
# Install what the tests need and run all of them; arguments go to pytest. With --lowest as the first one, the tests run with
# the lowest versions that pyproject.toml allows.
# DeepSpeed and torch.compile build small C++ extensions when they are first used.
command -v g++ >/dev/null || { echo "the tests need g++: install it with your system's package manager" >&2; exit 1; }
if [ "${1:-}" = --lowest ]; then
  shift
  source "$(dirname "$0")/setup.sh" dev,gguf,deepspeed lowest
else
  source "$(dirname "$0")/setup.sh" dev,gguf,deepspeed
  ruff format --check .
  ruff check .
  mypy
fi
pytest --numprocesses 2 --dist worksteal "$@" # neighbouring tests, which share fixtures, stay in one process
