//! Llama 1 to 3.x, SmolLM, TinyLlama and everything else that calls itself `LlamaForCausalLM`.

use super::{Architecture, Family, Rope, RopeScaling};
use crate::checkpoint::config::Config;
use crate::error::{Error, Kind, Result};

pub const FAMILY: Family = Family {
    name: "llama",
    architectures: &["LlamaForCausalLM"],
    read,
    ignored: &["model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"],
};

pub(super) fn read(config: &Config) -> Result<Architecture> {
    let (hidden, heads) = (config.usize("hidden_size")?, config.usize("num_attention_heads")?);
    let head_dim = match config.opt_usize("head_dim")? {
        Some(d) => d,
        None if heads > 0 && hidden % heads == 0 => hidden / heads,
        None => {
            return Err(refuse(config, format!("`hidden_size` {hidden} does not divide into {heads} heads"))
                .hint("give `head_dim` in config.json"));
        }
    };
    let kv_heads = config.opt_usize("num_key_value_heads")?.unwrap_or(heads);
    if kv_heads == 0 || heads % kv_heads != 0 {
        return Err(refuse(config, format!("{heads} query heads do not divide into {kv_heads} key/value heads")));
    }
    if head_dim == 0 || head_dim % 2 != 0 {
        return Err(refuse(config, format!("`head_dim` {head_dim} is not even, as rotary embedding needs")));
    }
    let activation = config.opt_str("hidden_act")?.unwrap_or("silu");
    if activation != "silu" {
        return Err(refuse(config, format!("`hidden_act` is `{activation}`; this family is known with `silu`")));
    }
    let attention_bias = config.bool_or("attention_bias", false)?;
    let max_positions = config.opt_usize("max_position_embeddings")?.unwrap_or(2048);
    Ok(Architecture {
        family: FAMILY.name,
        hidden,
        layers: config.usize("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        intermediate: config.usize("intermediate_size")?,
        vocab: config.usize("vocab_size")?,
        norm_eps: config.opt_f64("rms_norm_eps")?.unwrap_or(1e-6),
        rope: rope(config, max_positions)?,
        window: None,
        max_positions,
        tied: config.bool_or("tie_word_embeddings", false)?,
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: config.bool_or("mlp_bias", false)?,
    })
}

/// `rope_theta` and `rope_scaling`, or both inside `rope_parameters` as newer configurations write them.
fn rope(config: &Config, max_positions: usize) -> Result<Rope> {
    let newer = config.opt_object("rope_parameters")?;
    let theta = match &newer {
        Some(parameters) => parameters.opt_f64("rope_theta")?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => config.opt_f64("rope_theta")?.unwrap_or(10_000.0),
    };
    let scaling = match newer {
        Some(parameters) => Some(parameters),
        None => config.opt_object("rope_scaling")?,
    };
    let Some(keys) = scaling else { return Ok(Rope { theta, scaling: RopeScaling::None }) };
    let kind = match keys.opt_str("rope_type")? {
        Some(kind) => kind,
        None => keys.opt_str("type")?.unwrap_or("default"),
    };
    let factor = || match keys.f64("factor")? {
        factor if factor > 0.0 => Ok(factor),
        factor => Err(keys.wrong("factor", &factor.into(), "a number above 0")),
    };
    let original = keys.opt_usize("original_max_position_embeddings")?;
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => RopeScaling::Dynamic { factor: factor()?, original: original.unwrap_or(max_positions) },
        "llama3" => RopeScaling::Llama3 {
            factor: factor()?,
            low: keys.f64("low_freq_factor")?,
            high: keys.f64("high_freq_factor")?,
            original: keys.usize("original_max_position_embeddings")?,
        },
        other => {
            return Err(refuse(config, format!("rope scaling `{other}` is not supported"))
                .hint("known: default, linear, dynamic, llama3"));
        }
    };
    Ok(Rope { theta, scaling })
}

fn refuse(config: &Config, what: String) -> Error {
    Error::new(Kind::Config, format!("{}: {what}", config.file()))
}
