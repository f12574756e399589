#!/usr/bin/env bash
# All tests, in the environment of the quick start. Arguments are pytest's, such as -k selection.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

make_environment .venv
make_torch_npu .torch_npu || echo "no torch_npu: the tests that need it are skipped" >&2
# Tests that start torchrun or the command find the environment's own.
PATH="$PWD/.venv/bin:$PATH"
# A file of tests a core: most of their time is the start of other processes.
exec .venv/bin/python -m pytest --numprocesses auto --dist loadfile "$@"
