//! An op with small tensors, or a sequence of calls of a cache and its forks: an error, or a result of the right shape.
#![no_main]

mod args;
mod sequence;
mod worker;

use arbitrary::Arbitrary;
use args::{number, Args, Form};
use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{self, Attended, ClusterSums, Geometry, KmeansOptions, Selected};
use candle_pq_attn::{Codebook, Metric, PqConfig, Tail};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
enum Input {
    Op(Call),
    Sequence(sequence::Sequence),
}

#[derive(Debug, Arbitrary)]
struct Call {
    op: Op,
    b: u8,
    h_kv: u8,
    group: u8,
    n: u8,
    pq_dim: u8,
    pq_len: u8,
    bits: u8,
    k: u8,
    sizes: [u8; 3],
    huge: Option<u64>,
    scale: i8,
    dtype: u8,
    flags: [bool; 3],
    forms: Vec<Form>,
}

#[derive(Debug, Arbitrary)]
enum Op {
    Encode,
    Kmeans,
    Score,
    ResidualScore,
    FastScan,
    FastScanOfAny,
    Topk,
    GroupMass,
    CausalSoftmax,
    IndicesAndWeights,
    DenseWeights,
    Select,
    DenseAttend,
    SparseAttend,
    SparseAttendWithTail,
    Merge,
    EmptyClusterSums,
    ClusterSums,
    TailAttend,
    Train,
    Codebook,
}

fuzz_target!(init: worker::this_thread(), |input: Input| {
    let _ = match &input {
        Input::Op(call) => call.run(),
        Input::Sequence(sequence) => sequence.run(),
    };
});

impl Call {
    fn run(&self) -> Result<()> {
        let mut args = Args(self.forms.iter());
        let [b, h_kv, group] = [self.b % 3, self.h_kv % 4, self.group % 4].map(usize::from);
        let bits = usize::from(self.bits % 10);
        let (centroids, clusters) = (1 << bits, 1 << (bits / 2));
        // Large codebooks of few subspaces, and keys beyond the blocks of any kernel with small ones: each takes its time.
        let (most_dims, times) = if bits > 5 { (4, 1) } else { (20, 3) };
        let n = usize::from(self.n) * if self.flags[0] { times } else { 1 };
        let (pq_dim, pq_len) = (usize::from(self.pq_dim % most_dims), usize::from(self.pq_len % 12));
        // Training takes longer than all else.
        let (few, few_dims) = (usize::from(self.n), pq_dim % 6);
        let (h, d, k) = (h_kv * group, pq_dim * pq_len, usize::from(self.k));
        let sizes = self.sizes.map(usize::from);
        let huge = |small: usize| self.huge.map_or(small, |huge| huge as usize);
        let (scale, dtype) = (number(self.scale), args::dtype(self.dtype % 3));
        let [_, inner_product, weighted] = self.flags;
        let metric = if inner_product { Metric::InnerProduct } else { Metric::Euclidean };
        let augmented = usize::from(inner_product);
        let (f32, u8) = (DType::F32, DType::U8);

        match self.op {
            Op::Encode => {
                let keys = args.floats(&[b, h_kv, n, d], dtype)?;
                let table = args.floats(&[b, h_kv, pq_dim, centroids, pq_len + augmented], f32)?;
                let phi = args.floats(&[b, h_kv, pq_dim], f32)?;
                let codes = ops::encode(&keys, &table, inner_product.then_some(&phi))?;
                assert_eq!(codes.dims(), [&keys.dims()[..3], &table.dims()[2..3]].concat());
            }
            Op::Kmeans => {
                let keys = args.floats(&[b, h_kv, few, few_dims * pq_len], dtype)?;
                let (iters, max_keys, seed) = (sizes[0] % 3, huge(sizes[1] + centroids), self.sizes[2].into());
                let options = KmeansOptions { pq_dim: few_dims, pq_bits: bits, iters, metric, max_keys, seed };
                let (table, phi) = ops::kmeans(&keys, &options)?;
                assert_eq!(table.dims()[2..4], [few_dims, centroids]);
                assert_eq!(phi.is_some(), inner_product);
            }
            Op::Score => {
                let query = args.floats(&[b, h, 1, d], dtype)?;
                let codes = args.below(centroids, &[b, h_kv, n, pq_dim], u8)?;
                let table = args.floats(&[b, h_kv, pq_dim, centroids, pq_len], f32)?;
                let scores = ops::score(&query, &codes, &table)?;
                assert_eq!(scores.dims(), [query.dim(0)?, query.dim(1)?, codes.dim(2)?]);
            }
            Op::ResidualScore => {
                let query = args.floats(&[b, h, 1, d], dtype)?;
                let codes = args.below(centroids, &[b, h_kv, n, pq_dim], u8)?;
                let table = args.floats(&[b, h_kv, pq_dim, centroids, pq_len], f32)?;
                let of = args.below(clusters, &[b, h_kv, n], u8)?;
                let coarse = args.floats(&[b, h_kv, clusters, d], f32)?;
                let scores = ops::residual_score(&query, &codes, &table, &of, &coarse)?;
                assert_eq!(scores.dims(), [query.dim(0)?, query.dim(1)?, codes.dim(2)?]);
            }
            Op::FastScan => {
                let centroids = 1 << (bits % 5);
                let query = args.floats(&[b, h, 1, d], dtype)?;
                let codes = args.below(centroids, &[b, h_kv, n, pq_dim], u8)?;
                let table = args.floats(&[b, h_kv, pq_dim, centroids, pq_len], f32)?;
                let packed = ops::pack_codes(&codes)?;
                let best = ops::fast_scan(&query, &packed, codes.dim(2)?, &table, huge(k))?;
                // What it is documented to be.
                let slowly = ops::topk(&ops::score(&query, &codes, &table)?, huge(k))?;
                assert_eq!(best.to_vec3::<u32>()?, slowly.to_vec3::<u32>()?);
            }
            Op::FastScanOfAny => {
                let query = args.floats(&[b, h, 1, d], dtype)?;
                let packed = args.below(256, &[b, h_kv, n.div_ceil(32), pq_dim.div_ceil(2), 32], u8)?;
                let table = args.floats(&[b, h_kv, pq_dim, 1 << (bits % 5), pq_len], f32)?;
                let best = ops::fast_scan(&query, &packed, huge(n), &table, k)?;
                assert_eq!(best.dims(), [query.dim(0)?, query.dim(1)?, k.min(huge(n))]);
            }
            Op::Topk => {
                let scores = args.floats(&[b, h, n], f32)?;
                let best = ops::topk(&scores, huge(k))?;
                assert_eq!(best.dims().last().copied(), scores.dims().last().map(|n| huge(k).min(*n)));
            }
            Op::GroupMass => {
                let scores = args.floats(&[b, h, n], f32)?;
                let mass = ops::group_mass(&scores, huge(h_kv), scale)?;
                assert_eq!(mass.dims(), [scores.dim(0)?, huge(h_kv), scores.dim(2)?]);
            }
            Op::CausalSoftmax => {
                let queries = 1 + sizes[0] % 8;
                let scores = args.floats(&[b, h_kv, group * queries, n], f32)?.copy()?;
                ops::causal_softmax(&scores, huge(sizes[1]), queries, scale)?;
                ops::causal_softmax(&scores, sizes[1], huge(sizes[2]), scale)?;
            }
            Op::IndicesAndWeights => {
                let heavy = self.heavy(&mut args, [b, h, n], k)?;
                let (sink, window) = (sizes[0], sizes[1]);
                let geometry = Geometry { n, sink, window, init_offset: huge(sizes[2]) };
                let selected = ops::indices_and_weights(&heavy, geometry)?;
                let count = n.min(sink + window + heavy.dim(2)?);
                assert_eq!(selected.indices.dims(), [heavy.dim(0)?, heavy.dim(1)?, count]);
            }
            Op::DenseWeights => {
                let selected = self.selected(&mut args, [b, h_kv, n], k)?;
                let weights = ops::dense_weights(&selected, h, n)?;
                assert_eq!(weights.dims(), [selected.indices.dim(0)?, h, n]);
            }
            Op::Select => {
                let query = args.floats(&[b, h, 1, d], dtype)?;
                let codes = args.below(centroids, &[b, h_kv, n, pq_dim], u8)?;
                let table = args.floats(&[b, h_kv, pq_dim, centroids, pq_len], f32)?;
                let (sink, window, init_offset) = (sizes[0], sizes[1], sizes[2] % 16);
                let geometry = Geometry { n: n + sizes[0], sink, window: huge(window), init_offset };
                let (selected, dense) = ops::select_dense(&query, &codes, &table, huge(k), geometry)?;
                // What it is documented to be.
                let best = ops::topk(&ops::score(&query, &codes, &table)?, huge(k))?;
                let slowly = ops::indices_and_weights(&best, geometry)?;
                assert_eq!(selected.indices.to_vec3::<u32>()?, slowly.indices.to_vec3::<u32>()?);
                assert_eq!(dense.dims(), [query.dim(0)?, query.dim(1)?, geometry.n]);
            }
            Op::DenseAttend => {
                let [query, keys, values] = qkv(&mut args, [b, h, h_kv, n, d], dtype)?;
                let attended = ops::dense_attend(&query, &keys, &values, scale)?;
                assert_eq!((attended.out.dims(), attended.lse.dims()), (query.dims(), &query.dims()[..2]));
            }
            Op::SparseAttend => {
                let [query, keys, values] = qkv(&mut args, [b, h, h_kv, n, d], dtype)?;
                let selected = self.selected(&mut args, [b, if weighted { h } else { h_kv }, n], k)?;
                let attended = ops::sparse_attend(&query, &keys, &values, &selected, scale)?;
                assert_eq!((attended.out.dims(), attended.lse.dims()), (query.dims(), &query.dims()[..2]));
            }
            Op::SparseAttendWithTail => {
                let [query, keys, values] = qkv(&mut args, [b, h, h_kv, n, d], dtype)?;
                let selected = self.selected(&mut args, [b, if weighted { h } else { h_kv }, n], k)?;
                let tail = attended(&mut args, [b, h, d], f32)?;
                let attended = ops::sparse_attend_with_tail(&query, &keys, &values, &selected, &tail, scale)?;
                assert_eq!((attended.out.dims(), attended.lse.dims()), (query.dims(), &query.dims()[..2]));
            }
            Op::Merge => {
                let (one, other) = (attended(&mut args, [b, h, d], dtype)?, attended(&mut args, [b, h, d], dtype)?);
                let both = one.merge(&other)?;
                assert_eq!((both.out.dims(), both.lse.dims()), (one.out.dims(), one.lse.dims()));
            }
            Op::EmptyClusterSums => {
                let mut dims = [b, h_kv, clusters, d];
                if let Some(huge) = self.huge {
                    // What can be counted but not had ends the process, as any allocation does.
                    dims[sizes[0] % 4] = (huge | 1 << 63) as usize;
                }
                assert_eq!(ops::ClusterSums::empty(dims, &Device::Cpu)?.sums.dims(), dims);
            }
            Op::ClusterSums => {
                let values = args.floats(&[b, h_kv, n, d], dtype)?;
                let codes = args.below(clusters, &[b, h_kv, n], u8)?;
                let before = self.clusters(&mut args, [b, h_kv, clusters, d])?;
                let after = ops::cluster_sums(&values, &codes, &before)?;
                assert_eq!((after.sums.dims(), after.counts.dims()), (before.sums.dims(), before.counts.dims()));
            }
            Op::TailAttend => {
                let scores = args.floats(&[b, h, n], f32)?;
                let codes = args.below(clusters, &[b, h_kv, n], u8)?;
                let clusters = self.clusters(&mut args, [b, h_kv, clusters, d])?;
                let selected = self.selected(&mut args, [b, if weighted { h } else { h_kv }, n], k)?;
                let tail = ops::tail_attend(&scores, &codes, &clusters, &selected, huge(sizes[2]), scale)?;
                assert_eq!((&tail.out.dims()[..2], tail.lse.dims()), (&scores.dims()[..2], &scores.dims()[..2]));
            }
            Op::Train => {
                let coarse = if self.flags[0] { clusters } else { 0 };
                let config = PqConfig {
                    pq_dim: few_dims,
                    pq_bits: bits,
                    kmeans_iters: sizes[0] % 3,
                    max_train_keys: huge(sizes[1] + centroids),
                    coarse,
                    tail: Tail::None,
                    query_weights: weighted,
                    metric,
                    ..PqConfig::default()
                };
                let keys = args.floats(&[b, h_kv, few, few_dims * pq_len], dtype)?;
                let weights = args.floats(&[b, h_kv, few_dims * pq_len], f32)?;
                let codebook = Codebook::train_weighted(&keys, weighted.then_some(&weights), &config)?;
                encode(&codebook, &keys)?;
            }
            Op::Codebook => {
                let table = args.floats(&[b, h_kv, pq_dim, centroids, pq_len + augmented], f32)?;
                let keys = args.floats(&[b, h_kv, n, d], dtype)?;
                let phi = inner_product.then(|| args.floats(&[b, h_kv, pq_dim], f32)).transpose()?;
                let mut codebook = Codebook::new(table, phi)?;
                if self.flags[0] {
                    codebook = codebook.with_coarse(args.floats(&[b, h_kv, clusters, d], f32)?)?;
                }
                if weighted {
                    codebook = codebook.with_weights(args.floats(&[b, h_kv, d], f32)?)?;
                }
                encode(&codebook, &keys)?;
            }
        }
        Ok(())
    }

    /// Positions that ascend, or any.
    fn heavy(&self, args: &mut Args, dims: [usize; 3], k: usize) -> Result<Tensor> {
        match self.flags[1] {
            true => args.below(dims[2], &[dims[0], dims[1], k], DType::U32),
            false => ops::topk(&args.floats(&dims, DType::F32)?, k),
        }
    }

    /// Lists as they are made, or any.
    fn selected(&self, args: &mut Args, [b, lists, n]: [usize; 3], k: usize) -> Result<Selected> {
        if self.flags[1] {
            let indices = args.below(n, &[b, lists, k], DType::U32)?;
            let lens = args.below(k + 1, &[b, lists], DType::U32)?;
            return Ok(Selected { indices, lens, weights: args.floats(&[b, lists, k], DType::F32)? });
        }
        let [sink, window, init_offset] = self.sizes.map(|size| usize::from(size % 16));
        let heavy = ops::topk(&args.floats(&[b, lists, n.saturating_sub(init_offset)], DType::F32)?, k)?;
        ops::indices_and_weights(&heavy, Geometry { n, sink, window, init_offset })
    }

    fn clusters(&self, args: &mut Args, dims: [usize; 4]) -> Result<ClusterSums> {
        let sums = args.floats(&dims, DType::F32)?;
        Ok(ClusterSums { sums, counts: args.below(4, &dims[..3], DType::U32)? })
    }
}

fn qkv(args: &mut Args, [b, h, h_kv, n, d]: [usize; 5], dtype: DType) -> Result<[Tensor; 3]> {
    let query = args.floats(&[b, h, 1, d], dtype)?;
    Ok([query, args.floats(&[b, h_kv, n, d], dtype)?, args.floats(&[b, h_kv, n, d], dtype)?])
}

fn attended(args: &mut Args, [b, h, d]: [usize; 3], dtype: DType) -> Result<Attended> {
    Ok(Attended { out: args.floats(&[b, h, 1, d], dtype)?, lse: args.floats(&[b, h], DType::F32)? })
}

fn encode(codebook: &Codebook, keys: &Tensor) -> Result<()> {
    let (codes, clusters) = codebook.encode(keys)?;
    assert_eq!(codes.dims(), [&keys.dims()[..3], &codebook.dims()[2..3]].concat());
    assert_eq!(clusters.as_ref().map(Tensor::dims), codebook.coarse().map(|_| &keys.dims()[..3]));
    Ok(())
}
