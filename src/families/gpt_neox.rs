//! GPT-NeoX and Pythia: LayerNorms with biases, attention and MLP beside each other, a part of each head turns.

use super::{Architecture, Family, Layout, Names, NormKind, llama};
use crate::checkpoint::config::Config;
use crate::error::Result;

const NAMES: Names = Names {
    embedding: "gpt_neox.embed_in.weight",
    final_norm: "gpt_neox.final_layer_norm",
    head: "embed_out.weight",
    blocks: "gpt_neox.layers",
    projections: [
        "attention.query_key_value",
        "attention.query_key_value",
        "attention.query_key_value",
        "attention.dense",
        "",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ],
    ..Names::LLAMA
};

pub const FAMILY: Family = Family {
    name: "gpt_neox",
    architectures: &["GPTNeoXForCausalLM"],
    read,
    names: &[&NAMES],
    ignored: &[
        "gpt_neox.layers.*.attention.bias",
        "gpt_neox.layers.*.attention.masked_bias",
        "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
    ],
};

fn read(config: &Config) -> Result<Architecture> {
    let bias = config.bool_or("attention_bias", true)?;
    let theta = config.opt_f64("rotary_emb_base")?.unwrap_or(10_000.0);
    Ok(Architecture {
        family: FAMILY.name,
        norm: NormKind::Layer,
        norm_eps: config.opt_f64("layer_norm_eps")?.unwrap_or(1e-5),
        parallel: config.bool_or("use_parallel_residual", true)?,
        activation: llama::activation(config, "hidden_act", "gelu")?,
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: true,
        layout: Layout::Heads,
        ..llama::base(config, theta)?
    })
}
