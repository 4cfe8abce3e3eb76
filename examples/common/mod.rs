//! What the examples share: a language model without its attention, from any source, and its tokenizer.

// Each example uses a part of it.
#![allow(dead_code)]

pub mod chat;
pub mod cli;
pub mod config;
pub mod decoder;
pub mod linear;
pub mod logits;
pub mod rotary;
pub mod smollm2;
pub mod source;
#[cfg(test)]
pub mod testing;
pub mod tokenizer;
pub mod weights;
