//! A decode step and its parts, on the GPU or else on the CPU.
//!
//! `cargo bench --bench decode --features cuda -- [--json] [--case NAME]`; a case runs if its name starts with NAME.
//!
//! Results are checked against the CPU first. Inputs rotate over more memory than the GPU's second-level cache holds,
//! as the layers of a model do. `graph` is the time of a call within a replayed CUDA graph of 20 calls; `eager` the wall
//! time of one call and a synchronization; `host` what a call takes of the host, when many follow each other. `bytes` is the least that a call must read, and the percentage is of the
//! bandwidth of a large copy on the same device. `forward` is a token's `PqAttention::forward`, whose keys are appended and
//! encoded as they come; `paged` the same over pages of which no two are neighbours; `run` is a `PqAttention::forward_run` of four
//! tokens, which a graph has as steps one by one; `step` is the ops one by one.

use std::cell::RefCell;
use std::collections::HashSet;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{self, Geometry, KmeansOptions, Selected};
use candle_pq_attn::{Codebook, Heavy, Metric, PagePool, PqAttention, PqConfig, PqKvCache, Selection, Tail};
use serde_json::json;

struct Case {
    name: &'static str,
    b: usize,
    h: usize,
    h_kv: usize,
    n: usize,
    d: usize,
    dtype: DType,
    pq_dim: usize,
    pq_bits: usize,
    sink: usize,
    window: usize,
    heavy: usize,
    selection: Selection,
    /// Clusters, whose means are the tail.
    coarse: usize,
    tail: Tail,
    /// Encodes a key and writes the weights by position in each step, as the published indexer does.
    as_seed: bool,
    /// Sequences of lengths up to `n`, in caches of their own.
    is_ragged: bool,
}

const GQA: Case = Case {
    name: "",
    b: 1,
    h: 32,
    h_kv: 8,
    n: 32_768,
    d: 128,
    dtype: DType::BF16,
    pq_dim: 16,
    pq_bits: 8,
    sink: 4,
    window: 64,
    heavy: 328,
    selection: Selection::PerKvHead,
    coarse: 0,
    tail: Tail::None,
    as_seed: false,
    is_ragged: false,
};

/// A cluster and 8 x 8 bits of the residual.
const RESIDUAL: Case = Case { pq_dim: 8, coarse: 256, ..GQA };

const CASES: [Case; 15] = [
    Case {
        name: "seed-w0",
        h_kv: 32,
        n: 32_000,
        dtype: DType::F32,
        pq_dim: 2,
        pq_bits: 6,
        sink: 128,
        window: 128,
        heavy: 128,
        selection: Selection::PerQueryHead,
        as_seed: true,
        ..GQA
    },
    Case { name: "gqa-32k", ..GQA },
    Case { name: "gqa-32k-by-query", selection: Selection::PerQueryHead, ..GQA },
    Case { name: "gqa-128k", n: 131_072, heavy: 1311, ..GQA },
    Case { name: "gqa-128k-by-query", n: 131_072, heavy: 1311, selection: Selection::PerQueryHead, ..GQA },
    Case { name: "batch8-32k", b: 8, ..GQA },
    Case { name: "residual-32k", ..RESIDUAL },
    Case { name: "tail-32k", heavy: 656, tail: Tail::ClusterMeans, ..RESIDUAL },
    Case { name: "residual-128k", n: 131_072, heavy: 1311, ..RESIDUAL },
    Case { name: "tail-128k", n: 131_072, heavy: 1311, tail: Tail::ClusterMeans, ..RESIDUAL },
    Case {
        name: "tail-128k-by-query",
        n: 131_072,
        heavy: 1311,
        tail: Tail::ClusterMeans,
        selection: Selection::PerQueryHead,
        ..RESIDUAL
    },
    Case { name: "tail-1m", n: 1 << 20, heavy: 10_486, tail: Tail::ClusterMeans, ..RESIDUAL },
    Case { name: "tail-batch8-32k", b: 8, heavy: 656, tail: Tail::ClusterMeans, ..RESIDUAL },
    Case { name: "ragged8-32k", b: 8, tail: Tail::ClusterMeans, is_ragged: true, ..RESIDUAL },
    Case { name: "ragged9-32k", b: 9, tail: Tail::ClusterMeans, is_ragged: true, ..RESIDUAL },
];

/// Tokens that there is room for behind a case's keys.
const ROOM: usize = 4096;

/// Positions of a call of `forward_run`.
const RUN: usize = 4;

/// What is measured: the `i`-th of some calls.
type Call<'a> = &'a dyn Fn(usize) -> Result<()>;

/// One layer of a model.
struct Layer {
    keys: Tensor,
    values: Tensor,
    codes: Tensor,
    centroids: Tensor,
    query: Tensor,
}

impl Layer {
    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            keys: self.keys.to_device(device)?,
            values: self.values.to_device(device)?,
            codes: self.codes.to_device(device)?,
            centroids: self.centroids.to_device(device)?,
            query: self.query.to_device(device)?,
        })
    }
}

impl Case {
    fn geometry(&self) -> Geometry {
        Geometry { n: self.n, sink: self.sink, window: self.window, init_offset: self.sink }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }

    fn candidates(&self) -> usize {
        self.n - self.sink - self.window
    }

    fn options(&self) -> KmeansOptions {
        let (pq_dim, pq_bits) = (self.pq_dim, self.pq_bits);
        KmeansOptions { pq_dim, pq_bits, iters: 10, metric: Metric::Euclidean, max_keys: 65_536, seed: 0 }
    }

    /// Layers whose codes are more than the second-level cache holds; their keys and values, which are more already,
    /// alternate between two.
    fn layers(&self, device: &Device) -> Result<Vec<Layer>> {
        const ENOUGH: usize = 128 << 20;
        let random = |heads, n| Tensor::randn(0f32, 1.0, (self.b, heads, n, self.d), device)?.to_dtype(self.dtype);
        let first = (random(self.h_kv, self.n)?, random(self.h_kv, self.n)?);
        let second = if device.is_cuda() { (first.0.copy()?, first.1.copy()?) } else { first.clone() };
        let (centroids, _) = ops::kmeans(&first.0.narrow(2, 0, self.n.min(8192))?, &self.options())?;
        let candidates = first.0.narrow(2, self.sink, self.candidates())?;
        let codes = ops::encode(&candidates, &centroids, None)?;
        let count = if device.is_cuda() { ENOUGH.div_ceil(codes.elem_count()).clamp(2, 64) } else { 1 };
        (0..count)
            .map(|i| {
                let (keys, values) = if i % 2 == 0 { first.clone() } else { second.clone() };
                let (codes, centroids) = (codes.copy()?, centroids.copy()?);
                Ok(Layer { keys, values, codes, centroids, query: random(self.h, 1)? })
            })
            .collect()
    }

    fn config(&self) -> PqConfig {
        PqConfig {
            sink: self.sink,
            window: self.window,
            heavy: Heavy::Keys(self.heavy),
            pq_dim: self.pq_dim,
            pq_bits: self.pq_bits,
            selection: self.selection,
            coarse: self.coarse,
            tail: self.tail,
            ..PqConfig::default()
        }
    }

    /// A layer's cache, with room for the tokens that are measured.
    fn cache(&self, attn: &PqAttention, layer: &Layer, codebook: &Codebook) -> Result<PqKvCache> {
        let (dims, device) = ([self.b, self.h_kv, self.d], layer.keys.device());
        self.fill(attn.new_cache(dims, self.n + ROOM, self.dtype, device)?, layer, codebook)
    }

    /// The same in pages, of which no two follow each other.
    fn paged_cache(&self, layer: &Layer, codebook: &Codebook) -> Result<PqKvCache> {
        let (dims, pages) = ([self.b, self.h_kv, self.d], (self.n + ROOM).div_ceil(PagePool::PAGE));
        let pool = PagePool::new(self.config(), dims, 2 * pages, self.dtype, layer.keys.device())?;
        let (mut cache, mut between) = (pool.new_cache()?, pool.new_cache()?);
        for page in 0..pages {
            cache.reserve(page * PagePool::PAGE + 1)?;
            between.reserve(page * PagePool::PAGE + 1)?;
        }
        self.fill(cache, layer, codebook)
    }

    /// A cache with a layer's keys and values, indexed with the codebook of another device.
    fn fill(&self, mut cache: PqKvCache, layer: &Layer, codebook: &Codebook) -> Result<PqKvCache> {
        let device = layer.keys.device();
        cache.append(&layer.keys, &layer.values)?;
        let here = Codebook::new(codebook.centroids()?.to_device(device)?, None)?;
        cache.set_codebook(match codebook.coarse() {
            None => here,
            Some(coarse) => here.with_coarse(coarse.to_device(device)?)?,
        })?;
        cache.build_index()?;
        Ok(cache)
    }

    fn score(&self, layer: &Layer) -> Result<Tensor> {
        ops::score(&layer.query, &layer.codes, &layer.centroids)
    }

    fn select(&self, scores: &Tensor) -> Result<Tensor> {
        match self.selection {
            Selection::PerQueryHead => ops::topk(scores, self.heavy),
            Selection::PerKvHead => ops::topk(&ops::group_mass(scores, self.h_kv, self.scale())?, self.heavy),
        }
    }

    fn index(&self, layer: &Layer) -> Result<Selected> {
        if self.as_seed {
            ops::encode(&layer.keys.narrow(2, self.n - 1, 1)?, &layer.centroids, None)?;
        }
        let Layer { query, codes, centroids, .. } = layer;
        match self.selection {
            _ if self.as_seed => Ok(ops::select_dense(query, codes, centroids, self.heavy, self.geometry())?.0),
            Selection::PerQueryHead => ops::select(query, codes, centroids, self.heavy, self.geometry()),
            Selection::PerKvHead => ops::indices_and_weights(&self.select(&self.score(layer)?)?, self.geometry()),
        }
    }

    fn attend(&self, layer: &Layer, selected: &Selected) -> Result<Tensor> {
        Ok(ops::sparse_attend(&layer.query, &layer.keys, &layer.values, selected, self.scale())?.out)
    }

    fn dense(&self, layer: &Layer) -> Result<Tensor> {
        Ok(ops::dense_attend(&layer.query, &layer.keys, &layer.values, self.scale())?.out)
    }

    /// The device's results against the CPU's.
    fn check(&self, layer: &Layer) -> Result<()> {
        let cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu);
        let on_cpu = layer.to_device(&Device::Cpu)?;
        let selected = self.index(layer)?;
        let (out, dense) = (self.attend(layer, &selected)?, self.dense(layer)?);
        let selected =
            Selected { indices: cpu(&selected.indices)?, lens: cpu(&selected.lens)?, weights: cpu(&selected.weights)? };
        let want = self.index(&on_cpu)?;
        let positions = |selected: &Selected| selected.indices.flatten_to(1)?.to_vec2::<u32>();
        let (got, want) = (positions(&selected)?, positions(&want)?);
        let differ: usize = got
            .iter()
            .zip(&want)
            .map(|(got, want)| {
                let want: HashSet<u32> = want.iter().copied().collect();
                got.iter().filter(|position| !want.contains(position)).count()
            })
            .sum();
        let count = selected.indices.elem_count();
        // The softmax of group_mass rounds differently: a key at the edge of the budget may give way to its equal.
        let allowed = if self.selection == Selection::PerKvHead { count / 100 } else { 0 };
        assert!(differ <= allowed, "{}: {differ} of {count} positions are not the CPU's", self.name);
        self.assert_close("attend", &out, &self.attend(&on_cpu, &selected)?)?;
        self.assert_close("dense", &dense, &self.dense(&on_cpu)?)
    }

    fn assert_close(&self, what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
        let difference = (got.to_device(&Device::Cpu)?.to_dtype(DType::F32)? - want.to_dtype(DType::F32)?)?;
        let norm = |tensor: &Tensor| -> Result<f32> { tensor.sqr()?.sum_all()?.sqrt()?.to_scalar() };
        let error = norm(&difference)? / norm(&want.to_dtype(DType::F32)?)?;
        assert!(error < 1e-2, "{}: {what} is off by {error}", self.name);
        Ok(())
    }

    /// A token's forward, checked against the CPU's.
    fn run_forward(
        &self,
        layers: &[Layer],
        bytes: usize,
        report: &dyn Fn(&str, usize, Call) -> Result<()>,
    ) -> Result<()> {
        let attn = PqAttention::new(self.config(), self.scale())?;
        let codebook = Codebook::train(&layers[0].keys.narrow(2, 0, self.n.min(8192))?, &self.config())?;
        let caches: Result<Vec<_>> = layers.iter().take(4).map(|layer| self.cache(&attn, layer, &codebook)).collect();
        let caches = RefCell::new(caches?);
        // Tokens that differ: equal keys would tie.
        let new = |x: &Tensor, i: usize| x.narrow(2, i, 1)?.contiguous();
        let token = |i: usize| Ok((new(&layers[0].keys, i)?, new(&layers[0].values, i)?));
        let tokens: Vec<(Tensor, Tensor)> = (0..64).map(token).collect::<Result<_>>()?;
        let (query, (key, value)) = (&layers[0].query, &tokens[0]);
        {
            let mut on_cpu = self.cache(&attn, &layers[0].to_device(&Device::Cpu)?, &codebook)?;
            let cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu);
            let want = attn.forward(&cpu(query)?, &cpu(key)?, &cpu(value)?, &mut on_cpu)?;
            let cache = &mut caches.borrow_mut()[0];
            self.assert_close("forward", &attn.forward(query, key, value, cache)?, &want)?;
        }
        let forward = |i: usize, caches: &mut [PqKvCache]| {
            let (layer, (key, value)) = (i % caches.len(), &tokens[i % tokens.len()]);
            attn.forward(query, key, value, &mut caches[layer]).map(drop)
        };
        report("forward", bytes, &|i| forward(i, &mut caches.borrow_mut()))?;
        if self.tail == Tail::None || self.n > 131_072 {
            return Ok(());
        }
        let paged: Result<Vec<_>> = layers.iter().take(4).map(|layer| self.paged_cache(layer, &codebook)).collect();
        let paged = RefCell::new(paged?);
        report("paged", bytes, &|i| forward(i, &mut paged.borrow_mut()))?;
        let run = |i: usize| Tensor::cat(&(i..i + RUN).map(|i| &tokens[i % tokens.len()].0).collect::<Vec<_>>(), 2);
        let runs = (0..8).map(|i| run(i * RUN)).collect::<Result<Vec<_>>>()?;
        let query = query.repeat((1, 1, RUN, 1))?;
        report("run", bytes, &|i| {
            let (mut caches, new) = (caches.borrow_mut(), &runs[i % runs.len()]);
            let layer = i % caches.len();
            attn.forward_run(&query, new, new, &mut caches[layer]).map(drop)
        })
    }

    /// Tokens of several sequences in packed steps: of lengths from 1k to 32k, and of as many that are all as long as their
    /// mean, as caches of their own and as one batch.
    fn run_ragged(&self, device: &Device, report: &dyn Fn(&str, usize, Call) -> Result<()>) -> Result<()> {
        const LAYERS: usize = 4;
        let config = PqConfig { heavy: Heavy::Fraction(0.02), ..self.config() };
        let attn = PqAttention::new(config.clone(), self.scale())?;
        let random = |b, heads, n| Tensor::randn(0f32, 1.0, (b, heads, n, self.d), device)?.to_dtype(self.dtype);
        let (shortest, longest) = (1024, self.n);
        let lens: Vec<_> = (0..self.b).map(|i| shortest + (longest - shortest) * i / (self.b - 1)).collect();
        let mean = lens.iter().sum::<usize>() / self.b;
        let codebook = Codebook::train(&random(1, self.h_kv, 8192)?, &config)?;
        let new = |b: usize, n: usize| {
            let mut cache = attn.new_cache([b, self.h_kv, self.d], n + ROOM, self.dtype, device)?;
            for first in (0..n).step_by(8192) {
                let count = 8192.min(n - first);
                cache.append(&random(b, self.h_kv, count)?, &random(b, self.h_kv, count)?)?;
            }
            let of_all = |tensor: &Tensor| Tensor::cat(&vec![tensor; b], 0);
            let of_batch = Codebook::new(of_all(&codebook.centroids()?)?, None)?;
            cache.set_codebook(match codebook.coarse() {
                None => of_batch,
                Some(coarse) => of_batch.with_coarse(of_all(coarse)?)?,
            })?;
            cache.build_index()?;
            Ok(cache)
        };
        let layers = |lens: &[usize]| -> Result<Vec<Vec<PqKvCache>>> {
            (0..LAYERS).map(|_| lens.iter().map(|len| new(1, *len)).collect()).collect()
        };
        let code = self.pq_dim + usize::from(self.coarse > 0);
        let attended = |len: &usize| config.heavy.count(*len) + self.sink + self.window;
        let attended: usize = lens.iter().map(attended).sum();
        let bytes =
            self.h_kv * (lens.iter().sum::<usize>() * code + attended * 2 * self.d * self.dtype.size_in_bytes());
        // Tokens that differ: equal keys would tie.
        let token = |_| Ok([random(1, self.h, self.b)?, random(1, self.h_kv, self.b)?, random(1, self.h_kv, self.b)?]);
        let tokens: Vec<[Tensor; 3]> = (0..64).map(token).collect::<Result<_>>()?;
        for (what, lens) in [("ragged", &lens), ("even", &vec![mean; self.b])] {
            let layers = RefCell::new(layers(lens)?);
            report(what, bytes, &|i| {
                let (caches, [q, k, v]) = (&mut layers.borrow_mut()[i % LAYERS], &tokens[i % tokens.len()]);
                attn.forward_packed(q, k, v, caches.iter_mut().map(|cache| (cache, 1))).map(drop)
            })?;
        }
        let of_batch = |token: &[Tensor; 3]| -> Result<Vec<Tensor>> {
            token.iter().map(|x| x.permute((2, 1, 0, 3))?.contiguous()).collect()
        };
        let tokens: Vec<_> = tokens.iter().map(of_batch).collect::<Result<_>>()?;
        let caches = RefCell::new((0..LAYERS).map(|_| new(self.b, mean)).collect::<Result<Vec<_>>>()?);
        report("batch", bytes, &|i| {
            let (cache, qkv) = (&mut caches.borrow_mut()[i % LAYERS], &tokens[i % tokens.len()]);
            attn.forward(&qkv[0], &qkv[1], &qkv[2], cache).map(drop)
        })
    }

    fn run(&self, device: &Device, copy_gb_per_s: f64, json: bool) -> Result<()> {
        let print = |what: &str, bytes: usize, times: Vec<Times>| {
            for times in times {
                let gb_per_s = bytes as f64 / times.us[1] / 1e3;
                let row = json!({
                    "case": self.name, "what": what, "mode": times.mode, "us_p20": round(times.us[0]),
                    "us_p50": round(times.us[1]), "us_p80": round(times.us[2]), "launches": times.launches,
                    "bytes": bytes, "gb_per_s": round(gb_per_s),
                    "pct_of_copy_bandwidth": round(100.0 * gb_per_s / copy_gb_per_s),
                });
                match json {
                    true => println!("{row}"),
                    false => println!(
                        "{:18} {what:7} {:6} {:>10.1} {:>10.1} {:>10.1} {:>4} {gb_per_s:>8.0}",
                        self.name, times.mode, times.us[0], times.us[1], times.us[2], times.launches
                    ),
                }
            }
        };
        let report = |what: &str, bytes: usize, call: Call| -> Result<()> {
            print(what, bytes, measure(device, call)?);
            Ok(())
        };
        if self.is_ragged {
            return self.run_ragged(device, &report);
        }
        let layers = self.layers(device)?;
        self.check(&layers[0])?;
        let scores: Vec<Tensor> = layers.iter().take(8).map(|layer| self.score(layer)).collect::<Result<_>>()?;
        let selected = self.index(&layers[0])?;
        let element = self.dtype.size_in_bytes();
        let kv_bytes = self.b * self.h_kv * self.n * self.d * element;
        let codes_bytes = layers[0].codes.elem_count();
        let centroids_bytes = layers[0].centroids.elem_count() * 4;
        let attended_bytes = 2 * selected.indices.elem_count() * self.d * element;
        let block = if self.as_seed { 1 } else { self.window };
        let new_keys = layers[0].keys.narrow(2, self.n - block, block)?;
        let train_keys = layers[0].keys.narrow(2, 0, self.n.min(32_768))?;
        let at = |i: usize| &layers[i % layers.len()];

        self.run_forward(&layers, codes_bytes + centroids_bytes + attended_bytes, &report)?;
        if self.coarse > 0 {
            // Eager alone: what it gathers its sample by comes from the host.
            let train = |_| Codebook::train(&train_keys, &self.config()).map(drop);
            let times = Times { mode: "eager", us: percentiles(eager(device, &train)?), launches: 0 };
            print("train", train_keys.elem_count() * element, vec![times]);
            return Ok(());
        }
        report("lut", centroids_bytes, &|i| {
            let codes = at(i).codes.narrow(2, 0, 1)?;
            ops::score(&at(i).query, &codes, &at(i).centroids).map(drop)
        })?;
        report("score", codes_bytes + centroids_bytes, &|i| self.score(at(i)).map(drop))?;
        report("topk", scores[0].elem_count() * 4, &|i| {
            ops::topk(&scores[i % scores.len()], if self.n > 100_000 { 2048 } else { self.heavy }).map(drop)
        })?;
        report("select", scores[0].elem_count() * 4, &|i| self.select(&scores[i % scores.len()]).map(drop))?;
        report("index", codes_bytes + centroids_bytes, &|i| self.index(at(i)).map(drop))?;
        report("attend", attended_bytes, &|i| self.attend(at(i), &selected).map(drop))?;
        report("step", codes_bytes + centroids_bytes + attended_bytes, &|i| {
            self.attend(at(i), &self.index(at(i))?).map(drop)
        })?;
        report("dense", 2 * kv_bytes, &|i| self.dense(at(i)).map(drop))?;
        report("encode", new_keys.elem_count() * element, &|i| {
            ops::encode(&new_keys, &at(i).centroids, None).map(drop)
        })?;
        report("train", train_keys.elem_count() * element, &|_| ops::kmeans(&train_keys, &self.options()).map(drop))
    }
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}

struct Times {
    mode: &'static str,
    /// The 20th, 50th and 80th percentile, in µs.
    us: [f64; 3],
    launches: usize,
}

fn percentiles(mut us: Vec<f64>) -> [f64; 3] {
    us.sort_by(f64::total_cmp);
    [20, 50, 80].map(|percent| us[us.len() * percent / 100])
}

/// The wall time of single calls: 50 of them, fewer of long ones.
fn eager(device: &Device, call: Call) -> Result<Vec<f64>> {
    let time = |i| -> Result<f64> {
        let start = Instant::now();
        call(i)?;
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() * 1e6)
    };
    for i in 0..2 {
        time(i)?;
    }
    let count = (500_000.0 / time(2)?) as usize;
    (0..count.clamp(5, 50)).map(time).collect()
}

/// The host's time for a call, of so many that the device's queue holds them.
#[cfg(feature = "cuda")]
fn host(device: &Device, call: Call) -> Result<Vec<f64>> {
    const CALLS: usize = 32;
    let time = |_| -> Result<f64> {
        let start = Instant::now();
        (0..CALLS).try_for_each(call)?;
        let us = start.elapsed().as_secs_f64() * 1e6 / CALLS as f64;
        device.synchronize()?;
        Ok(us)
    };
    (0..10).map(time).collect()
}

#[cfg(not(feature = "cuda"))]
fn measure(device: &Device, call: Call) -> Result<Vec<Times>> {
    Ok(vec![Times { mode: "eager", us: percentiles(eager(device, call)?), launches: 0 }])
}

#[cfg(feature = "cuda")]
fn measure(device: &Device, call: Call) -> Result<Vec<Times>> {
    let eager = percentiles(eager(device, call)?);
    match device {
        Device::Cuda(cuda) => {
            let (graph, launches) = graph::measure(cuda, call)?;
            Ok(vec![
                Times { mode: "host", us: percentiles(host(device, call)?), launches },
                Times { mode: "eager", us: eager, launches },
                Times { mode: "graph", us: percentiles(graph), launches },
            ])
        }
        _ => Ok(vec![Times { mode: "eager", us: eager, launches: 0 }]),
    }
}

#[cfg(feature = "cuda")]
mod graph {
    use candle_core::cuda_backend::cudarc::driver::sys;
    use candle_core::cuda_backend::WrapErr;
    use candle_core::{bail, CudaDevice, Result};

    use super::Call;

    const CALLS: usize = 20;

    /// The time of a call in a replayed graph, in µs, and the launches of one call: kernels, fills and copies.
    pub fn measure(device: &CudaDevice, call: Call) -> Result<(Vec<f64>, usize)> {
        let stream = device.cuda_stream();
        stream.synchronize().w()?;
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let calls: Result<()> = (0..CALLS).try_for_each(call);
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).w()?;
        calls?;
        let Some(graph) = graph else { bail!("decode: the captured graph is empty") };
        let launches = launches(graph.cu_graph())? / CALLS;
        let replay = || -> Result<f64> {
            let timing = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            let start = stream.record_event(timing).w()?;
            graph.launch().w()?;
            let end = stream.record_event(timing).w()?;
            Ok(f64::from(start.elapsed_ms(&end).w()?) * 1e3 / CALLS as f64)
        };
        for _ in 0..2 {
            replay()?;
        }
        let count = ((200_000.0 / (replay()? * CALLS as f64)) as usize).clamp(3, 50);
        Ok(((0..count).map(|_| replay()).collect::<Result<_>>()?, launches))
    }

    fn launches(graph: sys::CUgraph) -> Result<usize> {
        use sys::CUgraphNodeType::{CU_GRAPH_NODE_TYPE_KERNEL, CU_GRAPH_NODE_TYPE_MEMCPY, CU_GRAPH_NODE_TYPE_MEMSET};
        let mut count = 0;
        // SAFETY: the graph lives in the caller; without a place for the nodes only their number is written.
        unsafe { sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut count) }.result().w()?;
        let mut nodes = vec![std::ptr::null_mut(); count];
        // SAFETY: there is room for `count` nodes.
        unsafe { sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) }.result().w()?;
        let mut launches = 0;
        for node in nodes {
            let mut kind = CU_GRAPH_NODE_TYPE_KERNEL;
            // SAFETY: a node of the graph.
            unsafe { sys::cuGraphNodeGetType(node, &mut kind) }.result().w()?;
            let counts = [CU_GRAPH_NODE_TYPE_KERNEL, CU_GRAPH_NODE_TYPE_MEMCPY, CU_GRAPH_NODE_TYPE_MEMSET];
            launches += usize::from(counts.contains(&kind));
        }
        Ok(launches)
    }
}

/// Bytes read and written by a large copy, in GB/s.
fn copy_bandwidth(device: &Device) -> Result<f64> {
    let count: usize = if device.is_cuda() { 1 << 30 } else { 1 << 26 };
    let times = match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            let src = cuda.alloc_zeros::<u8>(count)?;
            let dst = RefCell::new(cuda.alloc_zeros::<u8>(count)?);
            measure(device, &|_| cuda.memcpy_dtod(&src, &mut *dst.borrow_mut()))?
        }
        _ => {
            let (src, dst) = (Tensor::zeros(count, DType::U8, device)?, Tensor::zeros(count, DType::U8, device)?);
            measure(device, &|_| dst.slice_set(&src, 0, 0))?
        }
    };
    let best = times.iter().filter(|times| times.mode != "host").map(|times| times.us[1]).fold(f64::INFINITY, f64::min);
    Ok(2.0 * count as f64 / best / 1e3)
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let json = args.iter().any(|arg| arg == "--json");
    let wanted = args.iter().skip_while(|arg| *arg != "--case").nth(1);
    let device = Device::cuda_if_available(0)?;
    let copy_gb_per_s = copy_bandwidth(&device)?;
    if !json {
        println!("{:?}, a copy moves {copy_gb_per_s:.0} GB/s", device.location());
        println!(
            "{:18} {:7} {:6} {:>10} {:>10} {:>10} {:>4} {:>8}",
            "case", "what", "mode", "p20 us", "p50 us", "p80 us", "#", "GB/s"
        );
    }
    for case in CASES.iter().filter(|case| wanted.is_none_or(|wanted| case.name.starts_with(wanted.as_str()))) {
        case.run(&device, copy_gb_per_s, json)?;
    }
    Ok(())
}
