//! Rotary frequencies, plain and scaled, and the ways a `config.json` spells them.

use std::f64::consts::PI;

use crate::checkpoint::config::Config;
use crate::error::{Error, Kind, Result};

/// Rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// Changes to the frequencies for contexts longer than trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// All frequencies are 0: nothing turns (NoPE).
    Off,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Theta grows with the sequence once it is longer than `original` positions.
    Dynamic {
        factor: f64,
        original: usize,
    },
    /// Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1).
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: usize,
    },
    /// Channels that turn less than `slow` times in `original` positions divided by `factor`, those that turn more than
    /// `fast` times kept, a ramp between (YaRN, arXiv 2309.00071).
    Yarn {
        factor: f64,
        original: usize,
        fast: f64,
        slow: f64,
        /// Whether the ends of the ramp are whole channels.
        truncate: bool,
        magnitude: f64,
    },
    /// A divisor for each frequency, another one for sequences beyond `original` positions (LongRoPE, arXiv 2402.13753).
    Long {
        short: Vec<f64>,
        long: Vec<f64>,
        original: usize,
        magnitude: f64,
    },
}

impl Rope {
    /// No rotation at all.
    pub const OFF: Rope = Rope { theta: 1.0, scaling: RopeScaling::Off };

    /// Inverse frequencies [rotary / 2] of `rotary` channels for a sequence of `length` positions.
    pub fn inverse_frequencies(&self, rotary: usize, length: usize) -> Vec<f64> {
        let mut theta = self.theta;
        if let RopeScaling::Dynamic { factor, original } = self.scaling
            && length > original
        {
            let d = rotary as f64;
            let stretch = factor * length as f64 / original as f64 - (factor - 1.0);
            theta *= stretch.powf(d / (d - 2.0));
        }
        let plain = (0..rotary / 2).map(|i| theta.powf(-2.0 * i as f64 / rotary as f64));
        match &self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => plain.collect(),
            RopeScaling::Off => vec![0.0; rotary / 2],
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low, high, original } => plain
                .map(|f| {
                    let wavelength = 2.0 * PI / f;
                    let ratio = *original as f64 / wavelength;
                    let keep = ((ratio - low) / (high - low)).clamp(0.0, 1.0);
                    f * keep + f / factor * (1.0 - keep)
                })
                .collect(),
            RopeScaling::Yarn { factor, original, fast, slow, truncate, .. } => {
                let d = rotary as f64;
                // The channel pair that turns so many times in `original` positions.
                let pair = |turns: f64| d * (*original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
                let (low, high) = (pair(*fast), pair(*slow));
                let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(d - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                let keep = move |i: usize| 1.0 - ((i as f64 - low) / width).clamp(0.0, 1.0);
                plain.enumerate().map(|(i, f)| f * keep(i) + f / factor * (1.0 - keep(i))).collect()
            }
            RopeScaling::Long { short, long, original, .. } => {
                let divisors = if length > *original { long } else { short };
                plain.zip(divisors).map(|(f, divisor)| f / divisor).collect()
            }
        }
    }

    /// What cosines and sines are multiplied by, so that rotated queries and keys carry it.
    pub fn magnitude(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { magnitude, .. } | RopeScaling::Long { magnitude, .. } => magnitude,
            _ => 1.0,
        }
    }

    /// Whether the frequencies depend on the length of the sequence.
    pub fn grows(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. } | RopeScaling::Long { .. })
    }
}

impl std::fmt::Display for RopeScaling {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            RopeScaling::None => f.write_str("not scaled"),
            RopeScaling::Off => f.write_str("off"),
            RopeScaling::Linear { factor } => write!(f, "linear x {factor}"),
            RopeScaling::Dynamic { factor, original } => write!(f, "dynamic x {factor} beyond {original}"),
            RopeScaling::Llama3 { factor, low, high, original } => {
                write!(f, "llama3 x {factor} beyond {original}, ramp {low} to {high}")
            }
            RopeScaling::Yarn { factor, original, .. } => write!(f, "yarn x {factor} beyond {original}"),
            RopeScaling::Long { original, .. } => write!(f, "longrope beyond {original}"),
        }
    }
}

/// The rotation of a model whose layers share one: `rope_theta` (`theta` where there is none) and `rope_scaling`, or both
/// inside `rope_parameters` as newer configurations write them.
pub(super) fn read(config: &Config, theta: f64, max_positions: usize, rotary: usize) -> Result<Rope> {
    let newer = config.opt_object("rope_parameters")?;
    let theta = match &newer {
        Some(parameters) => parameters.opt_f64("rope_theta")?,
        None => None,
    }
    .map_or_else(|| Ok(config.opt_f64("rope_theta")?.unwrap_or(theta)), Ok::<f64, Error>)?;
    let scaling = match newer {
        Some(parameters) => Some(parameters),
        None => config.opt_object("rope_scaling")?,
    };
    let scaling = scaling.map_or(Ok(RopeScaling::None), |keys| scaled(config, &keys, max_positions, rotary))?;
    Ok(Rope { theta, scaling })
}

/// Channels of each head that turn: a share of `head_dim`, by default all.
pub(super) fn rotary(config: &Config, head_dim: usize) -> Result<usize> {
    let newer = config.opt_object("rope_parameters")?;
    let share = newer.map(|keys| keys.opt_f64("partial_rotary_factor")).transpose()?.flatten();
    let share = match share {
        Some(share) => share,
        None => match config.opt_f64("partial_rotary_factor")? {
            Some(share) => share,
            None => config.opt_f64("rotary_pct")?.unwrap_or(1.0),
        },
    };
    let rotary = (head_dim as f64 * share) as usize;
    if rotary == 0 || rotary > head_dim || !rotary.is_multiple_of(2) {
        let text = format!("{rotary} of {head_dim} channels would turn, which is no even number between");
        return Err(Error::new(Kind::Config, format!("{}: {text}", config.file()))
            .hint("check `partial_rotary_factor` and `head_dim`"));
    }
    Ok(rotary)
}

/// What the keys of `rope_scaling` or `rope_parameters` say.
pub(super) fn scaled(config: &Config, keys: &Config, max_positions: usize, rotary: usize) -> Result<RopeScaling> {
    let kind = match keys.opt_str("rope_type")? {
        Some(kind) => kind,
        None => keys.opt_str("type")?.unwrap_or("default"),
    };
    let above_0 = |key: &str, value: f64| match value > 0.0 {
        true => Ok(value),
        false => Err(keys.wrong(key, &value.into(), "a number above 0")),
    };
    let factor = || above_0("factor", keys.f64("factor")?);
    // Phi-3 has it beside the scaling, where it has precedence.
    let original = match config.opt_usize("original_max_position_embeddings")? {
        Some(outside) => Some(outside),
        None => keys.opt_usize("original_max_position_embeddings")?,
    };
    let stretch = |original: usize| match keys.opt_f64("factor")? {
        Some(factor) => above_0("factor", factor),
        None => Ok(max_positions as f64 / original as f64),
    };
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => RopeScaling::Dynamic { factor: factor()?, original: max_positions },
        "llama3" => RopeScaling::Llama3 {
            factor: factor()?,
            low: keys.f64("low_freq_factor")?,
            high: keys.f64("high_freq_factor")?,
            original: keys.usize("original_max_position_embeddings")?,
        },
        "yarn" => {
            let original = original.unwrap_or(max_positions);
            let factor = stretch(original)?;
            let grown = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
            let positive = |key| Ok::<_, Error>(keys.opt_f64(key)?.filter(|x| *x != 0.0));
            let magnitude = match (keys.opt_f64("attention_factor")?, positive("mscale")?, positive("mscale_all_dim")?)
            {
                (Some(given), ..) => given,
                (None, Some(above), Some(below)) => grown(above) / grown(below),
                _ => grown(1.0),
            };
            RopeScaling::Yarn {
                factor,
                original,
                fast: positive("beta_fast")?.unwrap_or(32.0),
                slow: positive("beta_slow")?.unwrap_or(1.0),
                truncate: keys.bool_or("truncate", true)?,
                magnitude,
            }
        }
        "longrope" | "su" => {
            let original = original.unwrap_or(max_positions);
            let factor = stretch(original)?;
            let magnitude = match keys.opt_f64("attention_factor")? {
                Some(given) => given,
                None if factor <= 1.0 => 1.0,
                None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
            };
            let divisors = |key: &str| match keys.f64s(key)? {
                list if list.len() == rotary / 2 && list.iter().all(|x| *x > 0.0) => Ok(list),
                list => Err(keys.wrong(key, &list.into(), &format!("{} numbers above 0", rotary / 2))),
            };
            RopeScaling::Long { short: divisors("short_factor")?, long: divisors("long_factor")?, original, magnitude }
        }
        other => {
            return Err(Error::new(
                Kind::Config,
                format!("{}: rope scaling `{other}` is not supported", config.file()),
            )
            .hint("known: default, linear, dynamic, llama3, yarn, longrope"));
        }
    })
}
