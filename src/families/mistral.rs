//! Mistral and Ministral: Llama's decoder with a sliding window in the teacher, in all layers or in some.

use super::{Architecture, Family, Names, llama, windows};
use crate::checkpoint::config::Config;
use crate::error::Result;

pub const FAMILY: Family = Family {
    name: "mistral",
    architectures: &["MistralForCausalLM", "MinistralForCausalLM"],
    read,
    names: &[&Names::LLAMA],
    ignored: llama::FAMILY.ignored,
};

fn read(config: &Config) -> Result<Architecture> {
    let base = llama::base(config, 10_000.0)?;
    let layer = windows::layers(config, base.layers, windows::window(config)?, |_| true)?;
    Ok(Architecture { family: FAMILY.name, layer, ..base })
}
