//! Which steps of a [`DecodeGraph`] are replays, what it gives back after an error, and what it says. That replays are
//! right is for tests/cuda.rs to say.

mod common;

use std::cell::Cell;

use candle_core::{bail, DType, Device, Result, Tensor};
use candle_pq_attn::{DecodeGraph, Heavy, PqAttention, PqConfig, PqKvCache};
use common::Rng;

const D: usize = 16;

fn attention() -> Result<PqAttention> {
    let config = PqConfig { sink: 2, window: 8, heavy: Heavy::Keys(8), coarse: 16, pq_bits: 4, ..PqConfig::default() };
    PqAttention::new(config, 0.25)
}

fn cache(attn: &PqAttention, keys: usize, capacity: usize) -> Result<PqKvCache> {
    let mut cache = attn.new_cache([1, 1, D], capacity, DType::F32, &Device::Cpu)?;
    let keys = Rng(7).tensor(&[1, 1, keys, D], DType::F32);
    cache.append(&keys, &keys)?;
    Ok(cache)
}

fn token(step: usize) -> Tensor {
    Rng(step as u64 + 100).tensor(&[1, 1, 1, D], DType::F32)
}

#[test]
fn steps_are_those_of_forward() -> Result<()> {
    let attn = attention()?;
    let (mut stepped, mut eager) =
        ([cache(&attn, 40, 0)?, cache(&attn, 40, 0)?], [cache(&attn, 40, 0)?, cache(&attn, 40, 0)?]);
    let forward = |x: &Tensor, position: &Tensor, caches: &mut [PqKvCache]| {
        let x = x.broadcast_add(&position.to_dtype(DType::F32)?)?;
        let y = attn.forward(&x, &x, &x, &mut caches[0])?;
        attn.forward(&y, &y, &y, &mut caches[1])
    };
    let mut graph = DecodeGraph::new(forward);
    for step in 0..60 {
        let position = Tensor::new(&[eager[0].len() as u32], &Device::Cpu)?;
        let got = graph.step(&token(step), &mut stepped)?.flatten_all()?.to_vec1::<f32>()?;
        let want = forward(&token(step), &position, &mut eager)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(got, want, "step {step}");
    }
    assert_eq!(stepped[0].len(), 100);
    Ok(())
}

/// What a step returns stays as it is, also where it is the token or the position itself.
#[test]
fn results_outlive_later_steps() -> Result<()> {
    let attn = attention()?;
    let mut caches = [cache(&attn, 40, 0)?];
    let which = Cell::new(0);
    let mut graph = DecodeGraph::new(|x: &Tensor, position: &Tensor, caches: &mut [PqKvCache]| {
        attn.forward(x, x, x, &mut caches[0])?;
        match which.get() {
            0 => Ok(x.clone()),
            1 => x.narrow(3, 2, 4)?.squeeze(0),
            _ => position.to_dtype(DType::U32),
        }
    });
    for (of, want) in [(0, token(0)), (1, token(0).narrow(3, 2, 4)?), (2, Tensor::new(&[42u32], &Device::Cpu)?)] {
        which.set(of);
        let out = graph.step(&token(0), &mut caches)?;
        graph.step(&token(1), &mut caches)?;
        caches[0].truncate(41 + of)?;
        assert_eq!(common::numbers(&out), common::numbers(&want), "{of}");
    }
    Ok(())
}

/// A share of a key is one key: at the same length nothing is trained twice.
#[test]
fn refresh_of_less_than_a_key() -> Result<()> {
    let config = PqConfig { refresh: 1e-300, ..attention()?.config().clone() };
    let attn = PqAttention::new(config, 0.25)?;
    let mut graph =
        DecodeGraph::new(|x: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| attn.forward(x, x, x, &mut caches[0]));
    let mut caches = [cache(&attn, 40, 100)?];
    for step in 0..5 {
        graph.step(&token(step), &mut caches)?;
        let id = |caches: &[PqKvCache]| caches[0].codebook().map(|codebook| codebook.coarse().map(Tensor::id));
        let trained = id(&caches);
        caches[0].build_index()?;
        assert!(trained.is_some() && id(&caches) == trained, "trained again at {}", caches[0].len());
        assert!(!graph.is_replay(&caches), "the next trains");
    }
    Ok(())
}

/// A replay neither trains, nor grows, nor turns from dense to sparse.
#[test]
fn what_is_not_a_replay() -> Result<()> {
    let attn = attention()?;
    let mut graph =
        DecodeGraph::new(|x: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| attn.forward(x, x, x, &mut caches[0]));
    // Dense up to 27 keys; trained at 28 on 26 of them, so again when there are 28, 30, 32, 34 of them and so on.
    assert!(attn.config().is_dense(27) && !attn.config().is_dense(28));
    let mut caches = [cache(&attn, 20, 36)?];
    let mut anew = Vec::new();
    for step in 0..20 {
        if !graph.is_replay(&caches) {
            anew.push(caches[0].len() + 1);
        }
        graph.step(&token(step), &mut caches)?;
    }
    assert_eq!(anew, [21, 28, 30, 32, 34, 36, 37, 39], "the first, turning sparse, training, growth");
    Ok(())
}

#[test]
fn other_caches_are_no_replay() -> Result<()> {
    let attn = attention()?;
    let mut graph =
        DecodeGraph::new(|x: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| attn.forward(x, x, x, &mut caches[0]));
    let (mut one, mut other) = ([cache(&attn, 200, 300)?], [cache(&attn, 200, 300)?]);
    graph.step(&token(0), &mut one)?;
    assert!(graph.is_replay(&one) && !graph.is_replay(&other) && !graph.is_replay(&[]));
    graph.step(&token(0), &mut other)?;
    assert!(graph.is_replay(&other) && !graph.is_replay(&one));

    // The codebook outlives the first truncation; sums of values are to be made again, the second time the codebook too.
    for step in 1..9 {
        graph.step(&token(step), &mut other)?;
    }
    assert!(graph.is_replay(&other));
    other[0].truncate(201)?;
    assert!(!graph.is_replay(&other));
    graph.step(&token(1), &mut other)?;
    assert!(graph.is_replay(&other));
    other[0].truncate(100)?;
    assert!(!graph.is_replay(&other));
    Ok(())
}

/// Attention that is dense by choice does not train, however many keys there are.
#[test]
fn dense_steps_are_replays() -> Result<()> {
    let attn = attention()?;
    let mut graph = DecodeGraph::new(|x: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| {
        attn.forward_dense(x, x, x, &mut caches[0])
    });
    let mut caches = [cache(&attn, 100, 300)?];
    for step in 0..50 {
        assert_eq!(graph.is_replay(&caches), step > 0, "step {step}");
        graph.step(&token(step), &mut caches)?;
    }
    assert!(caches[0].codebook().is_none());
    Ok(())
}

#[test]
fn errors_leave_the_caches_as_they_were() -> Result<()> {
    let attn = attention()?;
    let mut caches = [cache(&attn, 50, 0)?, cache(&attn, 50, 0)?];
    let fails = Cell::new(false);
    let mut graph = DecodeGraph::new(|x: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| {
        attn.forward(x, x, x, &mut caches[0])?;
        if fails.get() {
            bail!("no more");
        }
        attn.forward(x, x, x, &mut caches[1])
    });
    let mut len = 50;
    for (step, fail) in [true, false, true, true, false, false].into_iter().enumerate() {
        fails.set(fail);
        assert_eq!(graph.step(&token(step), &mut caches).is_err(), fail);
        len += usize::from(!fail);
        assert_eq!([caches[0].len(), caches[1].len()], [len, len], "step {step}");
    }
    Ok(())
}

/// Also a codebook that another takes the place of: later steps are those of caches that never failed, to the bit.
#[test]
fn errors_leave_the_codebooks_as_they_were() -> Result<()> {
    let attn = attention()?;
    let fails = Cell::new(false);
    let forward = |x: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| {
        let y = attn.forward(x, x, x, &mut caches[0])?;
        if fails.get() {
            bail!("no more");
        }
        attn.forward(&y, &y, &y, &mut caches[1])
    };
    let numbers = |x: Tensor| x.flatten_all()?.to_vec1::<f32>();
    let centroids = |cache: &PqKvCache| cache.codebook().map(|codebook| numbers(codebook.centroids()?)).transpose();
    let new_caches = || Ok::<_, candle_core::Error>([cache(&attn, 20, 0)?, cache(&attn, 20, 0)?]);
    let (mut failing, mut caches) = (new_caches()?, new_caches()?);
    let (mut graph, mut other) = (DecodeGraph::new(forward), DecodeGraph::new(forward));
    for step in 0..150 {
        // Before and after the first training, and each time that another falls due.
        fails.set(true);
        assert!(graph.step(&token(step + 500), &mut failing).is_err());
        fails.set(false);
        for (failing, cache) in failing.iter_mut().zip(&mut caches) {
            assert_eq!(centroids(failing)?, centroids(cache)?, "step {step}");
            if step % 3 == 0 {
                // Not due any more, where one was.
                failing.truncate(failing.len() - 1)?;
                cache.truncate(cache.len() - 1)?;
            }
        }
        let (got, want) = (graph.step(&token(step), &mut failing)?, other.step(&token(step), &mut caches)?);
        assert_eq!(numbers(got)?, numbers(want)?, "step {step}");
    }
    Ok(())
}

#[test]
fn errors_say_what_was_expected() -> Result<()> {
    let attn = attention()?;
    let mut graph =
        DecodeGraph::new(|x: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| attn.forward(x, x, x, &mut caches[0]));
    let mut message = |caches: &mut [PqKvCache]| graph.step(&token(0), caches).unwrap_err().to_string();
    assert!(message(&mut []).contains("caches: expected at least one, got none"));
    let unequal = message(&mut [cache(&attn, 5, 0)?, cache(&attn, 6, 0)?]);
    assert!(unequal.contains("caches: expected as many keys in each, got 5 in cache 0 and 6 in cache 1"), "{unequal}");
    let mut caches = [cache(&attn, 5, 0)?, cache(&attn, 5, 0)?];
    let lacking = message(&mut caches);
    assert!(lacking.contains("append one key to each cache, which makes 6, got 5 in cache 1"), "{lacking}");
    assert_eq!([caches[0].len(), caches[1].len()], [5, 5]);
    Ok(())
}
