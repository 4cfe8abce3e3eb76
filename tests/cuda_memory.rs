//! What a GPU's memory does to caches, and they to it: steps that it has no room for, fifty thousand steps, and two streams.
//!
//! Without a device the tests say SKIP, and fail under `REQUIRE_CUDA=1`. One at a time, since one of them takes all memory.
//! The steps without end take minutes: `cargo test --release --features cuda --test cuda_memory -- --ignored --nocapture`
#![cfg(feature = "cuda")]

mod common;
#[path = "common/soak.rs"]
mod soak;

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::{Heavy, PqAttention, PqConfig, PqKvCache};
use common::{integers, numbers, with_tail, Rng};

static GPU: Mutex<()> = Mutex::new(());

/// The lock, then the device: in this order, so that the device goes first.
fn gpu() -> Option<(MutexGuard<'static, ()>, Device)> {
    let guard = GPU.lock().unwrap_or_else(PoisonError::into_inner);
    match Device::new_cuda(0) {
        Ok(device) => Some((guard, device)),
        Err(error) if std::env::var_os("REQUIRE_CUDA").is_some_and(|require| require == "1") => {
            panic!("REQUIRE_CUDA=1, but there is no CUDA device: {error}")
        }
        Err(error) => {
            eprintln!("SKIP: no CUDA device: {error}");
            None
        }
    }
}

/// Bytes of the device that are in use, by whomever.
fn used(gpu: &Device) -> Result<usize> {
    gpu.synchronize()?;
    let stream = gpu.as_cuda_device()?.cuda_stream();
    let (free, total) = stream.context().mem_get_info().w()?;
    Ok(total - free)
}

/// Takes all memory but less than a megabyte.
fn fill(gpu: &Device) -> Vec<Tensor> {
    let (mut fillers, mut bytes) = (Vec::new(), 16 << 30);
    while bytes >= 1 << 19 {
        match Tensor::zeros(bytes, DType::U8, gpu) {
            Ok(filler) => fillers.push(filler),
            Err(_) => bytes /= 2,
        }
    }
    fillers
}

const H_KV: usize = 4;
const H: usize = 16;
const D: usize = 64;

/// Positions `from` to `from + s` of a sequence: queries, keys and values.
fn positions(from: usize, s: usize, dtype: DType, gpu: &Device) -> Result<[Tensor; 3]> {
    let mut rng = Rng(1000 + from as u64);
    let mut draw = |heads| rng.tensor(&[1, heads, s, D], dtype).to_device(gpu);
    Ok([draw(H)?, draw(H_KV)?, draw(H_KV)?])
}

/// All that can be seen of a cache, but its capacity.
#[derive(PartialEq)]
struct State {
    len: usize,
    floats: Vec<Vec<f64>>,
    codes: Vec<Vec<u32>>,
}

fn state(cache: &PqKvCache) -> Result<State> {
    let mut floats = vec![cache.keys()?, cache.values()?];
    let mut codes = vec![cache.codes()?];
    codes.extend(cache.coarse_codes()?);
    if let Some(codebook) = cache.codebook() {
        floats.push(codebook.centroids()?);
        floats.extend(codebook.coarse().cloned());
        floats.extend(codebook.weights().cloned());
    }
    if let Some(clusters) = cache.clusters() {
        floats.push(clusters.sums.clone());
        codes.push(clusters.counts.clone());
    }
    Ok(State {
        len: cache.len(),
        floats: floats.iter().map(numbers).collect(),
        codes: codes.iter().map(integers).collect(),
    })
}

/// Growth, attention to a prompt, and training, each in a step that has no memory for it.
#[test]
fn a_step_without_memory_leaves_the_cache_as_it_was() -> Result<()> {
    let Some((_guard, gpu)) = gpu() else { return Ok(()) };
    const KEYS: usize = 16_384;
    let never = PqConfig { heavy: Heavy::Keys(64), refresh: 1e9, ..PqConfig::default() };
    let often = PqConfig { refresh: 1e-9, ..never.clone() };
    let cases = [
        ("growth", &never, KEYS, 1),
        ("prefill", &never, 2 * KEYS, 4096),
        ("training", &often, 2 * KEYS, 1),
        ("growth, then training", &often, KEYS, 1),
    ];
    for (what, config, capacity, s) in cases {
        let attn = PqAttention::new(config.clone(), 0.125)?;
        let new = || -> Result<PqKvCache> {
            let mut cache = attn.new_cache([1, H_KV, D], capacity, DType::BF16, &gpu)?;
            let [q, k, v] = positions(0, KEYS - 1, DType::BF16, &gpu)?;
            attn.forward(&q, &k, &v, &mut cache)?;
            // Leaves buffers and kernels behind, so that what fails is the step.
            let [q, k, v] = positions(KEYS, 1, DType::BF16, &gpu)?;
            attn.forward(&q, &k, &v, &mut cache)?;
            Ok(cache)
        };
        let [q, k, v] = positions(2 * KEYS, s, DType::BF16, &gpu)?;
        let (mut cache, mut other) = (new()?, new()?);
        let want = numbers(&attn.forward(&q, &k, &v, &mut other)?);
        let before = state(&cache)?;
        assert!(before == state(&new()?)?, "{what}: a cache like it");

        gpu.synchronize()?;
        let fillers = fill(&gpu);
        let errors = [(); 2].map(|()| attn.forward(&q, &k, &v, &mut cache).map(drop));
        drop(fillers);
        gpu.synchronize()?;
        for error in errors {
            let error = error.expect_err(what).to_string().to_lowercase();
            assert!(error.contains("memory"), "{what}: {error}");
        }
        assert!(state(&cache)? == before, "{what}: the cache changed");
        assert!(numbers(&attn.forward(&q, &k, &v, &mut cache)?) == want, "{what}: the next step");
        assert!(state(&cache)? == state(&other)?, "{what}: the cache after it");
    }
    Ok(())
}

/// A step that has memory for its first launch, which appends and indexes a block of keys, but not for the others.
#[test]
fn a_step_that_fails_behind_its_first_launch_leaves_the_cache_as_it_was() -> Result<()> {
    let Some((_guard, gpu)) = gpu() else { return Ok(()) };
    let config = PqConfig { pq_dim: 8, refresh: 1e9, ..with_tail() };
    let keys = config.init_offset() + 100 * config.window - 1;
    // An attention of its own has no buffers yet; their size is that of the room.
    let attn = || PqAttention::new(config.clone(), 0.125);
    let new = || -> Result<PqKvCache> {
        let mut cache = attn()?.new_cache([1, H_KV, D], 1 << 20, DType::BF16, &gpu)?;
        let [_, k, v] = positions(0, keys, DType::BF16, &gpu)?;
        cache.append(&k, &v)?;
        cache.build_index()?;
        Ok(cache)
    };
    let [q, k, v] = positions(keys, 1, DType::BF16, &gpu)?;
    let (mut cache, mut other) = (new()?, new()?);
    let want = numbers(&attn()?.forward(&q, &k, &v, &mut other)?);
    let before = state(&cache)?;
    let failing = attn()?;
    gpu.synchronize()?;
    let (mut fillers, mut room) = (fill(&gpu), 0);
    while let Some(filler) = fillers.pop_if(|_| room < 8 << 20) {
        room += filler.elem_count();
    }
    gpu.synchronize()?;
    let errors = [(); 2].map(|()| failing.forward(&q, &k, &v, &mut cache).map(drop));
    drop(fillers);
    gpu.synchronize()?;
    for error in errors {
        let error = error.expect_err("a step without memory").to_string().to_lowercase();
        assert!(error.contains("memory"), "{error}");
    }
    assert!(state(&cache)? == before, "the cache changed");
    assert!(numbers(&failing.forward(&q, &k, &v, &mut cache)?) == want, "the next step");
    assert!(state(&cache)? == state(&other)?, "the cache after it");
    Ok(())
}

#[test]
#[ignore = "takes minutes"]
fn steps_without_end() -> Result<()> {
    let Some((_guard, gpu)) = gpu() else { return Ok(()) };
    soak::steps_without_end(&gpu, || used(&gpu))
}

/// Caches of two streams that share an attention, growing and training: in two threads at once, and by turns in one.
/// (Threads that share one device are in tests/cuda.rs.)
#[test]
fn streams_share_an_attention() -> Result<()> {
    let Some((_guard, _)) = gpu() else { return Ok(()) };
    let attn = PqAttention::new(PqConfig { heavy: Heavy::Keys(24), ..with_tail() }, 0.125)?;
    let new = || -> Result<(Device, PqKvCache)> {
        let stream = Device::new_cuda_with_stream(0)?;
        let cache = attn.new_cache([1, H_KV, D], 0, DType::F32, &stream)?;
        Ok((stream, cache))
    };
    let step = |(stream, cache): &mut (Device, PqKvCache), offset: usize, step: usize| -> Result<Vec<f64>> {
        let s = if step == 0 { 200 } else { 1 };
        let [q, k, v] = positions(offset + step, s, DType::F32, stream)?;
        attn.forward(&q, &k, &v, cache).map(|out| numbers(&out))
    };
    const STEPS: usize = 500;
    const OFFSETS: [usize; 2] = [0, 10_000];
    let run = |offset| -> Result<Vec<_>> {
        let mut sequence = new()?;
        (0..STEPS).map(|at| step(&mut sequence, offset, at)).collect()
    };
    let [first, second] = OFFSETS.map(run);
    let alone = [first?, second?];
    let together = std::thread::scope(|scope| {
        let threads = OFFSETS.map(|offset| scope.spawn(move || run(offset)));
        threads.map(|thread| thread.join().expect("no panic"))
    });
    for (got, want) in together.into_iter().zip(&alone) {
        assert!(got? == *want, "two threads");
    }
    let mut by_turns = [new()?, new()?];
    for at in 0..STEPS {
        for ((sequence, offset), want) in by_turns.iter_mut().zip(OFFSETS).zip(&alone) {
            assert!(step(sequence, offset, at)? == want[at], "by turns, step {at}");
        }
    }
    Ok(())
}
