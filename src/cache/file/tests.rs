use std::sync::OnceLock;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, Index};
use serde_json::Value;

use super::*;
use crate::config::{Heavy, Metric, Tail};
use crate::PqAttention;

fn small() -> PqConfig {
    let (sink, window, heavy) = (2, 8, Heavy::Keys(8));
    PqConfig { sink, window, heavy, pq_dim: 4, pq_bits: 4, coarse: 16, refresh: 0.25, ..PqConfig::default() }
}

/// The same numbers for the same seed.
fn tensor(seed: u32, dims: &[usize], dtype: DType) -> Result<Tensor> {
    let count: usize = dims.iter().product();
    let number = |i: usize| ((i as f32 + 1.) * 12.9898 + seed as f32 * 78.233).sin() * 4.3;
    Tensor::from_vec((0..count).map(number).collect(), dims, &Device::Cpu)?.to_dtype(dtype)
}

/// Reads a prompt, and steps on.
fn run(attn: &PqAttention, cache: &mut PqKvCache, steps: std::ops::Range<u32>) -> Result<Vec<f32>> {
    let mut outs = Vec::new();
    for step in steps {
        let s = if step == 0 { 70 } else { 1 };
        let [b, h_kv, d] = cache.dims();
        let q = tensor(step, &[b, 2 * h_kv, s, d], cache.dtype())?;
        let [k, v] = [7, 9].map(|part| tensor(step + 1000 * part, &[b, h_kv, s, d], cache.dtype()));
        outs.extend(attn.forward(&q, &k?, &v?, cache)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(outs)
}

fn forward(config: &PqConfig, dtype: DType, steps: u32) -> Result<(PqAttention, PqKvCache)> {
    let attn = PqAttention::new(config.clone(), 0.25)?;
    let mut cache = attn.new_cache([2, 2, 16], 0, dtype, &Device::Cpu)?;
    run(&attn, &mut cache, 0..steps)?;
    Ok((attn, cache))
}

/// Steps after it are those of a cache that was never saved, through trainings and to another save.
#[test]
fn loaded_caches_go_on_bit_for_bit() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("caches");
    let plain = PqConfig { coarse: 0, tail: Tail::None, query_weights: false, ..small() };
    let configs = [
        small(),
        PqConfig { query_weights: false, ..small() },
        PqConfig { tail: Tail::None, window: 0, ..small() },
        PqConfig { metric: Metric::InnerProduct, ..plain.clone() },
        PqConfig { init_offset: Some(5), ..plain },
    ];
    for (config, dtype) in configs.iter().flat_map(|config| [DType::F32, DType::BF16].map(|dtype| (config, dtype))) {
        for steps in [0, 1, 2, 40] {
            let (attn, mut first) = forward(config, dtype, steps)?;
            let (_, mut second) = forward(config, dtype, steps + 3)?;
            second.build_index()?;
            save_caches(&path, [&first, &second], "two")?;
            let SavedCaches { caches, about } = load_caches(&path, 90, &Device::Cpu)?;
            assert_eq!((caches.len(), about.as_str()), (2, "two"));
            for (cache, loaded) in [&mut first, &mut second].into_iter().zip(caches) {
                let mut loaded = loaded;
                assert_eq!((loaded.len(), loaded.config()), (cache.len(), config));
                assert_eq!(loaded.memory().kv_bytes, cache.memory().kv_bytes);
                let next = steps + 10..steps + 40;
                let (got, want) = (run(&attn, &mut loaded, next.clone())?, run(&attn, cache, next)?);
                assert!(!got.is_empty() && got == want, "{config:?} {dtype:?} after {steps} steps");
                assert_eq!(loaded.memory(), cache.memory());
                loaded.truncate(cache.len() / 2)?;
                cache.truncate(cache.len() / 2)?;
                assert!(run(&attn, &mut loaded, 1..30)? == run(&attn, cache, 1..30)?, "truncated");
            }
        }
    }
    Ok(())
}

#[test]
fn a_codebook_that_was_handed_in_stays() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("caches");
    let (attn, mut cache) = forward(&small(), DType::F32, 1)?;
    let keys = tensor(3, &[2, 2, 50, 16], DType::F32)?;
    cache.set_codebook(Codebook::train(&keys, &small())?)?;
    save_caches(&path, [&cache], "")?;
    let mut loaded = load_caches(&path, 0, &Device::Cpu)?.caches.remove(0);
    assert_eq!(run(&attn, &mut loaded, 1..60)?, run(&attn, &mut cache, 1..60)?);
    loaded.reset()?;
    assert!(loaded.codebook().is_some());
    Ok(())
}

/// All of it in order, and in place: what is read into them is in the tensor.
#[test]
fn blocks_are_the_tensor() -> Result<()> {
    let rows = BLOCK / 32 + 3;
    let wide = tensor(1, &[3, BLOCK / 4 + 5], DType::F32)?;
    let long = tensor(2, &[2, 2, rows, 16], DType::BF16)?;
    let short = tensor(3, &[2, 3, 4, 5], DType::F32)?;
    let empty = Tensor::zeros((usize::MAX, 0), DType::U8, &Device::Cpu)?;
    for tensor in [wide, long.narrow(2, 1, rows - 1)?, long, short.narrow(2, 1, 2)?, short, empty] {
        let (all, mut got) = (tensor.data().into_owned(), Vec::new());
        for_each_block(&tensor, &mut |block| {
            assert!(block.is_contiguous() && block.data_len() <= BLOCK);
            got.extend_from_slice(&block.data());
            block.slice_set(&block.ones_like()?, 0, 0)
        })?;
        assert!(got == all, "{:?}", tensor.layout());
        assert!(tensor.data() == tensor.ones_like()?.data(), "{:?}", tensor.layout());
    }
    Ok(())
}

#[track_caller]
fn assert_refused(path: &Path, expected: &str) {
    let error = load_caches(path, 0, &Device::Cpu).expect_err("an error").to_string();
    assert!(error.starts_with("load_caches: ") && error.contains(expected), "{error}, expected {expected}");
}

#[test]
fn damage_is_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("caches");
    assert_refused(&path, "No such file");
    let (_, cache) = forward(&small(), DType::F32, 2)?;
    save_caches(&path, [&cache], "about")?;
    let good = std::fs::read(&path)?;
    for len in [0, 7, 8, 100, good.len() / 2, good.len() - 1] {
        std::fs::write(&path, &good[..len])?;
        assert_refused(&path, "expected");
    }
    std::fs::write(&path, [&good[..], &[0]].concat())?;
    assert_refused(&path, "cut off or changed");
    // Wherever a bit falls.
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for at in (0..header).chain((header..good.len()).step_by(977)).chain([good.len() - 1]) {
        let mut bytes = good.clone();
        bytes[at] ^= 4;
        std::fs::write(&path, bytes)?;
        assert_refused(&path, "");
    }
    candle_core::safetensors::save(&HashMap::from([("x", tensor(1, &[3], DType::F32)?)]), &path)?;
    assert_refused(&path, "got another");
    std::fs::write(&path, "a document of some other kind")?;
    assert_refused(&path, "got another, or one that was cut off");
    Ok(())
}

/// Writes a cache's file with checksums that are right, whatever else is.
fn signed(path: &Path, caches: &str, tensors: &[(String, Tensor)]) -> Result<()> {
    let tensors = tensors.iter().map(|(name, tensor)| (format!("0.{name}"), tensor.clone()));
    write(path, caches.to_string(), "", tensors.collect())
}

/// What a file says is checked where its checksum is right, too.
#[test]
fn nonsense_is_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("caches");
    let (_, mut cache) = forward(&small(), DType::F32, 2)?;
    cache.build_index()?;
    let (saved, good) = (Saved { format: FORMAT, layers: vec![Layer::of(&cache)] }, cache.tensors()?);
    let write = |change: &dyn Fn(&mut Saved), tensors: &[(String, Tensor)]| -> Result<()> {
        let mut other = serde_json::from_value(serde_json::to_value(&saved).unwrap()).unwrap();
        change(&mut other);
        signed(&path, &serde_json::to_string(&other).unwrap(), tensors)
    };
    write(&|_| (), &good)?;
    load_caches(&path, 0, &Device::Cpu)?;
    let trained = |saved: &mut Saved, change: &dyn Fn(&mut Trained)| {
        change(saved.layers[0].trained.as_mut().expect("an index"));
    };
    type Change<'a> = &'a dyn Fn(&mut Saved);
    let changes: [(Change, &str); 12] = [
        (&|saved| saved.format = 1, "expected caches of format 3, got format 1"),
        (&|saved| saved.layers[0].len += 1, "0.keys: expected shape [2, 2, 72, 16], got [2, 2, 71, 16]"),
        (&|saved| saved.layers[0].dims = [usize::MAX; 3], "0.keys: expected shape"),
        (&|saved| saved.layers[0].dtype = "u8".into(), "0.keys: expected dtype u8, got F32"),
        (&|saved| saved.layers[0].dtype = "nothing".into(), "0.dtype: expected f32, f16 or bf16"),
        (&|saved| saved.layers[0].config.pq_dim = 5, "pq_dim: expected a divisor"),
        (&|saved| saved.layers[0].config.coarse = 32, "expected 32 coarse clusters, got 16"),
        (&|saved| saved.layers[0].queries = vec![4], "expected a tensor \"0.queries.4\", found none"),
        (&|saved| saved.layers[0].queries = vec![0, 0], "queries: expected ascending positions"),
        (&|saved| trained(saved, &|trained| trained.end = Some(72)), "0.end: expected 18 to 71"),
        (&|saved| trained(saved, &|trained| trained.encoded = usize::MAX), "0.encoded: expected 2 and blocks of 8"),
        (&|saved| trained(saved, &|trained| trained.encoded -= 8), "0.codes: expected shape"),
    ];
    for (change, expected) in changes {
        write(change, &good)?;
        assert_refused(&path, expected);
    }
    for (index, (name, tensor)) in good.iter().enumerate() {
        let mut tensors = good.clone();
        tensors.remove(index);
        write(&|_| (), &tensors)?;
        // Without weights it is another codebook, no broken one.
        if name != "weights" {
            let centroids = name == "coarse";
            assert_refused(&path, if centroids { "expected 16 coarse clusters, got 0" } else { "found none" });
        }
        tensors.push((name.clone(), tensor.flatten_all()?));
        write(&|_| (), &tensors)?;
        assert_refused(&path, "expected");
    }
    Ok(())
}

/// The numbers of JSON, by reference.
fn numbers_of(json: &mut Value) -> Vec<&mut Value> {
    match json {
        Value::Number(_) => vec![json],
        Value::Array(items) => items.iter_mut().flat_map(numbers_of).collect(),
        Value::Object(fields) => fields.values_mut().flat_map(numbers_of).collect(),
        _ => Vec::new(),
    }
}

/// A cache of 20 keys with everything, small enough to be broken thousands of times.
fn tiny() -> Result<(PqAttention, PqKvCache)> {
    let config = PqConfig { heavy: Heavy::Keys(2), window: 2, pq_bits: 1, coarse: 2, ..small() };
    let attn = PqAttention::new(config, 0.25)?;
    let mut cache = attn.new_cache([1, 1, 4], 0, DType::F32, &Device::Cpu)?;
    let [q, kv] = [2, 1].map(|heads| tensor(7, &[1, heads, 20, 4], DType::F32));
    let kv = kv?;
    attn.forward(&q?, &kv, &kv, &mut cache)?;
    cache.build_index()?;
    Ok((attn, cache))
}

/// Takes steps with what was loaded, which may be any cache: an error or numbers, no panic.
fn go_on(saved: SavedCaches) {
    for mut cache in saved.caches {
        let Ok(attn) = PqAttention::new(cache.config().clone(), 0.25) else { continue };
        let [b, h_kv, d] = cache.dims();
        // So many rounds are a long time, and what was asked for.
        let steps = if cache.config().kmeans_iters > 256 { 0 } else { 4 };
        for _ in 0..steps {
            let step = tensor(1, &[b, 2 * h_kv, 1, d], cache.dtype())
                .and_then(|q| attn.forward(&q, &q.narrow(1, 0, h_kv)?, &q.narrow(1, 0, h_kv)?, &mut cache));
            drop(step);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// Bytes flipped, cut off and put in, anywhere: refused, or the file says what it said.
    #[test]
    fn random_damage_is_refused(
        flips in vec((any::<Index>(), 1u8..), 0..4),
        cut in option::of(any::<Index>()),
        added in vec(any::<u8>(), 0..3),
    ) {
        static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("caches");
        let good = GOOD.get_or_init(|| {
            save_caches(&path, [&tiny().unwrap().1], "about").unwrap();
            std::fs::read(&path).unwrap()
        });
        let mut bytes = good.clone();
        for (at, mask) in flips {
            let len = bytes.len();
            bytes[at.index(len)] ^= mask;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(good.len()));
        }
        bytes.extend(added);
        std::fs::write(&path, &bytes)?;
        if let Ok(saved) = load_caches(&path, 0, &Device::Cpu) {
            prop_assert!(bytes == *good && saved.about == "about" && saved.caches.len() == 1);
        }
    }

    /// Numbers that say something else under a right checksum: an error, or a cache that goes on without a panic.
    #[test]
    fn random_nonsense_is_no_panic(
        changes in vec((any::<Index>(), select(NUMBERS.to_vec())), 1..4),
        bytes in vec((any::<Index>(), any::<Index>(), any::<u8>()), 0..4),
    ) {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("caches");
        let (_, cache) = tiny().unwrap();
        let mut json = serde_json::to_value(Saved { format: FORMAT, layers: vec![Layer::of(&cache)] })?;
        for (index, number) in changes {
            let mut numbers = numbers_of(&mut json);
            let number: Value = serde_json::from_str(number)?;
            let count = numbers.len();
            *numbers[index.index(count)] = number;
        }
        let mut tensors = cache.tensors().unwrap();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        for (which, at, byte) in bytes {
            let count = tensors.len();
            let (_, tensor) = &mut tensors[which.index(count)];
            let mut data = tensor.data().into_owned();
            let len = data.len();
            data[at.index(len)] = byte;
            *tensor = Tensor::from_raw_buffer(&data, tensor.dtype(), tensor.dims(), &Device::Cpu).unwrap();
        }
        signed(&path, &json.to_string(), &tensors).unwrap();
        if let Ok(saved) = load_caches(&path, 0, &Device::Cpu) {
            go_on(saved);
        }
    }
}

const NUMBERS: [&str; 14] = [
    "0",
    "1",
    "2",
    "3",
    "5",
    "19",
    "20",
    "21",
    "256",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "-1",
    "0.5",
];
