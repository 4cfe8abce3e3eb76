//! Numbers in which the blocks of a launch count themselves.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{CudaDevice, CudaStorage, Result};

use super::is_capturing;

/// As many as a grid may have rows. They never become more, and so stay where they are: graphs that were captured, which the thread
/// replays that captured them, go on using them.
pub(crate) const MAX_COUNTS: usize = 65_535;

thread_local! {
    /// By the numbers of the device and of the stream: memory alone, which keeps the stream but nothing else of a device.
    static COUNTS: RefCell<HashMap<[usize; 2], CudaSlice<u32>>> = RefCell::default();
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
    let kept = COUNTS.with_borrow_mut(|all| all.remove(&key));
    let counts = match kept {
        Some(counts) => counts,
        None if is_capturing(device)? => return Ok(None),
        None => device.alloc_zeros(MAX_COUNTS)?,
    };
    let mut storage = CudaStorage { slice: CudaStorageSlice::U32(counts), device: device.clone() };
    let done = launch(&mut storage);
    if let CudaStorageSlice::U32(counts) = storage.slice {
        COUNTS.with_borrow_mut(|all| all.insert(key, counts));
    }
    done.map(Some)
}
