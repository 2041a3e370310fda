//! Granite 3: Llama's decoder with multipliers on embeddings, attention scores, both residuals and logits.

use super::{Architecture, Family, Names, llama};
use crate::checkpoint::config::Config;
use crate::error::Result;

pub const FAMILY: Family = Family {
    name: "granite",
    architectures: &["GraniteForCausalLM"],
    read,
    names: &[&Names::LLAMA],
    ignored: llama::FAMILY.ignored,
};

fn read(config: &Config) -> Result<Architecture> {
    let bias = config.bool_or("attention_bias", false)?;
    let number = |key: &str| match config.opt_f64(key)?.unwrap_or(1.0) {
        x if x > 0.0 => Ok(x),
        x => Err(config.wrong(key, &x.into(), "a number above 0")),
    };
    Ok(Architecture {
        family: FAMILY.name,
        embedding_scale: number("embedding_multiplier")?,
        attention_scale: Some(number("attention_multiplier")?),
        residual_scale: number("residual_multiplier")?,
        logit_scale: 1.0 / number("logits_scaling")?,
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: config.bool_or("mlp_bias", false)?,
        ..llama::base(config, 10_000.0)?
    })
}
