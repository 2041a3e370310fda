//! SmolLM3: Llama's decoder, some of whose layers do not turn queries and keys.

use super::{Architecture, Family, Layer, Names, Rope, llama, windows};
use crate::checkpoint::config::Config;
use crate::error::Result;

pub const FAMILY: Family = Family {
    name: "smollm3",
    architectures: &["SmolLM3ForCausalLM"],
    read,
    names: &[&Names::LLAMA],
    ignored: llama::FAMILY.ignored,
};

fn read(config: &Config) -> Result<Architecture> {
    let mut base = llama::base(config, 2_000_000.0)?;
    let count = base.layers;
    let every = config.opt_usize("no_rope_layer_interval")?.unwrap_or(4).max(1);
    let turns = match config.usizes("no_rope_layers")? {
        Some(list) if list.len() == count => list.iter().map(|on| *on != 0).collect(),
        Some(list) => {
            return Err(llama::refuse(
                config,
                format!("`no_rope_layers` has {} entries for {count} layers", list.len()),
            ));
        }
        None => (0..count).map(|l| !(l + 1).is_multiple_of(every)).collect::<Vec<_>>(),
    };
    let window = if config.bool_or("use_sliding_window", false)? { windows::window(config)? } else { None };
    let layers = windows::layers(config, count, window, |layer| !turns[layer])?;
    let layer = layers.into_iter().zip(&turns).map(|(l, turns)| Layer { rope: !turns as usize, ..l }).collect();
    base.ropes.push(Rope::OFF);
    let bias = config.bool_or("attention_bias", false)?;
    Ok(Architecture {
        family: FAMILY.name,
        tied: config.bool_or("tie_word_embeddings", true)?,
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: config.bool_or("mlp_bias", false)?,
        layer,
        ..base
    })
}
