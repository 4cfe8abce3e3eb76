use candle_core::{bail, CudaStorage, DType, Result, Storage};

use super::{Plan, Selected};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Params};
use crate::ops::arg::View;

/// `kernels/sparse_attend.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Attend {
    query: DeviceView<4>,
    keys: DeviceView<4>,
    values: DeviceView<4>,
    indices: DeviceView<3>,
    lens: DeviceView<2>,
    weights: DeviceView<3>,
    n: u64,
    run: u64,
    h: u32,
    h_kv: u32,
    head_dim: u32,
    lists: u32,
    heads_per_list: u32,
    list_len: u32,
    runs: u32,
    scale: f32,
}

const THREADS: usize = 128;

/// Elements a thread takes at once.
const CHUNK: usize = 8;

/// Positions of a block, at least.
const MIN_RUN: usize = 64;

pub(super) fn run(
    plan: &Plan,
    selected: Option<&Selected>,
    query: &CudaStorage,
    keys: &CudaStorage,
    values: &CudaStorage,
) -> Result<(CudaStorage, CudaStorage)> {
    let op = plan.op;
    let (dtype, device) = cuda::kind(query);
    let gpu = cuda::prepare(device)?;
    let ([b, h, _, head_dim], [_, h_kv, n, _]) = (plan.query.dims, plan.keys.dims);
    let heads_per_list = plan.heads_per_list();
    let lists = h / heads_per_list;
    let (name, heads, blocks) = variant(plan, dtype);
    let bundles = heads_per_list.div_ceil(heads);
    // As many blocks as run at once, so that all end together.
    let list_len = plan.lists.map_or(n, |lists| lists.indices.dims[2]);
    let wanted = (blocks * gpu.multiprocessors / (b * lists * bundles).max(1)).max(1);
    let run = list_len.div_ceil(wanted).next_multiple_of(MIN_RUN).max(MIN_RUN);
    let runs = list_len.div_ceil(run).max(1);
    let params = Params(Attend {
        query: plan.query.device(),
        keys: plan.keys.device(),
        values: plan.values.device(),
        indices: plan.lists.map_or(DeviceView { offset: 0, strides: [0; 3] }, |lists| lists.indices.device()),
        lens: plan.lists.map_or(DeviceView { offset: 0, strides: [0; 2] }, |lists| lists.lens.device()),
        weights: plan.lists.map_or(DeviceView { offset: 0, strides: [0; 3] }, |lists| lists.weights.device()),
        n: n as u64,
        run: run as u64,
        h: u32_of(op, "h", h)?,
        h_kv: u32_of(op, "h_kv", h_kv)?,
        head_dim: u32_of(op, "head_dim", head_dim)?,
        lists: u32_of(op, "lists", lists)?,
        heads_per_list: u32_of(op, "group", heads_per_list)?,
        list_len: u32_of(op, "list", plan.lists.map_or(0, |lists| lists.indices.dims[2]))?,
        runs: u32_of(op, "runs", runs)?,
        scale: plan.scale,
    });
    let mut partials = cuda::output(device, (b, h, runs, head_dim), DType::F32)?;
    let mut stats = cuda::output(device, (b, h, runs, 2), DType::F32)?;
    let attend = Kernel::new(device, &cuda::SPARSE_ATTEND, name)?;
    let grid = [runs, lists * bundles, b];
    let launch = attend.launch().input(query)?.input(keys)?.input(values)?;
    match selected {
        None => {
            let launch = launch.null().null().null().output(&mut partials)?.output(&mut stats)?;
            launch.value(&params).run(grid, THREADS as u32, 0)?;
        }
        Some(selected) => {
            let (indices, lens, weights) = (
                selected.indices.storage_and_layout(),
                selected.lens.storage_and_layout(),
                selected.weights.storage_and_layout(),
            );
            let launch = launch.input(gpu_storage(op, &indices.0)?)?.input(gpu_storage(op, &lens.0)?)?;
            let launch = launch.input(gpu_storage(op, &weights.0)?)?.output(&mut partials)?.output(&mut stats)?;
            launch.value(&params).run(grid, THREADS as u32, 0)?;
        }
    }

    let mut out = cuda::output(device, (b, h, 1, head_dim), dtype)?;
    let mut lse = cuda::output(device, (b, h), DType::F32)?;
    let merge = Kernel::new(device, &cuda::SPARSE_ATTEND, format!("attend_merge_{}", cuda::suffix(dtype)))?;
    let (runs, head_dim) = (u32_of(op, "runs", runs)?, u32_of(op, "head_dim", head_dim)?);
    let launch = merge.launch().input(&partials)?.input(&stats)?.output(&mut out)?.output(&mut lse)?;
    launch.value(&runs).value(&head_dim).run([b * h, 1, 1], THREADS as u32, 0)?;
    Ok((out, lse))
}

/// Which kernel to take, the heads it serves at once, and the blocks of it that a multiprocessor has registers for.
fn variant(plan: &Plan, dtype: DType) -> (String, usize, usize) {
    const MMA_HEADS: usize = 8;
    let (suffix, head_dim) = (cuda::suffix(dtype), plan.query.dims[3]);
    let aligned = [&plan.query, &plan.keys, &plan.values].into_iter().all(aligned_rows);
    if !aligned {
        let heads = if plan.heads_per_list() == 1 { 1 } else { 4 };
        return (format!("attend_{suffix}_any_h{heads}"), heads, 3);
    }
    if dtype == DType::F32 {
        let heads = plan.heads_per_list().next_power_of_two().min(8);
        let lanes = (head_dim / CHUNK).next_power_of_two().max(8);
        let blocks = [4, 4, 3, 2][heads.trailing_zeros() as usize];
        return (format!("attend_f32_d{}_h{heads}", lanes * CHUNK), heads, blocks);
    }
    let (shape, blocks) = match head_dim {
        0..=64 => (64, 4),
        65..=96 => (96, 3),
        97..=128 => (128, 3),
        _ => (256, 2),
    };
    (format!("attend_{suffix}_mma_d{shape}"), MMA_HEADS, blocks)
}

/// Whether every row starts at a multiple of a chunk, and ends at one.
fn aligned_rows(view: &View<4>) -> bool {
    let DeviceView { offset, strides: [b, h, row, _] } = view.device();
    let [.., head_dim] = view.dims;
    (offset | b | h | row | head_dim as u64).is_multiple_of(CHUNK as u64)
}

/// The GPU storage of a tensor that the op holds beside its three inputs.
fn gpu_storage<'a>(op: &str, storage: &'a Storage) -> Result<&'a CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("{op}: selected: expected tensors on the device of the query"),
    }
}
