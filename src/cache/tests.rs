use safetensors::tensor::View;

use super::*;
use crate::config::{Heavy, Selection};
use crate::fault::{failing, Failing};
use crate::PqAttention;

/// Calls that take steps, each of so many keys.
#[derive(Debug, Clone, Copy)]
enum Call {
    Append(usize),
    Forward(usize),
    Dense,
    Run(usize),
}

impl Call {
    fn keys(self) -> usize {
        match self {
            Self::Append(s) | Self::Forward(s) | Self::Run(s) => s,
            Self::Dense => 1,
        }
    }

    /// The numbers that come out, those of the call at position `seed`.
    fn run(self, attn: &PqAttention, cache: &mut PqKvCache, seed: usize) -> Result<Vec<f32>> {
        let tensor = |heads: usize, part: usize| {
            let count = heads * self.keys() * 16;
            let number = |i: usize| ((i + 1) as f32 * 12.9898 + (seed + 1000 * part) as f32 * 78.233).sin() * 4.3;
            let numbers = (0..count).map(number).collect();
            Tensor::from_vec::<_, f32>(numbers, (1, heads, self.keys(), 16), &Device::Cpu)?.to_dtype(cache.dtype())
        };
        let [q, k, v] = [tensor(4, 0)?, tensor(2, 1)?, tensor(2, 2)?];
        let out = match self {
            Self::Append(_) => return cache.append(&k, &v).map(|()| Vec::new()),
            Self::Forward(_) => attn.forward(&q, &k, &v, cache)?,
            Self::Dense => attn.forward_dense(&q, &k, &v, cache)?,
            Self::Run(_) => attn.forward_run(&q, &k, &v, cache)?,
        };
        out.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
    }
}

/// All that a cache is but room: what a file has of it, and the sums.
fn state(cache: &PqKvCache) -> Result<Vec<(String, Vec<u8>)>> {
    let mut tensors = cache.tensors()?;
    tensors.extend(cache.clusters().map(|clusters| ("sums".to_string(), clusters.sums.clone())));
    tensors.extend(cache.clusters().map(|clusters| ("counts".to_string(), clusters.counts.clone())));
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let mut state: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.data().into_owned())).collect();
    let trained = cache.trained.as_ref().map(|trained| (trained.end, trained.summed));
    state.push((format!("{} {} {trained:?}", cache.len, cache.encoded), Vec::new()));
    Ok(state)
}

/// A call fails at each of its points in turn, and from each on, until it succeeds: meanwhile the cache is as before, and
/// then it is that of a cache which never failed. Where all fails from a point on, codes may be left for the next step.
#[test]
fn no_memory_at_any_point_of_a_step() -> Result<()> {
    let (sink, window, heavy) = (2, 8, Heavy::Keys(8));
    let everything = PqConfig { sink, window, heavy, pq_dim: 4, pq_bits: 4, coarse: 16, ..PqConfig::default() };
    let plain = PqConfig { coarse: 0, tail: Tail::None, query_weights: false, ..everything.clone() };
    let configs = [
        PqConfig { selection: Selection::PerKvHead, ..everything.clone() },
        PqConfig { metric: Metric::InnerProduct, ..plain },
        everything.clone(),
        everything,
    ];
    let (mut points, mut trainings, mut growths) = (0, 0, 0);
    let rest = [(DType::F32, false), (DType::F32, false), (DType::BF16, false), (DType::F32, true)];
    for (config, (dtype, is_paged)) in configs.into_iter().zip(rest) {
        let attn = PqAttention::new(config, 0.25)?;
        let new = || attn.new_cache([1, 2, 16], 0, dtype, &Device::Cpu);
        let pool = PagePool::new(attn.config().clone(), [1, 2, 16], 64, dtype, &Device::Cpu)?;
        let (mut cache, mut other) = (if is_paged { pool.new_cache()? } else { new()? }, new()?);
        let steps = [Call::Forward(1); 10].into_iter().chain([Call::Dense, Call::Run(12), Call::Append(9)]);
        let calls = [Call::Append(3), Call::Forward(67)].into_iter().chain(steps.cycle().take(36));
        for call in calls.chain([Call::Forward(130), Call::Forward(1), Call::Run(3)]) {
            cache.encode_blocks()?;
            other.encode_blocks()?;
            // Whose pages have to be copied before they are written to.
            let _fork = is_paged.then(|| cache.fork()).transpose()?;
            let (seed, mut capacity) = (cache.len(), cache.capacity());
            let (before, end) = (state(&cache)?, cache.trained.as_ref().and_then(|trained| trained.end));
            let mut at = 0;
            let out = loop {
                let (out, came_to) = failing(Failing::Once(at), || call.run(&attn, &mut cache, seed));
                if came_to <= at {
                    break out?;
                }
                assert!(out.is_err(), "{call:?} after {seed} keys, point {at}");
                assert!(state(&cache)? == before, "{call:?} after {seed} keys, point {at}");
                points += 1;
                // The room that it made stays, so that there are fewer points to come to.
                if capacity < cache.capacity() {
                    (capacity, growths, at) = (cache.capacity(), growths + 1, 0);
                    continue;
                }
                let (out, _) = failing(Failing::From(at), || call.run(&attn, &mut cache, seed));
                assert!(out.is_err(), "{call:?} after {seed} keys, from point {at} on");
                cache.encode_blocks()?;
                assert!(state(&cache)? == before, "{call:?} after {seed} keys, from point {at} on");
                at += 1;
            };
            assert!(out == call.run(&attn, &mut other, seed)?, "{call:?} after {seed} keys");
            assert!(state(&cache)? == state(&other)?, "{call:?} after {seed} keys");
            trainings += usize::from(end != cache.trained.as_ref().and_then(|trained| trained.end));
        }
    }
    assert!(
        points > 2000 && trainings > 10 && growths >= 6,
        "{points} points, {trainings} trainings, {growths} growths"
    );
    Ok(())
}
