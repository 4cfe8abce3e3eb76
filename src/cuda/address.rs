//! Memory that a kernel finds by what its parameters say, where its arguments would be too many.

use std::ops::Deref;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, SyncOnDrop};
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{bail, CudaStorage, Result, Storage, Tensor};

/// The addresses of storages, which stay borrowed until this is dropped: behind the launches that are given them.
pub(crate) struct Addresses<'a> {
    stream: &'a CudaStream,
    borrowed: Vec<SyncOnDrop<'a>>,
}

impl<'a> Addresses<'a> {
    /// For launches in `stream`.
    pub(crate) fn new(stream: &'a CudaStream) -> Self {
        Self { stream, borrowed: Vec::new() }
    }

    /// Where `storage` begins.
    pub(crate) fn of(&mut self, storage: &'a CudaStorage) -> Result<u64> {
        match &storage.slice {
            CudaStorageSlice::U8(slice) => Ok(self.of_slice(slice)),
            CudaStorageSlice::U32(slice) => Ok(self.of_slice(slice)),
            CudaStorageSlice::BF16(slice) => Ok(self.of_slice(slice)),
            CudaStorageSlice::F16(slice) => Ok(self.of_slice(slice)),
            CudaStorageSlice::F32(slice) => Ok(self.of_slice(slice)),
            _ => bail!("cuda: expected a storage of u8, u32, bf16, f16 or f32, got {}", storage.dtype().as_str()),
        }
    }

    fn of_slice<T>(&mut self, slice: &'a CudaSlice<T>) -> u64 {
        let (address, borrowed) = slice.device_ptr(self.stream);
        self.borrowed.push(borrowed);
        address
    }
}

/// The storages of tensors, each locked for reading once, however many of the tensors share it: a thread that locked one again
/// could wait for a writer who waits for the first lock. Returns also the place of each tensor's storage among them.
pub(crate) fn lock<'a>(
    tensors: &[Option<&'a Tensor>],
) -> (Vec<impl Deref<Target = Storage> + use<'a>>, Vec<Option<usize>>) {
    let mut first_of_each: Vec<(usize, &Tensor)> = Vec::new();
    // No lock is kept before all storages are known.
    let mut place = |tensor: &'a Tensor| {
        let own = std::ptr::from_ref(&*tensor.storage_and_layout().0).addr();
        first_of_each.iter().position(|(address, _)| *address == own).unwrap_or_else(|| {
            first_of_each.push((own, tensor));
            first_of_each.len() - 1
        })
    };
    let places = tensors.iter().map(|tensor| tensor.map(&mut place)).collect();
    (first_of_each.into_iter().map(|(_, tensor)| tensor.storage_and_layout().0).collect(), places)
}
