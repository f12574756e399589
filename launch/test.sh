#!/usr/bin/env bash
# All tests, in the environment of the quick start. Arguments are pytest's, such as -k selection.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

make_environment .venv
# Tests that start torchrun or the command find the environment's own.
PATH="$PWD/.venv/bin:$PATH"
exec .venv/bin/python -m pytest "$@"
