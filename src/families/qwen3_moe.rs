//! Qwen3 with experts in its layers, all but those it names.

use super::{Architecture, Family, Layer, Names, llama, mixtral, windows};
use crate::checkpoint::config::Config;
use crate::error::Result;

pub const FAMILY: Family = Family {
    name: "qwen3_moe",
    architectures: &["Qwen3MoeForCausalLM"],
    read,
    names: &[&Names {
        router: "mlp.gate",
        experts: "mlp.experts",
        expert: ["gate_proj", "up_proj", "down_proj"],
        ..Names::WITH_HEAD_NORMS
    }],
    ignored: llama::FAMILY.ignored,
};

fn read(config: &Config) -> Result<Architecture> {
    let base = llama::base(config, 10_000.0)?;
    let window = if config.bool_or("use_sliding_window", false)? { windows::window(config)? } else { None };
    let dense = config.usizes("mlp_only_layers")?.unwrap_or_default();
    let every = config.opt_usize("decoder_sparse_step")?.unwrap_or(1).max(1);
    let sparse = |layer: usize| !dense.contains(&layer) && (layer + 1).is_multiple_of(every);
    let layers = windows::layers(config, base.layers, window, |_| true)?.into_iter().enumerate();
    let layer = layers.map(|(l, of)| Layer { sparse: sparse(l), ..of }).collect();
    let (count, width) = ("num_experts", config.usize("moe_intermediate_size")?);
    let count = if config.get(count).is_some() { count } else { "num_local_experts" };
    let bias = config.bool_or("attention_bias", false)?;
    Ok(Architecture {
        family: FAMILY.name,
        experts: Some(mixtral::experts(config, &base, count, width, config.bool_or("norm_topk_prob", false)?)?),
        layer,
        qkv_bias: bias,
        o_bias: bias,
        ..base
    })
}
