//! NaN and infinities in what a model hands in: they stay in their sequence and head, and leave with their positions.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::{Metric, PqAttention, PqConfig, PqKvCache, Selection};
use common::*;

/// Sequences, query heads, KV heads, elements of a head.
const B: usize = 2;
const H: usize = 4;
const H_KV: usize = 2;
const D: usize = 16;
const PROMPT: usize = 150;
const TOTAL: usize = 170;

/// Queries, keys and values of all positions.
struct Run {
    attn: PqAttention,
    qkv: [Tensor; 3],
}

/// What is put where: into queries (0), keys (1) or values (2) of a sequence and one of its heads.
#[derive(Debug, Clone, Copy)]
struct Poison {
    number: f32,
    part: usize,
    sequence: usize,
    head: usize,
    position: usize,
}

impl Poison {
    fn kv_head(&self) -> usize {
        if self.part == 0 {
            self.head / (H / H_KV)
        } else {
            self.head
        }
    }
}

fn configs() -> Vec<PqConfig> {
    let inner_product = PqConfig { metric: Metric::InnerProduct, ..small() };
    let bases = [small(), with_tail(), PqConfig { query_weights: true, coarse: 16, ..small() }, inner_product];
    let selections = [Selection::PerQueryHead, Selection::PerKvHead];
    bases.into_iter().flat_map(|base| selections.map(|selection| PqConfig { selection, ..base.clone() })).collect()
}

impl Run {
    fn new(config: &PqConfig, dtype: DType, poison: Option<Poison>) -> Result<Self> {
        let mut rng = Rng(5);
        let part = |(part, heads): (usize, usize)| -> Result<Tensor> {
            let mut numbers: Vec<f32> = (0..B * heads * TOTAL * D).map(|_| rng.normal()).collect();
            if let Some(poison) = poison.filter(|poison| poison.part == part) {
                let row = (poison.sequence * heads + poison.head) * TOTAL + poison.position;
                numbers[row * D + 3] = poison.number;
            }
            Tensor::from_vec(numbers, (B, heads, TOTAL, D), &Device::Cpu)?.to_dtype(dtype)
        };
        let qkv: Result<Vec<_>> = [(0, H), (1, H_KV), (2, H_KV)].into_iter().map(part).collect();
        let qkv = qkv?.try_into().expect("three tensors");
        Ok(Self { attn: PqAttention::new(config.clone(), 0.25)?, qkv })
    }

    fn cache(&self) -> Result<PqKvCache> {
        self.attn.new_cache([B, H_KV, D], 0, self.qkv[0].dtype(), &Device::Cpu)
    }

    fn forward(&self, cache: &mut PqKvCache, s: usize, dense: bool) -> Result<Tensor> {
        let from = cache.len();
        let [q, k, v] = [0, 1, 2].map(|part| self.qkv[part].narrow(2, from, s));
        let (q, k, v) = (q?, k?, v?);
        match dense {
            true => self.attn.forward_dense(&q, &k, &v, cache),
            false => self.attn.forward(&q, &k, &v, cache),
        }
    }

    /// The output of what is left of the prompt, then those of sparse steps, and of a dense one at the end.
    fn outs(&self, cache: &mut PqKvCache) -> Result<Vec<Tensor>> {
        let prompt = self.forward(cache, PROMPT - cache.len(), false)?;
        let steps = (PROMPT..TOTAL).map(|position| self.forward(cache, 1, position + 1 == TOTAL));
        std::iter::once(Ok(prompt)).chain(steps).collect()
    }
}

/// The output of a query head.
fn head(out: &Tensor, sequence: usize, head: usize) -> Result<Vec<f64>> {
    Ok(numbers(&out.narrow(0, sequence, 1)?.narrow(1, head, 1)?))
}

fn poisons() -> impl Iterator<Item = Poison> {
    // In the sink, among the keys trained on, in the window of the first steps, and in a step's own token.
    let positions = [1, 70, PROMPT - 2, PROMPT + 4];
    let numbers = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let parts = numbers.into_iter().flat_map(|number| (0..3).map(move |part| (number, part)));
    parts.flat_map(move |(number, part)| {
        positions.map(|position| Poison { number, part, sequence: 1, head: 1, position })
    })
}

#[test]
fn it_stays_in_its_sequence_and_head() -> Result<()> {
    for (config, dtype) in configs().iter().flat_map(|config| [DType::F32, DType::F16].map(|dtype| (config, dtype))) {
        let clean = Run::new(config, dtype, None)?;
        let clean = clean.outs(&mut clean.cache()?)?;
        for poison in poisons() {
            let run = Run::new(config, dtype, Some(poison))?;
            for (step, (got, want)) in run.outs(&mut run.cache()?)?.iter().zip(&clean).enumerate() {
                let dense = step == 0 || step + 1 == clean.len();
                for (sequence, query_head) in (0..B).flat_map(|b| (0..H).map(move |h| (b, h))) {
                    let of_group = (sequence, query_head / (H / H_KV)) == (poison.sequence, poison.kv_head());
                    let (got, want) = (head(got, sequence, query_head)?, head(want, sequence, query_head)?);
                    let what = format!("{config:?} {dtype:?} {poison:?} step {step} head {sequence} {query_head}");
                    // A query leaves the others of its group their numbers, but may choose keys for them.
                    let is_other_query = poison.part == 0 && query_head != poison.head;
                    if !of_group || (is_other_query && dense) {
                        assert!(got == want, "{what}");
                    } else if is_other_query {
                        assert!(got.iter().all(|x| x.is_finite()), "{what}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// It is not hidden either: dense attention to a value that is not finite is not finite, where the value is.
#[test]
fn it_shows_in_its_own_head() -> Result<()> {
    for number in [f32::NAN, f32::INFINITY] {
        let poison = Poison { number, part: 2, sequence: 1, head: 1, position: 70 };
        let run = Run::new(&with_tail(), DType::F32, Some(poison))?;
        let outs = run.outs(&mut run.cache()?)?;
        let last = head(&outs[TOTAL - PROMPT], 1, 2)?;
        assert!(!last[3].is_finite() && last[..3].iter().chain(&last[4..]).all(|x| x.is_finite()));
    }
    Ok(())
}

/// A cache that was truncated goes on as one that never had it.
#[test]
fn it_leaves_with_its_position() -> Result<()> {
    for config in configs() {
        let clean = Run::new(&config, DType::F32, None)?;
        let mut want_cache = clean.cache()?;
        clean.forward(&mut want_cache, 60, false)?;
        let want = clean.outs(&mut want_cache)?;
        for poison in poisons().filter(|poison| poison.position >= 60) {
            let run = Run::new(&config, DType::F32, Some(poison))?;
            let mut cache = run.cache()?;
            run.forward(&mut cache, 60, false)?;
            run.outs(&mut cache)?;
            cache.truncate(60)?;
            let got = clean.outs(&mut cache)?;
            for (got, want) in got.iter().zip(&want) {
                assert_same_bits(got, want, &format!("{config:?} {poison:?}"));
            }
        }
    }
    Ok(())
}
