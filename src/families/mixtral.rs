//! Mixtral: Mistral with experts in every layer.

use super::{Activation, Architecture, Experts, Family, Layer, Names, llama, windows};
use crate::checkpoint::config::Config;
use crate::error::Result;

pub const FAMILY: Family = Family {
    name: "mixtral",
    architectures: &["MixtralForCausalLM"],
    read,
    names: &[&Names {
        router: "block_sparse_moe.gate",
        experts: "block_sparse_moe.experts",
        expert: ["w1", "w3", "w2"],
        ..Names::LLAMA
    }],
    ignored: llama::FAMILY.ignored,
};

fn read(config: &Config) -> Result<Architecture> {
    let base = llama::base(config, 1_000_000.0)?;
    let layers = windows::layers(config, base.layers, windows::window(config)?, |_| true)?;
    Ok(Architecture {
        family: FAMILY.name,
        norm_eps: config.opt_f64("rms_norm_eps")?.unwrap_or(1e-5),
        experts: Some(experts(config, &base, "num_local_experts", base.intermediate, true)?),
        layer: layers.into_iter().map(|l| Layer { sparse: true, ..l }).collect(),
        ..base
    })
}

/// `count` is the key of their number.
pub(super) fn experts(
    config: &Config,
    base: &Architecture,
    count: &str,
    intermediate: usize,
    normalised: bool,
) -> Result<Experts> {
    if base.activation != Activation::Silu {
        return Err(llama::refuse(config, "experts are known with `hidden_act` = silu".into()));
    }
    let (used, count) = (config.usize("num_experts_per_tok")?, config.usize(count)?);
    if used == 0 || used > count {
        return Err(llama::refuse(config, format!("a token cannot go through {used} of {count} experts")));
    }
    Ok(Experts { count, used, intermediate, normalised })
}
