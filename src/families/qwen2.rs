//! Qwen2 and Qwen2.5, and what was distilled into them: biases on queries, keys and values, windows in late layers.

use super::{Architecture, Family, Layer, Names, llama, windows};
use crate::checkpoint::config::Config;
use crate::error::Result;

pub const FAMILY: Family = Family {
    name: "qwen2",
    architectures: &["Qwen2ForCausalLM"],
    read,
    names: &[&Names::LLAMA],
    ignored: llama::FAMILY.ignored,
};

fn read(config: &Config) -> Result<Architecture> {
    let base = llama::base(config, 10_000.0)?;
    let layer = layers(config, base.layers)?;
    Ok(Architecture { family: FAMILY.name, qkv_bias: true, layer, ..base })
}

/// Windows from `max_window_layers` on, where `use_sliding_window` asks for them.
pub(super) fn layers(config: &Config, count: usize) -> Result<Vec<Layer>> {
    let window = if config.bool_or("use_sliding_window", false)? { windows::window(config)? } else { None };
    let first = config.opt_usize("max_window_layers")?.unwrap_or(28);
    windows::layers(config, count, window, |layer| layer >= first)
}
