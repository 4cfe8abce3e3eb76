//! Decode steps without end: memory stays what it is, and results those of a naive model.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops;
use candle_pq_attn::{Heavy, PqAttention, PqConfig};

use crate::common::{assert_close, assert_same_bits, attend, numbers, with_tail, Rng};

const H_KV: usize = 2;
const H: usize = 4;
const D: usize = 16;
const STEPS: usize = 50_000;
/// A conversation: when it is as long, it starts anew from its first keys.
const LONGEST: usize = 2_000;
const KEPT: usize = 200;

/// Takes them on a device of which so many bytes are in use.
pub fn steps_without_end(device: &Device, used: impl Fn() -> Result<usize>) -> Result<()> {
    let attn = PqAttention::new(PqConfig { heavy: Heavy::Keys(24), ..with_tail() }, 0.25)?;
    let new = || attn.new_cache([1, H_KV, D], LONGEST, DType::F32, device);
    let (mut cache, mut rng) = (new()?, Rng(31));
    let (mut keys, mut values) = (vec![Vec::new(); H_KV], vec![Vec::new(); H_KV]);
    let (mut trainings, mut codebook, mut warm) = (0, Vec::new(), 0);
    let start = Instant::now();
    for step in 0..STEPS {
        if cache.len() == LONGEST {
            cache.truncate(KEPT)?;
            keys.iter_mut().chain(&mut values).for_each(|head| head.truncate(KEPT * D));
        }
        let mut draw = |heads| rng.tensor(&[1, heads, 1, D], DType::F32).to_device(device);
        let (q, k, v) = (draw(H)?, draw(H_KV)?, draw(H_KV)?);
        let out = attn.forward(&q, &k, &v, &mut cache)?;
        if step % 997 == 0 {
            // A cache that has just been given all of it takes the same step, to the bit.
            let mut fresh = new()?;
            fresh.append(&tensor(&keys, device)?, &tensor(&values, device)?)?;
            if let Some(codebook) = cache.codebook() {
                fresh.set_codebook(codebook.clone())?;
            }
            assert_same_bits(&attn.forward(&q, &k, &v, &mut fresh)?, &out, "step");
        }
        for (to, from) in [(&mut keys, numbers(&k)), (&mut values, numbers(&v))] {
            to.iter_mut().zip(from.chunks(D)).for_each(|(to, from)| to.extend_from_slice(from));
        }
        if step % 997 == 0 {
            assert!(numbers(&cache.keys()?) == keys.concat() && numbers(&cache.values()?) == values.concat());
            let out = ops::dense_attend(&q, &cache.keys()?, &cache.values()?, 0.25)?.out;
            let all: Vec<_> = (0..cache.len()).map(|position| (position, 1.)).collect();
            for (head, (q, out)) in numbers(&q).chunks(D).zip(numbers(&out).chunks(D)).enumerate() {
                let kv = head / (H / H_KV);
                assert_close(out, &attend(q, &keys[kv], &values[kv], &all, 0.25).0, 1e-5, "dense");
            }
        }
        let now =
            cache.codebook().map(|codebook| numbers(&codebook.centroids().expect("centroids"))).unwrap_or_default();
        trainings += usize::from(!now.is_empty() && now != codebook);
        codebook = now;
        // Two conversations are enough to have everything.
        if step == 2 * LONGEST {
            warm = used()?;
        }
    }
    let (now, seconds) = (used()?, start.elapsed().as_secs_f64());
    println!("{STEPS} steps, {trainings} trainings, {seconds:.1} s; {warm} bytes after warm-up, {now} at the end");
    assert!(trainings > 100, "{trainings} trainings");
    assert!(now < warm + (8 << 20), "grew from {warm} to {now} bytes");
    Ok(())
}

/// Of `H_KV` heads.
fn tensor(heads: &[Vec<f64>], device: &Device) -> Result<Tensor> {
    let n = heads[0].len() / D;
    let numbers: Vec<f32> = heads.concat().into_iter().map(|x| x as f32).collect();
    Tensor::from_vec(numbers, (1, H_KV, n, D), device)
}
