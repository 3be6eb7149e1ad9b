#!/usr/bin/env bash
# Install what the tests need and run all of them; arguments go to pytest.
# DeepSpeed and torch.compile build small C++ extensions when they are first used.
command -v g++ >/dev/null || { echo "the tests need g++: install it with your system's package manager" >&2; exit 1; }
source "$(dirname "$0")/setup.sh" dev,gguf,deepspeed
ruff format --check .
ruff check .
mypy
pytest --numprocesses 2 "$@"
