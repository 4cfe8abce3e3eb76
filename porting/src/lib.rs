//! Models of candle-transformers with [`PqAttention`](candle_pq_attn::PqAttention), made by `build.rs` of their originals
//! and the diffs in docs/porting.md; `tests/` compares the two.

pub mod llama {
    include!(concat!(env!("OUT_DIR"), "/llama.rs"));
}

pub mod quantized_qwen3 {
    include!(concat!(env!("OUT_DIR"), "/quantized_qwen3.rs"));
}

pub mod qwen3 {
    include!(concat!(env!("OUT_DIR"), "/qwen3.rs"));
}
