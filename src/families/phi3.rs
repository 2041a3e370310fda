//! Phi-3 and Phi-4-mini: queries, keys and values in one tensor, gate and up in another; a part of each head turns, by
//! LongRoPE.

use super::{Architecture, Family, Names, llama, windows};
use crate::checkpoint::config::Config;
use crate::error::Result;

const NAMES: Names = Names {
    projections: [
        "self_attn.qkv_proj",
        "self_attn.qkv_proj",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ],
    ..Names::LLAMA
};

pub const FAMILY: Family = Family {
    name: "phi3",
    architectures: &["Phi3ForCausalLM"],
    read,
    names: &[&NAMES],
    ignored: llama::FAMILY.ignored,
};

fn read(config: &Config) -> Result<Architecture> {
    let base = llama::base(config, 10_000.0)?;
    let layer = windows::layers(config, base.layers, windows::window(config)?, |_| true)?;
    Ok(Architecture { family: FAMILY.name, norm_eps: config.opt_f64("rms_norm_eps")?.unwrap_or(1e-5), layer, ..base })
}
