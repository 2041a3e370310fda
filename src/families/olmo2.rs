//! OLMo 2: norms behind attention and MLP instead of before them, queries and keys normalised over all heads.

use super::{Architecture, Family, HeadNorm, Names, llama};
use crate::checkpoint::config::Config;
use crate::error::Result;

const NAMES: Names =
    Names { norms: ["", "post_attention_layernorm", "", "post_feedforward_layernorm"], ..Names::WITH_HEAD_NORMS };

pub const FAMILY: Family = Family {
    name: "olmo2",
    architectures: &["Olmo2ForCausalLM"],
    read,
    names: &[&NAMES],
    ignored: llama::FAMILY.ignored,
};

fn read(config: &Config) -> Result<Architecture> {
    let bias = config.bool_or("attention_bias", false)?;
    Ok(Architecture {
        family: FAMILY.name,
        head_norm: HeadNorm::Whole,
        norm_eps: config.opt_f64("rms_norm_eps")?.unwrap_or(1e-5),
        qkv_bias: bias,
        o_bias: bias,
        ..llama::base(config, 10_000.0)?
    })
}
