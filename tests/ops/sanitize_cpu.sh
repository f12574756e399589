#!/usr/bin/env bash
# The sweep of the native CPU kernels under the address and undefined behaviour sanitizers. Arguments are the sweep's: cases, seed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

build=build/sanitized
mkdir -p "$build"
for source in mindspeed_nsa/ops/cpu/csrc/*.cpp; do
  "${CXX:-g++}" -std=c++17 -O1 -g -fPIC -pthread -fvisibility=hidden -ffp-contract=fast -Wno-psabi -fsanitize=address,undefined \
    -fno-sanitize-recover=undefined -c "$source" -o "$build/$(basename "$source" .cpp).o"
done
"${CXX:-g++}" -shared -pthread -fsanitize=address,undefined "$build"/*.o -o "$build/libkernels.so"

# Python and torch leak by design, and are not instrumented: only what the kernels touch counts.
export ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD
LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so)"
for isa in $(.venv/bin/python -c 'from mindspeed_nsa.ops.cpu import native; print(*native.isas())'); do
  NSA_CPU_ISA=$isa .venv/bin/python tests/ops/cpu_sweep.py "${1:-9}" "${2:-0}" "$build/libkernels.so"
done
