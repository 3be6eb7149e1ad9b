#!/usr/bin/env bash
# Prune a real language model: install, fetch SmolLM2-135M, prune half of it, evaluate before and after, save, explain.
source "$(dirname "$0")/setup.sh" gguf
python scripts/fetch_smollm2.py out/smollm2-135m
lit-prune prune --config recipes/demo --output out/demo --overwrite "$@"
