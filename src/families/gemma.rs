//! Gemma 2 and the text models of Gemma 3: norms on both sides of attention and MLP, scaled embeddings, layers that see a
//! window between layers that see everything; Gemma 2 bends scores and logits, Gemma 3 normalises queries and keys and
//! turns its local layers by another theta.

use super::{Architecture, Family, Layer, Names, NormKind, Rope, RopeScaling, llama, rope, windows};
use crate::checkpoint::config::Config;
use crate::error::Result;

const NORMS: [&str; 4] =
    ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"];

pub const GEMMA2: Family = Family {
    name: "gemma2",
    architectures: &["Gemma2ForCausalLM"],
    read: read_2,
    names: &[&Names { norms: NORMS, ..Names::LLAMA }],
    ignored: llama::FAMILY.ignored,
};

pub const GEMMA3: Family = Family {
    name: "gemma3_text",
    architectures: &["Gemma3ForCausalLM"],
    read: read_3,
    names: &[&Names { norms: NORMS, ..Names::WITH_HEAD_NORMS }],
    ignored: llama::FAMILY.ignored,
};

fn read_2(config: &Config) -> Result<Architecture> {
    let base = common(config, GEMMA2.name)?;
    let layer = windows::layers(config, base.layers, windows::window(config)?, |l| l.is_multiple_of(2))?;
    Ok(Architecture {
        softcap: config.opt_f64("attn_logit_softcapping")?,
        logit_softcap: config.opt_f64("final_logit_softcapping")?,
        layer,
        ..base
    })
}

fn read_3(config: &Config) -> Result<Architecture> {
    let base = common(config, GEMMA3.name)?;
    let every = config.opt_usize("sliding_window_pattern")?.unwrap_or(6).max(1);
    let layers = windows::layers(config, base.layers, windows::window(config)?, |l| !(l + 1).is_multiple_of(every))?;
    let layer = layers.into_iter().map(|l| Layer { rope: l.window.is_some() as usize, ..l }).collect();
    Ok(Architecture {
        softcap: config.opt_f64("attn_logit_softcapping")?,
        logit_softcap: config.opt_f64("final_logit_softcapping")?,
        ropes: ropes(config, &base)?,
        layer,
        ..base
    })
}

/// Of layers that see everything and of local ones: inside `rope_parameters` by the name of the layer, or as `rope_theta`
/// with `rope_scaling` and `rope_local_base_freq`.
fn ropes(config: &Config, base: &Architecture) -> Result<Vec<Rope>> {
    let newer = config.opt_object("rope_parameters")?;
    let of = |kind: &str, theta: f64| -> Result<Option<Rope>> {
        let Some(keys) = newer.as_ref().map(|all| all.opt_object(kind)).transpose()?.flatten() else { return Ok(None) };
        let scaling = rope::scaled(config, &keys, base.max_positions, base.rotary)?;
        Ok(Some(Rope { theta: keys.opt_f64("rope_theta")?.unwrap_or(theta), scaling }))
    };
    let global = match of("full_attention", 1e6)? {
        Some(rope) => rope,
        None => rope::read(config, 1e6, base.max_positions, base.rotary)?,
    };
    let local = match of("sliding_attention", 1e4)? {
        Some(rope) => rope,
        None => {
            let theta = config.opt_f64("rope_local_base_freq")?.unwrap_or(1e4);
            Rope { theta, scaling: RopeScaling::None }
        }
    };
    Ok(vec![global, local])
}

fn common(config: &Config, family: &'static str) -> Result<Architecture> {
    if config.bool_or("use_bidirectional_attention", false)? {
        return Err(llama::refuse(config, "`use_bidirectional_attention` is set: not a causal decoder".into()));
    }
    let base = llama::base(config, 10_000.0)?;
    let bias = config.bool_or("attention_bias", false)?;
    let key = if config.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    Ok(Architecture {
        family,
        tied: config.bool_or("tie_word_embeddings", true)?,
        norm: NormKind::RmsShifted,
        attention_scale: Some(config.opt_f64("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5)),
        activation: llama::activation(config, key, "gelu_pytorch_tanh")?,
        qkv_bias: bias,
        o_bias: bias,
        embedding_scale: (base.hidden as f64).sqrt(),
        ..base
    })
}
