//! Llama 1 to 3.x, SmolLM, TinyLlama, Yi and everything else that calls itself `LlamaForCausalLM`.

use super::{Activation, Architecture, Family, Layer, Names, rope};
use crate::checkpoint::config::Config;
use crate::error::{Error, Kind, Result};

pub const FAMILY: Family = Family {
    name: "llama",
    architectures: &["LlamaForCausalLM"],
    read,
    names: &[&Names::LLAMA],
    ignored: &["model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"],
};

fn read(config: &Config) -> Result<Architecture> {
    let attention_bias = config.bool_or("attention_bias", false)?;
    Ok(Architecture {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: config.bool_or("mlp_bias", false)?,
        ..base(config, 10_000.0)?
    })
}

/// What families in Llama's spelling have in common, without biases; `theta` is the rotation's where nothing says it.
pub(super) fn base(config: &Config, theta: f64) -> Result<Architecture> {
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
    let max_positions = config.opt_usize("max_position_embeddings")?.unwrap_or(2048);
    let rotary = rope::rotary(config, head_dim)?;
    Ok(Architecture {
        hidden,
        layers: config.usize("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        intermediate: config.usize("intermediate_size")?,
        vocab: config.usize("vocab_size")?,
        max_positions,
        tied: config.bool_or("tie_word_embeddings", false)?,
        norm_eps: config.opt_f64("rms_norm_eps")?.unwrap_or(1e-6),
        ropes: vec![rope::read(config, theta, max_positions, rotary)?],
        rotary,
        layer: vec![Layer::default()],
        activation: activation(config, "hidden_act", "silu")?,
        ..Architecture::default()
    })
}

/// The activation that `key` names.
pub(super) fn activation(config: &Config, key: &str, default: &str) -> Result<Activation> {
    let name = config.opt_str(key)?.unwrap_or(default);
    Activation::named(name).ok_or_else(|| {
        refuse(config, format!("`{key}` is `{name}`, which is not supported"))
            .hint("known: silu, gelu, gelu_new, gelu_pytorch_tanh")
    })
}

pub(super) fn refuse(config: &Config, what: String) -> Error {
    Error::new(Kind::Config, format!("{}: {what}", config.file()))
}
