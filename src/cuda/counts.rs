//! Numbers in which the blocks of a launch count themselves.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{CudaDevice, CudaStorage, DType, Result};

use super::{is_capturing, zeros};

/// As many as a grid may have rows, always: graphs that were captured go on using them.
pub(crate) const MAX_COUNTS: usize = 65_535;

thread_local! {
    /// By the numbers of the device and of the stream.
    static COUNTS: RefCell<HashMap<[usize; 2], CudaStorage>> = RefCell::default();
}

/// Calls `launch` with [`MAX_COUNTS`] numbers that are 0, and that what it launches leaves at 0. No other launch uses them
/// meanwhile: they are those of a thread and of the device's stream, in which launches follow each other. They stay until the thread
/// ends.
///
/// None, with nothing done, where a capture forbids to allocate them.
pub(crate) fn with_counts<T>(
    device: &CudaDevice,
    launch: impl FnOnce(&mut CudaStorage) -> Result<T>,
) -> Result<Option<T>> {
    let stream = device.cuda_stream();
    let key = [stream.context().ordinal(), stream.cu_stream().addr()];
    COUNTS.with_borrow_mut(|all| {
        if !all.contains_key(&key) {
            if is_capturing(device)? {
                return Ok(None);
            }
            all.insert(key, zeros(device, MAX_COUNTS, DType::U32)?);
        }
        all.get_mut(&key).map(launch).transpose()
    })
}
