"""``lit-prune`` and ``python -m lit_prune``."""

import sys

import lit_prune


def main() -> int:
    """Run the command line and return its exit status; print the version before the libraries are imported."""
    if sys.argv[1:] == ["--version"]:
        print(f"lit-prune {lit_prune.__version__}")
        return 0
    from lit_prune.cli import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
