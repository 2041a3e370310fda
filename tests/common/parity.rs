//! Tiny random models of every family with logits of Hugging Face transformers (`fixtures/families`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use margay::checkpoint::Config;
use margay::families::{self, Role};
use serde_json::Value;

/// Every fixture by name, in order.
pub fn cases() -> Vec<(String, PathBuf)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = files.map(|path| (path.file_stem().unwrap().to_str().unwrap().to_string(), path)).collect();
    found.sort();
    found
}

/// A fixture.
pub fn case(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The weights of a `config.json`: `values` of every tensor's name and shape, as `fixtures/families.py` makes them.
pub fn weights(config: &Value) -> HashMap<String, Tensor> {
    let parsed = Config::parse(config.to_string().as_bytes(), "config.json").unwrap();
    let (_, architecture) = families::of(&parsed).unwrap();
    let tensors = architecture.tensors().into_iter();
    tensors.map(|(name, (_, shape)): (String, (Role, _))| (name.clone(), values(&name, &shape))).collect()
}

/// Uniform in ±1 by splitmix64 of the name's FNV-1a hash and the place; scaled by what the tensor is for.
fn values(name: &str, shape: &[usize]) -> Tensor {
    let seed = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325, |seed: u64, byte| (seed ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3));
    let noise = |i: usize| {
        let mut z = seed.wrapping_add(i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let (size, centre) = match shape {
        [_] if name.ends_with("bias") => (0.3, 0.0),
        [_] => (0.3, 1.0),
        [.., inner] => ((3.0 / *inner as f32).sqrt(), 0.0),
        [] => (1.0, 0.0),
    };
    let cells = (0..shape.iter().product()).map(|i| size * noise(i) + centre);
    Tensor::from_iter(cells, &Device::Cpu).unwrap().reshape(shape).unwrap()
}
