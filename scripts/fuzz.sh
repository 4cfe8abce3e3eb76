#!/usr/bin/env bash
# Fuzzes with libFuzzer, guided by what inputs reach; stable Rust and a C++ compiler are all that it takes.
#
#   scripts/fuzz.sh load_caches|ops [libFuzzer's options...]
#   scripts/fuzz.sh load_caches|ops FILE    # once more, what was left in fuzz/artifacts
set -euo pipefail
target=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
corpus=$root/fuzz/corpus/$target artifacts=$root/fuzz/artifacts/$target/
mkdir -p "$corpus" "$artifacts"

options=(-artifact_prefix="$artifacts" -rss_limit_mb=4096 -timeout=30)
case $target in
  # Longer ones than a file takes, and at once: one call has many arguments.
  ops) options+=(-max_len=300 -len_control=0) ;;
  *) options+=(-max_len=200) ;;
esac
[ -f "${1:-}" ] || options+=("$corpus")

# Files are written thousands of times a second.
[ ! -w /dev/shm ] || export TMPDIR=/dev/shm
# An error of Candle may have a backtrace, which takes longer to make than all else.
export RAYON_NUM_THREADS=1 RUST_LIB_BACKTRACE=0
export RUSTC_WORKSPACE_WRAPPER=$root/scripts/fuzz-rustc.sh
exec cargo run --manifest-path "$root/fuzz/Cargo.toml" --release --bin "$target" -- "${options[@]}" "$@"
