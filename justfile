# What CI runs, all of it
ci:
    bash .ci/run

# Format and lint
check:
    cargo fmt --check
    cargo clippy --release --all-targets -- -D warnings

# The test suite; needs no network
test *args:
    cargo test --release {{args}}

# The API documentation, in the browser
doc:
    cargo doc --no-deps --open

# Fidelity and speed of sparse decoding against dense on the bundled text
compare *args:
    cargo run --release --example generate -- --attention both {{args}}

# What sparse attention loses, by method and budget, in a real model on a real text
fidelity *args:
    cargo run --release --example fidelity -- {{args}}

# What sparse attention finds in a long text of what dense attention does, by depth and length
needle *args:
    cargo run --release --example needle -- {{args}}

# The tests on this machine's GPU
test-cuda *args:
    REQUIRE_CUDA=1 cargo test --release --features cuda --test cuda --test cuda_memory {{args}}

# The same under compute-sanitizer. What cuBLAS's kernels write on a Hopper GPU initcheck does not see: it is given tests
# without. synccheck hangs in them and passes them over; racecheck takes many minutes, and loses track of launches by several
# threads: it is given the tests of kernels whose blocks share memory
sanitize:
    #!/usr/bin/env bash
    set -euo pipefail
    for tool in memcheck synccheck initcheck racecheck; do
        case $tool in
            initcheck) tests="append cluster_sums decode_of encode group_mass long_sequences select --skip begin_step" ;;
            racecheck) tests="append begin_step cluster_sums decode_of encode group_mass select --test-threads 1" ;;
            *) tests="" ;;
        esac
        CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="compute-sanitizer --tool $tool --kernel-regex-exclude kns=nvjet --error-exitcode 1" \
            REQUIRE_CUDA=1 cargo test --release --features cuda --test cuda -- $tests
    done

# Files of caches, ops and caches in use, changed at random towards code that was not reached: so many seconds each
fuzz seconds="60":
    scripts/fuzz.sh load_caches -max_total_time={{seconds}}
    scripts/fuzz.sh ops -max_total_time={{seconds}}

# Fifty thousand decode steps: memory stays what it is
soak:
    cargo test --release --test soak -- --ignored --nocapture

# The same on this machine's GPU
soak-cuda:
    REQUIRE_CUDA=1 cargo test --release --features cuda --test cuda_memory -- --ignored --nocapture

# Ten thousand random sequences of everything that can be done to a cache
state-machine cases="10000":
    STATE_MACHINE_CASES={{cases}} cargo test --release --test state_machine

# Every kernel assembled by ptxas: no spills, no local memory; needs no GPU
assemble:
    scripts/assemble-kernels.sh

# A decode step and its parts, on the GPU if there is one
bench *args:
    cargo bench --features cuda --bench decode -- {{args}}

# Tokens of a whole model of 8B, beside Candle's own
bench-e2e *args:
    cargo bench --features cuda --bench e2e -- {{args}}

# The search of one query on a CPU, one thread
bench-cpu *args:
    cargo bench --bench cpu -- {{args}}

# The same beside FAISS: pip install -r benches/peers/requirements.txt
bench-peers *args:
    python benches/peers/cpu.py {{args}}

# Dense attention and top-k of PyTorch and FlashInfer on a GPU: pip install -r benches/peers/requirements-gpu.txt
bench-peers-gpu *args:
    python benches/peers/gpu.py {{args}}
