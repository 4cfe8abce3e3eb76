//! Every op with small tensors of any shape and dtype: an error, or a result of the right shape.
#![no_main]

use arbitrary::Arbitrary;
use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{self, Attended, ClusterSums, Geometry, KmeansOptions, Selected};
use candle_pq_attn::{Codebook, Heavy, Metric, PqAttention, PqConfig, Selection, Tail};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Arg {
    /// Dimensions below 12, of which there are up to 5.
    dims: Vec<u8>,
    dtype: u8,
    numbers: Vec<i8>,
    transposed: bool,
}

impl Arg {
    fn tensor(&self) -> Result<Tensor> {
        let dims: Vec<usize> = self.dims.iter().take(5).map(|dim| usize::from(dim % 12)).collect();
        let count = dims.iter().product();
        // Not finite at the ends.
        let number = |x: &i8| match *x {
            i8::MIN => f32::NAN,
            i8::MAX => f32::INFINITY,
            x => f32::from(x) / 8.,
        };
        let numbers = self.numbers.iter().map(number).chain([0.]).cycle().take(count).collect();
        let dtypes = [DType::F32, DType::F16, DType::BF16, DType::U8, DType::U32, DType::F64];
        let dtype = dtypes[usize::from(self.dtype) % dtypes.len()];
        let tensor = Tensor::from_vec::<_, f32>(numbers, dims, &Device::Cpu)?.to_dtype(dtype)?;
        if self.transposed && tensor.rank() > 1 {
            return tensor.t();
        }
        Ok(tensor)
    }
}

#[derive(Debug, Arbitrary)]
struct Input {
    args: [Arg; 6],
    sizes: [u8; 8],
    huge: Option<u64>,
    flags: [bool; 6],
    scale: f32,
}

fuzz_target!(|input: Input| {
    let _ = run(&input);
});

fn run(input: &Input) -> Result<()> {
    let mut args = Vec::new();
    for arg in &input.args {
        args.push(arg.tensor()?);
    }
    let [a, b, c, d, e, f] = &args[..] else { unreachable!() };
    let size = |i: usize| usize::from(input.sizes[i]) % 24;
    let (n, scale) = (input.huge.map_or(size(0), |huge| huge as usize), input.scale);
    let [inner_product, weighted, with_tail, per_kv, dense, by_run] = input.flags;
    let metric = if inner_product { Metric::InnerProduct } else { Metric::Euclidean };

    if let Ok(codes) = ops::encode(a, b, inner_product.then_some(c)) {
        assert_eq!(codes.dims()[..3], a.dims()[..3]);
    }
    let options = KmeansOptions { pq_dim: size(1), pq_bits: size(2), iters: size(3) % 4, metric, max_keys: n, seed: 1 };
    if let Ok((centroids, phi)) = ops::kmeans(a, &options) {
        assert_eq!((centroids.dims()[2], phi.is_some()), (options.pq_dim, inner_product));
    }
    if let Ok(scores) = ops::score(a, b, c) {
        assert_eq!(scores.dims(), [a.dim(0)?, a.dim(1)?, b.dim(2)?]);
    }
    let _ = ops::residual_score(a, b, c, d, e);
    if let Ok(packed) = ops::pack_codes(b) {
        let _ = ops::fast_scan(a, &packed, b.dim(2)?, c, n);
    }
    let _ = ops::fast_scan(a, b, n, c, size(1));
    if let Ok(best) = ops::topk(a, n) {
        assert_eq!(best.dims().last().copied(), a.dims().last().map(|len| n.min(*len)));
    }
    let _ = ops::group_mass(a, n, scale);
    let _ = ops::causal_softmax(&f.copy()?, n, size(1), scale);
    // No more than a test may take: as many as there are to list are listed.
    let geometry = Geometry { n: n.min(1000), sink: size(1), window: size(2), init_offset: n };
    let _ = ops::indices_and_weights(a, geometry);
    let selected = Selected { indices: d.clone(), lens: e.clone(), weights: f.clone() };
    let _ = ops::dense_weights(&selected, size(1), n.min(1000));
    let _ = ops::dense_attend(a, b, c, scale);
    let _ = ops::sparse_attend(a, b, c, &selected, scale);
    let other = Attended { out: b.clone(), lse: c.clone() };
    let _ = Attended { out: a.clone(), lse: e.clone() }.merge(&other);
    let _ = ops::sparse_attend_with_tail(a, b, c, &selected, &other, scale);
    let clusters = ClusterSums { sums: b.clone(), counts: c.clone() };
    let _ = ops::cluster_sums(a, d, &clusters);
    let _ = ops::tail_attend(a, d, &clusters, &selected, n, scale);

    let config = PqConfig {
        sink: size(1),
        window: size(2),
        heavy: Heavy::Keys(size(3)),
        pq_dim: size(4),
        pq_bits: size(5) % 4,
        kmeans_iters: 2,
        max_train_keys: n,
        coarse: if with_tail { 4 } else { 0 },
        tail: if with_tail { Tail::ClusterMeans } else { Tail::None },
        query_weights: weighted,
        metric,
        selection: if per_kv { Selection::PerKvHead } else { Selection::PerQueryHead },
        refresh: f64::from(scale),
        ..PqConfig::default()
    };
    let _ = Codebook::train_weighted(a, weighted.then_some(b), &config);
    if let Ok(codebook) = Codebook::new(a.clone(), inner_product.then(|| b.clone())) {
        let codebook = if with_tail { codebook.with_coarse(c.clone()) } else { Ok(codebook) };
        let codebook = if weighted { codebook.and_then(|codebook| codebook.with_weights(d.clone())) } else { codebook };
        let _ = codebook.and_then(|codebook| codebook.encode(e));
    }
    let attn = PqAttention::new(config, scale)?;
    let dims = [size(6) % 3, size(7) % 3, input.huge.map_or(8, |huge| huge as usize)];
    let mut cache = attn.new_cache(dims, size(0), DType::F32, &Device::Cpu)?;
    let [b, h_kv, head_dim] = dims;
    let random = |heads, s| Tensor::rand(-1f32, 1., (b, heads, s, head_dim), &Device::Cpu);
    for s in [20, 1, 1, 3, 1] {
        let (q, kv) = (random(2 * h_kv, s)?, random(h_kv, s)?);
        let out = match (dense, by_run) {
            (true, _) => attn.forward_dense(&q, &kv, &kv, &mut cache)?,
            (_, true) => attn.forward_run(&q, &kv, &kv, &mut cache)?,
            _ => attn.forward(&q, &kv, &kv, &mut cache)?,
        };
        assert_eq!(out.dims(), q.dims());
        let _ = attn.forward(e, f, f, &mut cache);
        let _ = cache.append(a, c);
        cache.truncate(cache.len().saturating_sub(size(1) % 3))?;
    }
    Ok(())
}
