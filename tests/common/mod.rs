//! What the tests share: seeded tensors in awkward layouts, and naive f64 references.
#![allow(dead_code)] // each test program uses a part

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{Selected, PADDING};
use candle_pq_attn::{Heavy, PqConfig, Tail};

pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Small enough that a few hundred keys have everything: codebook, candidates, selection.
pub fn small() -> PqConfig {
    PqConfig {
        sink: 3,
        window: 8,
        heavy: Heavy::Keys(12),
        pq_dim: 4,
        pq_bits: 4,
        kmeans_iters: 3,
        coarse: 0,
        tail: Tail::None,
        query_weights: false,
        ..PqConfig::default()
    }
}

/// The same with coarse clusters, a tail and weights.
pub fn with_tail() -> PqConfig {
    PqConfig { coarse: 32, tail: Tail::ClusterMeans, query_weights: true, ..small() }
}

/// Seeded numbers (SplitMix64), since Candle's CPU generator takes no seed.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// About normal: the sum of four uniform numbers.
    pub fn normal(&mut self) -> f32 {
        let uniform = |rng: &mut Self| (rng.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        (uniform(self) + uniform(self) + uniform(self) + uniform(self)) * 1.7
    }

    pub fn tensor(&mut self, dims: &[usize], dtype: DType) -> Tensor {
        let numbers: Vec<f32> = (0..dims.iter().product()).map(|_| self.normal()).collect();
        Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }
}

/// How a tensor lies in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Strides {
    Contiguous,
    /// A view into a larger buffer that holds NaN (or 255) around it, as a cache does.
    Capacity,
    /// Dimensions 1 and 2 the other way round in memory, as a model's projections leave them.
    Transposed,
    /// Elements of the last dimension apart.
    LastDim,
}

pub const STRIDES: [Strides; 4] = [Strides::Contiguous, Strides::Capacity, Strides::Transposed, Strides::LastDim];

/// The same numbers in another layout.
pub fn lay_out(tensor: &Tensor, strides: Strides) -> Result<Tensor> {
    let rank = tensor.rank();
    match strides {
        Strides::Contiguous => tensor.contiguous(),
        Strides::Capacity => {
            let mut dims = tensor.dims().to_vec();
            let dim = rank - 2;
            dims[dim] += 7;
            let poison = if tensor.dtype().is_int() { 255. } else { f64::NAN };
            let buffer = Tensor::full(poison as f32, dims, tensor.device())?.to_dtype(tensor.dtype())?;
            buffer.slice_set(&tensor.contiguous()?, dim, 3)?;
            buffer.narrow(dim, 3, tensor.dim(dim)?)
        }
        Strides::Transposed if rank >= 3 => tensor.transpose(1, 2)?.contiguous()?.transpose(1, 2),
        Strides::Transposed => Ok(tensor.clone()),
        Strides::LastDim => tensor.transpose(rank - 2, rank - 1)?.contiguous()?.transpose(rank - 2, rank - 1),
    }
}

/// All elements in order, in f64.
pub fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn integers(tensor: &Tensor) -> Vec<u32> {
    tensor.to_dtype(DType::U32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Relative rounding of one result of this dtype.
pub fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1e-3,
        DType::BF16 => 8e-3,
        _ => 1e-5,
    }
}

#[track_caller]
pub fn assert_close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1f64, |scale, x| if x.is_finite() { scale.max(x.abs()) } else { scale });
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let equal = got == want || (got - want).abs() <= tolerance * scale;
        assert!(equal, "{what}: element {i} is {got}, expected {want}");
    }
}

#[track_caller]
pub fn assert_same_bits(a: &Tensor, b: &Tensor, what: &str) {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()), "{what}");
    let bits = |t: &Tensor| numbers(t).into_iter().map(f64::to_bits).collect::<Vec<_>>();
    assert!(bits(a) == bits(b), "{what}: not equal to the bit");
}

/// Naive attention of one query over `(position, weight)` pairs; K and V are `[n, d]`. Returns output and LSE.
pub fn attend(query: &[f64], keys: &[f64], values: &[f64], attended: &[(usize, f64)], scale: f64) -> (Vec<f64>, f64) {
    let d = query.len();
    let score = |t: usize| scale * query.iter().zip(&keys[t * d..]).map(|(q, k)| q * k).sum::<f64>();
    let largest = attended.iter().map(|&(t, _)| score(t)).fold(f64::NEG_INFINITY, f64::max);
    let mut sum = 0.0;
    let mut out = vec![0.0; d];
    for &(t, weight) in attended {
        let p = weight * (score(t) - largest).exp();
        sum += p;
        out.iter_mut().zip(&values[t * d..]).for_each(|(out, v)| *out += p * v);
    }
    if attended.is_empty() {
        return (out, f64::NEG_INFINITY);
    }
    (out.iter().map(|x| x / sum).collect(), largest + sum.ln())
}

/// Naive attention to the candidates that are not `listed`, each with its score and the mean value of its cluster, which
/// is None for a cluster without keys. Returns output and LSE.
pub fn attend_to_means(
    scores: &[f64],
    clusters: &[u32],
    means: &[Option<Vec<f64>>],
    listed: &[usize],
    scale: f64,
    d: usize,
) -> (Vec<f64>, f64) {
    let unlisted = (0..scores.len()).filter(|t| !listed.contains(t));
    let unlisted: Vec<_> = unlisted.filter_map(|t| Some((t, means[clusters[t] as usize].as_ref()?))).collect();
    let largest = unlisted.iter().map(|&(t, _)| scale * scores[t]).fold(f64::NEG_INFINITY, f64::max);
    let (mut sum, mut out) = (0.0, vec![0.0; d]);
    for &(t, mean) in &unlisted {
        let p = (scale * scores[t] - largest).exp();
        sum += p;
        out.iter_mut().zip(mean).for_each(|(out, v)| *out += p * v);
    }
    if unlisted.is_empty() {
        return (out, f64::NEG_INFINITY);
    }
    (out.iter().map(|x| x / sum).collect(), largest + sum.ln())
}

/// Attention over two sets of keys from that over each.
pub fn merge(a: &(Vec<f64>, f64), b: &(Vec<f64>, f64)) -> (Vec<f64>, f64) {
    let largest = a.1.max(b.1);
    if largest == f64::NEG_INFINITY {
        return a.clone();
    }
    let (wa, wb) = ((a.1 - largest).exp(), (b.1 - largest).exp());
    let out = a.0.iter().zip(&b.0).map(|(a, b)| (wa * a + wb * b) / (wa + wb)).collect();
    (out, largest + (wa + wb).ln())
}

/// Random lists with holes, weights and poisoned padding, one a query head or one a KV head.
pub fn random_lists(rng: &mut Rng, b: usize, lists: usize, n: usize, l: usize) -> Result<Selected> {
    let (mut indices, mut weights, mut lens) = (vec![], vec![], vec![]);
    for _ in 0..b * lists {
        let len = rng.below(l + 1);
        lens.push(len as u32);
        for i in 0..l {
            let padding = i >= len || rng.below(10) == 0;
            indices.push(if padding { PADDING } else { rng.below(n) as u32 });
            weights.push(if padding { f32::NAN } else { [1.0, 2.5, 0.0, 0.25][rng.below(4)] });
        }
    }
    let shape = (b, lists, l);
    Ok(Selected {
        indices: Tensor::from_vec(indices, shape, &Device::Cpu)?,
        lens: Tensor::from_vec(lens, (b, lists), &Device::Cpu)?,
        weights: Tensor::from_vec(weights, shape, &Device::Cpu)?,
    })
}

/// What a list has for query head `bh` (counted over the batch): positions and weights that are not 0.
pub fn listed(selected: &Selected, bh: usize, h: usize) -> Vec<(usize, f64)> {
    let [_, lists, l] = selected.indices.dims()[..] else { panic!("rank 3") };
    let (indices, weights) = (integers(&selected.indices), numbers(&selected.weights));
    let list = bh / h * lists + bh % h * lists / h;
    let entries = list * l..list * l + integers(&selected.lens)[list] as usize;
    let entries = entries.filter(|&i| indices[i] != PADDING);
    entries.map(|i| (indices[i] as usize, weights[i])).filter(|(_, w)| *w != 0.0).collect()
}

/// Rows `[..., d]` of a contiguous `[rows, len]`: the `row`-th.
pub fn row(numbers: &[f64], row: usize, len: usize) -> &[f64] {
    &numbers[row * len..(row + 1) * len]
}
