//! On random weights and tensors, without network.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_pq_attn::Heavy;
use clap::Parser;
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::attend::{attend, top, Attended, Choose, Plan, Queries, Spread, Standins, Tail};
use crate::cli::{Args, Layers};
use crate::common::cli::usage_error;
use crate::common::config::{LayerKind, ModelConfig};
use crate::common::decoder::Decoder;
use crate::common::smollm2;
use crate::common::source::Checkpoint;
use crate::common::testing::{tiny_config, tiny_tensors, write_directory};
use crate::common::tokenizer::Codec;
use crate::common::weights::Weights;
use crate::measure::dense;
use crate::methods::{self, bounds, Prefill, Settings, Training};
use crate::subject::Subject;

const SETTINGS: Settings =
    Settings { sink: 4, window: 20, seed: 0, train_keys: usize::MAX, max_train_keys: usize::MAX };

/// Of the elements of a prefill's queries.
const SIZES: [f32; 16] = [8., 1., 1., 1., 1., 1., 1., 1., 4., 1., 1., 1., 1., 1., 1., 0.];

/// A layer's queries at the last positions, with keys that they tell apart.
struct Example {
    q: Tensor,
    keys: Tensor,
    values: Tensor,
}

impl Example {
    /// 4 query heads of 16 over 2 KV heads; the same numbers each time, about normal.
    fn new(queries: usize, keys: usize) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(1);
        let mut random = |heads: usize, n: usize| {
            let mut uniform = || rng.random_range(-1.5f32..1.5);
            let numbers: Vec<f32> = (0..heads * n * 16).map(|_| uniform() + uniform() + uniform()).collect();
            Tensor::from_vec(numbers, (heads, n, 16), &Device::Cpu)
        };
        Ok(Self { q: random(4, queries)?, keys: random(2, keys)?, values: random(2, keys)? })
    }

    fn queries(&self) -> Queries<'_> {
        Queries { q: &self.q, keys: &self.keys, values: &self.values, scale: 0.25 }
    }

    fn run(&self, method: &str, heavy: Heavy) -> Result<Attended> {
        self.run_after(self.keys.dim(1)? - self.q.dim(1)?, method, heavy)
    }

    /// With a prefill of so many keys.
    fn run_after(&self, prefill: usize, method: &str, heavy: Heavy) -> Result<Attended> {
        methods::parse(method)?.observe(&self.prefill(prefill)?)?.attend(&self.queries(), heavy)
    }

    /// Its queries are the keys, twice, with elements that count for more and less.
    fn prefill(&self, prefill: usize) -> Result<Prefill> {
        let keys = self.keys.narrow(1, 0, prefill)?.contiguous()?;
        let sizes = Tensor::new(&SIZES, &Device::Cpu)?;
        let queries = Tensor::cat(&[&keys.get(0)?, &keys.get(0)?, &keys.get(1)?, &keys.get(1)?], 0)?;
        let queries = queries.reshape((4, prefill, 16))?.broadcast_mul(&sizes)?;
        Ok(Prefill::new(keys, queries, SETTINGS))
    }
}

fn off(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar()?)
}

/// Softmax attention of one query by the book.
fn naive(example: &Example, head: usize, i: usize) -> Result<Vec<f64>> {
    let (q, keys) = (example.q.get(head)?.get(i)?.to_vec1::<f32>()?, example.keys.get(head / 2)?.to_vec2::<f32>()?);
    let values = example.values.get(head / 2)?.to_vec2::<f32>()?;
    let n = keys.len() - example.q.dim(1)? + i + 1;
    let dot = |key: &[f32]| q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
    let weights: Vec<f64> = keys[..n].iter().map(|key| (0.25 * dot(key)).exp()).collect();
    let sum: f64 = weights.iter().sum();
    Ok((0..16).map(|c| weights.iter().zip(&values).map(|(w, v)| w * f64::from(v[c])).sum::<f64>() / sum).collect())
}

#[test]
fn dense_is_softmax_attention_by_the_book() -> Result<()> {
    let example = Example::new(35, 100)?;
    let out = dense(&example.queries())?.out.to_vec3::<f32>()?;
    for (head, i) in [(0, 0), (1, 34), (2, 31), (3, 32)] {
        let expected = naive(&example, head, i)?;
        let off = out[head][i].iter().zip(expected).map(|(x, e)| (f64::from(*x) - e).abs()).fold(0., f64::max);
        assert!(off < 1e-5, "head {head}, query {i}: off by {off}");
    }
    Ok(())
}

#[test]
fn with_every_key_every_method_is_dense() -> Result<()> {
    let example = Example::new(40, 400)?;
    let dense = dense(&example.queries())?;
    for method in methods::DEFAULT.iter().filter(|method| **method != "edges") {
        let all = example.run(method, Heavy::Fraction(1.))?;
        assert!(off(&all.out, &dense.out)? < 1e-5, "{method}");
        let few = example.run(method, Heavy::Keys(1))?;
        assert!(off(&few.out, &dense.out)? > 1e-3, "{method} with one key is dense too");
    }
    assert!(off(&example.run("edges", Heavy::Fraction(1.))?.out, &dense.out)? > 1e-3);
    Ok(())
}

#[test]
fn with_every_key_there_is_no_tail() -> Result<()> {
    let example = Example::new(40, 400)?;
    for (heavy, same) in [(Heavy::Fraction(1.), true), (Heavy::Keys(300), false)] {
        let (with, without) = (example.run("clusters", heavy)?, example.run("clusters:tail=none", heavy)?);
        assert_eq!(off(&with.out, &without.out)? == 0., same, "{heavy}");
        let tail = with.tail.unwrap();
        assert!(without.tail.is_none() && tail.iter().all(|tail| (*tail == f64::NEG_INFINITY) == same), "{heavy}");
    }
    Ok(())
}

#[test]
fn masses_are_shares_and_no_choice_covers_more_than_the_oracle() -> Result<()> {
    let example = Example::new(40, 400)?;
    let (dense, heavy) = (dense(&example.queries())?, Heavy::Keys(32));
    let oracle = example.run("oracle", heavy)?.mass;
    for method in methods::DEFAULT {
        let attended = example.run(method, heavy)?;
        for (i, mass) in attended.mass.iter().enumerate() {
            let share = (mass - dense.mass[i]).exp();
            assert!(share > 0. && share < 1., "{method}, query {i}: {share}");
            assert!(*mass < oracle[i] + 1e-5, "{method}, query {i} covers more than the oracle");
        }
        let oracle_chooses = ["oracle", "oracle+tail"].contains(&method);
        let equal = attended.mass.iter().zip(&oracle).all(|(mass, oracle)| (mass - oracle).abs() < 1e-5);
        assert_eq!(equal, oracle_chooses, "{method}");
    }
    Ok(())
}

#[test]
fn quests_bound_holds() -> Result<()> {
    let (sink, page) = (4, 16);
    let example = Example::new(3, 100)?;
    let bounds = bounds(&example.keys, sink, page)?;
    let (mut touched, mut pages) = (0, 0);
    for head in 0..4 {
        let scores = example.q.get(head)?.matmul(&example.keys.get(head / 2)?.t()?)?.to_vec2::<f32>()?;
        let (largest, smallest) = (bounds.get(head / 2)?.narrow(1, 0, 16)?, bounds.get(head / 2)?.narrow(1, 16, 16)?);
        let q = example.q.get(head)?;
        let bound = (q.relu()?.matmul(&largest.t()?)? - q.neg()?.relu()?.matmul(&smallest.t()?)?)?.to_vec2::<f32>()?;
        for (scores, bound) in scores.iter().zip(bound) {
            for (scores, bound) in scores[sink..].chunks(page).zip(bound) {
                let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert!(bound >= best - 1e-4, "{bound} < {best}");
                touched += usize::from(bound < 3. * best.abs());
                pages += 1;
            }
        }
    }
    // A bound that is never near says nothing.
    assert!(touched > pages / 4, "{touched} of {pages}");
    Ok(())
}

/// A tail in which each key is a cluster of its own and has its own score makes attention dense, whatever is chosen.
#[test]
fn a_tail_of_exact_keys_is_dense() -> Result<()> {
    let example = Example::new(35, 250)?;
    let keys = example.keys.narrow(1, SETTINGS.sink, 250 - SETTINGS.sink)?.contiguous()?;
    let own: Vec<Vec<u8>> = vec![(0..=255).take(250 - SETTINGS.sink).collect(); 2];
    let one = vec![vec![0u8; 250 - SETTINGS.sink]; 2];
    let dense = dense(&example.queries())?;
    for (clusters, rest, heavy, exact) in
        [(&own, false, 7, true), (&own, true, 7, true), (&own, true, 0, true), (&one, false, 7, false)]
    {
        let tail = Some(Tail { by: &keys, clusters, rest, spread: Spread::Ignored });
        let choose = Some(Choose { heavy: Heavy::Keys(heavy), by: Standins::Keys(&keys), per_kv_head: false });
        let plan = Plan { sink: SETTINGS.sink, window: SETTINGS.window, choose, tail };
        let attended = attend(&example.queries(), &plan)?;
        assert_eq!(off(&attended.out, &dense.out)? < 1e-5, exact, "rest {rest}, heavy {heavy}");
        let tails = attended.tail.unwrap();
        for ((mass, tail), dense) in attended.mass.iter().zip(tails).zip(&dense.mass) {
            assert!((mass.exp() + tail.exp() - dense.exp()).abs() < 1e-4 * dense.exp());
        }
    }
    Ok(())
}

#[test]
fn means_of_the_rest_leave_out_what_was_chosen() -> Result<()> {
    // One cluster: the tail's value is the mean of all keys that were not chosen.
    let example = Example::new(1, 60)?;
    let keys = example.keys.narrow(1, 0, 60)?.contiguous()?;
    let zero = keys.zeros_like()?;
    let clusters = vec![vec![0u8; 60]; 2];
    let tail = Some(Tail { by: &zero, clusters: &clusters, rest: true, spread: Spread::Ignored });
    let choose = Some(Choose { heavy: Heavy::Keys(59), by: Standins::Keys(&keys), per_kv_head: false });
    let out = attend(&example.queries(), &Plan { sink: 0, window: 0, choose, tail })?.out.to_vec3::<f32>()?;
    for (head, out) in out.iter().enumerate() {
        let scores = example.q.get(head)?.matmul(&keys.get(head / 2)?.t()?)?.get(0)?.to_vec1::<f32>()?;
        let worst = (0..60).min_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap();
        let weights: Vec<f32> = (0..60).map(|t| if t == worst { 1. } else { (0.25 * scores[t]).exp() }).collect();
        let values = example.values.get(head / 2)?.to_vec2::<f32>()?;
        let sum: f32 = weights.iter().sum();
        for c in 0..16 {
            let expected = weights.iter().zip(&values).map(|(w, v)| w * v[c]).sum::<f32>() / sum;
            assert!((out[0][c] - expected).abs() < 1e-4, "{} {expected}", out[0][c]);
        }
    }
    Ok(())
}

#[test]
fn spreads_agree_where_they_say_the_same() -> Result<()> {
    let example = Example::new(5, 60)?;
    let zero = example.keys.zeros_like()?;
    let clusters = vec![(0..60).map(|t| t % 3).collect::<Vec<u8>>(); 2];
    let diagonal = Tensor::full(0.5f32, (2, 1, 16), &Device::Cpu)?;
    let by_cluster = Tensor::full(0.5f32, (2, 3, 16), &Device::Cpu)?;
    let full = (Tensor::eye(16, DType::F32, &Device::Cpu)? * 0.5)?.unsqueeze(0)?.repeat((2, 1, 1))?;
    let tail = |spread| -> Result<Vec<f64>> {
        let tail = Some(Tail { by: &zero, clusters: &clusters, rest: false, spread });
        Ok(attend(&example.queries(), &Plan { sink: 0, window: 0, choose: None, tail })?.tail.unwrap())
    };
    let expected = tail(Spread::Diagonal(&diagonal))?;
    for i in 0..5 {
        let norm = example.q.get(2)?.get(i)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
        let by_hand = (55. + i as f64 + 1.).ln() + 0.5 * 0.0625 * 0.5 * f64::from(norm);
        assert!((expected[2 * 5 + i] - by_hand).abs() < 1e-4);
    }
    for spread in [Spread::Diagonal(&by_cluster), Spread::Full(&full)] {
        assert!(tail(spread)?.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4));
    }
    Ok(())
}

#[test]
fn ties_go_to_the_lower_position() {
    assert_eq!(top(&[1., 3., 2., 3., 2., 3.], 4), [false, true, true, true, false, true]);
    assert_eq!(top(&[1., 1., 1.], 2), [true, true, false]);
    assert_eq!(top(&[1., 2.], 0), [false, false]);
    assert_eq!(top(&[1., 2.], 9), [true, true]);
}

/// A model of random weights that has read 600 random tokens and 40 more.
fn tiny() -> Result<Subject> {
    subject("llama", &ModelConfig { context: 1024, ..tiny_config() })
}

fn subject(model_type: &str, config: &ModelConfig) -> Result<Subject> {
    let directory = tempfile::tempdir()?;
    write_directory(directory.path(), model_type, config, &tiny_tensors(config)?, 1)?;
    let checkpoint = Checkpoint::open(directory.path().to_str().unwrap())?;
    let decoder = Decoder::new(config, Weights::new(checkpoint, config, DType::F32, &Device::Cpu)?)?;
    let tokens = (0..641u32).map(|i| i.wrapping_mul(2_654_435_761) % 250).collect();
    Subject::read(decoder, config, tokens, 600, &ProgressBar::hidden())
}

/// With a window in the first of two layers.
fn sliding() -> ModelConfig {
    let layer_kinds = vec![LayerKind::Sliding(8), LayerKind::Global];
    let gemma = ModelConfig { gemma: true, qk_norm: true, tied_embeddings: true, ..tiny_config() };
    ModelConfig { context: 1024, layer_kinds, query_pre_attn_scalar: Some(16.), local_rope_theta: Some(100.), ..gemma }
}

#[test]
fn layers_with_a_window_stay_as_they_are() -> Result<()> {
    let subject = subject("gemma3_text", &sliding())?;
    let mut replaced = Vec::new();
    let same = subject.predict(|layer, queries| {
        replaced.push(layer);
        Ok(dense(queries)?.out)
    })?;
    assert_eq!((replaced, subject.global_layers()), (vec![1], vec![1]));
    assert!(same.kl < 1e-8 && same.top1_agreement == 1., "{same:?}");
    Ok(())
}

#[test]
fn the_whole_model_is_dense_with_every_key_and_not_with_few() -> Result<()> {
    let subject = tiny()?;
    let prefill = |layer| Ok(Prefill::new(subject.prefill_keys(layer)?, subject.prefill_queries(layer)?, SETTINGS));
    let prefills = (0..subject.layers()).map(prefill).collect::<Result<Vec<_>>>()?;
    for method in methods::DEFAULT.iter().filter(|method| **method != "edges") {
        let layers: Vec<_> =
            prefills.iter().map(|prefill| methods::parse(method)?.observe(prefill)).collect::<Result<_>>()?;
        let predict = |heavy| subject.predict(|layer, queries| Ok(layers[layer].attend(queries, heavy)?.out));
        let all = predict(Heavy::Fraction(1.))?;
        assert!(all.kl < 1e-9 && all.top1_agreement == 1., "{method}: {all:?}");
        assert!((all.perplexity / subject.dense()?.perplexity - 1.).abs() < 1e-4);
        let few = predict(Heavy::Keys(1))?;
        assert!(few.kl > 1e-7 && few.kl_error > 0., "{method}: {few:?}");
    }
    Ok(())
}

/// Two ways to compute the same, but that the library's means count the keys of a block that has begun to leave the window.
#[test]
fn the_library_agrees_with_the_loops() -> Result<()> {
    let example = Example::new(40, 400)?;
    let norm = |x: Tensor| -> Result<f32> { Ok(x.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?) };
    for (select, loops) in [("query-head", "clusters"), ("kv-head", "clusters:select=kv-head")] {
        let library = example.run(&format!("pq:8x8:coarse=256:tail=means:select={select}"), Heavy::Keys(16))?;
        let loops = example.run(loops, Heavy::Keys(16))?;
        let without = example.run("clusters:tail=none", Heavy::Keys(16))?;
        let off = norm((&library.out - &loops.out)?)? / norm(loops.out.clone())?;
        let tail = norm((&without.out - &loops.out)?)? / norm(loops.out)?;
        assert!(off < 0.2 * tail, "{select}: off by {off}, where the tail makes {tail}");
        let same = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-3);
        assert!(same(&library.mass, &loops.mass), "{select}: masses");
        assert!(same(&library.tail.unwrap(), &loops.tail.unwrap()), "{select}: tails");
    }
    Ok(())
}

/// Estimates of the tail are best where the codes know what queries look at.
#[test]
fn weights_are_for_the_queries_they_come_from() -> Result<()> {
    let mut example = Example::new(40, 800)?;
    example.q = (example.q.broadcast_mul(&Tensor::new(&SIZES, &Device::Cpu)?)? * 0.5)?;
    let dense = dense(&example.queries())?;
    let error = |method: &str| -> Result<f32> {
        let out = example.run(method, Heavy::Keys(8))?.out;
        Ok((out - &dense.out)?.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt())
    };
    let (none, diagonal, pairs) = (
        error("clusters:codes=4x4:n=16")?,
        error("clusters:codes=4x4:n=16:weigh=diagonal")?,
        error("clusters:codes=4x4:n=16:weigh=pairs")?,
    );
    assert!(diagonal < 0.9 * none && pairs < 0.9 * none, "{none}, weighted {diagonal}, in pairs {pairs}");
    let (none, library) = (error("pq:4x4:coarse=16:tail=means")?, error("pq:4x4:coarse=16:tail=means:weigh=queries")?);
    assert!(library < 0.9 * none, "{none}, weighted by the library {library}");
    Ok(())
}

#[test]
fn weights_are_mean_squares() -> Result<()> {
    let queries =
        Tensor::new(&[[[1f32, 2., 0., 4.], [3., 2., 0., 4.]], [[1., 2., 0., 4.], [3., 2., 0., 8.]]], &Device::Cpu)?;
    let weights = |options: &[(&str, &str)]| -> Result<Vec<f32>> {
        let mut training = Training::default();
        for (name, text) in options {
            assert!(training.option(name, text)?);
        }
        Ok(training.weights(&queries, 1)?.flatten_all()?.sqr()?.to_vec1()?)
    };
    let off = |a: Vec<f32>, b: [f32; 4]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0., f32::max);
    assert!(off(weights(&[("weigh", "diagonal")])?, [5., 4., 0., 28.]) < 0.01);
    assert!(off(weights(&[("weigh", "pairs")])?, [2.5, 16., 2.5, 16.]) < 0.01);
    assert!(off(weights(&[("weigh", "diagonal"), ("queries", "1")])?, [1., 4., 0., 16.]) < 0.01);
    let none = weights(&[])?;
    assert!(none.iter().all(|x| *x == none[0]), "{none:?}");
    Ok(())
}

#[test]
fn half_of_a_sample_is_recent() -> Result<()> {
    let keys = Tensor::arange(0f32, 16., &Device::Cpu)?.reshape((1, 1, 16, 1))?;
    for (options, expected) in [
        (&[][..], (0..16).collect::<Vec<_>>()),
        (&[("sample", "0.25")], vec![0, 4, 8, 12]),
        (&[("recent", "half"), ("sample", "0.5")], vec![0, 3, 6, 9, 12, 13, 14, 15]),
        (&[("recent", "half")], vec![0, 1, 3, 4, 6, 7, 9, 10, 12, 12, 13, 13, 14, 14, 15, 15]),
    ] {
        let mut training = Training::default();
        for (name, text) in options {
            assert!(training.option(name, text)?);
        }
        let sample = training.sample(&keys, usize::MAX)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(sample, expected.iter().map(|x| *x as f32).collect::<Vec<_>>(), "{options:?}");
    }
    Ok(())
}

/// Training anew at 360 + 36 keys: queries before are as without, those after as with a prefill of that length.
#[test]
fn growth_trains_anew() -> Result<()> {
    let example = Example::new(40, 400)?;
    let heavy = Heavy::Keys(8);
    let (grown, frozen) = (example.run("clusters:grow=0.1", heavy)?, example.run("clusters", heavy)?);
    let fresh = example.run_after(396, "clusters", heavy)?;
    let part = |x: &Tensor, from| x.narrow(1, from, 36.min(40 - from));
    assert!(off(&part(&grown.out, 0)?, &part(&frozen.out, 0)?)? < 1e-6);
    assert!(off(&part(&grown.out, 36)?, &part(&fresh.out, 36)?)? < 1e-6);
    assert!(off(&part(&fresh.out, 36)?, &part(&frozen.out, 36)?)? > 1e-4);
    for (a, b) in [(&grown.mass, &fresh.mass), (&grown.tail.unwrap(), &fresh.tail.unwrap())] {
        assert!((0..4).all(|head| (36..40).all(|i| (a[head * 40 + i] - b[head * 40 + i]).abs() < 1e-6)));
    }
    Ok(())
}

/// As the loops do, but that a step of the library's counts its own key.
#[test]
fn the_library_grows() -> Result<()> {
    let example = Example::new(40, 400)?;
    let (frozen, heavy) = ("pq:8x4:coarse=16:tail=means", Heavy::Keys(8));
    let grown = example.run(&format!("{frozen}:grow=0.1"), heavy)?.out;
    let (frozen, fresh) = (example.run(frozen, heavy)?.out, example.run_after(396, frozen, heavy)?.out);
    let same = |other: &Tensor, from, len| -> Result<bool> {
        Ok(off(&grown.narrow(1, from, len)?, &other.narrow(1, from, len)?)? < 1e-6)
    };
    assert!(same(&frozen, 0, 35)? && same(&fresh, 35, 5)? && !same(&frozen, 35, 5)?);
    Ok(())
}

/// What lies beyond a query does not reach it.
#[test]
fn queries_see_no_later_keys() -> Result<()> {
    let example = Example::new(40, 400)?;
    let later = |x: &Tensor| Tensor::cat(&[x.narrow(1, 0, 380)?, x.narrow(1, 380, 20)?.affine(-3., 1.)?], 1);
    let changed = Example { q: example.q.clone(), keys: later(&example.keys)?, values: later(&example.values)? };
    let growing =
        ["clusters:weigh=diagonal:recent=half:grow=0.02", "pq:8x4:coarse=16:tail=means:weigh=queries:grow=0.02"];
    for method in methods::DEFAULT.into_iter().chain(growing) {
        let [a, b] = [&example, &changed].map(|example| example.run(method, Heavy::Keys(16)));
        let (a, b) = (a?.out, b?.out);
        assert!(off(&a.narrow(1, 0, 20)?, &b.narrow(1, 0, 20)?)? < 1e-6, "{method}");
        assert!(off(&a.narrow(1, 20, 20)?, &b.narrow(1, 20, 20)?)? > 1e-3, "{method}");
    }
    Ok(())
}

/// All positions at once are the same as one after the other.
#[test]
fn queries_do_not_depend_on_each_other() -> Result<()> {
    let example = Example::new(40, 400)?;
    let weighted = ["clusters:weigh=pairs:recent=half", "pq:8x4:coarse=16:tail=means:weigh=queries:grow=0.03"];
    for method in methods::DEFAULT.into_iter().chain(weighted) {
        let together = example.run(method, Heavy::Keys(16))?.out;
        for i in [0, 31, 32, 39] {
            let upto = |x: &Tensor| x.narrow(1, 0, 361 + i)?.contiguous();
            let q = example.q.narrow(1, i, 1)?.contiguous()?;
            let alone = Example { q, keys: upto(&example.keys)?, values: upto(&example.values)? };
            let alone = alone.run_after(360, method, Heavy::Keys(16))?.out;
            assert!(off(&alone, &together.narrow(1, i, 1)?)? < 1e-5, "{method}, query {i}");
        }
    }
    Ok(())
}

#[test]
fn the_bundled_text_fills_the_models_context() -> Result<()> {
    let Some(file) = smollm2::cached().ok().filter(|file| file.is_file()) else {
        eprintln!("skipped: run the example once to fetch the model");
        return Ok(());
    };
    let codec = Codec::new(&mut Checkpoint::open(file.to_str().unwrap())?)?;
    let tokens = codec.encode_plain(&Args::try_parse_from(["fidelity"])?.text()?.content)?.len();
    assert!(tokens > 8_192, "{tokens} tokens");
    Ok(())
}

#[test]
fn bad_flags_are_one_line() {
    for (args, expected) in [
        (&["--heavy", "1%,0%"][..], "'0%' for '--heavy <N|P%>'"),
        (&["--heavy", "many"], "a number of keys such as 512 or a share such as 2%"),
        (&["--prompt-tokens", "0"], "expected a number from 1 up"),
        (&["--eval-tokens", "-3"], "error: "),
        (&["--layers", "some"], "expected all, or numbers of layers such as 0,3,6"),
        (&["--measure", "speed"], "[possible values: layers, model, both]"),
        (&["--seed", "x"], "invalid digit"),
        (&["--bogus"], "unexpected argument '--bogus' found"),
    ] {
        let error = Args::try_parse_from([&["fidelity"], args].concat()).unwrap_err();
        let line = usage_error(&error.to_string());
        assert!(line.starts_with("error: ") && line.contains(expected) && !line.contains('\n'), "{args:?}: {line}");
    }
}

#[test]
fn bad_methods_say_what_is_expected() -> Result<()> {
    for (name, expected) in [
        ("magic", "expected one of edges, oracle, quest, pq:MxB"),
        ("oracle:n=3", "expected no options"),
        ("quest:0", "expected keys a page"),
        ("pq", "expected pq:MxB"),
        ("pq:8", "expected MxB"),
        ("pq:8x9", "codes of 1 to 8 bits"),
        ("pq:8x8:weigh=pairs", "such as coarse=256; got \"weigh=pairs\""),
        ("pq:8x8:grow=often", "such as coarse=256; got \"grow=often\""),
        ("pq:8x8:select=all", "such as coarse=256; got \"select=all\""),
        ("ours:n=64", "ours:n=64: expected options as --help lists them"),
        ("ours-kv:codes=8x9", "codes of 1 to 8 bits"),
        ("clusters:n=100", "n: expected 2, 4, 8, ... or 256"),
        ("clusters:codes=0x8", "expected MxB"),
        ("clusters:tail=some", "got \"tail=some\""),
        ("clusters:weigh=all", "expected none, diagonal or pairs"),
        ("clusters:recent=3", "expected none or half"),
        ("clusters:rounds=0", "rounds: expected a number from 1 up"),
        ("clusters:sample=-1", "sample: expected a number above 0"),
        ("clusters:grow=x", "grow: expected a number above 0"),
    ] {
        let error = format!("{:#}", methods::parse(name).err().unwrap());
        assert!(error.contains(expected), "{name}: {error}");
    }
    let example = Example::new(4, 400)?;
    for (name, expected) in [
        ("pq:8x8:grow=0", "refresh: expected a finite share above 0"),
        ("pq:5x8", "pq_dim: expected a divisor"),
        ("clusters:codes=5x8", "expected a divisor of"),
    ] {
        let error = format!("{:#}", example.run(name, Heavy::Keys(8)).err().unwrap());
        assert!(error.contains(expected), "{name}: {error}");
    }
    Ok(())
}

/// A whole run on a tiny model, with its files.
#[test]
fn a_run_has_a_table_json_and_a_plot() -> Result<()> {
    let config = ModelConfig { context: 1024, ..tiny_config() };
    let directory = tempfile::tempdir()?;
    write_directory(directory.path(), "llama", &config, &tiny_tensors(&config)?, 1)?;
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_string();
    std::fs::write(path("one.txt"), "a long story ".repeat(30))?;
    std::fs::write(path("two.txt"), "of something else ".repeat(20))?;
    let run = |args: &[&str]| {
        let (model, one, two) = (path(""), path("one.txt"), path("two.txt"));
        let given = ["fidelity", "--model", &model, "--text", &one, &two, "--eval-tokens", "30", "--window", "8"];
        crate::run(&Args::try_parse_from([&given[..], args].concat())?)
    };
    let (json, svg) = (path("out.json"), path("out.svg"));
    let methods = ["--methods", "edges,oracle,ours", "--heavy", "2%,10%", "--layers", "1"];
    let files = ["--prompt-tokens", "500", "--json", &json, "--plot", &svg];
    let table = run(&[&methods[..], &files].concat())?.to_string();
    assert!(table.contains("one.txt + two.txt") && table.contains("oracle top-k") && table.contains("10%"), "{table}");
    let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    let ours = &json["methods"][2];
    assert_eq!((ours["bytes_per_key"].as_f64(), ours["runs"][1]["share"].as_f64()), (Some(9.), Some(0.1)));
    let mass = |run: usize| ours["runs"][run]["layers"][0]["mass"].as_f64().unwrap();
    assert!(0. < mass(0) && mass(0) < mass(1) && mass(1) < 1. && ours["runs"][0]["model"]["kl"].as_f64() > Some(0.));
    let layers = ours["runs"][0]["layers"].as_array().unwrap();
    assert!(layers.len() == 1 && layers[0]["layer"] == 1 && layers[0]["tail_estimated"].as_f64() > Some(0.));
    assert_eq!(json["text_sha256"].as_str().unwrap().len(), 64);
    let svg = std::fs::read_to_string(&svg)?;
    assert!(svg.starts_with("<svg") && svg.contains("residuals + tail") && svg.contains("KL(dense"));

    for (args, expected) in [
        (&["--prompt-tokens", "1000"][..], "expected at most 1024 together, the model's context; got 1030"),
        (&["--prompt-tokens", "900"], "expected more than 930 tokens"),
        (&["--prompt-tokens", "500", "--layers", "1,2"], "--layers: expected numbers below 2, got 2"),
        (&["--prompt-tokens", "500", "--train-tokens", "3", "--methods", "ours"], "raise --train-tokens"),
        (&["--methods", "magic"], "--methods magic: expected one of"),
    ] {
        let error = format!("{:#}", run(args).unwrap_err());
        assert!(error.contains(expected), "{args:?}: {error}");
    }
    let gemma3 = sliding();
    write_directory(directory.path(), "gemma3_text", &gemma3, &tiny_tensors(&gemma3)?, 1)?;
    let small = ["--prompt-tokens", "500", "--methods", "ours", "--heavy", "5%"];
    let error = run(&[&small[..], &["--layers", "0,1"]].concat()).unwrap_err().to_string();
    assert!(error.contains("expected some of [1], which attend to all keys; got 0"), "{error}");
    let report = run(&small)?;
    let layers: Vec<_> = report.methods[0].runs[0].layers.iter().map(|layer| layer.layer).collect();
    assert!(layers == [1] && report.methods[0].runs[0].model.is_some());
    let all = ModelConfig { layers: 3, layer_kinds: vec![LayerKind::Sliding(8); 3], ..config };
    assert!(Layers::All.of(&all).unwrap_err().to_string().contains("got a sliding window in each"));
    assert_eq!(Layers::All.of(&ModelConfig { layer_kinds: vec![], ..all })?, [0, 1, 2]);
    Ok(())
}
