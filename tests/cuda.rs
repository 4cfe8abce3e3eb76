//! Every op on the GPU against its CPU twin, in awkward shapes and layouts; reruns; the golden cases.
//!
//! The kernel runs before the reference, so that nothing of the reference's lies in the memory it is given. Without a
//! device the tests say SKIP, and fail under `REQUIRE_CUDA=1`.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/misuse.rs"]
mod misuse;
#[path = "common/packed.rs"]
mod packed;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use candle_core::cuda_backend::cudarc::driver::{sys, CudaGraph};
use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, IndexOp, Result, Tensor};
use candle_pq_attn::ops::{self, ClusterSums, Geometry, KmeansOptions, Selected, PADDING};
use candle_pq_attn::{
    Codebook, DecodeGraph, Heavy, Metric, PagePool, PqAttention, PqConfig, PqKvCache, Selection, Tail,
};
use common::{integers, lay_out, numbers, Rng, Strides, DTYPES, STRIDES};

fn gpu() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("REQUIRE_CUDA").is_some_and(|require| require == "1") => {
            panic!("REQUIRE_CUDA=1, but there is no CUDA device: {error}")
        }
        Err(error) => {
            eprintln!("SKIP: no CUDA device: {error}");
            None
        }
    }
}

/// Held by every test, and alone by those that capture: what others do meanwhile on the default stream, such as to free
/// memory, would end a capture.
static GPU: RwLock<()> = RwLock::new(());

/// The lock, then the device: in this order, so that the device goes first.
macro_rules! gpu_or_skip {
    ($lock:ident) => {{
        let guard = GPU.$lock().unwrap_or_else(PoisonError::into_inner);
        match gpu() {
            Some(gpu) => (guard, gpu),
            None => return Ok(()),
        }
    }};
}

/// A tensor of `dims` in some layout, on the GPU and on the CPU.
fn pair(rng: &mut Rng, gpu: &Device, dims: &[usize], dtype: DType, strides: Strides) -> Result<[Tensor; 2]> {
    let cpu = lay_out(&rng.tensor(dims, dtype), strides)?;
    Ok([cpu.to_device(gpu)?, cpu])
}

fn codes(rng: &mut Rng, gpu: &Device, dims: &[usize], n_centroids: usize, strides: Strides) -> Result<[Tensor; 2]> {
    let count = dims.iter().product();
    let codes: Vec<u8> = (0..count).map(|_| rng.below(n_centroids) as u8).collect();
    let cpu = lay_out(&Tensor::from_vec(codes, dims, &Device::Cpu)?, strides)?;
    Ok([cpu.to_device(gpu)?, cpu])
}

/// A forward of queries of `h` heads, and behind them keys and values of `h_kv` each, in one tensor.
fn forward_of(attn: &PqAttention, [h, h_kv]: [usize; 2], qkv: &Tensor, cache: &mut PqKvCache) -> Result<Tensor> {
    let (q, k) = (qkv.narrow(1, 0, h)?, qkv.narrow(1, h, h_kv)?);
    attn.forward(&q, &k, &qkv.narrow(1, h + h_kv, h_kv)?, cache)
}

#[track_caller]
fn assert_same_integers(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (integers(got), integers(want));
    let differ = got.iter().zip(&want).filter(|(got, want)| got != want).count();
    let first = got.iter().zip(&want).position(|(got, want)| got != want);
    assert!(differ == 0, "{what}: {differ} of {} differ, the first at {first:?}", got.len());
}

#[track_caller]
fn assert_same_bits(what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let bits = |tensor: &Tensor| -> Result<Vec<u32>> {
        let numbers: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(numbers.into_iter().map(f32::to_bits).collect())
    };
    let (got, want) = (bits(got)?, bits(want)?);
    let differ = got.iter().zip(&want).filter(|(got, want)| got != want).count();
    assert!(differ == 0, "{what}: {differ} of {} differ", got.len());
    Ok(())
}

/// Differences of at most `tolerance` of the largest number.
#[track_caller]
fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (numbers(got), numbers(want));
    let largest = want.iter().filter(|x| x.is_finite()).fold(1e-30f64, |a, b| a.max(b.abs()));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let same = got == want || (got.is_nan() && want.is_nan()) || (got - want).abs() <= tolerance * largest;
        assert!(same, "{what}: {got} instead of {want} at {i}, of a largest {largest}");
    }
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1e-3,
        DType::BF16 => 8e-3,
        _ => 2e-6,
    }
}

/// (b, h_kv, n, head_dim, pq_dim, pq_bits)
const PQ_SHAPES: [[usize; 6]; 10] = [
    [1, 2, 300, 64, 16, 8],
    [2, 3, 257, 128, 16, 8],
    [1, 2, 133, 128, 2, 6],
    [1, 1, 140, 64, 2, 5],
    [1, 2, 7, 128, 8, 8],
    [2, 1, 1, 80, 16, 4],
    [1, 3, 200, 80, 8, 8],
    [1, 2, 129, 96, 3, 1],
    [1, 1, 150, 256, 256, 3],
    [1, 1, 40, 256, 1, 7],
];

#[test]
fn encode() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(1);
    for [b, h_kv, n, d, pq_dim, bits] in PQ_SHAPES {
        for dtype in DTYPES {
            for (strides, augmented) in STRIDES.iter().flat_map(|strides| [(*strides, false), (*strides, true)]) {
                let [keys, cpu_keys] = pair(&mut rng, &gpu, &[b, h_kv, n, d], dtype, strides)?;
                let dims = [b, h_kv, pq_dim, 1 << bits, d / pq_dim + usize::from(augmented)];
                let [centroids, cpu_centroids] = pair(&mut rng, &gpu, &dims, DType::F32, strides)?;
                let [phi, cpu_phi] = pair(&mut rng, &gpu, &[b, h_kv, pq_dim], DType::F32, Strides::Contiguous)?;
                let got = ops::encode(&keys, &centroids, augmented.then_some(&phi))?;
                let want = ops::encode(&cpu_keys, &cpu_centroids, augmented.then_some(&cpu_phi))?;
                let what = format!("{:?} {dtype:?} {strides:?} {augmented}", [b, h_kv, n, d, pq_dim, bits]);
                assert_same_integers(&what, &got, &want);
            }
        }
    }
    Ok(())
}

/// Keys that are few enough for a block of threads to have a sub-vector: centroids that fit its shared memory, that do not, that are
/// read one float at a time, and that lie where four cannot be.
#[test]
fn encode_of_few_keys() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(42);
    for (bits, pq_len, augmented) in [
        (6, 64, false),
        (8, 28, false),
        (8, 32, false),
        (7, 60, false),
        (7, 64, false),
        (8, 16, false),
        (6, 10, false),
        (4, 3, true),
        (5, 7, true),
        (8, 31, true),
    ] {
        for (n, dtype) in (1..=5).zip([DType::F32, DType::F16, DType::BF16, DType::F32, DType::F32]) {
            let columns = pq_len + usize::from(augmented);
            let [keys, cpu_keys] = pair(&mut rng, &gpu, &[2, 2, n, 3 * pq_len], dtype, Strides::Contiguous)?;
            let dims = [2, 2, 3, 1 << bits, columns + 8];
            let [wide, cpu_wide] = pair(&mut rng, &gpu, &dims, DType::F32, Strides::Contiguous)?;
            // As large as norms are.
            let [phi, cpu_phi] = pair(&mut rng, &gpu, &[2, 2, 3], DType::F32, Strides::Contiguous)?;
            let (phi, cpu_phi) = ((phi * 40.0)?, (cpu_phi * 40.0)?);
            for (first, whole) in [(0, true), (0, false), (1, false), (4, false)] {
                let of = |wide: &Tensor| {
                    let part = wide.narrow(4, first, columns)?;
                    if whole {
                        part.contiguous()
                    } else {
                        Ok(part)
                    }
                };
                let got = ops::encode(&keys, &of(&wide)?, augmented.then_some(&phi))?;
                let want = ops::encode(&cpu_keys, &of(&cpu_wide)?, augmented.then_some(&cpu_phi))?;
                assert_same_integers(&format!("{bits} {pq_len} {augmented} {n} {first} {whole}"), &got, &want);
            }
        }
    }
    Ok(())
}

#[test]
fn encode_nan() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(2);
    for n in [3, 200] {
        let [centroids, _] = pair(&mut rng, &gpu, &[1, 1, 4, 16, 16], DType::F32, Strides::Contiguous)?;
        let keys = Tensor::full(f32::NAN, (1, 1, n, 64), &gpu)?;
        assert!(integers(&ops::encode(&keys, &centroids, None)?).iter().all(|&code| code == 0));
    }
    Ok(())
}

#[test]
fn score() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(3);
    for [b, h_kv, n, d, pq_dim, bits] in PQ_SHAPES {
        for (dtype, group) in DTYPES.into_iter().zip([1, 4, 3]).chain([(DType::F32, 2), (DType::F32, 7)]) {
            for strides in STRIDES {
                let h = h_kv * group;
                let [query, cpu_query] = pair(&mut rng, &gpu, &[b, h, 1, d], dtype, strides)?;
                let [codes, cpu_codes] = codes(&mut rng, &gpu, &[b, h_kv, n, pq_dim], 1 << bits, strides)?;
                let dims = [b, h_kv, pq_dim, 1 << bits, d / pq_dim];
                let [centroids, cpu_centroids] = pair(&mut rng, &gpu, &dims, DType::F32, strides)?;
                let got = ops::score(&query, &codes, &centroids)?;
                let want = ops::score(&cpu_query, &cpu_codes, &cpu_centroids)?;
                let what = format!("{:?} {dtype:?} {group} {strides:?}", [b, h_kv, n, d, pq_dim, bits]);
                assert_same_bits(&what, &got, &want)?;
            }
        }
    }
    Ok(())
}

#[test]
fn score_of_many_keys_and_of_none() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(4);
    for n in [0, 2047, 2048, 2049, 50_001] {
        let [query, cpu_query] = pair(&mut rng, &gpu, &[1, 8, 1, 128], DType::BF16, Strides::Contiguous)?;
        let [codes, cpu_codes] = codes(&mut rng, &gpu, &[1, 2, n, 16], 256, Strides::Contiguous)?;
        let [centroids, cpu_centroids] = pair(&mut rng, &gpu, &[1, 2, 16, 256, 8], DType::F32, Strides::Contiguous)?;
        let got = ops::score(&query, &codes, &centroids)?;
        assert_same_bits(&format!("{n}"), &got, &ops::score(&cpu_query, &cpu_codes, &cpu_centroids)?)?;
    }
    Ok(())
}

#[test]
fn topk() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(5);
    for (rows, n) in [(1, 1), (3, 31), (2, 1024), (1, 8193), (5, 20_000), (1, 300_000), (40, 9000), (300, 700)] {
        for levels in [1, 3, 64, usize::MAX] {
            let mut scores: Vec<f32> = (0..rows * n)
                .map(|_| if levels == usize::MAX { rng.normal() } else { rng.below(levels) as f32 - 1.0 })
                .collect();
            // Zeros of either sign, infinities, NaN.
            for special in [-0.0, 0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN] {
                scores[rng.below(rows * n)] = special;
            }
            let cpu = Tensor::from_vec(scores, (rows, n), &Device::Cpu)?;
            for k in [0, 1, 2, n / 100, n / 3, n - 1, n, n + 5] {
                let got = ops::topk(&cpu.to_device(&gpu)?, k)?;
                assert_same_integers(&format!("{rows} {n} {levels} {k}"), &got, &ops::topk(&cpu, k)?);
            }
        }
    }
    Ok(())
}

#[test]
fn topk_of_strided_scores() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(6);
    for strides in STRIDES {
        let [scores, cpu_scores] = pair(&mut rng, &gpu, &[2, 3, 5000], DType::F32, strides)?;
        assert_same_integers(&format!("{strides:?}"), &ops::topk(&scores, 77)?, &ops::topk(&cpu_scores, 77)?);
        let (scores, cpu_scores) = (scores.narrow(2, 5, 4001)?, cpu_scores.narrow(2, 5, 4001)?);
        assert_same_integers(&format!("{strides:?}"), &ops::topk(&scores, 77)?, &ops::topk(&cpu_scores, 77)?);
    }
    Ok(())
}

#[test]
fn group_mass() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(7);
    for (h_kv, group, n) in [(1, 1, 1), (2, 4, 300), (1, 3, 8193), (2, 16, 100), (1, 20, 33), (2, 4, 40_000)] {
        for (strides, scale) in STRIDES.into_iter().zip([0.125, 3.0, -1.0, 0.0]) {
            let [scores, cpu_scores] = pair(&mut rng, &gpu, &[2, h_kv * group, n], DType::F32, strides)?;
            let got = ops::group_mass(&scores, h_kv, scale)?;
            let want = ops::group_mass(&cpu_scores, h_kv, scale)?;
            assert_close(&format!("{h_kv} {group} {n} {strides:?} {scale}"), &got, &want, 1e-5);
        }
    }
    Ok(())
}

#[test]
fn indices_and_weights() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(8);
    for (n, sink, window, init_offset) in [
        (1usize, 4, 64, 4usize),
        (100, 4, 10, 4),
        (1000, 0, 0, 0),
        (1000, 16, 100, 3),
        (1000, 3, 100, 50),
        (9000, 4, 9000, 4),
    ] {
        for k in [0, 1, 30, 400] {
            let rows: Vec<Vec<u32>> = (0..6)
                .map(|_| {
                    let mut row: Vec<u32> = (0..n.saturating_sub(init_offset) as u32).collect();
                    while row.len() > k {
                        let index = rng.below(row.len());
                        row.remove(index);
                    }
                    row
                })
                .collect();
            let k = rows[0].len();
            let cpu = Tensor::from_vec(rows.concat(), (2, 3, k), &Device::Cpu)?;
            let geometry = Geometry { n, sink, window, init_offset };
            let got = ops::indices_and_weights(&cpu.to_device(&gpu)?, geometry)?;
            let dense = ops::dense_weights(&got, 6, n)?;
            let want = ops::indices_and_weights(&cpu, geometry)?;
            let what = format!("{geometry:?} {k}");
            assert_same_integers(&what, &got.lens, &want.lens);
            assert_same_integers(&what, &got.indices, &want.indices);
            assert_same_bits(&what, &got.weights, &want.weights)?;
            assert_same_bits(&what, &dense, &ops::dense_weights(&want, 6, n)?)?;
        }
    }
    Ok(())
}

/// In the launches that are its own, and where these do not suit in those of the ops that it is made of.
#[test]
fn select() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(34);
    // The published indexer's shape, ties of one subspace, whole runs of candidates and a key more, many of them, and tables that
    // pass by in several tiles.
    let shapes = [
        ([1, 4, 31_744, 128, 2], 6, [128, 128, 128]),
        ([2, 3, 20_000, 16, 1], 1, [4, 64, 4]),
        ([1, 2, 8192, 64, 8], 8, [4, 64, 0]),
        ([1, 1, 8193, 96, 16], 8, [20, 64, 4]),
        ([1, 2, 100_000, 128, 16], 4, [0, 0, 0]),
        ([1, 1, 524_288, 8, 2], 8, [3, 100_000, 50]),
        ([1, 1, 524_289, 8, 2], 8, [3, 5, 50]),
        ([2, 1, 33, 24, 3], 5, [4, 64, 4]),
        ([1, 2, 5000, 256, 32], 8, [4, 4000, 1]),
        ([1, 1, 3000, 250, 2], 3, [4, 64, 4]),
    ];
    for ([b, h_kv, n, d, pq_dim], bits, [sink, window, init_offset]) in shapes {
        for (dtype, (group, strides)) in DTYPES.into_iter().zip([(1, STRIDES[0]), (4, STRIDES[1]), (3, STRIDES[2])]) {
            let h = h_kv * group;
            let [query, cpu_query] = pair(&mut rng, &gpu, &[b, h, 1, d], dtype, strides)?;
            let [codes, cpu_codes] = codes(&mut rng, &gpu, &[b, h_kv, n, pq_dim], 1 << bits, strides)?;
            let dims = [b, h_kv, pq_dim, 1 << bits, d / pq_dim];
            let [centroids, cpu_centroids] = pair(&mut rng, &gpu, &dims, DType::F32, strides)?;
            for k in [0, 1, 128, n / 100, n / 3, n + 1] {
                let geometry = Geometry { n: init_offset + n + window.min(7), sink, window, init_offset };
                let (got, dense) = ops::select_dense(&query, &codes, &centroids, k, geometry)?;
                let (want, cpu_dense) = ops::select_dense(&cpu_query, &cpu_codes, &cpu_centroids, k, geometry)?;
                let what = format!("{:?} {bits} {dtype:?} {group} {k} {geometry:?}", [b, h_kv, n, d, pq_dim]);
                assert_same_integers(&what, &got.lens, &want.lens);
                assert_same_integers(&what, &got.indices, &want.indices);
                assert_same_bits(&what, &got.weights, &want.weights)?;
                assert_same_bits(&what, &dense, &cpu_dense)?;
                let got = ops::select(&query, &codes, &centroids, k, geometry)?;
                assert_same_integers(&what, &got.indices, &want.indices);
            }
        }
    }
    Ok(())
}

/// Scores that no bin of a histogram tells apart: NaN, infinities, all alike, and one far from all others.
#[test]
fn select_at_the_extremes() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(35);
    let (n, geometry) = (20_000, Geometry { n: 20_100, sink: 4, window: 64, init_offset: 4 });
    let [few, cpu_few] = codes(&mut rng, &gpu, &[1, 2, n, 2], 16, Strides::Contiguous)?;
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, f32::MAX, 0.0] {
        for places in [vec![3], vec![3, 40], (0..64).collect()] {
            let mut table: Vec<f32> = (0..2 * 2 * 16 * 4).map(|_| rng.normal()).collect();
            places.iter().for_each(|place: &usize| table[*place] = special);
            let cpu_centroids = Tensor::from_vec(table, (1, 2, 2, 16, 4), &Device::Cpu)?;
            let cpu_query = Tensor::ones((1, 4, 1, 8), DType::F32, &Device::Cpu)?;
            let (query, centroids) = (cpu_query.to_device(&gpu)?, cpu_centroids.to_device(&gpu)?);
            for k in [1, 100, 2000] {
                let (got, dense) = ops::select_dense(&query, &few, &centroids, k, geometry)?;
                let (want, cpu_dense) = ops::select_dense(&cpu_query, &cpu_few, &cpu_centroids, k, geometry)?;
                let what = format!("{special} at {} places, {k}", places.len());
                assert_same_integers(&what, &got.indices, &want.indices);
                assert_same_bits(&what, &dense, &cpu_dense)?;
            }
        }
    }
    // A query of zeros, and few scores of many candidates.
    let geometry = Geometry { n: 400_000, sink: 4, window: 64, init_offset: 4 };
    let [many, cpu_many] = codes(&mut rng, &gpu, &[1, 1, 399_000, 2], 4, Strides::Contiguous)?;
    let [centroids, cpu_centroids] = pair(&mut rng, &gpu, &[1, 1, 2, 4, 4], DType::F32, Strides::Contiguous)?;
    for cpu_query in [Tensor::zeros((1, 1, 1, 8), DType::F32, &Device::Cpu)?, rng.tensor(&[1, 1, 1, 8], DType::F32)] {
        let got = ops::select(&cpu_query.to_device(&gpu)?, &many, &centroids, 300, geometry)?;
        let want = ops::select(&cpu_query, &cpu_many, &cpu_centroids, 300, geometry)?;
        assert_same_integers("many alike", &got.indices, &want.indices);
    }
    Ok(())
}

/// Without candidates, and with more sinks than keys.
#[test]
fn select_of_next_to_nothing() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(43);
    let [query, cpu_query] = pair(&mut rng, &gpu, &[1, 4, 1, 8], DType::F32, Strides::Contiguous)?;
    let [centroids, cpu_centroids] = pair(&mut rng, &gpu, &[1, 2, 2, 16, 4], DType::F32, Strides::Contiguous)?;
    for (n, [sink, window, init_offset], length) in
        [(0, [4, 4, 4], 4), (0, [9, 0, 0], 3), (40, [99, 99, 2], 50), (40, [0, 0, 0], 40), (1, [0, 0, 0], 1)]
    {
        let [codes, cpu_codes] = codes(&mut rng, &gpu, &[1, 2, n, 2], 16, Strides::Contiguous)?;
        for k in [0, 1, 20] {
            let geometry = Geometry { n: length, sink, window, init_offset };
            let (got, dense) = ops::select_dense(&query, &codes, &centroids, k, geometry)?;
            let (want, cpu_dense) = ops::select_dense(&cpu_query, &cpu_codes, &cpu_centroids, k, geometry)?;
            let what = format!("{n} {k} {geometry:?}");
            assert_same_integers(&what, &got.lens, &want.lens);
            assert_same_integers(&what, &got.indices, &want.indices);
            assert_same_bits(&what, &got.weights, &want.weights)?;
            assert_same_bits(&what, &dense, &cpu_dense)?;
        }
    }
    Ok(())
}

/// A captured call, replayed between others of other shapes: on a thread that called before, in one launch, and on one that did not,
/// in those of single ops.
#[test]
fn captured_selects_equal_eager_ones() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(write);
    // Returns how much was captured.
    let run = |gpu: &Device, is_first: bool| -> Result<usize> {
        let mut rng = Rng(44);
        let [codes, cpu_codes] = codes(&mut rng, gpu, &[2, 2, 20_000, 2], 64, Strides::Contiguous)?;
        let [centroids, cpu_centroids] = pair(&mut rng, gpu, &[2, 2, 2, 64, 16], DType::F32, Strides::Contiguous)?;
        let [queries, cpu_queries] = pair(&mut rng, gpu, &[2, 8, 10, 32], DType::F32, Strides::Contiguous)?;
        let geometry = Geometry { n: 20_100, sink: 4, window: 64, init_offset: 4 };
        let query = queries.narrow(2, 0, 1)?.contiguous()?;
        let lens = Tensor::zeros((2, 8), DType::U32, gpu)?;
        let indices = Tensor::zeros((2, 8, 4 + 100 + 64), DType::U32, gpu)?;
        let dense = Tensor::zeros((2, 8, 20_100), DType::F32, gpu)?;
        if !is_first {
            ops::select(&query, &codes, &centroids, 100, geometry)?;
        }
        let graph = capture(gpu, || {
            let (selected, by_position) = ops::select_dense(&query, &codes, &centroids, 100, geometry)?;
            lens.slice_set(&selected.lens, 0, 0)?;
            indices.slice_set(&selected.indices, 0, 0)?;
            dense.slice_set(&by_position, 0, 0)
        })?;
        for step in 0..10 {
            query.slice_set(&queries.narrow(2, step, 1)?.contiguous()?, 0, 0)?;
            let few = codes.narrow(0, 1, 1)?.narrow(2, 0, 9000 * (step % 2) + 5000)?;
            ops::select(&query.narrow(0, 1, 1)?, &few, &centroids.narrow(0, 1, 1)?, 7, geometry)?;
            graph.launch().w()?;
            let cpu_query = cpu_queries.narrow(2, step, 1)?;
            let (want, by_position) = ops::select_dense(&cpu_query, &cpu_codes, &cpu_centroids, 100, geometry)?;
            let what = format!("step {step}");
            assert_same_integers(&what, &lens, &want.lens);
            assert_same_integers(&what, &indices, &want.indices);
            assert_same_bits(&what, &dense, &by_position)?;
        }
        nodes(&graph)
    };
    let in_one = run(&gpu, false)?;
    let on_a_thread = std::thread::spawn(move || run(&Device::new_cuda(0)?, true));
    let in_several = on_a_thread.join().expect("a thread that ends")?;
    assert!(in_one < in_several, "{in_one} nodes, and {in_several} of single ops");
    Ok(())
}

/// Steps whose lists are those of `select` as candidates grow into a second run and go back, one by one and replayed, in a cache with
/// room for more: against the CPU's.
#[test]
fn selected_lists_of_a_cache_that_grows() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(write);
    let (h, h_kv, d, prompt, steps) = (8, 2, 64, 8200, 120);
    let mut rng = Rng(45);
    let config = PqConfig {
        heavy: Heavy::Keys(40),
        pq_dim: 2,
        pq_bits: 6,
        coarse: 0,
        tail: Tail::None,
        query_weights: false,
        refresh: 10.0, // replays do not train
        ..PqConfig::default()
    };
    let attn = PqAttention::new(config, 0.125)?;
    let all = pair(&mut rng, &gpu, &[1, h + 2 * h_kv, prompt + steps, d], DType::F32, Strides::Contiguous)?;
    let forward = |qkv: &Tensor, cache: &mut PqKvCache| forward_of(&attn, [h, h_kv], qkv, cache);
    let read = |all: &Tensor| -> Result<PqKvCache> {
        let mut cache = attn.new_cache([1, h_kv, d], 20_000, DType::F32, all.device())?;
        cache.append(
            &all.narrow(1, h, h_kv)?.narrow(2, 0, prompt)?,
            &all.narrow(1, h + h_kv, h_kv)?.narrow(2, 0, prompt)?,
        )?;
        cache.build_index()?;
        Ok(cache)
    };
    let (mut eager, mut replayed, mut cpu) = (read(&all[0])?, [read(&all[0])?], read(&all[1])?);
    assert!(eager.len() - attn.config().window - attn.config().init_offset() < 8192);
    let mut graph = DecodeGraph::new(|qkv: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| forward(qkv, &mut caches[0]));
    let mut replays = 0;
    for round in 0..2 {
        for step in prompt..prompt + steps {
            let [qkv, cpu_qkv] = [&all[0], &all[1]].map(|all| all.narrow(2, step, 1));
            let (qkv, cpu_qkv) = (qkv?, cpu_qkv?);
            let (got, want) = (forward(&qkv, &mut eager)?, forward(&cpu_qkv, &mut cpu)?);
            let what = format!("round {round}, step {step}");
            assert_close(&what, &got, &want, 1e-4);
            replays += usize::from(graph.is_replay(&replayed));
            assert_same_bits(&what, &graph.step(&qkv, &mut replayed)?, &got.to_device(&Device::Cpu)?)?;
        }
        assert!(eager.len() - attn.config().window - attn.config().init_offset() > 8192);
        [&mut eager, &mut replayed[0], &mut cpu].into_iter().try_for_each(|cache| cache.truncate(prompt))?;
    }
    assert!(replays > steps, "{replays} of {} steps were replays", 2 * steps);
    Ok(())
}

/// Random ascending lists of different lengths, padded, with NaN for the weights of padding.
fn lists(rng: &mut Rng, b: usize, count: usize, n: usize, len: usize) -> Result<Selected> {
    let (mut indices, mut lens, mut weights) = (vec![], vec![], vec![]);
    for row in 0..b * count {
        let attended = [len, 0, 1, len / 2][row % 4].min(n);
        let mut positions: Vec<u32> = (0..n as u32).collect();
        while positions.len() > attended {
            let index = rng.below(positions.len());
            positions.swap_remove(index);
        }
        positions.sort_unstable();
        lens.push(attended as u32);
        indices.extend(positions.iter().copied().chain(std::iter::repeat_n(PADDING, len - attended)));
        weights.extend(
            (0..attended).map(|_| 0.5 + rng.below(4) as f32).chain(std::iter::repeat_n(f32::NAN, len - attended)),
        );
    }
    Ok(Selected {
        indices: Tensor::from_vec(indices, (b, count, len), &Device::Cpu)?,
        lens: Tensor::from_vec(lens, (b, count), &Device::Cpu)?,
        weights: Tensor::from_vec(weights, (b, count, len), &Device::Cpu)?,
    })
}

fn to_device(selected: &Selected, device: &Device) -> Result<Selected> {
    Ok(Selected {
        indices: selected.indices.to_device(device)?,
        lens: selected.lens.to_device(device)?,
        weights: selected.weights.to_device(device)?,
    })
}

#[test]
fn attend() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(9);
    for d in [64, 80, 96, 128, 256, 1, 33, 250] {
        for (h_kv, group) in [(2, 1), (1, 2), (2, 3), (2, 4), (1, 7), (1, 8), (1, 16), (1, 24)] {
            let n = [1, 2, 31, 64, 65, 500][rng.below(6)];
            for (dtype, strides) in DTYPES.into_iter().zip([STRIDES[rng.below(4)], STRIDES[rng.below(4)], STRIDES[1]]) {
                let (b, h) = (2, h_kv * group);
                let [query, cpu_query] = pair(&mut rng, &gpu, &[b, h, 1, d], dtype, strides)?;
                let [keys, cpu_keys] = pair(&mut rng, &gpu, &[b, h_kv, n, d], dtype, strides)?;
                let value_strides = STRIDES[rng.below(4)];
                let [values, cpu_values] = pair(&mut rng, &gpu, &[b, h_kv, n, d], dtype, value_strides)?;
                let scale = 1.0 / (d as f32).sqrt();
                let what = format!("d {d} {h_kv} x {group} n {n} {dtype:?} {strides:?}");
                let got = ops::dense_attend(&query, &keys, &values, scale)?;
                let want = ops::dense_attend(&cpu_query, &cpu_keys, &cpu_values, scale)?;
                assert_close(&what, &got.out, &want.out, tolerance(dtype));
                assert_close(&what, &got.lse, &want.lse, 1e-5);
                for count in [h, h_kv] {
                    let selected = lists(&mut rng, b, count, n, n.min(200))?;
                    let on_gpu = to_device(&selected, &gpu)?;
                    let got = ops::sparse_attend(&query, &keys, &values, &on_gpu, scale)?;
                    let want = ops::sparse_attend(&cpu_query, &cpu_keys, &cpu_values, &selected, scale)?;
                    assert_close(&what, &got.out, &want.out, tolerance(dtype));
                    assert_close(&what, &got.lse, &want.lse, 1e-5);
                }
            }
        }
    }
    Ok(())
}

/// Keys and values that no list names hold NaN.
#[test]
fn attend_reads_listed_positions_only() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(10);
    let (n, d) = (900, 128);
    let selected = lists(&mut rng, 1, 1, n, 150)?;
    let mut poisoned = vec![f32::NAN; n * d];
    for &position in integers(&selected.indices).iter().filter(|position| **position != PADDING) {
        poisoned[position as usize * d..][..d].fill_with(|| rng.normal());
    }
    let keys = Tensor::from_vec(poisoned, (1, 1, n, d), &Device::Cpu)?.to_dtype(DType::BF16)?;
    let query = rng.tensor(&[1, 4, 1, d], DType::BF16);
    let on_gpu = keys.to_device(&gpu)?;
    let got = ops::sparse_attend(&query.to_device(&gpu)?, &on_gpu, &on_gpu, &to_device(&selected, &gpu)?, 0.1)?;
    let want = ops::sparse_attend(&query, &keys, &keys, &selected, 0.1)?;
    assert!(numbers(&want.out).iter().all(|x| x.is_finite()));
    assert_close("poisoned", &got.out, &want.out, tolerance(DType::BF16));
    Ok(())
}

#[test]
fn causal_softmax() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(11);
    for (rows, queries, n, first) in [(1, 1, 1, 0), (12, 4, 100, 96), (12, 4, 1000, 10), (30, 10, 257, 200)] {
        let cpu = rng.tensor(&[2, 2, rows, n], DType::F32);
        let on_gpu = cpu.to_device(&gpu)?;
        ops::causal_softmax(&on_gpu, first, queries, 0.7)?;
        ops::causal_softmax(&cpu, first, queries, 0.7)?;
        assert_close(&format!("{rows} {queries} {n} {first}"), &on_gpu, &cpu, 2e-6);
    }
    Ok(())
}

#[test]
fn kmeans() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(12);
    for (dims, pq_dim, pq_bits, max_keys) in [
        ([1, 2, 400, 64], 8, 6, 1000),
        ([2, 1, 1000, 80], 16, 4, 333),
        ([1, 1, 700, 128], 2, 6, 1000),
        ([1, 1, 5000, 128], 16, 8, 5000),
        ([1, 2, 64, 96], 4, 6, 64),
        ([1, 1, 300, 256], 1, 3, 300),
        ([1, 2, 700, 128], 1, 8, 600),
        ([2, 1, 500, 80], 1, 6, 500),
        ([1, 1, 500, 96], 1, 5, 500),
    ] {
        for (dtype, metric) in
            DTYPES.into_iter().flat_map(|dtype| [(dtype, Metric::Euclidean), (dtype, Metric::InnerProduct)])
        {
            let strides = STRIDES[rng.below(4)];
            let [keys, cpu_keys] = pair(&mut rng, &gpu, &dims, dtype, strides)?;
            for iters in [0, 1, 5] {
                let options = KmeansOptions { pq_dim, pq_bits, iters, metric, max_keys, seed: 3 };
                let (got, got_phi) = ops::kmeans(&keys, &options)?;
                let (want, want_phi) = ops::kmeans(&cpu_keys, &options)?;
                let what = format!("{dims:?} {dtype:?} {options:?}");
                if let (Some(got), Some(want)) = (got_phi, want_phi) {
                    assert_same_bits(&what, &got, &want)?;
                }
                assert_same_bits(&what, &got, &want)?;
            }
        }
    }
    Ok(())
}

/// Fewer distinct keys than centroids: clusters stay empty and are drawn anew.
#[test]
fn kmeans_with_empty_clusters() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(13);
    let distinct = rng.tensor(&[1, 1, 10, 64], DType::F32);
    let cpu = Tensor::cat(&vec![distinct; 60], 2)?;
    let options = KmeansOptions { pq_dim: 8, pq_bits: 6, iters: 4, metric: Metric::Euclidean, max_keys: 600, seed: 9 };
    let (got, _) = ops::kmeans(&cpu.to_device(&gpu)?, &options)?;
    assert_same_bits("empty clusters", &got, &ops::kmeans(&cpu, &options)?.0)
}

#[test]
fn reruns_are_equal_to_the_bit() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(14);
    let (h, h_kv, n, d) = (8, 2, 20_000, 128);
    let [query, _] = pair(&mut rng, &gpu, &[1, h, 1, d], DType::BF16, Strides::Contiguous)?;
    let [keys, _] = pair(&mut rng, &gpu, &[1, h_kv, n, d], DType::BF16, Strides::Contiguous)?;
    let options =
        KmeansOptions { pq_dim: 16, pq_bits: 8, iters: 3, metric: Metric::Euclidean, max_keys: 4096, seed: 1 };
    let run = || -> Result<Vec<Tensor>> {
        let (centroids, _) = ops::kmeans(&keys, &options)?;
        let codes = ops::encode(&keys, &centroids, None)?;
        let scores = ops::score(&query, &codes, &centroids)?;
        let mass = ops::group_mass(&scores, h_kv, 0.1)?;
        let heavy = ops::topk(&mass, 500)?;
        let geometry = Geometry { n, sink: 0, window: 0, init_offset: 0 };
        let selected = ops::indices_and_weights(&heavy, geometry)?;
        let sparse = ops::sparse_attend(&query, &keys, &keys, &selected, 0.1)?;
        let dense = ops::dense_attend(&query, &keys, &keys, 0.1)?;
        Ok(vec![centroids, codes, scores, mass, heavy, selected.indices, sparse.out, sparse.lse, dense.out, dense.lse])
    };
    let first = run()?;
    for _ in 0..20 {
        for (i, (got, want)) in run()?.iter().zip(&first).enumerate() {
            assert_same_bits(&format!("output {i}"), &got.to_dtype(DType::F32)?, &want.to_dtype(DType::F32)?)?;
        }
    }
    Ok(())
}

/// Weights, centroids, codes and sums of two caches, such as a GPU's and a CPU's.
#[track_caller]
fn assert_same_index(what: &str, got: &PqKvCache, want: &PqKvCache) -> Result<()> {
    let codebook = |cache: &PqKvCache| cache.codebook().cloned().expect("a codebook");
    let codebooks = [codebook(got), codebook(want)];
    let both = |of: fn(&Codebook) -> Option<&Tensor>, name: &str| match codebooks.each_ref().map(of) {
        [Some(got), Some(want)] => assert_same_bits(&format!("{what}: {name}"), got, want),
        [got, want] => {
            assert_eq!(got.is_some(), want.is_some(), "{what}: {name}");
            Ok(())
        }
    };
    both(Codebook::weights, "weights")?;
    both(Codebook::coarse, "coarse")?;
    assert_same_bits(&format!("{what}: centroids"), &codebooks[0].centroids()?, &codebooks[1].centroids()?)?;
    assert_same_integers(&format!("{what}: codes"), &got.codes()?, &want.codes()?);
    if let [Some(got), Some(want)] = [got.coarse_codes()?, want.coarse_codes()?] {
        assert_same_integers(&format!("{what}: clusters"), &got, &want);
    }
    let clusters = [got.clusters(), want.clusters()];
    assert_eq!(clusters[0].is_some(), clusters[1].is_some(), "{what}: sums");
    if let [Some(got), Some(want)] = clusters {
        assert_same_bits(&format!("{what}: sums"), &got.sums, &want.sums)?;
        assert_same_integers(&format!("{what}: counts"), &got.counts, &want.counts);
    }
    Ok(())
}

/// Keys weighed by queries: a codebook's training, and the codes of a prompt and of a block, for each kernel's length.
#[test]
fn weighted_index() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    for ([b, h, h_kv, n, d], pq_dim, pq_bits, coarse) in [
        ([1, 6, 2, 500, 64], 8, 6, 32),
        ([2, 2, 2, 300, 128], 8, 4, 16),
        ([1, 4, 1, 600, 128], 16, 8, 0),
        ([1, 2, 1, 400, 80], 5, 3, 64),
        ([1, 3, 3, 300, 96], 6, 4, 8),
        ([1, 2, 1, 300, 256], 2, 5, 4),
        ([1, 2, 2, 250, 33], 3, 4, 16),
        ([1, 8, 2, 300, 64], 32, 2, 0),
    ] {
        for dtype in DTYPES {
            let mut rng = Rng(24);
            let tail = if coarse > 0 { Tail::ClusterMeans } else { Tail::None };
            let config =
                PqConfig { pq_dim, pq_bits, coarse, tail, window: 16, query_weights: true, ..PqConfig::default() };
            let attn = PqAttention::new(config, 0.125)?;
            let mut caches =
                [attn.new_cache([b, h_kv, d], 0, dtype, &gpu)?, attn.new_cache([b, h_kv, d], 0, dtype, &Device::Cpu)?];
            // A prompt in two chunks, then keys of another block.
            for s in [n - 100, 100, 40] {
                let strides = STRIDES[rng.below(4)];
                let queries = pair(&mut rng, &gpu, &[b, h, s, d], dtype, strides)?;
                let keys = pair(&mut rng, &gpu, &[b, h_kv, s, d], dtype, strides)?;
                let values = pair(&mut rng, &gpu, &[b, h_kv, s, d], dtype, Strides::Contiguous)?;
                for (i, cache) in caches.iter_mut().enumerate() {
                    attn.forward_dense(&queries[i], &keys[i], &values[i], cache)?;
                    cache.build_index()?;
                }
                let what = format!("{:?} {dtype:?} {s}", [b, h, h_kv, n, d]);
                assert_same_index(&what, &caches[0], &caches[1])?;
                assert!(caches[0].codebook().expect("a codebook").weights().is_some(), "{what}");
                // The op by op way through the same codes.
                let codebook = caches[0].codebook().expect("a codebook");
                let keys = caches[0].keys()?.narrow(2, 4, caches[0].codes()?.dim(2)?)?;
                assert_same_integers(&what, &codebook.encode(&keys)?.0, &caches[0].codes()?);
            }
        }
    }
    Ok(())
}

/// Keys that come one by one, whose append indexes the block that is full with it: the CPU's codes and sums.
#[test]
fn begin_step() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let (plain, weighted) = ((Metric::Euclidean, false), (Metric::Euclidean, true));
    for ([b, h_kv, d], (pq_dim, pq_bits, coarse), window, (metric, query_weights), dtype) in [
        ([2, 3, 64], (8, 6, 32), 16, plain, DType::BF16),
        ([1, 2, 128], (8, 8, 256), 64, weighted, DType::F16),
        ([1, 1, 256], (16, 4, 4), 0, weighted, DType::F32),
        ([1, 2, 128], (16, 5, 0), 30, (Metric::InnerProduct, false), DType::BF16),
        ([2, 1, 33], (3, 3, 8), 300, plain, DType::F32),
        ([1, 2, 128], (32, 4, 16), 9, plain, DType::BF16),
        ([1, 1, 96], (6, 6, 0), 20, (Metric::InnerProduct, false), DType::F16),
    ] {
        let mut rng = Rng(31);
        let tail = if coarse > 0 { Tail::ClusterMeans } else { Tail::None };
        let config = PqConfig {
            pq_dim,
            pq_bits,
            coarse,
            tail,
            window,
            metric,
            query_weights,
            refresh: 9.0,
            ..PqConfig::default()
        };
        let attn = PqAttention::new(config, 0.125)?;
        let mut caches =
            [attn.new_cache([b, h_kv, d], 0, dtype, &gpu)?, attn.new_cache([b, h_kv, d], 0, dtype, &Device::Cpu)?];
        let mut scales =
            [1.0, 0.0, 1e-3, 1e-20, 1e-38, 60.0, 1e10, 1.5e19, 1e38, f64::NAN, f64::INFINITY].iter().cycle();
        for s in std::iter::once(400).chain(std::iter::repeat_n(1, 2 * window + 9)) {
            let queries = pair(&mut rng, &gpu, &[b, h_kv, s, d], dtype, Strides::Contiguous)?;
            // Among the new keys some that are as near to many centroids, some at the ends of what floats are, and none.
            let scale = if s == 1 { *scales.next().unwrap_or(&1.0) } else { 1.0 };
            let keys = pair(&mut rng, &gpu, &[b, h_kv, s, d], dtype, Strides::Contiguous)?;
            let keys = [keys[0].affine(scale, 0.0)?, keys[1].affine(scale, 0.0)?];
            let values = pair(&mut rng, &gpu, &[b, h_kv, s, d], dtype, Strides::Contiguous)?;
            for (i, cache) in caches.iter_mut().enumerate() {
                attn.forward_dense(&queries[i], &keys[i], &values[i], cache)?;
                cache.build_index()?;
            }
        }
        let what = format!("{:?} {window} {metric:?} {dtype:?}", [b, h_kv, d]);
        assert_same_index(&what, &caches[0], &caches[1])?;
        assert_eq!(caches[0].clusters().is_some(), coarse > 0, "{what}");
    }
    Ok(())
}

/// Two threads, of which each has a stream of its own, decode with one attention.
#[test]
fn threads_share_an_attention() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let config = PqConfig { heavy: Heavy::Keys(64), ..PqConfig::default() };
    let attn = PqAttention::new(config, 0.125)?;
    let decode = |attn: &PqAttention, seed: u64| -> Result<Vec<f64>> {
        let mut rng = Rng(seed);
        let mut cache = attn.new_cache([1, 2, 64], 4096, DType::F32, &gpu)?;
        let mut outs = Vec::new();
        for s in std::iter::once(3000).chain(std::iter::repeat_n(1, 200)) {
            let query = rng.tensor(&[1, 8, s, 64], DType::F32).to_device(&gpu)?;
            let keys = rng.tensor(&[1, 2, s, 64], DType::F32).to_device(&gpu)?;
            let out = attn.forward(&query, &keys, &(&keys * 0.5)?, &mut cache)?;
            outs.extend(numbers(&out.narrow(2, s - 1, 1)?));
        }
        Ok(outs)
    };
    let alone: Result<Vec<_>> =
        (0..4).map(|seed| decode(&PqAttention::new(attn.config().clone(), 0.125)?, seed)).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|seed| {
                scope.spawn({
                    let attn = &attn;
                    move || decode(attn, seed)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    for (seed, (got, want)) in together.into_iter().zip(alone?).enumerate() {
        assert!(got? == want, "the cache of seed {seed} is another's");
    }
    Ok(())
}

/// Prefill and a decode across retraining, against the CPU.
#[test]
fn forward() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    for (dtype, selection, (coarse, tail), tolerance) in [
        (DType::F32, Selection::PerQueryHead, (0, Tail::None), 1e-4),
        (DType::F32, Selection::PerKvHead, (0, Tail::None), 1e-4),
        (DType::BF16, Selection::PerQueryHead, (0, Tail::None), 2e-2),
        (DType::F16, Selection::PerKvHead, (0, Tail::None), 2e-2),
        (DType::F32, Selection::PerQueryHead, (16, Tail::ClusterMeans), 1e-4),
        (DType::F32, Selection::PerKvHead, (32, Tail::ClusterMeans), 1e-4),
        (DType::BF16, Selection::PerKvHead, (16, Tail::ClusterMeans), 2e-2),
        (DType::F32, Selection::PerKvHead, (8, Tail::None), 1e-4),
    ] {
        // Of these numbers no selection ends between two keys whose masses are equal within rounding: it may then end
        // at either, and does with some others.
        let mut rng = Rng(16);
        let config = PqConfig {
            heavy: Heavy::Keys(20),
            pq_dim: 8,
            pq_bits: 5,
            window: 16,
            selection,
            coarse,
            tail,
            ..PqConfig::default()
        };
        let attn = PqAttention::new(config, 0.125)?;
        let mut caches =
            [attn.new_cache([2, 2, 64], 0, dtype, &gpu)?, attn.new_cache([2, 2, 64], 0, dtype, &Device::Cpu)?];
        for s in std::iter::once(150).chain(std::iter::repeat_n(1, 200)) {
            let [query, cpu_query] = pair(&mut rng, &gpu, &[2, 8, s, 64], dtype, Strides::Transposed)?;
            let [keys, cpu_keys] = pair(&mut rng, &gpu, &[2, 2, s, 64], dtype, Strides::Transposed)?;
            let [values, cpu_values] = pair(&mut rng, &gpu, &[2, 2, s, 64], dtype, Strides::Transposed)?;
            let got = attn.forward(&query, &keys, &values, &mut caches[0])?;
            let want = attn.forward(&cpu_query, &cpu_keys, &cpu_values, &mut caches[1])?;
            assert_close(&format!("{dtype:?} {selection:?} {tail:?} at {}", caches[0].len()), &got, &want, tolerance);
            if caches[0].len() == 300 {
                caches.iter_mut().try_for_each(|cache| cache.truncate(260))?;
            }
        }
        assert_same_index(&format!("{dtype:?} {selection:?} {tail:?}"), &caches[0], &caches[1])?;
    }
    Ok(())
}

/// Query, key and value as a model has them that computes all three at once: views of one tensor, which a step locks once.
#[test]
fn steps_of_one_tensor() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(36);
    let config = PqConfig { coarse: 16, pq_bits: 4, ..PqConfig::default() };
    for config in [config.clone(), PqConfig { coarse: 0, tail: Tail::None, pq_dim: 2, ..config }] {
        let attn = PqAttention::new(config, 0.125)?;
        let [prompt, _] = pair(&mut rng, &gpu, &[1, 2, 900, 64], DType::BF16, Strides::Contiguous)?;
        let mut caches = [0, 1].map(|_| attn.new_cache([1, 2, 64], 0, DType::BF16, &gpu).expect("a cache"));
        caches.iter_mut().try_for_each(|cache| cache.append(&prompt, &prompt))?;
        for step in 0..70 {
            let [all, _] = pair(&mut rng, &gpu, &[1, 12, 1, 64], DType::BF16, Strides::Contiguous)?;
            let [q, k, v] = [(0, 8), (8, 2), (10, 2)].map(|(first, heads)| all.narrow(1, first, heads));
            let [q, k, v] = [q?, k?, v?];
            let got = attn.forward(&q, &k, &v, &mut caches[0])?;
            let want = attn.forward(&q.copy()?, &k.copy()?, &v.copy()?, &mut caches[1])?;
            assert_same_bits(&format!("step {step}"), &got, &want.to_device(&Device::Cpu)?)?;
        }
    }
    Ok(())
}

/// Caches that differ in as little as what the launches of a step follow from: each step of one attention against that of another,
/// which has no launches of a step before.
#[test]
fn caches_take_turns() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(41);
    let config = PqConfig { coarse: 16, pq_bits: 4, ..PqConfig::default() };
    let attn = PqAttention::new(config.clone(), 0.125)?;
    let all_numbers = rng.tensor(&[1, 12, 1000, 64], DType::F32);
    // The first so many positions, or one: a query, keys and values.
    let draw = |numbers: &Tensor, positions: usize, dtype: DType| -> Result<[Tensor; 3]> {
        let of_heads = |first, heads| {
            numbers.narrow(1, first, heads)?.narrow(2, 0, positions)?.contiguous()?.to_dtype(dtype)?.to_device(&gpu)
        };
        Ok([of_heads(0, 8)?, of_heads(8, 2)?, of_heads(10, 2)?])
    };
    let pool = PagePool::new(config.clone(), [1, 2, 64], 2 * (6 + 7), DType::BF16, &gpu)?;
    let mut origins = Vec::new();
    let mut make = || -> Result<Vec<(PqKvCache, DType)>> {
        let mut all = Vec::new();
        for dtype in [DType::F16, DType::BF16] {
            all.push((attn.new_cache([1, 2, 64], 1000, dtype, &gpu)?, dtype, 700));
        }
        for len in [700, 800] {
            all.push((pool.new_cache()?, DType::BF16, len));
        }
        for len in [700, 800] {
            all.push((attn.new_cache([1, 2, 64], 1000, DType::BF16, &gpu)?, DType::BF16, len));
        }
        for (cache, dtype, len) in &mut all {
            let [_, keys, values] = draw(&all_numbers, *len, *dtype)?;
            cache.append(&keys, &values)?;
            cache.build_index()?;
        }
        for (cache, ..) in &mut all[4..] {
            let fork = cache.fork()?;
            origins.push(std::mem::replace(cache, fork));
        }
        Ok(all.into_iter().map(|(cache, dtype, _)| (cache, dtype)).collect())
    };
    let (mut caches, mut others) = (make()?, make()?);
    for step in 0..40 {
        let numbers = rng.tensor(&[1, 12, 1, 64], DType::F32);
        for (i, ((cache, dtype), (other, _))) in caches.iter_mut().zip(&mut others).enumerate() {
            let [q, k, v] = draw(&numbers, 1, *dtype)?;
            let got = attn.forward(&q, &k, &v, cache)?;
            let want = PqAttention::new(config.clone(), 0.125)?.forward(&q, &k, &v, other)?;
            assert_same_bits(&format!("step {step} of cache {i}"), &got, &want.to_device(&Device::Cpu)?)?;
        }
    }
    Ok(())
}

/// Decode steps of many shapes against the CPU's, each twice, and to the bit the second time.
#[test]
fn decode_of_many_shapes() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let shape = |b, h_kv, group, head_dim, n| [b, h_kv, group, head_dim, n];
    for (dims, dtype, (pq_dim, pq_bits, coarse, tail)) in [
        (shape(1, 2, 4, 128, 3000), DType::BF16, (8, 8, 256, Tail::ClusterMeans)),
        (shape(1, 2, 4, 128, 3000), DType::F32, (8, 8, 256, Tail::ClusterMeans)),
        (shape(2, 3, 3, 64, 2111), DType::F32, (8, 6, 64, Tail::ClusterMeans)),
        (shape(1, 1, 8, 128, 1500), DType::F32, (16, 7, 32, Tail::ClusterMeans)),
        (shape(3, 1, 7, 96, 1201), DType::F16, (8, 5, 16, Tail::ClusterMeans)),
        (shape(1, 2, 1, 256, 1900), DType::F32, (32, 6, 8, Tail::ClusterMeans)),
        (shape(1, 2, 2, 256, 900), DType::BF16, (8, 4, 4, Tail::ClusterMeans)),
        (shape(2, 2, 6, 64, 5000), DType::F32, (16, 6, 0, Tail::None)),
        (shape(1, 2, 4, 64, 1300), DType::F32, (8, 1, 2, Tail::None)),
        (shape(1, 1, 16, 32, 2500), DType::F32, (8, 8, 128, Tail::ClusterMeans)),
        (shape(1, 2, 5, 80, 1400), DType::F32, (16, 5, 16, Tail::ClusterMeans)),
        // In the launches of single ops.
        (shape(1, 4, 1, 64, 9000), DType::F32, (2, 6, 0, Tail::None)),
        (shape(2, 2, 3, 64, 3000), DType::BF16, (4, 8, 0, Tail::None)),
        (shape(1, 2, 4, 96, 2000), DType::F16, (12, 5, 32, Tail::ClusterMeans)),
    ] {
        let [b, h_kv, group, head_dim, n] = dims;
        for selection in [Selection::PerQueryHead, Selection::PerKvHead] {
            for (heavy, sink, window, init_offset) in [
                (Heavy::Keys(1), 0, 0, None),
                (Heavy::Fraction(0.05), 4, 64, None),
                (Heavy::Keys(300), 7, 33, Some(3)),
                (Heavy::Keys(77), 3, 16, Some(20)),
            ] {
                let what =
                    format!("{dims:?} {dtype:?} {pq_dim} x {pq_bits} of {coarse} {tail:?} {selection:?} {heavy}");
                let mut rng = Rng(77);
                let config = PqConfig {
                    heavy,
                    sink,
                    window,
                    init_offset,
                    pq_dim,
                    pq_bits,
                    coarse,
                    tail,
                    selection,
                    kmeans_iters: 1,
                    ..PqConfig::default()
                };
                let attn = PqAttention::new(config, 0.2)?;
                let capacity = n + 131;
                let cache = |device| attn.new_cache([b, h_kv, head_dim], capacity, dtype, device);
                let mut caches = [cache(&gpu)?, cache(&Device::Cpu)?];
                let [keys, cpu_keys] = pair(&mut rng, &gpu, &[b, h_kv, n, head_dim], dtype, Strides::Contiguous)?;
                let [values, cpu_values] = pair(&mut rng, &gpu, &[b, h_kv, n, head_dim], dtype, Strides::Contiguous)?;
                caches[0].append(&keys, &values)?;
                caches[1].append(&cpu_keys, &cpu_values)?;
                let [query, cpu_query] =
                    pair(&mut rng, &gpu, &[b, h_kv * group, 1, head_dim], dtype, Strides::Contiguous)?;
                let [key, cpu_key] = pair(&mut rng, &gpu, &[b, h_kv, 1, head_dim], dtype, Strides::Contiguous)?;
                let got = attn.forward(&query, &key, &key, &mut caches[0])?;
                let want = attn.forward(&cpu_query, &cpu_key, &cpu_key, &mut caches[1])?;
                let tolerance = if dtype == DType::F32 { 2e-3 } else { 2e-2 };
                assert_close(&what, &got, &want, tolerance);
                caches[0].truncate(n)?;
                assert_same_bits(
                    &what,
                    &attn.forward(&query, &key, &key, &mut caches[0])?,
                    &got.to_device(&Device::Cpu)?,
                )?;
            }
        }
    }
    Ok(())
}

/// Keys that are all alike, whose scores tie, and keys that outweigh all others: more ties than are ranked at once. And one key far
/// against the queries, beside which rounding leaves no difference between all others. With one key selected most of what outweighs
/// others is in the tail.
#[test]
fn decode_of_ties_and_peaks() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let selections = [Selection::PerQueryHead, Selection::PerKvHead];
    for (selection, heavy) in selections.into_iter().flat_map(|selection| [(selection, 50), (selection, 1)]) {
        for (factor, same, against) in
            [(1.0, true, 0.0), (40.0, false, 0.0), (0.0, false, 0.0), (1e-3, true, 1e5), (1e-3, true, 1e8)]
        {
            let mut rng = Rng(5);
            let config =
                PqConfig { heavy: Heavy::Keys(heavy), pq_bits: 6, coarse: 32, selection, ..PqConfig::default() };
            let attn = PqAttention::new(config, 0.125)?;
            let n = 4000;
            let [keys, _] = pair(&mut rng, &gpu, &[1, 2, n, 64], DType::F32, Strides::Contiguous)?;
            let keys = if same { keys.narrow(2, 0, 1)?.broadcast_as(keys.shape())?.contiguous()? } else { keys };
            let [values, cpu_values] = pair(&mut rng, &gpu, &[1, 2, n, 64], DType::F32, Strides::Contiguous)?;
            let keys = (keys * factor)?;
            let [query, cpu_query] = pair(&mut rng, &gpu, &[1, 8, 1, 64], DType::F32, Strides::Contiguous)?;
            if against > 0.0 {
                let of_group = query.reshape((1, 2, 4, 64))?.sum_keepdim(2)?;
                keys.slice_set(&(of_group * -against)?, 2, 1000)?;
            }
            let cpu_keys = keys.to_device(&Device::Cpu)?;
            let mut caches = [
                attn.new_cache([1, 2, 64], n + 1, DType::F32, &gpu)?,
                attn.new_cache([1, 2, 64], n + 1, DType::F32, &Device::Cpu)?,
            ];
            caches[0].append(&keys, &values)?;
            caches[1].append(&cpu_keys, &cpu_values)?;
            let last = |x: &Tensor| x.narrow(2, n - 1, 1);
            let got = attn.forward(&query, &last(&keys)?, &last(&values)?, &mut caches[0])?;
            let want = attn.forward(&cpu_query, &last(&cpu_keys)?, &last(&cpu_values)?, &mut caches[1])?;
            let what = format!("{selection:?} of {heavy} times {factor}, all alike: {same}, one against: {against}");
            assert_close(&what, &got, &want, 2e-3);
        }
    }
    Ok(())
}

/// Keys and values of any layout, in pieces, through the growth of the cache.
#[test]
fn append() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(17);
    for (d, dtype) in [(64, DType::F32), (80, DType::BF16), (128, DType::F16), (33, DType::F32), (250, DType::BF16)] {
        let config = PqConfig { pq_dim: 1, coarse: 0, tail: Tail::None, ..PqConfig::default() };
        let attn = PqAttention::new(config, 1.0)?;
        let [mut cache, mut on_cpu] =
            [attn.new_cache([2, 3, d], 10, dtype, &gpu)?, attn.new_cache([2, 3, d], 10, dtype, &Device::Cpu)?];
        for (s, strides) in [1, 300, 1, 1, 700, 2].into_iter().zip(STRIDES.into_iter().cycle()) {
            let [keys, cpu_keys] = pair(&mut rng, &gpu, &[2, 3, s, d], dtype, strides)?;
            let [values, cpu_values] = pair(&mut rng, &gpu, &[2, 3, s, d], dtype, Strides::Contiguous)?;
            cache.append(&keys, &values)?;
            on_cpu.append(&cpu_keys, &cpu_values)?;
            if s == 700 {
                cache.truncate(900)?;
                on_cpu.truncate(900)?;
            }
        }
        assert_same_bits(&format!("keys {d} {dtype:?}"), &cache.keys()?, &on_cpu.keys()?)?;
        assert_same_bits(&format!("values {d} {dtype:?}"), &cache.values()?, &on_cpu.values()?)?;
    }
    Ok(())
}

/// Sizes of `[b, h, h_kv, n, head_dim]`, clusters and where the candidates begin.
const TAIL_SHAPES: [([usize; 5], usize, usize); 7] = [
    ([1, 4, 2, 300, 64], 16, 0),
    ([2, 6, 2, 257, 128], 256, 5),
    ([1, 8, 1, 9000, 80], 64, 4),
    ([1, 3, 3, 1, 128], 2, 300),
    ([1, 16, 1, 4096, 96], 256, 0),
    ([2, 2, 1, 20_001, 256], 128, 4),
    ([1, 1, 1, 8193, 33], 4, 1),
];

#[test]
fn residual_score() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let gpu = &gpu;
    let mut rng = Rng(20);
    for ([b, h, h_kv, n, d], n_clusters, _) in TAIL_SHAPES {
        for (dtype, strides) in DTYPES.into_iter().zip([STRIDES[0], STRIDES[1], STRIDES[2]]) {
            let (pq_dim, bits) = if d % 8 == 0 { (8, 8) } else { (d, 3) };
            let [query, cpu_query] = pair(&mut rng, gpu, &[b, h, 1, d], dtype, strides)?;
            let [codes_of_residuals, cpu_codes] = codes(&mut rng, gpu, &[b, h_kv, n, pq_dim], 1 << bits, strides)?;
            let dims = [b, h_kv, pq_dim, 1 << bits, d / pq_dim];
            let [centroids, cpu_centroids] = pair(&mut rng, gpu, &dims, DType::F32, strides)?;
            let [clusters, cpu_clusters] = codes(&mut rng, gpu, &[b, h_kv, n], n_clusters, strides)?;
            let [coarse, cpu_coarse] = pair(&mut rng, gpu, &[b, h_kv, n_clusters, d], DType::F32, strides)?;
            let got = ops::residual_score(&query, &codes_of_residuals, &centroids, &clusters, &coarse)?;
            let want = ops::residual_score(&cpu_query, &cpu_codes, &cpu_centroids, &cpu_clusters, &cpu_coarse)?;
            assert_same_bits(&format!("{:?} {dtype:?} {strides:?}", [b, h, h_kv, n, d]), &got, &want)?;
        }
    }
    Ok(())
}

#[test]
fn cluster_sums() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let gpu = &gpu;
    let mut rng = Rng(21);
    for ([b, _, h_kv, n, d], n_clusters, _) in TAIL_SHAPES {
        for (dtype, strides) in DTYPES.into_iter().zip([STRIDES[1], STRIDES[2], STRIDES[3]]) {
            let [values, cpu_values] = pair(&mut rng, gpu, &[b, h_kv, n, d], dtype, strides)?;
            let [codes, cpu_codes] = codes(&mut rng, gpu, &[b, h_kv, n], n_clusters, strides)?;
            let mut got = ClusterSums::empty([b, h_kv, n_clusters, d], gpu)?;
            let mut want = ClusterSums::empty([b, h_kv, n_clusters, d], &Device::Cpu)?;
            let cut = rng.below(n + 1);
            for (start, len) in [(0, cut), (cut, n - cut)] {
                let part = |x: &Tensor| x.narrow(2, start, len);
                got = ops::cluster_sums(&part(&values)?, &part(&codes)?, &got)?;
                want = ops::cluster_sums(&part(&cpu_values)?, &part(&cpu_codes)?, &want)?;
            }
            let what = format!("{:?} {n_clusters} {dtype:?} {strides:?}", [b, h_kv, n, d]);
            assert_same_bits(&what, &got.sums, &want.sums)?;
            assert_same_integers(&what, &got.counts, &want.counts);
        }
    }
    Ok(())
}

#[test]
fn tail_attend() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let gpu = &gpu;
    let mut rng = Rng(22);
    for ([b, h, h_kv, n, d], n_clusters, init_offset) in TAIL_SHAPES {
        for (count, scale, strides) in [(h, 0.5f32, STRIDES[1]), (h_kv, -0.25, STRIDES[2]), (h_kv, 20.0, STRIDES[3])] {
            let [scores, cpu_scores] = pair(&mut rng, gpu, &[b, h, n], DType::F32, strides)?;
            let [codes, cpu_codes] = codes(&mut rng, gpu, &[b, h_kv, n], n_clusters, strides)?;
            let [values, cpu_values] = pair(&mut rng, gpu, &[b, h_kv, n, d], DType::F32, STRIDES[0])?;
            // Half of the keys, so that some clusters have none.
            let half = |x: &Tensor| x.narrow(2, 0, n.div_ceil(2));
            let sums = |values: &Tensor, codes: &Tensor, device: &Device| {
                let empty = ClusterSums::empty([b, h_kv, n_clusters, d], device)?;
                ops::cluster_sums(&half(values)?, &half(codes)?, &empty)
            };
            let (clusters, cpu_clusters) = (sums(&values, &codes, gpu)?, sums(&cpu_values, &cpu_codes, &Device::Cpu)?);
            let selected = lists(&mut rng, b, count, n + init_offset + 3, (n / 2).clamp(1, 500))?;
            let on_gpu = to_device(&selected, gpu)?;
            let got = ops::tail_attend(&scores, &codes, &clusters, &on_gpu, init_offset, scale)?;
            let want = ops::tail_attend(&cpu_scores, &cpu_codes, &cpu_clusters, &selected, init_offset, scale)?;
            let what = format!("{:?} {count} {scale}", [b, h, h_kv, n, d]);
            assert_close(&what, &got.out, &want.out, 1e-5);
            assert_close(&what, &got.lse, &want.lse, 1e-5);

            // Merged with attention to the listed positions.
            let total = n + init_offset + 3;
            for dtype in DTYPES {
                let [query, cpu_query] = pair(&mut rng, gpu, &[b, h, 1, d], dtype, STRIDES[0])?;
                let [keys, cpu_keys] = pair(&mut rng, gpu, &[b, h_kv, total, d], dtype, STRIDES[0])?;
                let all = ops::sparse_attend_with_tail(&query, &keys, &keys, &on_gpu, &got, 0.1)?;
                let cpu_all = ops::sparse_attend_with_tail(&cpu_query, &cpu_keys, &cpu_keys, &selected, &want, 0.1)?;
                assert_close(&what, &all.out, &cpu_all.out, tolerance(dtype).max(1e-5));
                assert_close(&what, &all.lse, &cpu_all.lse, 1e-5);
            }
        }
    }
    Ok(())
}

/// Offsets common to all scores, one huge score, equal scores; all listed.
#[test]
fn tail_attend_at_the_extremes() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let gpu = &gpu;
    let mut rng = Rng(23);
    let (n, d) = (6000, 64);
    let [values, cpu_values] = pair(&mut rng, gpu, &[1, 1, n, d], DType::F32, STRIDES[0])?;
    let [codes, cpu_codes] = codes(&mut rng, gpu, &[1, 1, n], 16, STRIDES[0])?;
    let sums = |values, codes, device| ops::cluster_sums(values, codes, &ClusterSums::empty([1, 1, 16, d], device)?);
    let (clusters, cpu_clusters) = (sums(&values, &codes, gpu)?, sums(&cpu_values, &cpu_codes, &Device::Cpu)?);
    let random = rng.tensor(&[1, 1, n], DType::F32);
    let mut huge = random.flatten_all()?.to_vec1::<f32>()?;
    huge[4999] = 3e4;
    let with = |at: usize, x: f32| {
        let mut scores = huge.clone();
        scores[at] = x;
        Tensor::from_vec(scores, (1, 1, n), &Device::Cpu)
    };
    let (infinite, broken) = (with(17, f32::INFINITY)?, with(5017, f32::NAN)?);
    for (what, scores) in [
        ("infinite", infinite),
        ("broken", broken),
        ("up", (&random + 1e4)?),
        ("down", (&random - 1e4)?),
        ("huge", with(4999, 3e4)?),
        ("equal", random.ones_like()?),
    ] {
        for attended in [0, 10, n] {
            let positions: Vec<u32> = (0..attended as u32).collect();
            let selected = Selected {
                indices: Tensor::from_vec(positions, (1, 1, attended), &Device::Cpu)?,
                lens: Tensor::full(attended as u32, (1, 1), &Device::Cpu)?,
                weights: Tensor::ones((1, 1, attended), DType::F32, &Device::Cpu)?,
            };
            let on_gpu = to_device(&selected, gpu)?;
            let got = ops::tail_attend(&scores.to_device(gpu)?, &codes, &clusters, &on_gpu, 0, 1.0)?;
            let want = ops::tail_attend(&scores, &cpu_codes, &cpu_clusters, &selected, 0, 1.0)?;
            assert_close(&format!("{what} {attended}"), &got.out, &want.out, 1e-5);
            assert_close(&format!("{what} {attended}"), &got.lse, &want.lse, 1e-6);
            assert!(numbers(&got.out).iter().all(|x| x.is_finite()), "{what} {attended}");
        }
    }
    Ok(())
}

/// A pool of which `pages` are free, with none beside another, and who has the others.
fn scattered_pages(
    attn: &PqAttention,
    dims: [usize; 3],
    pages: usize,
    dtype: DType,
    gpu: &Device,
) -> Result<(PagePool, Vec<PqKvCache>)> {
    let pool = PagePool::new(attn.config().clone(), dims, 2 * pages, dtype, gpu)?;
    let mut held = Vec::new();
    for _ in 0..2 * pages {
        let mut cache = pool.new_cache()?;
        cache.reserve(1)?;
        held.push(cache);
    }
    // As they were taken.
    let mut is_free = true;
    held.retain(|_| {
        is_free = !is_free;
        is_free
    });
    assert_eq!(pool.free_pages(), pages);
    Ok((pool, held))
}

/// What `launch` launches, as a graph.
fn capture(gpu: &Device, launch: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let stream = gpu.as_cuda_device()?.cuda_stream();
    stream.synchronize().w()?;
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
    let launched = launch();
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).w();
    launched?;
    Ok(graph?.expect("a graph that is not empty"))
}

/// What a graph launches, allocates and frees.
fn nodes(graph: &CudaGraph) -> Result<usize> {
    let mut count = 0;
    // SAFETY: the graph is borrowed; without a place for the nodes only their number is written.
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut count) }.result().w()?;
    Ok(count)
}

/// A step that is captured once and replayed as the sequence grows, to the end of the cache's room and beyond, against
/// the same steps one by one.
#[test]
fn replayed_steps_equal_eager_ones() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(write);
    for (dtype, selection, heavy, is_dense, (pq_dim, coarse, tail), query_weights) in [
        (DType::BF16, Selection::PerKvHead, Heavy::Fraction(0.07), false, (8, 0, Tail::None), false),
        (DType::F32, Selection::PerQueryHead, Heavy::Keys(40), false, (8, 0, Tail::None), true),
        (DType::BF16, Selection::PerQueryHead, Heavy::Fraction(0.07), false, (2, 0, Tail::None), false),
        (DType::BF16, Selection::PerQueryHead, Heavy::Fraction(0.07), true, (8, 0, Tail::None), true),
        (DType::BF16, Selection::PerKvHead, Heavy::Fraction(0.07), false, (8, 32, Tail::ClusterMeans), true),
        (DType::F32, Selection::PerQueryHead, Heavy::Keys(40), false, (8, 16, Tail::ClusterMeans), false),
        (DType::BF16, Selection::PerKvHead, Heavy::Fraction(0.07), true, (8, 32, Tail::ClusterMeans), true),
    ] {
        let mut rng = Rng(18);
        let ([b, h, h_kv, d], prompt, steps) = ([2, 8, 2, 64], 500, 522);
        let config = PqConfig {
            heavy,
            pq_dim,
            pq_bits: 6,
            window: 16,
            selection,
            coarse,
            tail,
            query_weights,
            refresh: 10.0, // replays do not train
            ..PqConfig::default()
        };
        let attn = PqAttention::new(config, 0.125)?;
        let forward = if is_dense { PqAttention::forward_dense } else { PqAttention::forward };
        let mut random = |heads, s| pair(&mut rng, &gpu, &[b, heads, s, d], dtype, Strides::Contiguous);
        let (prompt_queries, prompt_keys) = (random(h, prompt)?[0].clone(), random(h_kv, prompt)?[0].clone());
        let queries = random(h, 2 + steps)?[0].clone();
        let (keys, values) = (random(h_kv, 2 + steps)?[0].clone(), random(h_kv, 2 + steps)?[0].clone());
        let at = |step| -> Result<[Tensor; 3]> {
            let one = |all: &Tensor| all.narrow(2, step, 1)?.contiguous();
            Ok([one(&queries)?, one(&keys)?, one(&values)?])
        };
        // Room for the prompt, the first step, the replays and one more, which are whole pages.
        let room = prompt + steps + 2;
        assert!(room.is_multiple_of(PagePool::PAGE));
        let (pool, _held) = scattered_pages(&attn, [b, h_kv, d], room / PagePool::PAGE, dtype, &gpu)?;
        let mut eager = attn.new_cache([b, h_kv, d], room, dtype, &gpu)?;
        let mut replayed = match is_dense || tail == Tail::None {
            true => attn.new_cache([b, h_kv, d], room, dtype, &gpu)?,
            false => pool.new_cache()?,
        };
        replayed.reserve(room)?;
        for cache in [&mut eager, &mut replayed] {
            attn.forward(&prompt_queries, &prompt_keys, &prompt_keys, cache)?;
            cache.build_index()?;
            assert_eq!(cache.codebook().expect("a codebook").weights().is_some(), query_weights);
            let [query, key, value] = at(0)?;
            forward(&attn, &query, &key, &value, cache)?;
        }

        let inputs = at(0)?.map(|tensor| tensor.copy());
        let [query, key, value] = inputs;
        let (query, key, value) = (query?, key?, value?);
        let out = query.zeros_like()?;
        let graph = capture(&gpu, || out.slice_set(&forward(&attn, &query, &key, &value, &mut replayed)?, 0, 0))?;
        for step in 1..=steps {
            let [next_query, next_key, next_value] = at(step)?;
            query.slice_set(&next_query, 0, 0)?;
            key.slice_set(&next_key, 0, 0)?;
            value.slice_set(&next_value, 0, 0)?;
            graph.launch().w()?;
            let want = forward(&attn, &next_query, &next_key, &next_value, &mut eager)?;
            assert_same_bits(&format!("{dtype:?} {selection:?} {is_dense} step {step}"), &out, &want)?;
        }
        // The capture counted as the first of them.
        replayed.advance(steps - 1)?;
        assert_eq!(replayed.len(), eager.len());
        assert_same_bits("keys", &replayed.keys()?, &eager.keys()?)?;
        let [query, key, value] = at(1 + steps)?;
        // Dense steps leave the index to the next sparse one.
        [&mut replayed, &mut eager].into_iter().try_for_each(|cache| cache.build_index())?;
        assert_same_index("replayed", &replayed, &eager)?;
        let got = forward(&attn, &query, &key, &value, &mut replayed)?;
        assert_same_bits("the step after", &got, &forward(&attn, &query, &key, &value, &mut eager)?)?;

        // There is no room left: a replay appends nothing, and says nothing, but the host does.
        let before = replayed.keys()?.copy()?;
        graph.launch().w()?;
        assert_same_bits("full", &replayed.keys()?, &before)?;
        assert!(replayed.advance(1).unwrap_err().to_string().contains("advance: expected at most 0 steps"));
    }
    Ok(())
}

/// A layer of attention and its cache, through every training that falls due and the growth of the cache.
#[test]
fn graph_steps_of_a_layer_equal_eager_ones() -> Result<()> {
    const STEPS: usize = 1000;
    let (_guard, gpu) = gpu_or_skip!(write);
    for (b, selection, is_dense, is_paged) in [
        (1, Selection::PerQueryHead, false, false),
        (2, Selection::PerKvHead, false, false),
        (1, Selection::PerQueryHead, true, false),
        (2, Selection::PerQueryHead, false, true),
    ] {
        let mut rng = Rng(24);
        let (h, h_kv, d) = (8, 2, 64);
        let config =
            PqConfig { heavy: Heavy::Fraction(0.05), coarse: 32, pq_bits: 5, selection, ..PqConfig::default() };
        let attn = PqAttention::new(config, 0.125)?;
        let forward = |qkv: &Tensor, cache: &mut PqKvCache| {
            let (q, k) = (qkv.narrow(1, 0, h)?, qkv.narrow(1, h, h_kv)?);
            let v = qkv.narrow(1, h + h_kv, h_kv)?;
            match is_dense {
                true => attn.forward_dense(&q, &k, &v, cache),
                false => attn.forward(&q, &k, &v, cache),
            }
        };
        let [prompt, _] = pair(&mut rng, &gpu, &[b, h + 2 * h_kv, 40, d], DType::BF16, STRIDES[0])?;
        let [steps, _] = pair(&mut rng, &gpu, &[b, h + 2 * h_kv, STEPS, d], DType::BF16, STRIDES[0])?;
        let (pool, _held) = scattered_pages(&attn, [b, h_kv, d], 20, DType::BF16, &gpu)?;
        let new_cache = |is_paged: bool| -> Result<PqKvCache> {
            // Room for half of the steps.
            let mut cache = match is_paged {
                true => pool.new_cache()?,
                false => attn.new_cache([b, h_kv, d], 40 + STEPS / 2, DType::BF16, &gpu)?,
            };
            cache.reserve(40 + STEPS / 2)?;
            forward(&prompt, &mut cache)?;
            Ok(cache)
        };
        let (mut eager, mut caches) = (new_cache(is_paged)?, [new_cache(is_paged)?]);
        // Dense at first, sparse later: no graph has a dense step over pages.
        for step in 0..if is_paged { 200 } else { 0 } {
            let [qkv, _] = pair(&mut Rng(step), &gpu, &[b, h + 2 * h_kv, 1, d], DType::BF16, STRIDES[0])?;
            assert_same_bits("before", &forward(&qkv, &mut caches[0])?, &forward(&qkv, &mut eager)?)?;
        }
        let prompt_len = eager.len();
        let mut graph =
            DecodeGraph::new(|qkv: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| forward(qkv, &mut caches[0]));
        let mut replays = 0;
        for step in 0..STEPS {
            let qkv = steps.narrow(2, step, 1)?;
            replays += usize::from(graph.is_replay(&caches));
            let (got, want) = (graph.step(&qkv, &mut caches)?, forward(&qkv, &mut eager)?);
            assert_same_bits(&format!("{b} {selection:?} {is_dense} step {step}"), &got, &want)?;
        }
        assert!(replays > 900, "{b} {selection:?} {is_dense} {is_paged}: {replays} of {STEPS} steps were replays");
        let [replayed] = caches;
        assert_eq!((replayed.len(), eager.len()), (prompt_len + STEPS, prompt_len + STEPS));
        assert_same_bits("keys", &replayed.keys()?, &eager.keys()?)?;
        assert_same_bits("values", &replayed.values()?, &eager.values()?)?;
        if !is_dense {
            assert_same_index("replayed", &replayed, &eager)?;
        }
    }
    Ok(())
}

/// Forks of a document go on as caches that read it themselves, to the bit: over shared memory where the fused kernels suit,
/// in a copy where they do not.
#[test]
fn forks_equal_caches_of_their_own() -> Result<()> {
    const STEPS: usize = 200;
    let (_guard, gpu) = gpu_or_skip!(write);
    let (h, h_kv, d, n) = (8, 2, 64, 3000);
    for (pq_dim, selection, tail, is_shared) in [
        (8, Selection::PerQueryHead, Tail::None, true),
        (8, Selection::PerKvHead, Tail::ClusterMeans, true),
        (4, Selection::PerKvHead, Tail::ClusterMeans, false),
    ] {
        let mut rng = Rng(25);
        let config = PqConfig { pq_dim, pq_bits: 5, coarse: 32, tail, selection, ..PqConfig::default() };
        let attn = PqAttention::new(config, 0.125)?;
        let forward = |qkv: &Tensor, cache: &mut PqKvCache| forward_of(&attn, [h, h_kv], qkv, cache);
        let mut draw = |s| {
            Ok::<_, candle_core::Error>(
                pair(&mut rng, &gpu, &[1, h + 2 * h_kv, s, d], DType::BF16, STRIDES[0])?[0].clone(),
            )
        };
        let (prompt, questions, steps) = (draw(n)?, [draw(30)?, draw(45)?], [draw(STEPS)?, draw(STEPS)?]);
        // As many blocks share a row as in a fork: their number follows from the capacity.
        let document = || -> Result<PqKvCache> {
            let mut cache = attn.new_cache([1, h_kv, d], n + 500, DType::BF16, &gpu)?;
            forward(&prompt, &mut cache)?;
            cache.build_index()?;
            Ok(cache)
        };
        let mut origin = document()?;
        let mut forks = [origin.fork()?, origin.fork()?];
        let mut alone = [document()?, document()?];
        for (i, question) in questions.iter().enumerate() {
            let (got, want) = (forward(question, &mut forks[i])?, forward(question, &mut alone[i])?);
            assert_same_bits("question", &got, &want)?;
        }
        for step in 0..STEPS {
            for i in 0..2 {
                let qkv = steps[i].narrow(2, step, 1)?;
                let (got, want) = (forward(&qkv, &mut forks[i])?, forward(&qkv, &mut alone[i])?);
                assert_same_bits(&format!("{pq_dim} {selection:?} fork {i} step {step}"), &got, &want)?;
            }
        }
        for (fork, alone) in forks.iter().zip(&alone) {
            assert_same_bits("keys", &fork.keys()?, &alone.keys()?)?;
            assert_same_bits("values", &fork.values()?, &alone.values()?)?;
            assert_same_index("fork", fork, alone)?;
            assert_eq!(fork.memory().kv_bytes < alone.memory().kv_bytes / 5, is_shared, "{:?}", fork.memory());
        }
        // A graph of a fork, and steps of what it was made of, which wrote behind what it lent.
        let (mut caches, mut eager) = ([origin.fork()?], document()?);
        caches[0].reserve(STEPS)?;
        let mut graph =
            DecodeGraph::new(|qkv: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| forward(qkv, &mut caches[0]));
        let mut replays = 0;
        for step in 0..STEPS {
            let qkv = steps[0].narrow(2, step, 1)?;
            replays += usize::from(graph.is_replay(&caches));
            let (got, want) = (graph.step(&qkv, &mut caches)?, forward(&qkv, &mut eager)?);
            assert_same_bits(&format!("{pq_dim} {selection:?} graph of a fork, step {step}"), &got, &want)?;
            forward(&steps[1].narrow(2, step, 1)?, &mut origin)?;
        }
        assert!(replays > STEPS - 20, "{replays} of {STEPS} steps were replays");
        // A block that a fork shares and that has no codes yet.
        let (mut cache, block) = (document()?, attn.config().window);
        cache.truncate(cache.len() - (cache.len() - attn.config().init_offset()) % block)?;
        cache.build_index()?;
        let more = draw(block)?;
        cache.append(&more.narrow(1, h, h_kv)?, &more.narrow(1, h + h_kv, h_kv)?)?;
        let mut fork = cache.fork()?;
        fork.build_index()?;
        cache.build_index()?;
        assert_same_index("a fork's first block", &fork, &cache)?;
        // A graph of what lends: replays would write where the fork reads.
        let keys = fork.keys()?.copy()?;
        let mut caches = [cache];
        let mut graph =
            DecodeGraph::new(|qkv: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| forward(qkv, &mut caches[0]));
        for step in 0..10 {
            graph.step(&steps[0].narrow(2, step, 1)?, &mut caches)?;
        }
        caches[0].truncate(caches[0].len() - 20)?;
        for step in 0..10 {
            graph.step(&steps[1].narrow(2, step, 1)?, &mut caches)?;
        }
        assert_same_bits("keys of a fork", &fork.keys()?, &keys)?;
    }
    Ok(())
}

/// A model of two layers, from token to likeliest token.
struct TinyModel {
    embeddings: Tensor,
    layers: Vec<TinyLayer>,
    cos: Tensor,
    sin: Tensor,
    attention: PqAttention,
}

struct TinyLayer {
    norms: [Tensor; 2],
    qkv: Tensor,
    output: Tensor,
    gate_up: Tensor,
    down: Tensor,
}

impl TinyModel {
    const HIDDEN: usize = 256;
    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;
    const D: usize = 64;
    const MLP: usize = 512;
    const VOCAB: usize = 1000;
    const CONTEXT: usize = 2048;

    fn new(gpu: &Device) -> Result<Self> {
        let mut rng = Rng(25);
        let mut weight = |inputs: usize, outputs: usize| -> Result<Tensor> {
            let weight = (rng.tensor(&[inputs, outputs], DType::F32) / (inputs as f64).sqrt())?;
            weight.to_dtype(DType::BF16)?.to_device(gpu)
        };
        let embeddings = weight(Self::VOCAB, Self::HIDDEN)?;
        let mut layer = |_| {
            let norm = || Tensor::ones(Self::HIDDEN, DType::BF16, gpu);
            Ok(TinyLayer {
                norms: [norm()?, norm()?],
                qkv: weight(Self::HIDDEN, (Self::HEADS + 2 * Self::KV_HEADS) * Self::D)?,
                output: weight(Self::HEADS * Self::D, Self::HIDDEN)?,
                gate_up: weight(Self::HIDDEN, 2 * Self::MLP)?,
                down: weight(Self::MLP, Self::HIDDEN)?,
            })
        };
        let layers = (0..2).map(&mut layer).collect::<Result<_>>()?;
        let angles = (0..Self::CONTEXT).flat_map(|n| (0..Self::D / 2).map(move |i| n as f32 * 0.7f32.powi(i as i32)));
        let angles = Tensor::from_iter(angles, &Device::Cpu)?.reshape((Self::CONTEXT, Self::D / 2))?;
        let table = |angles: Tensor| angles.to_dtype(DType::BF16)?.to_device(gpu);
        let config = PqConfig { heavy: Heavy::Fraction(0.05), coarse: 32, pq_bits: 5, ..PqConfig::default() };
        let attention = PqAttention::new(config, 0.125)?;
        Ok(Self { embeddings, layers, cos: table(angles.cos()?)?, sin: table(angles.sin()?)?, attention })
    }

    fn caches(&self, gpu: &Device) -> Result<Vec<PqKvCache>> {
        let cache = |_| self.attention.new_cache([1, Self::KV_HEADS, Self::D], Self::CONTEXT, DType::BF16, gpu);
        self.layers.iter().map(cache).collect()
    }

    /// Logits, `[1, vocab]`.
    fn forward(&self, token: &Tensor, position: &Tensor, caches: &mut [PqKvCache]) -> Result<Tensor> {
        let mut x = self.embeddings.embedding(token)?;
        let (cos, sin) = (self.cos.index_select(position, 0)?, self.sin.index_select(position, 0)?);
        for (layer, cache) in self.layers.iter().zip(caches) {
            let normed = candle_nn::ops::rms_norm(&x, &layer.norms[0], 1e-5)?;
            let qkv = normed.matmul(&layer.qkv)?.reshape((1, Self::HEADS + 2 * Self::KV_HEADS, 1, Self::D))?;
            let part = |start, heads| qkv.narrow(1, start, heads)?.contiguous();
            let q = candle_nn::rotary_emb::rope(&part(0, Self::HEADS)?, &cos, &sin)?;
            let k = candle_nn::rotary_emb::rope(&part(Self::HEADS, Self::KV_HEADS)?, &cos, &sin)?;
            let v = part(Self::HEADS + Self::KV_HEADS, Self::KV_HEADS)?;
            let out = self.attention.forward(&q, &k, &v, cache)?;
            x = (&x + out.reshape((1, Self::HEADS * Self::D))?.matmul(&layer.output)?)?;
            let normed = candle_nn::ops::rms_norm(&x, &layer.norms[1], 1e-5)?;
            x = (&x + candle_nn::ops::swiglu(&normed.matmul(&layer.gate_up)?)?.matmul(&layer.down)?)?;
        }
        x.matmul(&self.embeddings.t()?)
    }
}

#[test]
fn graph_steps_of_a_model_equal_eager_ones() -> Result<()> {
    const STEPS: usize = 1000;
    let (_guard, gpu) = gpu_or_skip!(write);
    let model = TinyModel::new(&gpu)?;
    let (mut eager, mut caches) = (model.caches(&gpu)?, model.caches(&gpu)?);
    let mut graph = DecodeGraph::new(|token: &Tensor, position: &Tensor, caches: &mut [PqKvCache]| {
        let logits = model.forward(token, position, caches)?;
        // The next token in the last column, so that one result holds both.
        Tensor::cat(&[logits.to_dtype(DType::F32)?, logits.argmax_keepdim(1)?.to_dtype(DType::F32)?], 1)
    });
    let (mut token, mut replays, mut distinct) = (Tensor::new(&[7u32], &gpu)?, 0, HashSet::new());
    for step in 0..STEPS {
        let position = Tensor::new(&[step as u32], &gpu)?;
        let want = model.forward(&token, &position, &mut eager)?;
        replays += usize::from(graph.is_replay(&caches));
        let got = graph.step(&token, &mut caches)?;
        assert_same_bits(&format!("step {step}"), &got.narrow(1, 0, TinyModel::VOCAB)?, &want)?;
        let likeliest = got.narrow(1, TinyModel::VOCAB, 1)?.flatten_all()?;
        assert_same_bits(&format!("step {step}"), &likeliest, &want.argmax(1)?)?;
        // A model of random weights soon repeats itself: every other token is given.
        token = if step % 2 == 0 { likeliest.to_dtype(DType::U32)? } else { Tensor::new(&[step as u32 % 997], &gpu)? };
        distinct.insert(integers(&token));
    }
    assert!(replays > 900, "{replays} of {STEPS} steps were replays");
    assert!(distinct.len() > 400, "{} different tokens", distinct.len());
    Ok(())
}

/// What a captured step may not do fails, and leaves caches and device fit for other steps.
#[test]
fn graph_steps_that_cannot_be_captured_fail() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(write);
    let attn = PqAttention::new(PqConfig::default(), 0.125)?;
    let mut rng = Rng(26);
    let [x, _] = pair(&mut rng, &gpu, &[1, 1, 1, 64], DType::F32, STRIDES[0])?;
    let [prompt, _] = pair(&mut rng, &gpu, &[1, 1, 50, 64], DType::F32, STRIDES[0])?;
    type Step<'a> = &'a dyn Fn(&Tensor, usize) -> Result<()>;
    let read_back: Step = &|out, _| out.flatten_all()?.to_vec1::<f32>().map(drop);
    let upload: Step = &|out, n| (out + Tensor::new(&[n as f32], out.device())?.broadcast_as(out.shape())?).map(drop);
    for (what, then, expected) in [("read", read_back, "while capturing"), ("upload", upload, "cached host data")] {
        let mut caches = [attn.new_cache([1, 1, 64], 100, DType::F32, &gpu)?];
        caches[0].append(&prompt, &prompt)?;
        let mut graph = DecodeGraph::new(|x: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| {
            let out = attn.forward(x, x, x, &mut caches[0])?;
            then(&out, caches[0].len())?;
            Ok(out)
        });
        graph.step(&x, &mut caches)?;
        let error = graph.step(&x, &mut caches).expect_err(what).to_string();
        assert!(error.contains(expected), "{what}: {error}");
        assert_eq!(caches[0].len(), 51);
        // The next is run as it is again.
        let got = graph.step(&x, &mut caches)?;
        let mut eager = attn.new_cache([1, 1, 64], 100, DType::F32, &gpu)?;
        eager.append(&prompt, &prompt)?;
        attn.forward(&x, &x, &x, &mut eager)?;
        assert_same_bits(what, &got, &attn.forward(&x, &x, &x, &mut eager)?)?;
    }
    Ok(())
}

/// What a captured step must not do is an error.
#[test]
fn captures_that_cannot_be_replayed_are_refused() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(write);
    let mut rng = Rng(19);
    let config = PqConfig {
        heavy: Heavy::Keys(20),
        pq_dim: 8,
        pq_bits: 5,
        window: 16,
        coarse: 0,
        tail: Tail::None,
        ..PqConfig::default()
    };
    let attn = PqAttention::new(config, 0.125)?;
    let mut random =
        |s| Ok::<_, candle_core::Error>(pair(&mut rng, &gpu, &[1, 2, s, 64], DType::F32, STRIDES[0])?[0].clone());
    let (prompt, one) = (random(200)?, random(1)?);
    let message = |result: Result<CudaGraph>| result.err().expect("an error").to_string();

    let mut cache = attn.new_cache([1, 2, 64], 300, DType::F32, &gpu)?;
    cache.append(&prompt, &prompt)?;
    let untrained = message(capture(&gpu, || attn.forward(&one, &one, &one, &mut cache).map(drop)));
    assert!(untrained.contains("training"), "{untrained}");

    let mut cache = attn.new_cache([1, 2, 64], 300, DType::F32, &gpu)?;
    cache.append(&prompt, &prompt)?;
    cache.build_index()?;
    let unallocated = message(capture(&gpu, || attn.forward(&one, &one, &one, &mut cache).map(drop)));
    assert!(unallocated.contains("a step of these sizes before"), "{unallocated}");

    let mut cache = attn.new_cache([1, 2, 64], 200, DType::F32, &gpu)?;
    cache.append(&prompt, &prompt)?;
    let full = message(capture(&gpu, || attn.forward(&one, &one, &one, &mut cache).map(drop)));
    assert!(full.contains("growth"), "{full}");

    let pool = PagePool::new(attn.config().clone(), [1, 2, 64], 6, DType::F32, &gpu)?;
    let mut cache = pool.new_cache()?;
    cache.append(&prompt, &prompt)?;
    cache.build_index()?;
    attn.forward_dense(&one, &one, &one, &mut cache)?;
    let dense = message(capture(&gpu, || attn.forward_dense(&one, &one, &one, &mut cache).map(drop)));
    assert!(dense.contains("copies keys out of pages"), "{dense}");
    attn.forward(&one, &one, &one, &mut cache)?;
    let mut fork = cache.fork()?;
    cache.truncate(120)?;
    cache.build_index()?;
    let shared = message(capture(&gpu, || attn.forward(&one, &one, &one, &mut cache).map(drop)));
    assert!(shared.contains("an append to what a fork reads"), "{shared}");
    attn.forward(&one, &one, &one, &mut fork)?;
    assert_eq!((cache.len(), fork.len()), (120, 203));
    Ok(())
}

#[test]
fn packed_sequences_equal_the_same_alone() -> Result<()> {
    let (_lock, gpu) = gpu_or_skip!(read);
    packed::equal_the_same_alone(&gpu, &[DType::F32, DType::BF16])
}

#[test]
fn shared_launches_equal_single_ones_without_tail() -> Result<()> {
    shared_launches_equal_single_ones(2, Selection::PerQueryHead, Tail::None, DType::F32)
}

#[test]
fn shared_launches_equal_single_ones_by_kv() -> Result<()> {
    shared_launches_equal_single_ones(8, Selection::PerKvHead, Tail::ClusterMeans, DType::BF16)
}

#[test]
fn shared_launches_equal_single_ones_by_query() -> Result<()> {
    shared_launches_equal_single_ones(8, Selection::PerQueryHead, Tail::ClusterMeans, DType::F32)
}

#[test]
fn shared_launches_equal_single_ones_of_bundles() -> Result<()> {
    shared_launches_equal_single_ones(20, Selection::PerKvHead, Tail::ClusterMeans, DType::F16)
}

/// What shared launches make of 20 sequences of all lengths, forks among them, and of runs, beside steps of one sequence at a
/// time: other numbers of blocks share a row, so that sums round otherwise, and keys at the edge of a selection may give way
/// to their equals.
fn shared_launches_equal_single_ones(h: usize, selection: Selection, tail: Tail, dtype: DType) -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(write);
    let (h_kv, d) = (2, 64);
    let mut rng = Rng(31);
    let config = PqConfig { pq_dim: 8, pq_bits: 6, coarse: 64, tail, selection, ..PqConfig::default() };
    let attn = PqAttention::new(config, 0.125)?;
    let what = format!("{h} heads, {selection:?}, {tail:?}, {}", dtype.as_str());
    let mut draw = |s: usize| -> Result<[Tensor; 3]> {
        let mut of = |heads| rng.tensor(&[1, heads, s, d], dtype).to_device(&gpu);
        Ok([of(h)?, of(h_kv)?, of(h_kv)?])
    };
    let mut packed = Vec::new();
    for i in 0..20 {
        let mut cache = attn.new_cache([1, h_kv, d], 0, dtype, &gpu)?;
        let [q, k, v] = draw(600 + 250 * i)?;
        attn.forward(&q.narrow(2, 0, 1)?.repeat((1, 1, k.dims()[2], 1))?, &k, &v, &mut cache)?;
        cache.build_index()?;
        packed.push(cache);
    }
    packed[3] = packed[19].fork()?;
    packed[7] = packed[19].fork()?;
    let mut alone = packed.iter_mut().map(PqKvCache::fork).collect::<Result<Vec<_>>>()?;
    // Some are in pages, which lie apart, and one is a fork that shares some of them.
    let (pool, _held) = scattered_pages(&attn, [1, h_kv, d], 400, dtype, &gpu)?;
    for place in [0, 6, 18, 19] {
        packed[place] = pool.copy_of(&packed[place])?;
    }
    packed[3] = packed[19].fork()?;
    let mut errors = Vec::new();
    // In which most of them fill a block of keys.
    for step in 0..40 {
        // One of them rests, and one reads a few tokens at once.
        let counts: Vec<usize> = (0..20).map(|i| if i == step % 7 { step % 3 } else { 1 }).collect();
        let [q, k, v] = draw(counts.iter().sum())?;
        let sequences = packed.iter_mut().zip(counts.iter().copied()).filter(|(_, count)| *count > 0);
        let got = attn.forward_packed(&q, &k, &v, sequences)?;
        let mut first = 0;
        for (i, (cache, count)) in alone.iter_mut().zip(counts).enumerate().filter(|(_, (_, count))| *count > 0) {
            let of = |tensor: &Tensor| tensor.narrow(2, first, count);
            let want = attn.forward(&of(&q)?, &of(&k)?, &of(&v)?, cache)?;
            errors.push(error_of(&format!("{what}, step {step}, sequence {i}"), &of(&got)?, &want));
            first += count;
        }
    }
    for (packed, alone) in packed.iter().zip(&alone) {
        assert_eq!(packed.len(), alone.len());
        assert_same_bits("keys", &packed.keys()?, &alone.keys()?)?;
        assert_same_index(&what, packed, alone)?;
    }
    // A short one, two forks and a long one, in pages but for one fork.
    let runs = packed.iter_mut().zip(&mut alone).enumerate().filter(|(i, _)| [0, 3, 7, 18].contains(i));
    for (i, (run, alone)) in runs {
        for step in 0..12 {
            let [q, k, v] = draw(if step == 11 { 80 } else { 2 + (i + step) % 7 })?;
            let got = attn.forward_run(&q, &k, &v, run)?;
            for position in 0..q.dims()[2] {
                let of = |tensor: &Tensor| tensor.narrow(2, position, 1);
                let want = attn.forward(&of(&q)?, &of(&k)?, &of(&v)?, alone)?;
                errors.push(error_of(&format!("{what}, position {position} of run {step}"), &of(&got)?, &want));
            }
            run.truncate(run.len() - 1)?;
            alone.truncate(alone.len() - 1)?;
        }
        assert_same_bits("values", &run.values()?, &alone.values()?)?;
        assert_same_index(&what, run, alone)?;
    }
    errors.sort_by(f64::total_cmp);
    let (most, tolerance) = (errors[errors.len() * 99 / 100], if dtype == DType::F32 { 1e-4 } else { 5e-3 });
    assert!(most < tolerance, "{what}: one in a hundred of {} is off by {most} or more", errors.len());
    Ok(())
}

/// Nine sequences of 16,000 keys and more, one of them short: some share the device's blocks, others have one a row.
#[test]
fn long_sequences_in_shared_launches() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(write);
    let (h_kv, d) = (8, 64);
    // In a launch each has a block of threads a head or two, alone many.
    let by_kv = Selection::PerKvHead;
    for (h, selection) in [(8, Selection::PerQueryHead), (8, by_kv), (16, by_kv), (32, by_kv)] {
        let tail = Tail::ClusterMeans;
        let config = PqConfig { pq_dim: 8, pq_bits: 6, coarse: 64, tail, selection, ..PqConfig::default() };
        let attn = PqAttention::new(config, 0.125)?;
        let random = |heads, s| Tensor::randn(0f32, 1.0, (1, heads, s, d), &gpu)?.to_dtype(DType::F16);
        let mut packed = Vec::new();
        for i in 0..9 {
            let mut cache = attn.new_cache([1, h_kv, d], 0, DType::F16, &gpu)?;
            cache.append(&random(h_kv, 16_000 + 500 * i)?, &random(h_kv, 16_000 + 500 * i)?)?;
            cache.build_index()?;
            packed.push(cache);
        }
        packed[4].truncate(700)?;
        packed[4].build_index()?;
        let mut alone = packed.iter_mut().map(PqKvCache::fork).collect::<Result<Vec<_>>>()?;
        let mut errors = Vec::new();
        for step in 0..12 {
            let (q, k, v) = (random(h, 9)?, random(h_kv, 9)?, random(h_kv, 9)?);
            let got = attn.forward_packed(&q, &k, &v, packed.iter_mut().map(|cache| (cache, 1)))?;
            for (i, cache) in alone.iter_mut().enumerate() {
                let of = |tensor: &Tensor| tensor.narrow(2, i, 1);
                let want = attn.forward(&of(&q)?, &of(&k)?, &of(&v)?, cache)?;
                errors.push(error_of(&format!("{selection:?}, step {step}, sequence {i}"), &of(&got)?, &want));
            }
        }
        errors.sort_by(f64::total_cmp);
        let (median, most) = (errors[errors.len() / 2], errors[errors.len() - 2]);
        assert!(median < 2e-3 && most < 5e-2, "{selection:?}: off by {median}, the second worst by {most}");
    }
    Ok(())
}

/// The norm of the differences, beside that of the numbers.
#[track_caller]
fn error_of(what: &str, got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!((got.dims(), got.dtype()), (want.dims(), want.dtype()), "{what}");
    let norm = |numbers: &[f64]| numbers.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (got, want) = (numbers(got), numbers(want));
    let differences: Vec<_> = got.iter().zip(&want).map(|(got, want)| got - want).collect();
    let error = norm(&differences) / norm(&want);
    assert!(error < 0.3, "{what}: off by {error}");
    error
}

#[test]
fn misuse_is_refused() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    misuse::all(misuse::On { device: &gpu })
}

/// What is on another device than the cache is refused before anything is appended or forgotten.
#[test]
fn other_devices_are_refused() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let attn = PqAttention::new(PqConfig { pq_bits: 4, coarse: 16, ..PqConfig::default() }, 0.125)?;
    let [prompt, cpu_prompt] = pair(&mut Rng(28), &gpu, &[1, 2, 100, 64], DType::F32, STRIDES[0])?;
    let mut cache = attn.new_cache([1, 2, 64], 0, DType::F32, &gpu)?;
    cache.append(&prompt, &prompt)?;
    cache.build_index()?;
    let one = prompt.narrow(2, 0, 1)?;
    let on_cpu = one.to_device(&Device::Cpu)?;
    let error = attn.forward(&on_cpu, &one, &one, &mut cache).expect_err("query").to_string();
    assert!(error.contains("PqAttention: query: expected device"), "{error}");
    for (keys, values, name) in [(&on_cpu, &one, "keys"), (&one, &on_cpu, "values")] {
        let error = attn.forward(&one, keys, values, &mut cache).expect_err(name).to_string();
        assert!(error.contains(&format!("PqKvCache: {name}: expected device")), "{error}");
    }
    let codes = Tensor::zeros((1, 2, 50, 8), DType::U8, &Device::Cpu)?;
    let (centroids, geometry) =
        (cache.codebook().expect("a codebook").centroids()?, Geometry { n: 50, sink: 0, window: 0, init_offset: 0 });
    let error = ops::select(&one, &codes, &centroids, 5, geometry).map(drop).expect_err("codes").to_string();
    assert!(error.contains("select: codes: expected device"), "{error}");
    let error = cache.set_codebook(Codebook::train(&cpu_prompt, attn.config())?).expect_err("codebook").to_string();
    assert!(error.contains("PqKvCache: codebook: expected device"), "{error}");
    assert_eq!(cache.len(), 100);
    let codebook = cache.codebook().expect("a codebook");
    assert!(codebook.centroids()?.device().is_cuda());
    Ok(())
}

/// Offsets beyond 2^31 elements: K and V of 4 M keys, of which a few are not zero.
#[test]
fn four_million_keys() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    let mut rng = Rng(16);
    let (h_kv, n, d) = (9, 4 << 20, 64);
    let keys = Tensor::zeros((1, h_kv, n, d), DType::BF16, &gpu)?;
    let values = keys.zeros_like()?;
    let query = rng.tensor(&[1, h_kv, 1, d], DType::BF16).to_device(&gpu)?;
    let marked = rng.tensor(&[1, h_kv, 1, d], DType::BF16);
    let indices = Tensor::full((n - 1) as u32, (1, h_kv, 1), &gpu)?;
    let lens = Tensor::ones((1, h_kv), DType::U32, &gpu)?;
    let selected = Selected { indices, lens, weights: Tensor::ones((1, h_kv, 1), DType::F32, &gpu)? };
    values.slice_set(&marked.to_device(&gpu)?, 2, n - 1)?;
    let got = ops::sparse_attend(&query, &keys, &values, &selected, 0.1)?;
    assert_close("the last value", &got.out, &marked, 0.0);
    let got = ops::dense_attend(&query, &keys, &values, 0.1)?;
    let mean = (marked.to_dtype(DType::F32)? / n as f64)?;
    assert_close("the mean", &got.out, &mean, tolerance(DType::BF16));

    let [centroids, cpu_centroids] = pair(&mut rng, &gpu, &[1, h_kv, 16, 256, 4], DType::F32, Strides::Contiguous)?;
    let codes = ops::encode(&keys, &centroids, None)?;
    let scores = ops::score(&query, &codes, &centroids)?;
    let cpu_keys = Tensor::zeros((1, h_kv, 1, d), DType::BF16, &Device::Cpu)?;
    let cpu_codes = ops::encode(&cpu_keys, &cpu_centroids, None)?;
    let want = ops::score(&query.to_device(&Device::Cpu)?, &cpu_codes, &cpu_centroids)?;
    assert_same_bits("the last score", &scores.narrow(2, n - 1, 1)?, &want)?;
    // All scores of a row are equal: the lowest positions win.
    let heavy = ops::topk(&scores, 1000)?.to_device(&Device::Cpu)?;
    assert_eq!(integers(&heavy.i((0, h_kv - 1))?), (0..1000).collect::<Vec<_>>());
    Ok(())
}

/// The published indexer's decode steps: codes, selection, weights, attention output.
#[test]
fn golden_cases() -> Result<()> {
    let (_guard, gpu) = gpu_or_skip!(read);
    // Asked for when the test runs: the program may have been built on another machine.
    let root = std::env::var_os("CARGO_MANIFEST_DIR").expect("the variable that cargo sets");
    let folder = Path::new(&root).join("tests/golden");
    let mut cases = 0;
    for entry in std::fs::read_dir(folder).expect("a folder of golden cases") {
        let path = entry.expect("a folder entry").path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            golden_case(&path, &gpu)?;
            cases += 1;
        }
    }
    assert!(cases >= 12, "only {cases} golden cases found");
    Ok(())
}

fn golden_case(path: &Path, gpu: &Device) -> Result<()> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).expect("a readable golden case");
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a safetensors header");
    let numbers: HashMap<_, _> = header.metadata().clone().expect("the case's numbers in the metadata");
    let number = |name: &str| numbers[name].parse::<usize>().expect("a number");
    let tensors = candle_core::safetensors::load(path, gpu)?;
    let scale = 1.0 / (number("d") as f32).sqrt();

    let phi = tensors.get("ip_phi").map(|phi| phi.reshape((number("b"), number("h_kv"), number("m")))).transpose()?;
    let codebook = Codebook::new(tensors["centroids"].clone(), phi)?;
    let codes = tensors["codes_after"].transpose(1, 2)?.contiguous()?;
    let old = tensors["codes_before"].dim(1)?;
    let new = codes.dim(2)? - old;
    if new > 0 {
        let keys = tensors["key"].narrow(2, number("init_offset") + old, new)?;
        assert_same_integers(&name, &codebook.encode(&keys)?.0, &codes.narrow(2, old, new)?);
    }

    let scores = ops::score(&tensors["query"], &codes, &codebook.centroids()?)?;
    assert_close(&name, &scores, &tensors["scores"].narrow(2, 0, codes.dim(2)?)?, 1e-4);

    let indices = tensors["sparse_list"].to_dtype(DType::U32)?;
    let lens = tensors["sparse_len"].to_dtype(DType::U32)?;
    let weights = indices.ones_like()?.to_dtype(DType::F32)?;
    let selected = Selected { indices, lens, weights };
    let dense = ops::dense_weights(&selected, number("h"), number("n"))?;
    assert_same_bits(&name, &dense, &tensors["weight_list"])?;
    let attended = ops::sparse_attend(&tensors["query"], &tensors["key"], &tensors["value"], &selected, scale)?;
    assert_close(&name, &attended.out.squeeze(2)?, &tensors["attention_output"], 1e-4);
    Ok(())
}
