//! GPT-2: learned positions, LayerNorms with biases, weights stored the other way round.

use super::{Architecture, Family, Layer, Layout, Names, NormKind, Rope, llama};
use crate::checkpoint::config::Config;
use crate::error::Result;

const NAMES: Names = Names {
    embedding: "transformer.wte.weight",
    positions: "transformer.wpe.weight",
    final_norm: "transformer.ln_f",
    blocks: "transformer.h",
    norms: ["ln_1", "", "ln_2", ""],
    projections: ["attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj", "", "mlp.c_fc", "mlp.c_proj"],
    ..Names::LLAMA
};

/// As the first checkpoints have it.
const BARE: Names =
    Names { embedding: "wte.weight", positions: "wpe.weight", final_norm: "ln_f", blocks: "h", ..NAMES };

pub const FAMILY: Family = Family {
    name: "gpt2",
    architectures: &["GPT2LMHeadModel"],
    read,
    names: &[&NAMES, &BARE],
    ignored: &[
        "transformer.h.*.attn.bias",
        "transformer.h.*.attn.masked_bias",
        "h.*.attn.bias",
        "h.*.attn.masked_bias",
    ],
};

fn read(config: &Config) -> Result<Architecture> {
    for (key, usual) in [("scale_attn_weights", true), ("scale_attn_by_inverse_layer_idx", false)] {
        if config.bool_or(key, usual)? != usual {
            return Err(llama::refuse(config, format!("`{key}` = {} is not supported", !usual)));
        }
    }
    let (hidden, heads) = (config.usize("n_embd")?, config.usize("n_head")?);
    if heads == 0 || hidden % heads != 0 {
        return Err(llama::refuse(config, format!("`n_embd` {hidden} does not divide into {heads} heads")));
    }
    Ok(Architecture {
        family: FAMILY.name,
        hidden,
        layers: config.usize("n_layer")?,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        intermediate: config.opt_usize("n_inner")?.unwrap_or(4 * hidden),
        vocab: config.usize("vocab_size")?,
        max_positions: config.opt_usize("n_positions")?.unwrap_or(1024),
        tied: config.bool_or("tie_word_embeddings", true)?,
        norm: NormKind::Layer,
        norm_eps: config.opt_f64("layer_norm_epsilon")?.unwrap_or(1e-5),
        ropes: vec![Rope::OFF],
        rotary: hidden / heads,
        layer: vec![Layer::default()],
        activation: llama::activation(config, "activation_function", "gelu_new")?,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        layout: Layout::Columns,
        ..Architecture::default()
    })
}
