//! Fifty thousand decode steps on the CPU; on a GPU they are in tests/cuda_memory.rs. Takes minutes:
//! `cargo test --release --test soak -- --ignored --nocapture`

mod common;
#[path = "common/soak.rs"]
mod soak;

use candle_core::{Device, Result};

/// Resident bytes of this process, where the system says so, as Linux does; else none.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? << 10)
}

#[test]
#[ignore = "takes minutes"]
fn steps_without_end() -> Result<()> {
    soak::steps_without_end(&Device::Cpu, || Ok(resident().unwrap_or_default()))
}
