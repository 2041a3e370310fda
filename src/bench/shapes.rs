//! Shapes of published models, by name.

use crate::checkpoint::config::Config;
use crate::error::{Error, Kind, Result, closest};
use crate::families::{self, Architecture};

/// Names and the parts of their `config.json` that shape the decoder.
const SHAPES: &[(&str, &str)] = &[
    (
        "llama-3.2-1b",
        r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
            "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
            "tie_word_embeddings": true}"#,
    ),
    (
        "llama-3.1-8b",
        r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
            "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
            "tie_word_embeddings": false}"#,
    ),
    (
        "mistral-7b",
        r#"{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
            "vocab_size": 32000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 32768,
            "sliding_window": 4096, "tie_word_embeddings": false}"#,
    ),
    (
        "tinyllama-1.1b",
        r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22,
            "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632, "vocab_size": 32000,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": false}"#,
    ),
    (
        "qwen2.5-7b",
        r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": false}"#,
    ),
    (
        "qwen3-8b",
        r#"{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
            "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 40960,
            "attention_bias": false, "tie_word_embeddings": false}"#,
    ),
    (
        "hidden-512",
        r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1376, "vocab_size": 8192,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": true}"#,
    ),
];

/// All names.
pub fn names() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|(name, _)| *name)
}

/// The architecture of a name.
pub fn architecture(name: &str) -> Result<Architecture> {
    let Some((_, json)) = SHAPES.iter().find(|(known, _)| *known == name) else {
        let hint = match closest(name, names()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known: {}", names().collect::<Vec<_>>().join(", ")),
        };
        return Err(Error::new(Kind::Usage, format!("no shape is called `{name}`")).hint(hint));
    };
    Ok(families::of(&Config::parse(json.as_bytes(), name)?)?.1)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_shape_is_read() {
        for (name, billions) in [
            ("llama-3.1-8b", 6.98),
            ("llama-3.2-1b", 0.973),
            ("mistral-7b", 6.98),
            ("qwen2.5-7b", 6.53),
            ("qwen3-8b", 6.95),
        ] {
            let a = super::architecture(name).unwrap();
            let blocks = (a.layers * a.block_parameters()) as f64 / 1e9;
            assert!((blocks / billions - 1.0).abs() < 0.01, "{name}: {blocks} billion parameters in its blocks");
        }
        super::names().for_each(|name| assert!(super::architecture(name).is_ok(), "{name}"));
        assert!(super::architecture("llama-3.1-8").unwrap_err().to_string().contains("llama-3.1-8"));
    }
}
