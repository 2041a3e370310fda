//! Which layers of the teacher see a window of keys, and how wide it is.

use super::Layer;
use crate::checkpoint::config::Config;
use crate::error::{Error, Kind, Result};

/// `sliding_window`, which 0 is refused for.
pub(super) fn window(config: &Config) -> Result<Option<usize>> {
    match config.opt_usize("sliding_window")? {
        Some(0) => {
            let message = format!("{}: `sliding_window` is 0, which leaves a token nothing to see", config.file());
            Err(Error::new(Kind::Config, message).hint("`null` stands for no window"))
        }
        window => Ok(window),
    }
}

/// The `count` layers: `window` in those that `layer_types` names sliding, or where that is not there in those that are
/// `local`.
pub(super) fn layers(
    config: &Config,
    count: usize,
    window: Option<usize>,
    local: impl Fn(usize) -> bool,
) -> Result<Vec<Layer>> {
    let wrong = |found: &str| config.wrong("layer_types", &found.into(), "sliding_attention or full_attention");
    let sliding: Vec<bool> = match config.strings("layer_types")? {
        Some(types) if types.len() != count => {
            let message = format!("{}: `layer_types` has {} entries for {count} layers", config.file(), types.len());
            return Err(Error::new(Kind::Config, message));
        }
        Some(types) => types
            .into_iter()
            .map(|kind| match kind {
                "sliding_attention" => Ok(true),
                "full_attention" => Ok(false),
                other => Err(wrong(other)),
            })
            .collect::<Result<_>>()?,
        None => (0..count).map(local).collect(),
    };
    Ok(sliding.into_iter().map(|on| Layer { window: window.filter(|_| on), ..Layer::default() }).collect())
}
