//! Mistral: Llama's decoder with a sliding window in the teacher.

use super::{Architecture, Family, llama};
use crate::checkpoint::config::Config;
use crate::error::{Error, Kind, Result};

pub const FAMILY: Family =
    Family { name: "mistral", architectures: &["MistralForCausalLM"], read, ignored: llama::FAMILY.ignored };

fn read(config: &Config) -> Result<Architecture> {
    let window = config.opt_usize("sliding_window")?;
    if window == Some(0) {
        let message = format!("{}: `sliding_window` is 0, which leaves a token nothing to see", config.file());
        return Err(Error::new(Kind::Config, message).hint("`null` stands for no window"));
    }
    Ok(Architecture {
        family: FAMILY.name,
        window,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        ..llama::read(config)?
    })
}
