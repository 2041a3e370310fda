//! Checkpoints on disk: Hugging Face folders of sharded safetensors, read lazily by tensor name.
pub mod config;
pub mod hub;
pub mod writer;
