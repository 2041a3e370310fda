//! Mistral: Llama's decoder with a sliding window in the teacher.

use super::{Architecture, Family, llama};
use crate::checkpoint::config::Config;
use crate::error::Result;

pub const FAMILY: Family =
    Family { name: "mistral", architectures: &["MistralForCausalLM"], read, ignored: llama::FAMILY.ignored };

fn read(config: &Config) -> Result<Architecture> {
    let window = config.opt_usize("sliding_window")?;
    Ok(Architecture {
        family: FAMILY.name,
        window,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        ..llama::read(config)?
    })
}
