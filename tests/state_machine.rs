//! Random sequences of everything that can be done to a cache, beside a model of it that is plain numbers.
//!
//! `STATE_MACHINE_CASES` says how many sequences; each is of up to 24 operations over a config of its own.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{self, Geometry};
use candle_pq_attn::{
    load_caches, save_caches, Heavy, Metric, PagePool, PqAttention, PqConfig, PqKvCache, SavedCaches, Selection, Tail,
};
use common::{assert_close, assert_same_bits, attend, integers, numbers, Rng};
use proptest::collection::vec;
use proptest::prelude::*;

const H_KV: usize = 2;
const GROUP: usize = 2;
const D: usize = 8;
const SCALE: f32 = 0.35;
/// What the budget has room for.
const MAX_KEYS: usize = 400;

/// What is done next; counts are of keys, shares of what is there.
#[derive(Debug, Clone)]
enum Op {
    Append(usize),
    Prefill(usize),
    Step,
    DenseStep,
    Run(usize),
    /// So many positions of this cache, and one of each of the others.
    Packed(usize),
    Truncate(f64),
    Reset,
    BuildIndex,
    Reserve(usize),
    SaveAndLoad,
    /// Goes on in the fork, or in what it was made of.
    Fork(bool),
    /// Goes on in another of the caches that forks left.
    Switch(usize),
    Drop(usize),
    Fail(Failure),
}

/// A call that is an error.
#[derive(Debug, Clone)]
enum Failure {
    Query,
    Keys,
    Values,
    Truncate,
    Prefill,
    Budget,
}

fn op() -> impl Strategy<Value = Op> {
    use Failure::*;
    prop_oneof![
        2 => (0usize..60).prop_map(Op::Append),
        2 => (2usize..60).prop_map(Op::Prefill),
        6 => Just(Op::Step),
        1 => Just(Op::DenseStep),
        2 => (1usize..9).prop_map(Op::Run),
        2 => (1usize..4).prop_map(Op::Packed),
        2 => (0f64..=1.).prop_map(|share| Op::Truncate(1. - share * share)),
        1 => Just(Op::Reset),
        2 => Just(Op::BuildIndex),
        1 => (0usize..300).prop_map(Op::Reserve),
        1 => Just(Op::SaveAndLoad),
        2 => any::<bool>().prop_map(Op::Fork),
        2 => (0usize..3).prop_map(Op::Switch),
        1 => (0usize..3).prop_map(Op::Drop),
        2 => prop_oneof![Just(Query), Just(Keys), Just(Values), Just(Truncate), Just(Prefill), Just(Budget)].prop_map(Op::Fail),
    ]
}

fn config() -> impl Strategy<Value = PqConfig> {
    let sizes = (
        0usize..4,
        0usize..12,
        prop_oneof![(1usize..20).prop_map(Heavy::Keys), (0.01f64..=1.).prop_map(Heavy::Fraction)],
    );
    let index =
        (prop_oneof![Just(0usize), Just(4), Just(16)], any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let rest = (prop_oneof![Just(0.0625), Just(0.5), Just(f64::MAX)], prop::option::of(0usize..6), any::<u64>());
    (sizes, index, rest).prop_map(
        |((sink, window, heavy), (coarse, tail, query_weights, inner_product, per_kv), rest)| {
            let metric = if inner_product && coarse == 0 { Metric::InnerProduct } else { Metric::Euclidean };
            PqConfig {
                sink,
                window,
                heavy,
                pq_dim: 4,
                pq_bits: 3,
                kmeans_iters: 2,
                max_train_keys: 64,
                coarse,
                tail: if tail && coarse > 0 { Tail::ClusterMeans } else { Tail::None },
                query_weights: query_weights && metric == Metric::Euclidean,
                metric,
                selection: if per_kv { Selection::PerKvHead } else { Selection::PerQueryHead },
                refresh: rest.0,
                init_offset: rest.1,
                seed: rest.2,
            }
        },
    )
}

/// The most caches beside the one that is worked with.
const OTHERS: usize = 3;

/// The cache, and what is in it: keys and values of each of `b * H_KV` heads.
struct Machine {
    attn: PqAttention,
    cache: PqKvCache,
    /// Where the caches are in pages.
    pool: Option<PagePool>,
    b: usize,
    max_bytes: usize,
    rng: Rng,
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
    /// Caches that forks left, with what is in them.
    others: Vec<Other>,
}

struct Other {
    cache: PqKvCache,
    seen: Snapshot,
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
}

impl Machine {
    fn new(config: PqConfig, b: usize, is_paged: bool) -> Result<Self> {
        // For this cache, the others, one that is loaded and forks that train anew.
        const PAGES: usize = 2 * (OTHERS + 2) * MAX_KEYS.div_ceil(PagePool::PAGE);
        let (attn, dims) = (PqAttention::new(config.clone(), SCALE)?, [b, H_KV, D]);
        let pool = is_paged.then(|| PagePool::new(config, dims, PAGES, DType::F32, &Device::Cpu)).transpose()?;
        let mut cache = match &pool {
            Some(pool) => pool.new_cache()?,
            None => attn.new_cache(dims, 0, DType::F32, &Device::Cpu)?,
        };
        // Room for an index, whatever the config, and for all that `MAX_KEYS` take.
        let max_bytes = b * H_KV * (MAX_KEYS.next_multiple_of(PagePool::PAGE) * (2 * D * 4 + 5) + 8192);
        cache.set_max_bytes(max_bytes)?;
        let heads = vec![Vec::new(); b * H_KV];
        Ok(Self {
            attn,
            cache,
            pool,
            b,
            max_bytes,
            rng: Rng(17),
            keys: heads.clone(),
            values: heads,
            others: Vec::new(),
        })
    }

    fn len(&self) -> usize {
        self.keys[0].len() / D
    }

    /// Queries, keys and values of `s` positions.
    fn draw(&mut self, s: usize) -> [Tensor; 3] {
        [H_KV * GROUP, H_KV, H_KV].map(|heads| self.rng.tensor(&[self.b, heads, s, D], DType::F32))
    }

    fn push(&mut self, keys: &Tensor, values: &Tensor) {
        for (to, from) in [(&mut self.keys, numbers(keys)), (&mut self.values, numbers(values))] {
            let head = from.len() / to.len();
            to.iter_mut().zip(from.chunks(head.max(1))).for_each(|(to, from)| to.extend(from));
        }
    }

    fn run(&mut self, op: &Op) -> Result<()> {
        match *op {
            Op::Append(s) | Op::Prefill(s) | Op::Run(s) if self.len() + s > MAX_KEYS => {}
            Op::Append(s) => {
                let [_, k, v] = self.draw(s);
                self.cache.append(&k, &v)?;
                self.push(&k, &v);
            }
            Op::Prefill(s) => {
                let [q, k, v] = self.draw(s);
                let out = self.attn.forward(&q, &k, &v, &mut self.cache)?;
                self.push(&k, &v);
                for position in 0..s {
                    let visible = self.len() - s + position + 1;
                    self.check_dense(&q.narrow(2, position, 1)?, &out.narrow(2, position, 1)?, visible, "prefill")?;
                }
            }
            Op::Step | Op::DenseStep if self.len() == MAX_KEYS => {}
            Op::Step => {
                let [q, k, v] = self.draw(1);
                let out = self.attn.forward(&q, &k, &v, &mut self.cache)?;
                self.push(&k, &v);
                self.check_step(&q, &out)?;
            }
            Op::DenseStep => {
                let [q, k, v] = self.draw(1);
                let out = self.attn.forward_dense(&q, &k, &v, &mut self.cache)?;
                self.push(&k, &v);
                self.check_dense(&q, &out, self.len(), "dense step")?;
            }
            Op::Run(s) => {
                let [q, k, v] = self.draw(s);
                let out = self.attn.forward_run(&q, &k, &v, &mut self.cache)?;
                self.push(&k, &v);
                self.check_step(&q.narrow(2, s - 1, 1)?, &out.narrow(2, s - 1, 1)?)?;
            }
            Op::Packed(s) => self.packed(s)?,
            Op::Truncate(share) => self.truncate((share * self.len() as f64).round() as usize)?,
            Op::Reset => {
                self.cache.reset()?;
                self.keys.iter_mut().chain(&mut self.values).for_each(Vec::clear);
            }
            Op::BuildIndex => {
                let trainable = self.len().saturating_sub(self.attn.config().init_offset());
                self.cache.build_index()?;
                let config = self.attn.config();
                assert_eq!(self.cache.codebook().is_some(), trainable >= config.n_centroids().max(config.coarse));
            }
            Op::Reserve(additional) => {
                let additional = additional.min(MAX_KEYS - self.len());
                self.cache.reserve(additional)?;
                assert!(self.cache.capacity() >= self.len() + additional);
            }
            Op::SaveAndLoad => {
                let file = tempfile::NamedTempFile::new()?;
                save_caches(file.path(), [&self.cache], "state")?;
                let SavedCaches { mut caches, about } = load_caches(file.path(), 0, &Device::Cpu)?;
                let mut loaded = caches.remove(0);
                if let Some(pool) = &self.pool {
                    loaded = pool.copy_of(&loaded)?;
                }
                loaded.set_max_bytes(self.max_bytes)?;
                assert_eq!(about, "state");
                let (mut got, want) = (snapshot(&loaded)?, snapshot(&self.cache)?);
                assert!(got.memory.kv_bytes >= want.memory.kv_bytes); // a fork's are its own
                got.memory.kv_bytes = want.memory.kv_bytes;
                assert_eq!(got, want);
                self.cache = loaded;
            }
            Op::Fork(_) if self.others.len() == OTHERS => {}
            Op::Fork(goes_on_in_fork) => {
                let before = snapshot(&self.cache)?;
                let mut fork = self.cache.fork()?;
                assert_eq!(snapshot(&self.cache)?, before, "fork");
                let of_fork = snapshot(&fork)?;
                assert!(of_fork.memory.kv_bytes <= before.memory.kv_bytes);
                assert_eq!(
                    (&of_fork.kv, &of_fork.codes, &of_fork.codebook),
                    (&before.kv, &before.codes, &before.codebook)
                );
                if goes_on_in_fork {
                    std::mem::swap(&mut fork, &mut self.cache);
                }
                let (seen, keys, values) = (snapshot(&fork)?, self.keys.clone(), self.values.clone());
                self.others.push(Other { cache: fork, seen, keys, values });
            }
            Op::Switch(other) if other >= self.others.len() => {}
            Op::Switch(other) => {
                self.others[other].seen = snapshot(&self.cache)?;
                self.swap(other);
            }
            Op::Drop(other) => drop((other < self.others.len()).then(|| self.others.remove(other))),
            Op::Fail(ref failure) => {
                let before = snapshot(&self.cache)?;
                assert!(self.fail(failure).is_err(), "{failure:?} is no error");
                assert_eq!(snapshot(&self.cache)?, before, "after {failure:?}");
            }
        }
        for Other { cache, seen, .. } in &self.others {
            assert_eq!(&snapshot(cache)?, seen, "another cache changed");
        }
        self.check_contents()
    }

    /// Makes one of the others the cache that is worked with.
    fn swap(&mut self, other: usize) {
        let other = &mut self.others[other];
        std::mem::swap(&mut other.cache, &mut self.cache);
        std::mem::swap(&mut other.keys, &mut self.keys);
        std::mem::swap(&mut other.values, &mut self.values);
    }

    fn packed(&mut self, s: usize) -> Result<()> {
        let is_full = |keys: &[Vec<f64>], s| keys[0].len() / D + s > MAX_KEYS;
        let counts: Vec<_> = std::iter::once(s).chain(self.others.iter().map(|_| 1)).collect();
        if self.b > 1 || is_full(&self.keys, s) || self.others.iter().any(|other| is_full(&other.keys, 1)) {
            return Ok(());
        }
        let [q, k, v] = self.draw(counts.iter().sum());
        let caches = std::iter::once(&mut self.cache).chain(self.others.iter_mut().map(|other| &mut other.cache));
        let out = self.attn.forward_packed(&q, &k, &v, caches.zip(counts.iter().copied()))?;
        let mut first = 0;
        for (i, &count) in counts.iter().enumerate() {
            let of = |tensor: &Tensor| tensor.narrow(2, first, count);
            let (q, k, v, out) = (of(&q)?, of(&k)?, of(&v)?, of(&out)?);
            first += count;
            if i > 0 {
                self.swap(i - 1);
            }
            self.push(&k, &v);
            match count {
                1 => self.check_step(&q, &out)?,
                _ => {
                    self.check_dense(&q.narrow(2, count - 1, 1)?, &out.narrow(2, count - 1, 1)?, self.len(), "packed")?
                }
            }
            self.check_contents()?;
            if i > 0 {
                self.swap(i - 1);
                self.others[i - 1].seen = snapshot(&self.others[i - 1].cache)?;
            }
        }
        Ok(())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.cache.truncate(len)?;
        self.keys.iter_mut().chain(&mut self.values).for_each(|head| head.truncate(len * D));
        Ok(())
    }

    fn fail(&mut self, failure: &Failure) -> Result<()> {
        let [q, k, v] = self.draw(1);
        let [q2, k2, v2] = self.draw(2);
        let (attn, cache) = (&self.attn, &mut self.cache);
        match failure {
            Failure::Query => attn.forward(&q.narrow(1, 0, H_KV * GROUP - 1)?, &k, &v, cache).map(drop),
            Failure::Keys => attn.forward(&q, &k2, &v2, cache).map(drop),
            Failure::Values => attn.forward_run(&q2, &k2, &v, cache).map(drop),
            Failure::Truncate => cache.truncate(cache.len() + 1),
            Failure::Prefill => {
                let attn = attn.clone().with_prefill(|_, _, _, _| candle_core::bail!("no prefill today"));
                attn.forward(&q2, &k2, &v2, cache).map(drop)
            }
            Failure::Budget => cache.reserve(4 * MAX_KEYS),
        }
    }

    /// Keys and values are those that were appended and not truncated.
    fn check_contents(&self) -> Result<()> {
        let cache = &self.cache;
        assert_eq!((cache.len(), cache.is_empty()), (self.len(), self.len() == 0));
        assert!(numbers(&cache.keys()?) == self.keys.concat(), "keys");
        assert!(numbers(&cache.values()?) == self.values.concat(), "values");
        let codes = cache.codes()?.dim(2)?;
        assert!(codes <= self.len().saturating_sub(self.attn.config().init_offset()), "codes of keys that are gone");
        Ok(())
    }

    /// Softmax attention to the first `visible` keys, in f64.
    fn check_dense(&self, q: &Tensor, out: &Tensor, visible: usize, what: &str) -> Result<()> {
        let all: Vec<_> = (0..visible).map(|position| (position, 1.)).collect();
        let (q, out) = (numbers(q), numbers(out));
        for (head, (q, out)) in q.chunks(D).zip(out.chunks(D)).enumerate() {
            let kv = head / GROUP;
            let (want, _) = attend(q, &self.keys[kv], &self.values[kv], &all, f64::from(SCALE));
            assert_close(out, &want, 1e-5, what);
        }
        Ok(())
    }

    /// Dense while the config says so; then what the single ops make of the codes, over keys and values of this model.
    fn check_step(&self, q: &Tensor, out: &Tensor) -> Result<()> {
        let (config, n) = (self.attn.config(), self.len());
        if config.is_dense(n) {
            return self.check_dense(q, out, n, "step while dense");
        }
        let tensor = |heads: &[Vec<f64>]| {
            let numbers = heads.concat().into_iter().map(|x| x as f32).collect();
            Tensor::from_vec::<_, f32>(numbers, (self.b, H_KV, n, D), &Device::Cpu)
        };
        let (keys, values) = (tensor(&self.keys)?, tensor(&self.values)?);
        let codebook = self.cache.codebook().expect("a codebook in a sparse step");
        // Of all keys at once, by the public codebook: not those that the cache gathered.
        let (codes, clusters) = codebook.encode(&keys)?;
        let candidates = config.candidates(n);
        let of_candidates = |codes: &Tensor| codes.narrow(2, candidates.start, candidates.len());
        let (codes, centroids) = (of_candidates(&codes)?, codebook.centroids()?);
        let clusters = clusters.map(|clusters| Ok::<_, candle_core::Error>((of_candidates(&clusters)?, clusters)));
        let clusters = clusters.transpose()?;
        let scores = match (&clusters, codebook.coarse()) {
            (Some((clusters, _)), Some(coarse)) => ops::residual_score(q, &codes, &centroids, clusters, coarse)?,
            _ => ops::score(q, &codes, &centroids)?,
        };
        let ranked = match config.selection {
            Selection::PerQueryHead => scores.clone(),
            Selection::PerKvHead => ops::group_mass(&scores, H_KV, SCALE)?,
        };
        let geometry = Geometry { n, sink: config.sink, window: config.window, init_offset: candidates.start };
        let selected = ops::indices_and_weights(&ops::topk(&ranked, config.heavy.count(n))?, geometry)?;
        let attended = match (&clusters, config.tail) {
            (Some((of_candidates, all)), Tail::ClusterMeans) => {
                // Of full blocks from `init_offset` on.
                let (start, block) = (config.init_offset(), config.window.max(1));
                let encoded = (n - start) / block * block;
                let empty = ops::ClusterSums::empty([self.b, H_KV, config.coarse, D], &Device::Cpu)?;
                let (values, all) = (values.narrow(2, start, encoded)?, all.narrow(2, start, encoded)?);
                let sums = ops::cluster_sums(&values, &all, &empty)?;
                let tail = ops::tail_attend(&scores, of_candidates, &sums, &selected, candidates.start, SCALE)?;
                let values = tensor(&self.values)?;
                ops::sparse_attend_with_tail(q, &keys, &values, &selected, &tail, SCALE)?
            }
            _ => ops::sparse_attend(q, &keys, &values, &selected, SCALE)?,
        };
        assert_same_bits(out, &attended.out, "sparse step");
        Ok(())
    }
}

/// All that can be seen of a cache, but its capacity: a call that fails may have made room.
#[derive(Debug, PartialEq)]
struct Snapshot {
    memory: candle_pq_attn::Memory,
    kv: [Vec<f64>; 2],
    codes: Vec<u32>,
    codebook: Option<Vec<f64>>,
}

fn snapshot(cache: &PqKvCache) -> Result<Snapshot> {
    let codebook = cache.codebook().map(|codebook| codebook.centroids()).transpose()?;
    Ok(Snapshot {
        memory: cache.memory(),
        kv: [numbers(&cache.keys()?), numbers(&cache.values()?)],
        codes: integers(&cache.codes()?),
        codebook: codebook.as_ref().map(numbers),
    })
}

fn cases() -> u32 {
    std::env::var("STATE_MACHINE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_cache_is_its_keys_and_values(config in config(), b in 1usize..3, is_paged: bool, ops in vec(op(), 1..25)) {
        let mut machine = Machine::new(config, b, is_paged).unwrap();
        for op in &ops {
            machine.run(op).unwrap();
        }
    }
}
