//! Calls of a cache and its forks, one after the other.

use arbitrary::Arbitrary;
use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::{Heavy, KvCache, Metric, PqAttention, PqConfig, PqKvCache, Selection, Tail};

use crate::args::{dtype, number, Args, Form};

#[derive(Debug, Arbitrary)]
pub struct Sequence {
    sizes: [u8; 6],
    /// Of which a field of the config is.
    huge: Option<(u8, u64)>,
    heavy: Share,
    refresh: Share,
    init_offset: Option<u8>,
    coarse: u8,
    flags: [bool; 4],
    dims: [u8; 4],
    capacity: u8,
    dtype: u8,
    scale: i8,
    steps: Vec<Act>,
}

#[derive(Debug, Arbitrary)]
enum Share {
    Keys(u8),
    Fraction(i8),
}

#[derive(Debug, Arbitrary)]
enum Act {
    Append(u8),
    Prefill(u8),
    Step,
    Dense(u8),
    Run(u8),
    Truncate(u8),
    TooShort(u64),
    Reset,
    BuildIndex,
    Reserve(u8),
    ReserveAll(u8),
    Budget(u16),
    /// Goes on in the fork, or in what it was made of.
    Fork(bool),
    Switch(u8),
    Drop(u8),
    TakeCodebook(u8),
    Advance(u8),
    /// Query, keys and values that need not fit.
    Any(u8, [Form; 3]),
    /// The calls of Candle's own cache.
    KvCache([Form; 3]),
}

/// Keys and steps at most, so that no sequence takes long.
const MOST: usize = 300;
const STEPS: usize = 24;

impl Sequence {
    fn config(&self) -> PqConfig {
        let [sink, window, pq_dim, pq_bits, iters, max_train_keys] = self.sizes.map(usize::from);
        let [tail, inner_product, query_weights, per_kv] = self.flags;
        let mut config = PqConfig {
            sink: sink % 8,
            window: window % 20,
            heavy: match self.heavy {
                Share::Keys(keys) => Heavy::Keys(keys.into()),
                Share::Fraction(share) => Heavy::Fraction(f64::from(number(share)) / 16.),
            },
            pq_dim: pq_dim % 6,
            pq_bits: pq_bits % 10,
            kmeans_iters: iters % 3,
            max_train_keys: max_train_keys + 16,
            refresh: match self.refresh {
                Share::Keys(growth) => f64::from(growth) / 64.,
                Share::Fraction(growth) => number(growth).into(),
            },
            coarse: [0, 2, 4, 16, 3, 256][usize::from(self.coarse) % 6],
            tail: if tail { Tail::ClusterMeans } else { Tail::None },
            init_offset: self.init_offset.map(usize::from),
            metric: if inner_product { Metric::InnerProduct } else { Metric::Euclidean },
            query_weights,
            selection: if per_kv { Selection::PerKvHead } else { Selection::PerQueryHead },
            seed: 1,
        };
        match self.huge.map(|(field, huge)| (field % 5, huge as usize)) {
            None => {}
            Some((0, huge)) => config.sink = huge,
            Some((1, huge)) => config.window = huge,
            Some((2, huge)) => config.heavy = Heavy::Keys(huge),
            Some((3, huge)) => config.max_train_keys = huge,
            Some((_, huge)) => config.init_offset = Some(huge),
        }
        config
    }

    pub fn run(&self) -> Result<()> {
        let attn = PqAttention::new(self.config(), number(self.scale))?;
        let [b, h_kv, group, pq_len] = self.dims.map(usize::from);
        let dims = [b % 3, h_kv % 3, attn.config().pq_dim * (pq_len % 6)];
        let cache = attn.new_cache(dims, self.capacity.into(), dtype(self.dtype), &Device::Cpu)?;
        let mut machine = Machine { attn, cache, group: 1 + group % 3, others: Vec::new() };
        for step in self.steps.iter().take(STEPS) {
            let before = machine.cache.len();
            if machine.run(step).is_err() && !matches!(step, Act::Any(..)) {
                assert_eq!(machine.cache.len(), before, "after an error of {step:?}");
            }
        }
        Ok(())
    }
}

struct Machine {
    attn: PqAttention,
    cache: PqKvCache,
    group: usize,
    others: Vec<PqKvCache>,
}

impl Machine {
    /// Queries, keys and values of `s` positions.
    fn qkv(&self, s: usize) -> Result<[Tensor; 3]> {
        let [b, h_kv, d] = self.cache.dims();
        let of = |heads: usize, seed: usize| {
            let at = |i: usize| ((i + self.cache.len() * 7 + seed) as f32 * 12.9898).sin();
            let numbers = (0..b * heads * s * d).map(at).collect();
            Tensor::from_vec(numbers, (b, heads, s, d), &Device::Cpu)?.to_dtype(self.cache.dtype())
        };
        Ok([of(self.group * h_kv, 1)?, of(h_kv, 2)?, of(h_kv, 3)?])
    }

    fn run(&mut self, step: &Act) -> Result<()> {
        let room = MOST.saturating_sub(self.cache.len());
        let few = |count: u8| usize::from(count).min(room);
        match *step {
            Act::Append(s) => {
                let [_, k, v] = self.qkv(few(s))?;
                self.cache.append(&k, &v)
            }
            Act::Prefill(s) => self.attend(few(s), PqAttention::forward),
            Act::Step => self.attend(few(1), PqAttention::forward),
            Act::Dense(s) => self.attend(few(s % 4), PqAttention::forward_dense),
            Act::Run(s) => self.attend(few(s % 8), PqAttention::forward_run),
            Act::Truncate(back) => self.cache.truncate(self.cache.len().saturating_sub(back.into())),
            Act::TooShort(len) => self.cache.truncate(len as usize | 1 << 20),
            Act::Reset => self.cache.reset(),
            Act::BuildIndex => self.cache.build_index(),
            Act::Reserve(keys) => self.cache.reserve(keys.into()),
            Act::ReserveAll(but) => self.cache.reserve(usize::MAX - usize::from(but)),
            Act::Budget(bytes) => self.cache.set_max_bytes(usize::from(bytes) * 8),
            Act::Fork(_) if self.others.len() == 3 => Ok(()),
            Act::Fork(goes_on_in_fork) => {
                let mut fork = self.cache.fork()?;
                assert_eq!(fork.len(), self.cache.len());
                if goes_on_in_fork {
                    std::mem::swap(&mut fork, &mut self.cache);
                }
                self.others.push(fork);
                Ok(())
            }
            Act::Switch(which) => {
                if let Some(other) = self.others.get_mut(usize::from(which % 3)) {
                    std::mem::swap(other, &mut self.cache);
                }
                Ok(())
            }
            Act::Drop(which) => {
                let which = usize::from(which % 3);
                drop((which < self.others.len()).then(|| self.others.remove(which)));
                Ok(())
            }
            Act::TakeCodebook(which) => match self.others.get(usize::from(which % 3)).and_then(PqKvCache::codebook) {
                Some(codebook) => self.cache.set_codebook(codebook.clone()),
                None => Ok(()),
            },
            Act::Advance(steps) => match self.cache.advance(few(steps)) {
                // On a CPU nothing has been written there.
                Ok(()) => self.cache.truncate(self.cache.len() - few(steps)),
                error => error,
            },
            Act::Any(s, ref forms) => {
                let ([b, h_kv, d], s, dtype) = (self.cache.dims(), few(s % 4), self.cache.dtype());
                let [q, k, v] = any(forms, [b, self.group * h_kv, h_kv, s, d], dtype)?;
                let _ = self.attn.forward(&q, &k, &v, &mut self.cache);
                let _ = self.attn.forward_run(&q, &k, &v, &mut self.cache);
                self.cache.append(&k, &v)
            }
            Act::KvCache(ref forms) => {
                let ([b, h_kv, d], dtype) = (self.cache.dims(), self.cache.dtype());
                let [q, k, v] = any(forms, [b, self.group * h_kv, h_kv, 3, d], dtype)?;
                let mut cache = KvCache::new(self.attn.clone(), 4);
                cache.append(&k, &v)?;
                cache.attend(&q, &k, &v)?;
                assert_eq!(cache.current_seq_len(), 2 * k.dim(2)?);
                Ok(())
            }
        }
    }

    fn attend(
        &mut self,
        s: usize,
        forward: fn(&PqAttention, &Tensor, &Tensor, &Tensor, &mut PqKvCache) -> Result<Tensor>,
    ) -> Result<()> {
        let ([q, k, v], len) = (self.qkv(s)?, self.cache.len());
        let out = forward(&self.attn, &q, &k, &v, &mut self.cache)?;
        assert_eq!((out.dims(), self.cache.len()), (q.dims(), len + s));
        Ok(())
    }
}

fn any(forms: &[Form], [b, h, h_kv, s, d]: [usize; 5], dtype: DType) -> Result<[Tensor; 3]> {
    let mut args = Args(forms.iter());
    let query = args.floats(&[b, h, s, d], dtype)?;
    Ok([query, args.floats(&[b, h_kv, s, d], dtype)?, args.floats(&[b, h_kv, s, d], dtype)?])
}
