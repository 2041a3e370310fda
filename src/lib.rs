//! Margay linearizes pretrained language models: softmax attention in, learnable linear attention out.
//!
//! The folders in the order a conversion meets them:
//!
//! | where | what |
//! |---|---|
//! | [`recipe`] | what to do, as a typed TOML file |
//! | [`checkpoint`] | Hugging Face folders and hub repositories, read lazily by tensor name; shards written |
//! | [`families`] | what a `config.json` means for the one decoder: data, one file per family |
//! | [`model`] | that decoder: embeddings, blocks, norm, head |
//! | [`mixers`] | the attention of a layer: softmax and what replaces it, one file per variant |
//! | [`ops`] | the operations under them, each with definition, fast form and gradient |
//! | [`data`] | text to packed token rows |
//! | [`train`] | loop, optimiser, schedules, resume |
//! | [`convert`] | the verbs: load → plan → swap → training stages, layers selected between → merge → export → verify; recipes compared |
//! | [`evaluate`] | perplexity, by position too, agreement with the teacher, recall, multiple choice |
//! | [`report`](mod@report) | a conversion as one page of HTML |
//! | [`plot`] | line charts and heat maps as SVG |
//! | [`generate`] | recurrent decoding |
//! | [`mod@bench`] | speed on random weights, beside the machine's ceilings |
//! | [`run_dir`] | one conversion's folder on disk: progress that survives a kill |

pub mod bench;
pub mod checkpoint;
pub mod convert;
pub mod data;
pub mod error;
pub mod evaluate;
pub mod families;
pub mod generate;
pub mod mixers;
pub mod model;
pub mod ops;
pub mod params;
pub mod plot;
pub mod progress;
pub mod recipe;
pub mod report;
pub mod run_dir;
pub mod train;

pub use error::{Error, Result};
