#!/usr/bin/env bash
# Assembles every kernel as a driver would, and fails on register spills and on arrays in local memory: both cost a
# kernel many times its speed, and a build to PTX shows neither. Needs nvcc on the PATH, and no GPU.
#
#   scripts/assemble-kernels.sh [compute capability...]
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || set -- 80 90
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

for source in kernels/*.cu; do
  name=$(basename "$source" .cu)
  # The same PTX as build.rs embeds, assembled for each device.
  nvcc -gencode=arch=compute_80,code=sm_80 --ptx -std=c++17 -O3 "$source" -o "$work/$name.ptx"
  for capability in "$@"; do
    ptxas -v -arch="sm_$capability" "$work/$name.ptx" -o "$work/$name.cubin" 2>"$work/log" || { cat "$work/log"; exit 1; }
    kernels=$(grep -c 'Compiling entry function' "$work/log")
    bad=$(grep -B1 'bytes stack frame' "$work/log" | grep -v ' 0 bytes stack frame, 0 bytes spill stores' |
      grep -B1 'bytes stack frame' || true)
    if [ -n "$bad" ]; then
      echo "sm_$capability $name:"
      echo "$bad"
      failed=1
    else
      echo "sm_$capability $name: $kernels kernels, no spills, no local memory"
    fi
  done
done
exit $failed
