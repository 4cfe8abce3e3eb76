//! Forks: continuations of one cache that share its keys and values.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::{PqAttention, PqConfig, PqKvCache};
use common::{assert_same_bits, Rng};

const H: usize = 4;
const H_KV: usize = 2;
const D: usize = 16;

fn attention() -> Result<PqAttention> {
    PqAttention::new(PqConfig { pq_bits: 6, coarse: 32, ..PqConfig::default() }, 0.25)
}

fn draw(rng: &mut Rng, s: usize) -> [Tensor; 3] {
    [H, H_KV, H_KV].map(|heads| rng.tensor(&[1, heads, s, D], DType::F32))
}

/// A cache that has read `len` positions, always the same.
fn document(attn: &PqAttention, len: usize) -> Result<PqKvCache> {
    let mut cache = attn.new_cache([1, H_KV, D], 0, DType::F32, &Device::Cpu)?;
    let [q, k, v] = draw(&mut Rng(1), len);
    attn.forward(&q, &k, &v, &mut cache)?;
    cache.build_index()?;
    Ok(cache)
}

/// A question of `s` tokens and `steps` of the answer, which differ by `seed`.
fn go_on(attn: &PqAttention, cache: &mut PqKvCache, seed: u64, [s, steps]: [usize; 2]) -> Result<Vec<Tensor>> {
    let mut rng = Rng(seed);
    let mut outs = Vec::new();
    for s in std::iter::once(s).chain(std::iter::repeat_n(1, steps)) {
        let [q, k, v] = draw(&mut rng, s);
        outs.push(attn.forward(&q, &k, &v, cache)?);
    }
    Ok(outs)
}

fn assert_same(what: &str, got: &[Tensor], want: &[Tensor]) {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).for_each(|(got, want)| assert_same_bits(got, want, what));
}

#[test]
fn forks_go_on_as_if_they_were_alone() -> Result<()> {
    let attn = attention()?;
    // Each trains anew on its way: 1/16 of 1,000 keys is less than 90.
    let (question, seeds) = ([20, 70], [2u64, 3, 4]);
    let alone = |seed| go_on(&attn, &mut document(&attn, 1000)?, seed, question);
    let want: Vec<_> = seeds.iter().map(|&seed| alone(seed)).collect::<Result<_>>()?;

    let mut cache = document(&attn, 1000)?;
    let mut forks = vec![cache.fork()?, cache.fork()?];
    // One of a fork that has gone on, and come back.
    go_on(&attn, &mut forks[0], 9, [5, 3])?;
    forks[0].truncate(1000)?;
    let fork = forks[0].fork()?;
    forks.push(fork);
    for ((fork, seed), want) in forks.iter_mut().zip(seeds).zip(&want) {
        assert_same("fork", &go_on(&attn, fork, seed, question)?, want);
    }
    // What they were made of goes on as well, and they are no other for that.
    assert_same("the first", &go_on(&attn, &mut cache, 3, question)?, &want[1]);
    forks.iter_mut().try_for_each(|fork| fork.truncate(1000))?;
    drop(cache);
    for ((fork, seed), want) in forks.iter_mut().zip(seeds).zip(&want) {
        fork.reset()?;
        let [q, k, v] = draw(&mut Rng(1), 1000);
        attn.forward(&q, &k, &v, fork)?;
        fork.build_index()?;
        assert_same("a fork that began anew", &go_on(&attn, fork, seed, question)?, want);
    }
    Ok(())
}

#[test]
fn what_is_lent_is_not_written_to() -> Result<()> {
    let attn = attention()?;
    let mut cache = document(&attn, 1000)?;
    let mut fork = cache.fork()?;
    let keys = fork.keys()?.copy()?;
    // Other keys where the fork has its own, in both of them.
    cache.truncate(300)?;
    go_on(&attn, &mut cache, 5, [400, 20])?;
    assert_same_bits(&fork.keys()?, &keys, "keys of the fork");
    let want = go_on(&attn, &mut document(&attn, 1000)?, 6, [10, 10])?;
    assert_same("fork", &go_on(&attn, &mut fork, 6, [10, 10])?, &want);

    // And as one cache that was truncated would.
    let mut alone = document(&attn, 1000)?;
    alone.truncate(300)?;
    fork.truncate(300)?;
    assert_same("shorter fork", &go_on(&attn, &mut fork, 7, [500, 10])?, &go_on(&attn, &mut alone, 7, [500, 10])?);
    Ok(())
}

#[test]
fn continuations_cost_what_they_add() -> Result<()> {
    let (n, added) = (32_768, 100);
    let attn = attention()?;
    let mut cache = attn.new_cache([1, 1, D], n, DType::F32, &Device::Cpu)?;
    let mut rng = Rng(8);
    let mut random = |len| rng.tensor(&[1, 1, len, D], DType::F32);
    cache.append(&random(n), &random(n))?;
    let (key, block) = (2 * D * 4, attn.config().window);
    assert_eq!(cache.memory().kv_bytes, n * key);
    for _ in 0..16 {
        let mut fork = cache.fork()?;
        fork.append(&random(added), &random(added))?;
        assert_eq!(fork.len(), n + added);
        let bytes = fork.memory().kv_bytes;
        assert!((added * key..(added + block) * key).contains(&bytes), "{bytes} bytes of {added} keys of {key}");
        // Room is made by doubling.
        assert!(fork.capacity() - n <= 2 * (added + block).max(128));
    }
    Ok(())
}

#[test]
fn threads_go_on_with_forks() -> Result<()> {
    let attn = attention()?;
    let mut cache = document(&attn, 1000)?;
    let forks = [cache.fork()?, cache.fork()?];
    let want = go_on(&attn, &mut document(&attn, 1000)?, 6, [10, 200])?;
    std::thread::scope(|scope| {
        let threads = forks.map(|mut fork| scope.spawn(move || go_on(&attention()?, &mut fork, 6, [10, 200])));
        let mut rng = Rng(11);
        for _ in 0..500 {
            let [_, k, v] = draw(&mut rng, 1);
            cache.append(&k, &v)?;
        }
        threads.into_iter().try_for_each(|thread| {
            assert_same("fork", &thread.join().expect("a thread that ends")?, &want);
            Ok(())
        })
    })
}
