//! Qwen3: every head's queries and keys are normalised before they turn.

use super::{Architecture, Family, Names, llama, qwen2};
use crate::checkpoint::config::Config;
use crate::error::Result;

pub const FAMILY: Family = Family {
    name: "qwen3",
    architectures: &["Qwen3ForCausalLM"],
    read,
    names: &[&Names::WITH_HEAD_NORMS],
    ignored: llama::FAMILY.ignored,
};

fn read(config: &Config) -> Result<Architecture> {
    let base = llama::base(config, 10_000.0)?;
    let layer = qwen2::layers(config, base.layers)?;
    let bias = config.bool_or("attention_bias", false)?;
    Ok(Architecture { family: FAMILY.name, qkv_bias: bias, o_bias: bias, layer, ..base })
}
