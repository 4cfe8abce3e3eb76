//! Decoding by a whole model: a Llama of 8B and random weights, whose caches hold 8k, 32k and 128k random keys.
//!
//! `cargo bench --bench e2e --features cuda -- [--json] [--case NAME] [--layers N] [--vocab N] [--small] [--no-peer]`; a
//! case runs if its name starts with NAME, `--small` is a model for smoke tests, which also run on a CPU.
//!
//! Times are of whole tokens: the wall time of a step with its token and position from the host, and a synchronization.
//! `eager` runs the model, `graph` replays it by `DecodeGraph`. `dense` and `sparse` (the default config, and by KV head)
//! are the same weights and keys; `attention-...` is the attention of all layers alone, `rest` the model without any (but
//! with its keys appended), `candle-transformers` Candle's own Llama on the same weights, without flash attention, behind
//! a prompt of as many random tokens. In the same run replays are compared with eager steps to the bit, and the two models
//! with each other. `prefill` is a prompt of up to 32k tokens and what its indexes add. `bytes` is the least that a step must
//! read.

mod model;
mod peer;

use std::time::Instant;

use candle_core::{bail, DType, Device, Result, Tensor};
use candle_pq_attn::{DecodeGraph, PqAttention, PqConfig, PqKvCache, Selection};
use serde_json::json;

use model::{Attend, Model, Shape};
use peer::Peer;

/// Steps that are compared, then steps that are measured.
const COMPARED: usize = 8;
const MEASURED: usize = 40;

/// Room behind the keys that are there at first.
const ROOM: usize = 256;

/// The longest context for whose cache Candle's Llama runs the prompt: its time grows with the square.
const PEER_LIMIT: usize = 32_768;

struct Args {
    json: bool,
    small: bool,
    peer: bool,
    case: String,
    layers: usize,
    vocab: usize,
}

impl Args {
    fn new() -> Result<Self> {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let has = |flag: &str| args.iter().any(|arg| arg == flag);
        let value = |flag: &str| args.iter().skip_while(|arg| *arg != flag).nth(1).cloned();
        let number = |flag: &str, default: usize| match value(flag).map(|value| value.parse()) {
            None => Ok(default),
            Some(Ok(number)) if number > 0 => Ok(number),
            Some(_) => bail!("e2e: {flag}: expected a number from 1 up, got {:?}", value(flag).unwrap_or_default()),
        };
        let small = has("--small");
        Ok(Self {
            json: has("--json"),
            small,
            peer: !has("--no-peer"),
            case: value("--case").unwrap_or_default(),
            layers: number("--layers", if small { 2 } else { 32 })?,
            vocab: number("--vocab", if small { 1000 } else { 128_256 })?,
        })
    }

    fn shape(&self, device: &Device) -> Shape {
        let Self { layers, vocab, .. } = *self;
        // Candle's CPU has no matmul for bf16.
        let dtype = if device.is_cuda() { DType::BF16 } else { DType::F32 };
        match self.small {
            true => Shape { layers, heads: 8, kv_heads: 2, head_dim: 64, mlp: 1024, vocab, dtype },
            false => Shape { layers, heads: 32, kv_heads: 8, head_dim: 128, mlp: 14_336, vocab, dtype },
        }
    }

    /// Names, and keys that are there at first.
    fn cases(&self) -> Vec<(String, usize)> {
        let (name, lens) = if self.small { ("small", [1, 4, 8]) } else { ("llama", [8, 32, 128]) };
        let cases = lens.map(|k| (format!("{name}-{k}k"), k << 10));
        cases.into_iter().filter(|(name, _)| name.starts_with(&self.case)).collect()
    }
}

/// A model's step, or a part of it: `forward` of [`DecodeGraph`].
type Forward<'a> = &'a dyn Fn(&Tensor, &Tensor, &mut [PqKvCache]) -> Result<Tensor>;

struct Run<'a> {
    case: &'a str,
    n: usize,
    device: &'a Device,
    copy_gb_per_s: f64,
    json: bool,
}

impl Run<'_> {
    fn token(&self, step: usize) -> Result<Tensor> {
        Tensor::new(&[(step * 7919 % 997) as u32], self.device)
    }

    /// Compares and measures both modes of a step; leaves the caches at `n` keys.
    fn modes(&self, what: &str, bytes: usize, caches: &mut [PqKvCache], forward: Forward) -> Result<()> {
        let eager = |step: usize, caches: &mut [PqKvCache]| {
            let position = Tensor::new(&[(self.n + step) as u32], self.device)?;
            forward(&self.token(step)?, &position, caches)
        };
        let mut graph = DecodeGraph::new(forward);
        let want: Vec<_> = (0..COMPARED).map(|step| bits(&eager(step, caches)?)).collect::<Result<_>>()?;
        truncate(caches, self.n)?;
        for (step, want) in want.iter().enumerate() {
            let got = bits(&graph.step(&self.token(step)?, caches)?)?;
            let is_finite = got.iter().all(|bits| f32::from_bits(*bits).is_finite());
            assert!(is_finite, "{}: {what}: step {step}: not all of its results are finite", self.case);
            let differ = got.iter().zip(want).filter(|(got, want)| got != want).count();
            assert!(differ == 0, "{}: {what}: step {step}: {differ} results of a replay differ", self.case);
        }
        truncate(caches, self.n)?;
        self.report(what, "eager", bytes, |step| eager(step, caches).map(drop))?;
        truncate(caches, self.n)?;
        if self.device.is_cuda() {
            self.report(what, "graph", bytes, |step| graph.step(&self.token(step)?, caches).map(drop))?;
            truncate(caches, self.n)?;
        }
        Ok(())
    }

    /// Measures the wall time of steps, each with a synchronization.
    fn report(&self, what: &str, mode: &str, bytes: usize, mut step: impl FnMut(usize) -> Result<()>) -> Result<()> {
        const WARM_UP: usize = 3;
        let mut us = Vec::new();
        self.device.synchronize()?;
        for i in 0..WARM_UP + MEASURED {
            let start = Instant::now();
            step(i)?;
            self.device.synchronize()?;
            us.push(start.elapsed().as_secs_f64() * 1e6);
        }
        let mut us = us.split_off(WARM_UP);
        us.sort_by(f64::total_cmp);
        let [p20, p50, p80] = [20, 50, 80].map(|percent| us[us.len() * percent / 100]);
        let (gb_per_s, tokens_per_s) = (bytes as f64 / p50 / 1e3, 1e6 / p50);
        let round = |x: f64| (x * 100.0).round() / 100.0;
        let row = json!({
            "case": self.case, "what": what, "mode": mode, "us_p20": round(p20), "us_p50": round(p50),
            "us_p80": round(p80), "launches": 0, "tokens_per_s": round(tokens_per_s), "bytes": bytes, "gb_per_s": round(gb_per_s),
            "pct_of_copy_bandwidth": round(100.0 * gb_per_s / self.copy_gb_per_s),
        });
        match self.json {
            true => println!("{row}"),
            false => println!(
                "{:12} {what:27} {mode:6} {p20:>10.1} {p50:>10.1} {p80:>10.1} {tokens_per_s:>9.1} {gb_per_s:>7.0}",
                self.case
            ),
        }
        Ok(())
    }

    /// Steps with one kind of selection, and where they are `dense` first those without any.
    fn ours(&self, model: &Model, kv: &[Tensor; 2], selection: Selection, dense: bool) -> Result<()> {
        let shape = &model.shape;
        let config = PqConfig { selection, ..PqConfig::default() };
        let attn = &PqAttention::new(config.clone(), shape.scale())?;
        let dims = [1, shape.kv_heads, shape.head_dim];
        let mut caches = (0..shape.layers)
            .map(|_| {
                let mut cache = attn.new_cache(dims, self.n + ROOM, shape.dtype, self.device)?;
                cache.append(&kv[0], &kv[1])?;
                Ok(cache)
            })
            .collect::<Result<Vec<_>>>()?;
        let row = shape.head_dim * shape.dtype.size_in_bytes();
        let dense_bytes = 2 * shape.layers * shape.kv_heads * self.n * row;
        let random =
            |heads| Tensor::randn(0f32, 1.0, (1, heads, 1, shape.head_dim), self.device)?.to_dtype(shape.dtype);
        let (q, k, v) = (random(shape.heads)?, random(shape.kv_heads)?, random(shape.kv_heads)?);
        let alone = |attend: &Attend, caches: &mut [PqKvCache]| {
            let attend_to = |cache: &mut PqKvCache| match attend {
                Attend::Dense(attn) => attn.forward_dense(&q, &k, &v, cache),
                _ => attn.forward(&q, &k, &v, cache),
            };
            let outs = caches.iter_mut().map(attend_to).collect::<Result<Vec<_>>>()?;
            // The last stands for all.
            outs.last().map_or_else(|| bail!("e2e: a model without layers"), |out| out.to_dtype(DType::F32))
        };

        if dense {
            // Before there is an index, which dense steps would keep up.
            let caches = &mut caches;
            self.modes("rest", model.bytes(), caches, &|token, position, caches| {
                model.forward(token, position, caches, &Attend::Not)
            })?;
            self.modes("dense", model.bytes() + dense_bytes, caches, &|token, position, caches| {
                model.forward(token, position, caches, &Attend::Dense(attn))
            })?;
            self.modes("attention-dense", dense_bytes, caches, &|_, _, caches| alone(&Attend::Dense(attn), caches))?;
        }
        let start = Instant::now();
        caches.iter_mut().try_for_each(PqKvCache::build_index)?;
        self.device.synchronize()?;
        eprintln!("{}: indexes of {} layers in {:.2} s", self.case, caches.len(), start.elapsed().as_secs_f64());
        let (name, lists) = match selection {
            Selection::PerQueryHead => ("sparse", shape.heads),
            Selection::PerKvHead => ("sparse-by-kv-head", shape.kv_heads),
        };
        let codes = shape.kv_heads * self.n * (config.pq_dim + usize::from(config.coarse > 0));
        let bytes = shape.layers * (codes + 2 * lists * config.attended(self.n) * row);
        self.modes(name, model.bytes() + bytes, &mut caches, &|token, position, caches| {
            model.forward(token, position, caches, &Attend::Sparse(attn))
        })?;
        let alone = |_: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| alone(&Attend::Sparse(attn), caches);
        self.modes(&format!("attention-{name}"), bytes, &mut caches, &alone)
    }

    /// Runs a prompt of `n` tokens, in chunks, and says what indexing it adds.
    fn prefill(&self, model: &Model) -> Result<()> {
        const CHUNK: usize = 2048;
        if self.n > PEER_LIMIT {
            return Ok(());
        }
        let shape = &model.shape;
        let attn = PqAttention::new(PqConfig::default(), shape.scale())?;
        let cache = |_| attn.new_cache([1, shape.kv_heads, shape.head_dim], self.n, shape.dtype, self.device);
        let mut caches = (0..shape.layers).map(cache).collect::<Result<Vec<_>>>()?;
        let n = self.n as u32;
        let tokens =
            Tensor::from_iter((0..n).map(|i| i.wrapping_mul(2_654_435_761) % shape.vocab as u32), self.device)?;
        let positions = Tensor::arange(0, n, self.device)?;
        self.device.synchronize()?;
        let start = Instant::now();
        for first in (0..self.n).step_by(CHUNK) {
            let chunk = |of: &Tensor| of.narrow(0, first, CHUNK.min(self.n - first));
            model.forward(&chunk(&tokens)?, &chunk(&positions)?, &mut caches, &Attend::Sparse(&attn))?;
        }
        self.device.synchronize()?;
        let prefill_s = start.elapsed().as_secs_f64();
        let start = Instant::now();
        caches.iter_mut().try_for_each(PqKvCache::build_index)?;
        self.device.synchronize()?;
        let index_s = start.elapsed().as_secs_f64();
        match self.json {
            true => println!(
                "{}",
                json!({ "case": self.case, "what": "prefill", "mode": "eager", "us_p50": (prefill_s * 1e6).round(),
                    "index_us": (index_s * 1e6).round(), "launches": 0 })
            ),
            false => println!(
                "{:12} prefill {prefill_s:.2} s, its indexes {index_s:.2} s more: {:.1}%",
                self.case,
                100.0 * index_s / prefill_s
            ),
        }
        Ok(())
    }

    fn peer(&self, model: &Model, peer: &Peer) -> Result<()> {
        if self.n > PEER_LIMIT {
            eprintln!(
                "{}: candle-transformers left out: its cache is filled by running a prompt, for minutes",
                self.case
            );
            return Ok(());
        }
        let start = Instant::now();
        let mut cache = peer.cache(self.n, self.device)?;
        self.device.synchronize()?;
        eprintln!("{}: candle-transformers ran the prompt in {:.1} s", self.case, start.elapsed().as_secs_f64());
        let shape = &model.shape;
        let row = shape.head_dim * shape.dtype.size_in_bytes();
        let bytes = model.bytes() + 2 * shape.layers * shape.kv_heads * self.n * row;
        self.report("candle-transformers", "eager", bytes, |step| {
            peer.forward(&self.token(step)?, self.n + step, &mut cache).map(drop)
        })
    }
}

fn truncate(caches: &mut [PqKvCache], len: usize) -> Result<()> {
    caches.iter_mut().try_for_each(|cache| cache.truncate(len))
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// The same model twice: a few tokens from the first on.
fn check_peer(model: &Model, peer: &Peer, device: &Device) -> Result<()> {
    let shape = &model.shape;
    let attn = PqAttention::new(PqConfig::default(), shape.scale())?;
    let cache = |_| attn.new_cache([1, shape.kv_heads, shape.head_dim], COMPARED, shape.dtype, device);
    let mut caches = (0..shape.layers).map(cache).collect::<Result<Vec<_>>>()?;
    let mut theirs = peer.cache(0, device)?;
    for step in 0..COMPARED {
        let (token, position) = (Tensor::new(&[step as u32 + 5], device)?, Tensor::new(&[step as u32], device)?);
        let got = model.forward(&token, &position, &mut caches, &Attend::Dense(&attn))?;
        let want = peer.forward(&token, step, &mut theirs)?;
        let norm = |tensor: Tensor| tensor.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
        let error = norm((got - &want)?)? / norm(want)?;
        assert!(error < 0.1, "candle-transformers: logits of step {step} are off by {error}");
    }
    Ok(())
}

/// Bytes read and written by a large copy, in GB/s.
fn copy_bandwidth(device: &Device) -> Result<f64> {
    let count: usize = if device.is_cuda() { 1 << 28 } else { 1 << 24 };
    let (from, to) = (Tensor::zeros(count, DType::F32, device)?, Tensor::zeros(count, DType::F32, device)?);
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        device.synchronize()?;
        let start = Instant::now();
        to.slice_set(&from, 0, 0)?;
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (count * size_of::<f32>()) as f64 / best / 1e9)
}

fn main() -> Result<()> {
    let args = Args::new()?;
    let device = &Device::cuda_if_available(0)?;
    let copy_gb_per_s = copy_bandwidth(device)?;
    let cases = args.cases();
    let context = cases.iter().map(|(_, n)| n + ROOM).max().unwrap_or(0);
    let model = Model::new(args.shape(device), context, device)?;
    if !args.json {
        println!("{:?}, a copy moves {copy_gb_per_s:.0} GB/s; {:?}", device.location(), model.shape);
        println!(
            "{:12} {:27} {:6} {:>10} {:>10} {:>10} {:>9} {:>7}",
            "case", "what", "mode", "p20 us", "p50 us", "p80 us", "tokens/s", "GB/s"
        );
    }
    let peer = args.peer.then(|| Peer::new(&model, context, device)).transpose()?;
    if let Some(peer) = &peer {
        check_peer(&model, peer, device)?;
    }
    for (case, n) in &cases {
        let run = Run { case, n: *n, device, copy_gb_per_s, json: args.json };
        if let Some(peer) = &peer {
            run.peer(&model, peer)?;
        }
        run.prefill(&model)?;
        let shape = &model.shape;
        let random =
            || Tensor::randn(0f32, 1.0, (1, shape.kv_heads, *n, shape.head_dim), device)?.to_dtype(shape.dtype);
        let kv = [random()?, random()?];
        run.ours(&model, &kv, Selection::PerQueryHead, true)?;
        run.ours(&model, &kv, Selection::PerKvHead, false)?;
    }
    Ok(())
}
