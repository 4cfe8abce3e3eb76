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
