#!/usr/bin/env bash
# Installs a CUDA 13.0 compile toolkit (nvcc, headers, link libraries) without root and without a GPU, from NVIDIA's
# redistributable wheels on PyPI, and prints the exports that a build with the feature `cuda` needs. Needs Python 3
# and a C compiler; takes seconds, and nothing the second time.
#
#   eval "$(scripts/cuda-toolkit.sh)"
#   cargo build --release --features cuda
#
# What is built this way links against a stub of the driver's library: it starts only where the real driver is, of the
# 580 series or later. CUDA_TOOLKIT_PREFIX says where to install to; CUDA_COMPUTE_CAP is the device that Candle's own
# kernels are built for, 90 (Hopper) unless it is set.
set -euo pipefail

prefix=${CUDA_TOOLKIT_PREFIX:-${XDG_CACHE_HOME:-$HOME/.cache}/cuda-13.0}

root() { echo "$prefix"/lib/python3*/site-packages/nvidia/cu13; }

install() {
  python3 -m venv "$prefix"
  "$prefix/bin/pip" install --quiet 'cuda-toolkit[nvcc,cudart,cccl,nvrtc,cublas,curand,crt,nvvm]==13.0.2'
  cd "$(root)"
  ln -sfn lib lib64
  # The wheels have libraries under their versioned names only; a linker looks for the plain ones.
  for library in cublas:13 cublasLt:13 cudart:13 curand:10 nvrtc:13; do
    ln -sf "lib${library%:*}.so.${library#*:}" "lib/lib${library%:*}.so"
  done
  # A stub with every function that cuda.h declares.
  mkdir -p lib/stubs
  cc -E -P -I include include/cuda.h | tr '\n' ' ' | grep -oE '\bcu[A-Z][A-Za-z0-9_]+ *\(' | tr -d ' (' | sort -u |
    sed 's/.*/int &(void) { return 100; }/' |
    cc -x c -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o lib/stubs/libcuda.so -
  touch "$prefix/ready"
}

[ -e "$prefix/ready" ] || (install) >&2

home=$(root)
cat <<EOF
export CUDA_HOME=$home CUDA_PATH=$home CUDA_ROOT=$home CUDA_TOOLKIT_ROOT_DIR=$home
export PATH=$home/bin:\$PATH
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
EOF
