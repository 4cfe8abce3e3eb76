use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::cuda_backend::DeviceId;
use candle_core::{bail, CudaDevice, CudaStorage, DType, Layout, Result, Tensor};

use super::fused::{self, Fused};
use super::{Sequences, OP};
use crate::cuda;

/// What the launches of a step leave to each other, for each stream: all layers of a model share it, which keeps it in the
/// second-level cache.
///
/// A stream's launches follow each other, and so do the steps of several caches. Most of Candle's devices have a stream a
/// thread: each thread that decodes has buffers of its own, which stay as long as the attention. They could be freed with
/// the thread only behind its last launch, and to wait for that would break what another thread captures.
#[derive(Clone, Default)]
pub(crate) struct Workspace(Arc<Mutex<HashMap<Stream, Buffers>>>);

/// A device, and a thread where that says which stream.
type Stream = (DeviceId, Option<ThreadId>);

fn stream_of(device: &CudaDevice) -> Stream {
    // CU_STREAM_PER_THREAD, a number in the place of a pointer.
    const PER_THREAD: usize = 2;
    let is_per_thread = device.cuda_stream().cu_stream().addr() == PER_THREAD;
    (device.id(), is_per_thread.then(|| thread::current().id()))
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Workspace(..)")
    }
}

impl Workspace {
    /// Calls `launch` with the buffers of this thread's stream on a device.
    pub(super) fn with<T>(&self, device: &CudaDevice, launch: impl FnOnce(&mut Buffers) -> Result<T>) -> Result<T> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let buffers = all.entry(stream_of(device)).or_default();
        if cuda::is_capturing(device)? {
            buffers.all().into_iter().for_each(|buffer| buffer.is_captured = buffer.storage.is_some());
        }
        launch(buffers)
    }

    /// The launches of the last step over one cache, if they are this step's as well.
    pub(super) fn last_launches(
        &self,
        device: &CudaDevice,
        query: &Tensor,
        caches: &[Sequences],
    ) -> Option<Arc<Fused>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (caches, all.get(&stream_of(device)).and_then(|buffers| buffers.last.as_ref())) {
            ([cache], Some(last)) if last.suits(query, cache) => Some(last.launches.clone()),
            _ => None,
        }
    }
}

macro_rules! buffers {
    ($($name:ident)*) => {
        #[derive(Default)]
        pub(super) struct Buffers {
            $(pub(super) $name: Buffer,)*
            last: Option<Last>,
        }

        impl Buffers {
            fn all(&mut self) -> impl IntoIterator<Item = &mut Buffer> {
                [$(&mut self.$name),*]
            }
        }
    };
}

buffers! {
    tables bounds scores mass_stats mass histograms heavy indices list_lens weights tail_masses tail_shifts tail_out tail_lse
    finalists partials attend_stats lse searches arrived
}

/// The fused launches of a step over one cache, and what they follow from: layers of a model, and a layer's steps one after the
/// other, mostly have the same. Where tensors are, and how long the sequences, each step finds out anew.
struct Last {
    launches: Arc<Fused>,
    forms: Vec<Option<(Layout, DType)>>,
    sizes: [usize; 3],
}

impl Last {
    fn suits(&self, query: &Tensor, cache: &Sequences) -> bool {
        let forms = self.forms.iter().map(|form| form.as_ref().map(|(layout, dtype)| (layout, *dtype)));
        self.sizes == sizes(cache) && forms.eq(fused::forms(query, cache))
    }
}

fn sizes(cache: &Sequences) -> [usize; 3] {
    [cache.capacity, cache.shared, cache.ahead]
}

impl Buffers {
    /// Keeps those of a step over one cache; several share the device by their lengths.
    pub(super) fn keep_launches(&mut self, query: &Tensor, caches: &[Sequences], launches: Arc<Fused>) {
        let is_last = self.last.as_ref().is_some_and(|last| Arc::ptr_eq(&last.launches, &launches));
        if let ([cache], false) = (caches, is_last) {
            let owned = |form: Option<(&Layout, DType)>| form.map(|(layout, dtype)| (layout.clone(), dtype));
            let forms = fused::forms(query, cache).map(owned).collect();
            self.last = Some(Last { launches, forms, sizes: sizes(cache) });
        }
    }

    /// After a step that failed on its way: what counts in `searches` and `arrived` is to be zero between steps.
    pub(super) fn forget_counts(&mut self) {
        for buffer in [&mut self.searches, &mut self.arrived] {
            buffer.replace(None);
        }
    }
}

/// Memory that grows to the most that was ever asked of it.
#[derive(Default)]
pub(super) struct Buffer {
    storage: Option<(CudaStorage, usize)>,
    /// Whether captured graphs may use the storage.
    is_captured: bool,
    /// Storages that grew too small, but that captured graphs still use.
    retired: Vec<CudaStorage>,
}

impl Buffer {
    /// At least `count` elements.
    pub(super) fn of(&mut self, device: &CudaDevice, count: usize, dtype: DType) -> Result<&mut CudaStorage> {
        self.of_new(device, count, || cuda::output(device, count, dtype))
    }

    /// As [`of`](Self::of), zeroed when they are allocated.
    pub(super) fn zeroed(&mut self, device: &CudaDevice, count: usize, dtype: DType) -> Result<&mut CudaStorage> {
        self.of_new(device, count, || cuda::zeros(device, count, dtype))
    }

    fn of_new(
        &mut self,
        device: &CudaDevice,
        count: usize,
        allocate: impl FnOnce() -> Result<CudaStorage>,
    ) -> Result<&mut CudaStorage> {
        if self.storage.as_ref().is_none_or(|(_, len)| *len < count) {
            if cuda::is_capturing(device)? {
                bail!("{OP}: expected a step of these sizes before the one that is captured, which cannot allocate");
            }
            self.replace(Some((allocate()?, count)));
        }
        match &mut self.storage {
            Some((storage, _)) => Ok(storage),
            None => bail!("{OP}: a buffer was not allocated"),
        }
    }

    fn replace(&mut self, storage: Option<(CudaStorage, usize)>) {
        if let (Some((old, _)), true) = (std::mem::replace(&mut self.storage, storage), self.is_captured) {
            self.retired.push(old);
        }
        self.is_captured = false;
    }

    /// What was last asked for.
    pub(super) fn get(&self, op: &str) -> Result<&CudaStorage> {
        match &self.storage {
            Some((storage, _)) => Ok(storage),
            None => bail!("{op}: a buffer was read before it was written"),
        }
    }
}
