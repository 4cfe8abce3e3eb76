//! What the examples share: a language model from any source, its tokenizer, and how it generates.

// Each example uses a part of it.
#![allow(dead_code)]

pub mod budget;
pub mod chat;
pub mod cli;
pub mod config;
#[cfg(test)]
mod damage;
pub mod decoder;
pub mod decoding;
pub mod linear;
pub mod logits;
pub mod model;
pub mod rotary;
pub mod sampling;
pub mod sliding;
pub mod smollm2;
pub mod source;
pub mod terminal;
#[cfg(test)]
pub mod testing;
pub mod text;
pub mod tokenizer;
pub mod weights;
