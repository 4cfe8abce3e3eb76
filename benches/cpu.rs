//! The search of one query on a CPU: scores of all keys and the k best of them, as a vector index does it. And a cache in a
//! file.
//!
//! `cargo bench --bench cpu -- [--json] [--case NAME] [--threads N]`; a case runs if its name starts with NAME; N is 1
//! unless said otherwise. `benches/peers/cpu.py` runs it beside FAISS.
//!
//! `search` is a whole query, `score` and `topk` are its parts, `fast_scan` is the search of 4-bit codes from their packed
//! form, whose result is checked to be that of `search`. `bytes` is the least that a call must read, and the percentage
//! is of the bandwidth of a large copy.
//!
//! `save` and `load` are those of caches of 32,768 keys, of one layer or of four, `write` and `read` of the same bytes by
//! `std::fs`; the file stays in the system's memory, so that what they say is of the processor and not of a disk. What was
//! loaded is checked to go on as what was saved.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{self, KmeansOptions};
use candle_pq_attn::{load_caches, save_caches, Metric, PqAttention, PqConfig};
use serde_json::json;

const KEYS: usize = 131_072;
const HEAD_DIM: usize = 128;

/// How many queries take turns.
const QUERIES: usize = 16;

/// How many calls are timed.
const CALLS: usize = 100;

/// `(name, pq_dim, pq_bits)`
const CASES: [(&str, usize, usize); 3] = [("pq-16x8", 16, 8), ("pq-2x6", 2, 6), ("pq-32x4", 32, 4)];
const K: [usize; 2] = [128, 2048];

/// Prints a row: case, what, bytes, microseconds of each call.
type Report<'a> = &'a dyn Fn(&str, &str, usize, Vec<f64>);

fn run(name: &str, pq_dim: usize, pq_bits: usize, report: Report) -> Result<()> {
    let random = |n| Tensor::randn(0f32, 1.0, (1, 1, n, HEAD_DIM), &Device::Cpu);
    let keys = random(KEYS)?;
    let options = KmeansOptions { pq_dim, pq_bits, iters: 10, metric: Metric::Euclidean, max_keys: 8192, seed: 0 };
    let (centroids, _) = ops::kmeans(&keys, &options)?;
    let codes = ops::encode(&keys, &centroids, None)?;
    let queries: Vec<Tensor> = (0..QUERIES).map(|_| random(1)).collect::<Result<_>>()?;
    let at = |i: usize| &queries[i % QUERIES];
    let score = |i| ops::score(at(i), &codes, &centroids);
    let bytes = codes.elem_count() + centroids.elem_count() * 4;
    report(name, "score", bytes, times(CALLS, &|i| score(i).map(drop))?);
    let packed = (pq_bits <= 4).then(|| ops::pack_codes(&codes)).transpose()?;
    for k in K {
        let name = format!("{name}-k{k}");
        let scores = score(0)?;
        report(&name, "topk", KEYS * 4, times(CALLS, &|_| ops::topk(&scores, k).map(drop))?);
        report(&name, "search", bytes, times(CALLS, &|i| ops::topk(&score(i)?, k).map(drop))?);
        if let Some(packed) = &packed {
            let fast_scan = |i| ops::fast_scan(at(i), packed, KEYS, &centroids, k);
            for i in 0..QUERIES {
                let (got, want) = (fast_scan(i)?.flatten_all()?, ops::topk(&score(i)?, k)?.flatten_all()?);
                assert_eq!(got.to_vec1::<u32>()?, want.to_vec1::<u32>()?, "{name}: query {i}");
            }
            let bytes = packed.elem_count() + centroids.elem_count() * 4;
            report(&name, "fast_scan", bytes, times(CALLS, &|i| fast_scan(i).map(drop))?);
        }
    }
    Ok(())
}

/// Caches of 8 KV heads in bf16, one a layer, with room to go on, to a file and back.
fn file(name: &str, layers: usize, report: Report) -> Result<()> {
    const KEYS: usize = 32_768;
    const CAPACITY: usize = KEYS + 1024;
    let random = |n| Tensor::randn(0f32, 1.0, (1, 8, n, HEAD_DIM), &Device::Cpu)?.to_dtype(DType::BF16);
    let attn = PqAttention::new(PqConfig::default(), 0.1)?;
    let mut caches = Vec::new();
    for _ in 0..layers {
        let mut cache = attn.new_cache([1, 8, HEAD_DIM], CAPACITY, DType::BF16, &Device::Cpu)?;
        cache.append(&random(KEYS)?, &random(KEYS)?)?;
        cache.build_index()?;
        caches.push(cache);
    }
    let directory = tempfile::tempdir()?;
    let saved = directory.path().join("saved");
    save_caches(&saved, &caches, "")?;
    let bytes = std::fs::read(&saved)?;
    // Taken away when the clock has stopped, as are what was read and loaded.
    let new = |i: usize| tempfile::TempPath::try_from_path(directory.path().join(i.to_string()));
    let write = |i| {
        let path = new(i)?;
        std::fs::write(&path, &bytes)?;
        Ok(path)
    };
    let save = |i| {
        let path = new(i)?;
        save_caches(&path, &caches, "")?;
        Ok(path)
    };
    let report = |what, us| report(name, what, bytes.len(), us);
    report("write", times(CALLS / layers, &write)?);
    report("save", times(CALLS / layers, &save)?);
    report("read", times(CALLS / layers, &|_| Ok(std::fs::read(&saved)?))?);
    report("load", times(CALLS / layers, &|_| load_caches(&saved, CAPACITY, &Device::Cpu))?);
    let mut loaded = load_caches(&saved, CAPACITY, &Device::Cpu)?.caches;
    for _ in 0..100 {
        let [q, k, v] = [random(1)?, random(1)?, random(1)?];
        for (loaded, cache) in loaded.iter_mut().zip(&mut caches) {
            let step = |cache| attn.forward(&q, &k, &v, cache)?.flatten_all()?.to_vec1::<half::bf16>();
            assert_eq!(step(loaded)?, step(cache)?, "a step after loading");
        }
    }
    Ok(())
}

/// The wall time of single calls, in µs, ascending.
fn times<T>(calls: usize, call: &dyn Fn(usize) -> Result<T>) -> Result<Vec<f64>> {
    for i in 0..5 {
        call(i)?;
    }
    let mut us: Vec<f64> = (0..calls)
        .map(|i| {
            let start = Instant::now();
            let result = call(i)?;
            let us = start.elapsed().as_secs_f64() * 1e6;
            drop(result);
            Ok(us)
        })
        .collect::<Result<_>>()?;
    us.sort_by(f64::total_cmp);
    Ok(us)
}

/// Bytes read and written by a large copy, in GB/s.
fn copy_bandwidth() -> Result<f64> {
    let count = 1 << 26;
    let (src, dst) = (Tensor::zeros(count, DType::U8, &Device::Cpu)?, Tensor::zeros(count, DType::U8, &Device::Cpu)?);
    let us = times(10, &|_| dst.slice_set(&src, 0, 0))?;
    Ok(2.0 * count as f64 / us[us.len() / 2] / 1e3)
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let json = args.iter().any(|arg| arg == "--json");
    let option = |name: &str| args.iter().skip_while(|arg| *arg != name).nth(1);
    let threads = option("--threads").and_then(|threads| threads.parse().ok()).unwrap_or(1);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().map_err(candle_core::Error::wrap)?;
    let copy_gb_per_s = copy_bandwidth()?;
    if !json {
        println!("{threads} threads, a copy moves {copy_gb_per_s:.0} GB/s");
        println!("{:16} {:10} {:>9} {:>9} {:>9} {:>6}", "case", "what", "p20 us", "p50 us", "p80 us", "GB/s");
    }
    let report = |case: &str, what: &str, bytes: usize, us: Vec<f64>| {
        let [p20, p50, p80] = [20, 50, 80].map(|percent| us[us.len() * percent / 100]);
        let gb_per_s = bytes as f64 / p50 / 1e3;
        let row = json!({
            "case": case, "what": what, "mode": "eager", "us_p20": round(p20), "us_p50": round(p50),
            "us_p80": round(p80), "launches": 0, "bytes": bytes, "gb_per_s": round(gb_per_s),
            "pct_of_copy_bandwidth": round(100.0 * gb_per_s / copy_gb_per_s),
        });
        match json {
            true => println!("{row}"),
            false => println!("{case:16} {what:10} {p20:>9.1} {p50:>9.1} {p80:>9.1} {gb_per_s:>6.1}"),
        }
    };
    let wanted = option("--case").map_or("", String::as_str);
    for (name, pq_dim, pq_bits) in CASES.into_iter().filter(|(name, ..)| name.starts_with(wanted)) {
        run(name, pq_dim, pq_bits, &report)?;
    }
    for (name, layers) in [("file-32k", 1), ("file-4x32k", 4)] {
        if name.starts_with(wanted) {
            file(name, layers, &report)?;
        }
    }
    Ok(())
}
