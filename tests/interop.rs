//! What this crate is to code around it: threads, traces, Candle's own cache.

mod common;

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::{Codebook, Heavy, KvCache, PqAttention, PqConfig, PqKvCache};
use common::Rng;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

fn config() -> PqConfig {
    PqConfig { heavy: Heavy::Keys(16), window: 16, pq_bits: 4, coarse: 16, ..PqConfig::default() }
}

#[test]
fn caches_and_attention_go_from_thread_to_thread() {
    fn is_send<T: Send>() {}
    fn is_sync<T: Sync>() {}
    is_send::<PqKvCache>();
    is_send::<KvCache>();
    is_send::<Codebook>();
    is_send::<PqAttention>();
    is_sync::<PqAttention>();
}

/// The names of the spans that were opened.
#[derive(Clone, Default)]
struct Names(Arc<Mutex<Vec<&'static str>>>);

impl Subscriber for Names {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }
    fn new_span(&self, span: &Attributes) -> Id {
        let mut names = self.0.lock().unwrap();
        names.push(span.metadata().name());
        Id::from_u64(names.len() as u64)
    }
    fn record(&self, _: &Id, _: &Record) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn spans_name_what_a_call_does() -> Result<()> {
    let attn = PqAttention::new(config(), 0.25)?;
    let mut cache = attn.new_cache([1, 1, 16], 0, DType::F32, &Device::Cpu)?;
    let mut rng = Rng(1);
    let mut forward = |s: usize| -> Result<Vec<&'static str>> {
        let x = rng.tensor(&[1, 1, s, 16], DType::F32);
        let names = Names::default();
        tracing::subscriber::with_default(names.clone(), || attn.forward(&x, &x, &x, &mut cache))?;
        let names = names.0.lock().unwrap().clone();
        Ok(names.into_iter().filter(|name| name.starts_with("pq-attn")).collect())
    };
    assert_eq!(forward(4)?, ["pq-attn", "pq-attn-prefill"]);
    assert_eq!(forward(1)?, ["pq-attn", "pq-attn-dense"]);
    assert_eq!(forward(200)?, ["pq-attn", "pq-attn-prefill"]);
    assert_eq!(forward(1)?, ["pq-attn", "pq-attn-train", "pq-attn-encode", "pq-attn-sparse"]);
    assert_eq!(forward(1)?, ["pq-attn", "pq-attn-sparse"]);
    Ok(())
}

#[test]
fn kv_cache_is_that_of_candle() -> Result<()> {
    let mut rng = Rng(2);
    let attn = PqAttention::new(config(), 0.25)?;
    let (mut ours, mut theirs) = (KvCache::new(attn.clone(), 40), candle_nn::kv_cache::KvCache::new(2, 40));
    let same = |got: &Tensor, want: &Tensor| -> Result<()> {
        assert_eq!(got.dims(), want.dims());
        assert_eq!(got.flatten_all()?.to_vec1::<f32>()?, want.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    };
    assert!(ours.k()?.is_none() && ours.inner().is_none());
    for round in 0..2 {
        for s in [30, 1, 1, 20] {
            let (k, v) = (rng.tensor(&[2, 3, s, 16], DType::F32), rng.tensor(&[2, 3, s, 16], DType::F32));
            let (got, want) = (ours.append(&k, &v)?, theirs.append(&k, &v)?);
            same(&got.0, &want.0)?;
            same(&got.1, &want.1)?;
            assert_eq!(ours.current_seq_len(), theirs.current_seq_len(), "round {round}");
        }
        let (Some(k), Some(v)) = (ours.k()?, ours.v()?) else { panic!("no keys") };
        assert_eq!((k.dim(2)?, v.dim(2)?), (52, 52));
        ours.reset();
        theirs.reset();
        assert_eq!(ours.current_seq_len(), 0);
    }
    // What attend does is what the attention does.
    let mut cache = attn.new_cache([2, 3, 16], 0, DType::F32, &Device::Cpu)?;
    for s in [100, 1, 1] {
        let (q, k) = (rng.tensor(&[2, 6, s, 16], DType::F32), rng.tensor(&[2, 3, s, 16], DType::F32));
        same(&ours.attend(&q, &k, &k)?, &attn.forward(&q, &k, &k, &mut cache)?)?;
    }
    // A call that fails leaves it as it was, also the first.
    let mut empty = KvCache::new(attn.clone(), 0);
    let (k, v) = (rng.tensor(&[1, 3, 2, 16], DType::F32), rng.tensor(&[1, 2, 2, 16], DType::F32));
    assert!(empty.append(&k, &v).is_err());
    empty.append(&v, &v)?;
    let other = rng.tensor(&[2, 3, 1, 8], DType::F32);
    assert!(ours.append(&other, &other).is_err() && ours.attend(&other, &other, &other).is_err());
    assert_eq!(ours.current_seq_len(), 102);
    Ok(())
}
