//! StarCoder2: LayerNorms and biases everywhere, an MLP without a gate, a sliding window where the configuration says one.

use super::{Architecture, Family, Names, NormKind, llama, windows};
use crate::checkpoint::config::Config;
use crate::error::Result;

const NAMES: Names = Names {
    projections: [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "",
        "mlp.c_fc",
        "mlp.c_proj",
    ],
    ..Names::LLAMA
};

pub const FAMILY: Family = Family {
    name: "starcoder2",
    architectures: &["Starcoder2ForCausalLM"],
    read,
    names: &[&NAMES],
    ignored: llama::FAMILY.ignored,
};

fn read(config: &Config) -> Result<Architecture> {
    let base = llama::base(config, 10_000.0)?;
    let layer = windows::layers(config, base.layers, windows::window(config)?, |_| true)?;
    let bias = config.bool_or("use_bias", true)?;
    Ok(Architecture {
        family: FAMILY.name,
        tied: config.bool_or("tie_word_embeddings", true)?,
        norm: NormKind::Layer,
        norm_eps: config.opt_f64("norm_epsilon")?.unwrap_or(1e-5),
        layer,
        activation: llama::activation(config, "hidden_act", "gelu_pytorch_tanh")?,
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: bias,
        ..base
    })
}
