#!/usr/bin/env bash
# Assembles every kernel as a driver would, and fails on register spills and on arrays in local memory: both cost a
# kernel many times its speed, and a build to PTX shows neither. Needs nvcc on the PATH, and no GPU.
#
#   scripts/assemble-kernels.sh [compute capability...]
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || set -- 80 90
export work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# assemble SOURCE CAPABILITY...
assemble() {
  local source=$1 name failed=0 capability kernels bad
  shift
  name=$(basename "$source" .cu)
  # The same PTX as build.rs embeds, assembled for each device.
  nvcc -gencode=arch=compute_80,code=sm_80 --ptx -std=c++17 -O3 "$source" -o "$work/$name.ptx"
  for capability in "$@"; do
    log=$work/$name.$capability.log
    ptxas -v -arch="sm_$capability" "$work/$name.ptx" -o "$work/$name.$capability.cubin" 2>"$log" || { cat "$log"; return 1; }
    kernels=$(grep -c 'Compiling entry function' "$log")
    bad=$(grep -B1 'bytes stack frame' "$log" | grep -v ' 0 bytes stack frame, 0 bytes spill stores' |
      grep -B1 'bytes stack frame' || true)
    if [ -n "$bad" ]; then
      echo "sm_$capability $name:"
      echo "$bad"
      failed=1
    else
      echo "sm_$capability $name: $kernels kernels, no spills, no local memory"
    fi
  done
  return $failed
}
export -f assemble

# The longest first.
printf '%s\n' kernels/*.cu | xargs ls -S | xargs -P "$(nproc)" -I{} bash -ec 'assemble "$@"' _ {} "$@"
