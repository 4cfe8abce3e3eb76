use candle_core::{CudaStorage, Result};

use super::Plan;
use crate::cuda::{self, Kernel, Module};

const THREADS: u32 = 256;

pub(super) fn run(plan: &Plan, scores: &mut CudaStorage) -> Result<()> {
    let device = cuda::kind(scores).1.clone();
    cuda::prepare(&device)?;
    let [b, h_kv, rows, n] = plan.scores.dims;
    let offset = plan.scores.at(&[]) as u64;
    let (row_len, rows_per_head) = (n as u64, rows as u64);
    let (first, queries) = (plan.first as u64, plan.queries as u64);
    let kernel = Kernel::new(&device, Module::CausalSoftmax, "causal_softmax")?;
    kernel
        .launch()
        .output(scores)?
        .value(&offset)
        .value(&row_len)
        .value(&rows_per_head)
        .value(&first)
        .value(&queries)
        .value(&plan.scale)
        .run([b * h_kv * rows, 1, 1], THREADS, 0)
}
