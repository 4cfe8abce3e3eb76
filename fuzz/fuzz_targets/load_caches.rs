//! A file of caches with other bytes, as it is and under right checksums: an error, or caches that go on.
#![no_main]

use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use candle_pq_attn::{load_caches, save_caches, Heavy, PqAttention, PqConfig};
use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;
use xxhash_rust::xxh3::xxh3_128;

/// A file of a small cache that has everything.
fn good(path: &Path) -> &'static [u8] {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    GOOD.get_or_init(|| {
        let (window, heavy) = (2, Heavy::Keys(2));
        let config = PqConfig { sink: 2, window, heavy, pq_dim: 4, pq_bits: 1, coarse: 2, ..PqConfig::default() };
        let attn = PqAttention::new(config, 0.25).unwrap();
        let mut cache = attn.new_cache([1, 1, 4], 0, DType::F32, &Device::Cpu).unwrap();
        let [q, kv] = [2, 1].map(|heads| Tensor::rand(-1f32, 1., (1, heads, 20, 4), &Device::Cpu).unwrap());
        attn.forward(&q, &kv, &kv, &mut cache).unwrap();
        cache.build_index().unwrap();
        save_caches(path, [&cache], "about").unwrap();
        std::fs::read(path).unwrap()
    })
}

fn load(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
    let Ok(saved) = load_caches(path, 0, &Device::Cpu) else { return };
    for mut cache in saved.caches {
        let config = cache.config().clone();
        // Rounds of training are what was asked for.
        if config.kmeans_iters > 16 {
            continue;
        }
        let (attn, [b, h_kv, d]) = (PqAttention::new(config, 0.25).unwrap(), cache.dims());
        let q = Tensor::ones((b, h_kv, 1, d), cache.dtype(), &Device::Cpu).unwrap();
        for _ in 0..3 {
            let _ = attn.forward(&q, &q, &q, &mut cache);
        }
    }
}

/// The same with the checksums that it should have, if it is a safetensors file.
fn signed(bytes: &[u8]) -> Option<Vec<u8>> {
    let (len, header) = SafeTensors::read_metadata(bytes).ok()?;
    let (header_bytes, data) = bytes[8..].split_at(len);
    let mut names = header.offset_keys();
    names.pop();
    let tensors =
        names.iter().filter_map(|name| header.info(name)).map(|info| &data[info.data_offsets.0..info.data_offsets.1]);
    let sums = std::iter::once(header_bytes).chain(tensors).flat_map(|bytes| xxh3_128(bytes).to_le_bytes());
    let sums: Vec<u8> = sums.collect();
    let end = bytes.len().checked_sub(sums.len())?;
    Some([&bytes[..end], &sums].concat())
}

fuzz_target!(|changes: Vec<(u16, u8)>| {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut bytes = good(file.path()).to_vec();
    for (at, byte) in changes {
        let len = bytes.len();
        bytes[usize::from(at) % len] = byte;
    }
    load(file.path(), &bytes);
    if let Some(bytes) = signed(&bytes) {
        load(file.path(), &bytes);
    }
});
