//! Bad input: the error that each gives, and that nothing else happens. `tests/cuda.rs` has the same table for a GPU.

mod common;
#[path = "common/misuse.rs"]
mod misuse;

use candle_core::{Device, Result};

#[test]
fn is_refused() -> Result<()> {
    misuse::all(misuse::On { device: &Device::Cpu })
}
