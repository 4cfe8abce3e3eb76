//! Caches that take pages of a pool, beside the same ones in one piece.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::{
    load_caches, save_caches, PagePool, PqAttention, PqConfig, PqKvCache, SavedCaches, Selection, Tail,
};
use common::{assert_same_bits, integers, Rng};

const H: usize = 4;
const H_KV: usize = 2;
const D: usize = 16;
const PAGE: usize = PagePool::PAGE;

fn config() -> PqConfig {
    PqConfig { pq_bits: 5, coarse: 32, ..PqConfig::default() }
}

fn draw(rng: &mut Rng, b: usize, s: usize, dtype: DType) -> [Tensor; 3] {
    [H, H_KV, H_KV].map(|heads| rng.tensor(&[b, heads, s, D], dtype))
}

/// Two sequences that take pages in turn, so that those of neither lie together: prompts in chunks, trainings, steps.
#[test]
fn scattered_pages_equal_one_piece() -> Result<()> {
    let by_query = PqConfig { selection: Selection::PerQueryHead, tail: Tail::None, coarse: 0, ..config() };
    let wide = PqConfig { window: 300, ..config() };
    for (config, b, dtype) in
        [(config(), 1, DType::F32), (by_query, 2, DType::BF16), (wide, 1, DType::F16), (config(), 2, DType::F32)]
    {
        let attn = PqAttention::new(config.clone(), 0.25)?;
        let pool = PagePool::new(config, [b, H_KV, D], 40, dtype, &Device::Cpu)?;
        let mut paged = [pool.new_cache()?, pool.new_cache()?];
        let whole = || attn.new_cache([b, H_KV, D], 0, dtype, &Device::Cpu);
        let (mut whole, mut rng) = ([whole()?, whole()?], Rng(3));
        let mut is_sparse = false;
        for s in [150; 5].into_iter().chain([1; 330]).chain([200, 1, 1]) {
            for (paged, whole) in paged.iter_mut().zip(&mut whole) {
                let [q, k, v] = draw(&mut rng, b, s, dtype);
                let got = attn.forward(&q, &k, &v, paged)?;
                let what = format!("{s} positions behind {}", whole.len());
                assert_same_bits(&got, &attn.forward(&q, &k, &v, whole)?, &what);
                is_sparse |= s == 1 && !attn.config().is_dense(whole.len());
            }
        }
        assert!(is_sparse);
        for (paged, whole) in paged.iter().zip(&whole) {
            assert_same_bits(&paged.keys()?, &whole.keys()?, "keys");
            assert_same_bits(&paged.values()?, &whole.values()?, "values");
            assert_eq!(integers(&paged.codes()?), integers(&whole.codes()?));
            assert_eq!(paged.capacity(), paged.len().next_multiple_of(PAGE));
            assert_eq!(paged.memory(), whole.memory());
        }
    }
    Ok(())
}

/// What is there stays where it is, and what is dropped is there for others.
#[test]
fn pages_come_and_go() -> Result<()> {
    let (attn, mut rng) = (PqAttention::new(config(), 0.25)?, Rng(4));
    let pool = PagePool::new(config(), [1, H_KV, D], 20, DType::F32, &Device::Cpu)?;
    let mut random = |s: usize| rng.tensor(&[1, H_KV, s, D], DType::F32);
    let mut long = pool.new_cache()?;
    assert_eq!((long.capacity(), pool.free_pages()), (0, 20));
    long.append(&random(10 * PAGE), &random(10 * PAGE))?;
    // A view, which goes on to show what the memory has.
    let keys = long.keys()?;
    let address = |tensor: &Tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0).addr();
    let before = keys.copy()?;
    let mut short = pool.new_cache()?;
    short.append(&random(1), &random(1))?;
    long.append(&random(5 * PAGE), &random(5 * PAGE))?;
    assert_same_bits(&keys, &before, "keys that were there");
    assert_eq!((long.capacity(), short.capacity(), pool.free_pages()), (15 * PAGE, PAGE, 4));
    assert_ne!(address(&keys), address(&long.keys()?), "a copy of pages that lie apart");

    let too_many = short.append(&random(5 * PAGE), &random(5 * PAGE)).expect_err("more than there are");
    assert!(too_many.to_string().contains("expected 5 free pages, got 4 of 20"), "{too_many}");
    assert_eq!((short.len(), pool.free_pages()), (1, 4));
    drop(long);
    short.append(&random(5 * PAGE), &random(5 * PAGE))?;
    assert_eq!(pool.free_pages(), 20 - 6);
    short.reset()?;
    assert_eq!(pool.free_pages(), 20 - 6, "a reset keeps the memory");
    drop(short);

    // One that was saved, in pages again.
    let document = document(&attn, &pool, 1000)?;
    let file = tempfile::NamedTempFile::new()?;
    save_caches(file.path(), [&document], "")?;
    let SavedCaches { caches, .. } = load_caches(file.path(), 0, &Device::Cpu)?;
    let (mut document, mut copy) = (document, pool.copy_of(&caches[0])?);
    assert_eq!(pool.free_pages(), 20 - 16);
    for _ in 0..20 {
        let [q, k, v] = draw(&mut Rng(5), 1, 1, DType::F32);
        let got = attn.forward(&q, &k, &v, &mut copy)?;
        assert_same_bits(&got, &attn.forward(&q, &k, &v, &mut document)?, "a copy");
    }
    Ok(())
}

/// Copies and forks take no more pages than they need, and give back what they cannot use.
#[test]
fn pages_that_nobody_reads_are_not_copied() -> Result<()> {
    let (attn, dims) = (PqAttention::new(config(), 0.25)?, [1, 1, D]);
    let pool = PagePool::new(config(), dims, 24, DType::F32, &Device::Cpu)?;
    let mut rng = Rng(6);
    let mut random = |s: usize| rng.tensor(&[1, 1, s, D], DType::F32);
    let mut document = pool.new_cache()?;
    document.append(&random(10 * PAGE - 28), &random(10 * PAGE - 28))?;
    document.build_index()?;
    let mut copy = pool.copy_of(&document)?;
    assert_eq!(integers(&copy.codes()?), integers(&document.codes()?));
    assert_eq!(pool.free_pages(), 4);
    let [q, k] = [1, 1].map(&mut random);
    let outs = [&mut document, &mut copy].map(|cache| attn.forward(&q, &k, &k, cache));
    let [a, b] = outs;
    assert_same_bits(&a?, &b?, "a copy in the same pool");
    drop(copy);

    // Both go on from the first page: each has one of its own in its place.
    let mut forks = [document.fork()?, document.fork()?];
    assert_eq!(pool.free_pages(), 24 - 10 - 2);
    for fork in &mut forks {
        fork.truncate(1)?;
        fork.append(&random(1), &random(1))?;
        assert_eq!(fork.capacity(), PAGE);
    }
    assert_eq!(pool.free_pages(), 24 - 10 - 2);
    let keys = document.keys()?.copy()?;
    forks[0].append(&random(500), &random(500))?;
    assert_same_bits(&document.keys()?, &keys, "the document");

    // What is to be copied counts with what is to be added: a call that fails takes nothing.
    drop(forks);
    let fork = document.fork()?;
    document.truncate(1000)?;
    let (free, capacity) = (pool.free_pages(), document.capacity());
    let missing = (free + 1) * PAGE;
    assert!(document.append(&random(missing), &random(missing)).is_err());
    assert_eq!((pool.free_pages(), document.capacity(), document.len()), (free, capacity, 1000));
    drop(fork);
    Ok(())
}

fn document(attn: &PqAttention, pool: &PagePool, len: usize) -> Result<PqKvCache> {
    let mut cache = pool.new_cache()?;
    let [q, k, v] = draw(&mut Rng(1), 1, len, DType::F32);
    attn.forward(&q, &k, &v, &mut cache)?;
    cache.build_index()?;
    Ok(cache)
}

/// Sixteen continuations of a document: one page each of keys and values, and two at most of codes.
#[test]
fn forks_share_pages() -> Result<()> {
    let attn = PqAttention::new(PqConfig { refresh: 10.0, ..config() }, 0.25)?;
    let pages = 1000usize.div_ceil(PAGE);
    let pool = PagePool::new(attn.config().clone(), [1, H_KV, D], pages + 16 * 2, DType::F32, &Device::Cpu)?;
    let mut cache = document(&attn, &pool, 1000)?;
    let mut forks = (0..16).map(|_| cache.fork()).collect::<Result<Vec<_>>>()?;
    let kept = cache.keys()?.copy()?;
    let mut outs = Vec::new();
    for (i, fork) in forks.iter_mut().enumerate() {
        let mut rng = Rng(i as u64 / 2);
        for s in [20, 1, 1, 1] {
            let [q, k, v] = draw(&mut rng, 1, s, DType::F32);
            outs.push(attn.forward(&q, &k, &v, fork)?);
        }
        let added = fork.len() - (1000 / PAGE * PAGE);
        assert_eq!(fork.memory().kv_bytes, added * 2 * H_KV * D * 4);
        assert_same_bits(&cache.keys()?, &kept, "the document's");
    }
    for pair in outs.chunks_exact(8) {
        pair[..4].iter().zip(&pair[4..]).for_each(|(a, b)| assert_same_bits(a, b, "the same continuation"));
    }
    assert!(pool.free_pages() > 0);
    drop(cache);
    drop(forks.split_off(1));
    assert_eq!(pool.free_pages(), 16 * 2, "one has all pages");
    // It goes on in those that nobody else has.
    let mut fork = forks.remove(0);
    fork.truncate(100)?;
    let [_, k, v] = draw(&mut Rng(9), 1, 800, DType::F32);
    fork.append(&k, &v)?;
    fork.build_index()?;
    assert_eq!(pool.free_pages(), 16 * 2);
    Ok(())
}
