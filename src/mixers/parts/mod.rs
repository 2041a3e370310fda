//! What mixers are composed of: each part is its recipe keys, the tensors it adds, and what it computes.

pub mod beside;
pub mod conv;
pub mod gate;
pub mod maps;
pub mod output;
mod principal;
pub mod shared;
