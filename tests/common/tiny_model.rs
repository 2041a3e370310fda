//! Checkpoint folders of tiny random models.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use margay::checkpoint::Config;
use margay::convert::load::Model;
use margay::families;
use margay::model::Decoder;
use margay::progress::Silent;
use serde_json::{Value, json};

use crate::random::randn;

/// `config.json` of a 3-layer Llama with grouped keys, with `changes` put over it; `null` removes a key.
pub fn config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 100.0, "hidden_act": "silu",
        "tie_word_embeddings": false
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// Random values for every tensor that the family asks for, in f32.
pub fn weights(config: &Value) -> HashMap<String, Tensor> {
    let parsed = Config::parse(config.to_string().as_bytes(), "config.json").unwrap();
    let (_, architecture) = families::of(&parsed).unwrap();
    let tensors = architecture.tensors();
    let random = |(seed, (name, (_, shape))): (usize, (String, (families::Role, Vec<usize>)))| {
        let x = randn(&shape, seed as u64);
        let x = match shape.as_slice() {
            [_] if name.ends_with("norm.weight") => x.affine(0.1, 1.0),
            [_] => x.affine(0.3, 0.0), // a bias
            [_, inner, ..] => x.affine((*inner as f64).powf(-0.5), 0.0),
            [] => Ok(x),
        };
        (name, x.unwrap().to_dtype(DType::F32).unwrap())
    };
    tensors.into_iter().enumerate().map(random).collect()
}

/// A checkpoint folder of these.
pub fn folder(config: &Value, weights: &HashMap<String, Tensor>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    candle_core::safetensors::save(weights, dir.path().join("model.safetensors")).unwrap();
    dir
}

/// Opens a folder and reads its weights.
pub fn open(dir: &Path) -> margay::Result<(Model, Decoder)> {
    let model = Model::open(dir.to_str().unwrap(), &Silent)?;
    let decoder = model.decoder(&Device::Cpu, &Silent)?;
    Ok((model, decoder))
}
