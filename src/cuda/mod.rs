//! The GPU: kernels loaded once a device, checked launches, memory for outputs. The crate's unsafe code is all here.
//!
//! What a launch relies on, and who sees to it:
//! 1. Arguments are those of the kernel, in order: each op pushes them in one place, next to the kernel of its name in
//!    `kernels/`, and every kernel runs under compute-sanitizer in `just sanitize`.
//! 2. Shapes and strides stay inside the tensors: the op's `Plan` was made from their layouts, or from equal ones. So do
//!    places in pages, whose tables have numbers of the pool's pages for as many positions as the cache has room.
//! 3. Memory outlives the launch: storages are borrowed until it is in the stream, by its arguments or by [`Addresses`], and
//!    freed in stream order. Those of a cache are borrowed for reading even where a kernel writes to them: nothing of the host
//!    looks into them, and the stream orders launches by itself.
//!
//! Kernels are asynchronous; only a capture's beginning waits for the device, and nothing copies from it.
#![allow(unsafe_code)]

mod address;
mod counts;
mod graph;
mod matmul;
pub(crate) use address::{lock, Addresses};
pub(crate) use counts::{with_counts, MAX_COUNTS};
pub(crate) use graph::{check_capturable, Graph};
pub(crate) use matmul::matmul_to_f32;

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{
    sys::{
        CUdevice_attribute as DeviceAttribute, CUfunction_attribute as FunctionAttribute,
        CUstreamCaptureStatus as CaptureStatus,
    },
    CudaFunction, CudaModule, CudaStream, DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, WrapErr};
use candle_core::{bail, CudaDevice, CudaStorage, DType, Error, Result, Shape, Storage};

use crate::config::{Heavy, PqConfig};
use crate::ops::Geometry;

mod ptx {
    include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
}

/// The same, assembled for the devices of one compute capability.
mod cubin {
    include!(concat!(env!("OUT_DIR"), "/cubin.rs"));
}

/// The kernels of one source file: what a driver compiles, and what it need not.
struct Source {
    ptx: &'static str,
    cubin: &'static [u8],
}

macro_rules! modules {
    ($($name:ident = $file:ident,)*) => {
        /// A source file in `kernels/`.
        #[derive(Debug, Clone, Copy)]
        pub(crate) enum Module { $($name),* }

        const SOURCES: &[Source] = &[$(Source { ptx: ptx::$file, cubin: cubin::$file }),*];
    };
}

modules! {
    Append = APPEND,
    BeginStep = BEGIN_STEP,
    CausalSoftmax = CAUSAL_SOFTMAX,
    ClusterSums = CLUSTER_SUMS,
    Decode = DECODE,
    Encode = ENCODE,
    GroupMass = GROUP_MASS,
    IndicesAndWeights = INDICES_AND_WEIGHTS,
    Kmeans = KMEANS,
    Score = SCORE,
    Select = SELECT,
    SparseAttend = SPARSE_ATTEND,
    TailAttend = TAIL_ATTEND,
    TopK = TOPK,
}

/// What the ops ask of a device.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) multiprocessors: usize,
    /// Bytes of shared memory that a block may have.
    pub(crate) shared_bytes: usize,
    /// In the order of [`Module`].
    modules: Vec<Arc<CudaModule>>,
    functions: RwLock<HashMap<String, CudaFunction>>,
}

/// By the number of the device: all of Candle's devices for one GPU share its context, and so its modules.
static GPUS: RwLock<Vec<(usize, Arc<Gpu>)>> = RwLock::new(Vec::new());

/// Loads all kernels when a device is met for the first time: with its first cache, or else its first op, so never within
/// a later token. On devices other than those the crate was built for, the driver compiles them then, which takes seconds
/// once: it keeps the result.
///
/// Fails on a device below compute capability 8.0, or on a driver older than the toolkit that made the PTX.
pub(crate) fn prepare(device: &CudaDevice) -> Result<Arc<Gpu>> {
    let ordinal = device.cuda_stream().context().ordinal();
    let known = |gpus: &[(usize, Arc<Gpu>)]| gpus.iter().find(|(id, _)| *id == ordinal).map(|(_, gpu)| gpu.clone());
    if let Some(gpu) = known(&GPUS.read().unwrap_or_else(PoisonError::into_inner)) {
        return Ok(gpu);
    }
    let mut gpus = GPUS.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(gpu) = known(&gpus) {
        return Ok(gpu);
    }
    let gpu = Arc::new(Gpu::new(device)?);
    gpus.push((ordinal, gpu.clone()));
    Ok(gpu)
}

impl Gpu {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let (major, minor) = context.compute_capability().w()?;
        if major < 8 {
            bail!("cuda: expected a device of compute capability 8.0 (Ampere) or later, got {major}.{minor}");
        }
        // Machine code runs on devices of its major capability from its own on.
        let capability = usize::try_from(10 * major + minor).unwrap_or(0);
        let is_assembled = cubin::CAPABILITY / 10 == capability / 10 && cubin::CAPABILITY <= capability;
        let load = |source: &Source| {
            let image = if is_assembled { Ptx::from_binary(source.cubin.to_vec()) } else { source.ptx.into() };
            context.load_module(image).w().map_err(|error| {
                error.context(
                    "cuda: the driver does not take the embedded kernels: install a driver as new as the CUDA toolkit \
                     that built this crate, or build it with an older toolkit",
                )
            })
        };
        let attribute = |attribute| Ok::<_, Error>(usize::try_from(context.attribute(attribute).w()?).unwrap_or(0));
        Ok(Self {
            multiprocessors: attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            modules: SOURCES.iter().map(load).collect::<Result<_>>()?,
            functions: RwLock::default(),
        })
    }

    /// The kernel of this name.
    fn function(&self, module: Module, name: &str) -> Result<CudaFunction> {
        if let Some(function) = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(name) {
            return Ok(function.clone());
        }
        let function = self.modules[module as usize].load_function(name).w()?;
        // Once, and to the most: threads share the function, and a launch of one relies on what another would lower.
        let fixed = usize::try_from(function.shared_size_bytes().w()?).unwrap_or(0);
        let dynamic = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(dynamic, self.shared_bytes.saturating_sub(fixed) as i32).w()?;
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        Ok(functions.entry(name.to_string()).or_insert(function).clone())
    }
}

/// Offset and strides of a tensor, in elements: `View` in `kernels/common.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceView<const N: usize> {
    pub(crate) offset: u64,
    pub(crate) strides: [u64; N],
}

/// Which keys of a sequence a decode step is about: `Step` in `kernels/common.cuh`, which derives all counts from it and
/// the length of the sequence.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    /// Keys of every sequence; where their lengths are in device memory, the most there may be.
    pub(crate) n: u64,
    pub(crate) sink: u64,
    pub(crate) window: u64,
    pub(crate) init_offset: u64,
    /// So many keys to select,
    pub(crate) heavy: u64,
    /// or this share of all.
    pub(crate) share: f64,
}

impl Step {
    /// A decode step over sequences of at most `capacity` keys.
    pub(crate) fn of_config(config: &PqConfig, capacity: usize) -> Self {
        let (heavy, share) = match config.heavy {
            Heavy::Keys(keys) => (keys, 0.0),
            Heavy::Fraction(share) => (0, share),
        };
        Self {
            n: capacity as u64,
            sink: config.sink as u64,
            window: config.window as u64,
            init_offset: config.init_offset() as u64,
            heavy: heavy as u64,
            share,
        }
    }

    /// `heavy` keys of a sequence of as many as its geometry says.
    pub(crate) fn of_geometry(geometry: Geometry, heavy: usize) -> Self {
        let Geometry { n, sink, window, init_offset } = geometry;
        let [n, sink, window, init_offset, heavy] = [n, sink, window, init_offset, heavy].map(|x| x as u64);
        Self { n, sink, window, init_offset, heavy, share: 0.0 }
    }

    /// `n` candidates, of which `heavy` are selected.
    pub(crate) fn of_candidates(n: usize, heavy: usize) -> Self {
        Self::of_geometry(Geometry { n, sink: 0, window: 0, init_offset: 0 }, heavy)
    }
}

/// The lengths of a cache's sequences in device memory, which kernels read and `append` moves on, so that a captured
/// graph serves a sequence that grows.
#[derive(Debug)]
pub(crate) struct Lens {
    /// A length each; then, which are 0 between launches, a count each of blocks that know it and of those that met; then what
    /// is left for these.
    storage: CudaStorage,
    sequences: usize,
}

/// Words that the blocks of `begin_step` leave each other for each (batch, KV head) pair: `Sequence::nearest` in its
/// kernel.
const NEAREST_WORDS: usize = 8 * 64 * 2;

impl Lens {
    pub(crate) fn new(device: &CudaDevice, [sequences, kv_heads]: [usize; 2]) -> Result<Self> {
        let words = (3 * sequences).next_multiple_of(2) + sequences * kv_heads * NEAREST_WORDS;
        Ok(Self { storage: zeros(device, words, DType::U32)?, sequences })
    }

    /// Sets all of them.
    pub(crate) fn set(&mut self, len: usize) -> Result<()> {
        let mut lens = vec![u32_of("PqKvCache", "len", len)?; self.sequences];
        lens.resize(3 * self.sequences, 0);
        let device = self.storage.device().clone();
        device.memcpy_htod(&lens, &mut u32::as_cuda_slice_mut(&mut self.storage)?.slice_mut(..lens.len()))
    }

    pub(crate) fn storage(&self) -> &CudaStorage {
        &self.storage
    }

    /// Where `append` counts blocks of the `b`-th sequence.
    pub(crate) fn appended_at(&self, b: usize) -> usize {
        self.sequences + b
    }

    /// Where `begin_step` counts blocks that met.
    pub(crate) fn met_at(&self, b: usize) -> usize {
        2 * self.sequences + b
    }

    /// Where they leave what they found for the first KV head.
    pub(crate) fn nearest_at(&self, b: usize, kv_heads: usize) -> usize {
        (3 * self.sequences).next_multiple_of(2) + b * kv_heads * NEAREST_WORDS
    }
}

/// Whether what is launched on a device now is recorded for a CUDA graph rather than run.
pub(crate) fn is_capturing(device: &CudaDevice) -> Result<bool> {
    Ok(device.cuda_stream().capture_status().w()? != CaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

impl<const N: usize> DeviceView<N> {
    /// Of a tensor of which the first element along dimension `dim` is the `first`: as if it were element 0.
    pub(crate) fn starting_at(mut self, dim: usize, first: usize) -> Self {
        self.offset = self.offset.wrapping_sub(first as u64 * self.strides[dim]);
        self
    }

    /// Of a tensor that there is not.
    pub(crate) const NONE: Self = Self { offset: 0, strides: [0; N] };
}

/// A kernel's parameter struct, passed by value: `repr(C)`, of the fields of its namesake in the kernel's source.
#[repr(transparent)]
pub(crate) struct Params<P>(pub(crate) P);

// SAFETY: the bytes are copied to the kernel, which reads them as the struct of the same fields; parameters are integers,
// floats, DeviceViews and Steps, for which any bits are valid. Addresses among them are the module's documentation, 3.
unsafe impl<P: Copy> DeviceRepr for Params<P> {}

/// A number of a device's memory as a kernel's size; an error where it does not fit.
pub(crate) fn u32_of(op: &str, name: &str, x: usize) -> Result<u32> {
    match u32::try_from(x) {
        Ok(x) => Ok(x),
        Err(_) => bail!("{op}: {name}: expected at most {} on a GPU, got {x}", u32::MAX),
    }
}

/// Memory for an output that the next launch writes in full.
pub(crate) fn output(device: &CudaDevice, shape: impl Into<Shape>, dtype: DType) -> Result<CudaStorage> {
    let shape = shape.into();
    if shape.elem_count() == 0 {
        // Candle copies storages whole: one that is empty would be an error, and this element must hold something.
        return zeros(device, 1, dtype);
    }
    // SAFETY: every kernel writes each element of its outputs before anything reads it (initcheck of `just sanitize`).
    unsafe { device.alloc_uninit(&shape, dtype) }
}

/// Zeroed memory, for a kernel to count in.
pub(crate) fn zeros(device: &CudaDevice, count: usize, dtype: DType) -> Result<CudaStorage> {
    device.zeros_impl(&count.into(), dtype)
}

/// Zeroes the first `count` words of `storage`.
pub(crate) fn clear(storage: &mut CudaStorage, count: usize) -> Result<()> {
    let stream = storage.device().cuda_stream();
    stream.memset_zeros(&mut u32::as_cuda_slice_mut(storage)?.slice_mut(..count)).w()
}

/// The suffix of the kernels for an element type.
pub(crate) fn suffix(dtype: DType) -> &'static str {
    dtype.as_str()
}

/// A loaded kernel.
pub(crate) struct Kernel {
    name: String,
    func: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    pub(crate) fn new(device: &CudaDevice, module: Module, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let func = prepare(device)?.function(module, &name)?;
        Ok(Self { name, func, stream: device.cuda_stream() })
    }

    /// A launch to push arguments to, in the order of the kernel's parameters.
    pub(crate) fn launch(&self) -> Launch<'_> {
        Launch { kernel: self, args: self.stream.launch_builder(&self.func) }
    }
}

/// A null pointer, for a tensor that a kernel is not given.
static NULL: u64 = 0;

/// Arguments on their way to a kernel.
pub(crate) struct Launch<'a> {
    kernel: &'a Kernel,
    args: LaunchArgs<'a>,
}

macro_rules! push_slice {
    ($args:expr, $slice:expr) => {
        match $slice {
            CudaStorageSlice::U8(slice) => $args.arg(slice),
            CudaStorageSlice::U32(slice) => $args.arg(slice),
            CudaStorageSlice::I64(slice) => $args.arg(slice),
            CudaStorageSlice::BF16(slice) => $args.arg(slice),
            CudaStorageSlice::F16(slice) => $args.arg(slice),
            CudaStorageSlice::F32(slice) => $args.arg(slice),
            other => bail!("cuda: expected a storage of u8, u32, i64, bf16, f16 or f32, got {other:?}"),
        }
    };
}

impl<'a> Launch<'a> {
    /// The start of a storage that the kernel reads.
    pub(crate) fn input(mut self, storage: &'a CudaStorage) -> Result<Self> {
        push_slice!(self.args, &storage.slice);
        Ok(self)
    }

    /// The start of a storage that the kernel writes.
    pub(crate) fn output(mut self, storage: &'a mut CudaStorage) -> Result<Self> {
        push_slice!(self.args, &mut storage.slice);
        Ok(self)
    }

    /// As [`input`](Self::input), or a null pointer.
    pub(crate) fn input_or_null(mut self, storage: Option<&'a CudaStorage>) -> Result<Self> {
        match storage {
            Some(storage) => self.input(storage),
            None => {
                self.args.arg(&NULL);
                Ok(self)
            }
        }
    }

    /// As [`output`](Self::output), or a null pointer.
    pub(crate) fn output_or_null(mut self, storage: Option<&'a mut CudaStorage>) -> Result<Self> {
        match storage {
            Some(storage) => self.output(storage),
            None => {
                self.args.arg(&NULL);
                Ok(self)
            }
        }
    }

    /// A parameter that is passed by value.
    pub(crate) fn value<P: DeviceRepr>(mut self, value: &'a P) -> Self {
        self.args.arg(value);
        self
    }

    /// Starts the kernel on `grid` blocks of `threads` threads with `shared` bytes of dynamic shared memory; does
    /// nothing for an empty grid.
    pub(crate) fn run(self, grid: [usize; 3], threads: u32, shared: usize) -> Result<()> {
        let Some(config) = self.config(grid, threads, shared)? else { return Ok(()) };
        let mut args = self.args;
        // SAFETY: the module's documentation, 1 to 3.
        unsafe { args.launch(config) }.w()?;
        Ok(())
    }

    /// As [`run`](Self::run), with all blocks running at once: they may wait for each other.
    pub(crate) fn run_cooperatively(self, grid: [usize; 3], threads: u32, shared: usize) -> Result<()> {
        let Some(config) = self.config(grid, threads, shared)? else { return Ok(()) };
        let mut args = self.args;
        // SAFETY: the module's documentation, 1 to 3; the driver refuses a grid that does not fit the device at once.
        unsafe { args.launch_cooperative(config) }.w()?;
        Ok(())
    }

    fn config(&self, grid: [usize; 3], threads: u32, shared: usize) -> Result<Option<LaunchConfig>> {
        const LIMITS: [usize; 3] = [i32::MAX as usize, 65_535, 65_535];
        if grid.contains(&0) {
            return Ok(None);
        }
        if grid.iter().zip(LIMITS).any(|(blocks, limit)| *blocks > limit) {
            bail!("{}: expected a grid of at most {LIMITS:?} blocks, got {grid:?}", self.kernel.name);
        }
        Ok(Some(LaunchConfig {
            grid_dim: (grid[0] as u32, grid[1] as u32, grid[2] as u32),
            block_dim: (threads, 1, 1),
            shared_mem_bytes: shared as u32,
        }))
    }
}

/// The GPU's side of a tensor that an op holds beside those that Candle gives it.
pub(crate) fn storage_of<'a>(op: &str, storage: &'a Storage) -> Result<&'a CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("{op}: expected all tensors on one GPU, got one that is not"),
    }
}

/// The dtype of a storage and the device it lives on.
pub(crate) fn kind(storage: &CudaStorage) -> (DType, &CudaDevice) {
    (storage.dtype(), storage.device())
}
