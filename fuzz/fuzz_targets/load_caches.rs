//! A file of caches that was changed: an error, or caches that go on.
#![no_main]

mod saved;
mod worker;

use std::path::Path;

use arbitrary::Arbitrary;
use candle_core::{Device, Tensor};
use candle_pq_attn::{load_caches, PqAttention};
use libfuzzer_sys::fuzz_target;
use saved::{Change, File};

#[derive(Debug, Arbitrary)]
struct Input {
    signed: bool,
    /// Whether tensors lie where the shapes in the header have them.
    laid_out: bool,
    capacity: u8,
    changes: Vec<Change>,
}

fuzz_target!(init: worker::this_thread(), |input: Input| {
    let path = saved::path();
    let mut file = File::of_a_small_cache();
    input.changes.iter().for_each(|change| file.change(change));
    if input.laid_out {
        file.lay_out();
    }
    if input.signed {
        file.sign();
    }
    std::fs::write(path, file.bytes()).unwrap();
    load(path, input.capacity.into());
});

fn load(path: &Path, capacity: usize) {
    let Ok(saved) = load_caches(path, capacity, &Device::Cpu) else { return };
    for mut cache in saved.caches {
        let config = cache.config().clone();
        // Rounds of training are what was asked for.
        if config.kmeans_iters > 16 {
            continue;
        }
        let (attn, [b, h_kv, d]) = (PqAttention::new(config, 0.25).unwrap(), cache.dims());
        let ones = |heads| Tensor::ones((b, heads, 1, d), cache.dtype(), &Device::Cpu).unwrap();
        let (q, kv) = (ones(2 * h_kv), ones(h_kv));
        for _ in 0..3 {
            let len = cache.len();
            let went_on = attn.forward(&q, &kv, &kv, &mut cache).is_ok();
            assert_eq!(cache.len(), len + usize::from(went_on));
        }
    }
}
