//! Fast long-context decoding for language models on [Candle](candle_core).
//!
//! A decoder spends its time reading a KV cache that it mostly ignores. This crate product-quantizes the keys as they
//! arrive, scores all of them from a few bytes each, and attends exactly to the few that matter and to the first and
//! last ones. It needs no training of the model, and works with any softmax attention: MHA, GQA or MQA.
//!
//! A model calls one thing, [`PqAttention::forward`]:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_pq_attn::{Heavy, PqAttention, PqConfig};
//!
//! let device = Device::Cpu;
//! let config = PqConfig { heavy: Heavy::Fraction(0.02), ..PqConfig::default() };
//! let attn = PqAttention::new(config, 1.0 / 8.0)?; // scale: 1 / sqrt(head_dim)
//! let mut cache = attn.new_cache([1, 2, 64], 2048, DType::F32, &device)?; // one for each layer
//!
//! // The prompt: 8 query heads over 2 KV heads, 1500 tokens. Dense.
//! let q = Tensor::randn(0f32, 1., (1, 8, 1500, 64), &device)?;
//! let kv = Tensor::randn(0f32, 1., (1, 2, 1500, 64), &device)?;
//! attn.forward(&q, &kv, &kv, &mut cache)?;
//!
//! // Every token after: sparse, exact over 99 of the 1501 keys.
//! let (q, kv) = (q.narrow(2, 0, 1)?, kv.narrow(2, 0, 1)?);
//! let out = attn.forward(&q, &kv, &kv, &mut cache)?;
//! assert_eq!(out.dims(), [1, 8, 1, 64]);
//! assert_eq!(attn.config().attended(cache.len()), 4 + 31 + 64);
//! # candle_core::Result::Ok(())
//! ```
//!
//! # Map
//! - [`PqConfig`]: what is kept, selected and attended to
//! - [`PqAttention`]: dense prefill, sparse decode
//! - [`PqKvCache`]: keys, values and codes of one layer; [`Codebook`]: their centroids
//! - [`PagePool`]: memory that many caches take pages of, for servers
//! - [`save_caches`], [`load_caches`]: a document that was read, kept on disk
//! - [`DecodeGraph`]: a whole model's decode step as a CUDA graph
//! - [`KvCache`]: with the calls of `candle_nn::kv_cache::KvCache`, for code whose attention is yet to change
//! - [`porting`]: the change that puts it into three models of candle-transformers
//! - [`tuning`]: what each field of the config does, in the order to touch them; memory; signs that something is wrong
//! - [`comparison`]: what others offer, and where they are better
//! - [`ops`]: the steps of a decode, each an op of its own: encode, score, top-k, indices and weights, attend
//!
//! Spans of [`tracing`] at the level TRACE show where time goes: `pq-attn`, a call of [`PqAttention`], and within it
//! `pq-attn-prefill`, `-train`, `-encode`, `-sparse` and `-dense`.
//!
//! Names are those of the field: `b` sequences, `h` query heads in groups over `h_kv` KV heads, `n` keys so far,
//! `head_dim`, `pq_dim` subspaces of `pq_len = head_dim / pq_dim` elements, `2^pq_bits` centroids in each.

#![deny(missing_docs)]
#![deny(unsafe_code)]

mod attention;
mod cache;
mod codebook;
mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod fault;
mod graph;
mod kv_cache;
pub mod ops;
#[cfg(doc)]
#[doc = include_str!("../docs/comparison.md")]
pub mod comparison {}
#[cfg(doc)]
#[doc = include_str!("../docs/porting.md")]
pub mod porting {}
mod query_weights;
#[cfg(doc)]
#[doc = include_str!("../docs/tuning.md")]
pub mod tuning {}

pub use attention::PqAttention;
pub use cache::{load_caches, save_caches, Memory, PagePool, PqKvCache, SavedCaches};
pub use codebook::Codebook;
pub use config::{Heavy, Metric, PqConfig, Selection, Tail};
pub use graph::DecodeGraph;
pub use kv_cache::KvCache;
