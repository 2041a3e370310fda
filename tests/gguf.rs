//! GGUF files by another reader of the format, and what is refused.

#[allow(dead_code)] // ids of its marks are for other tests
#[path = "common/byte_tokenizer.rs"]
mod byte_tokenizer;
#[allow(dead_code)] // the list of all is for other tests
#[path = "common/parity.rs"]
mod parity;
#[allow(dead_code)] // comparisons are for other tests
#[path = "common/random.rs"]
mod random;
#[allow(dead_code)] // opening models is for other tests
#[path = "common/tiny_model.rs"]
mod tiny_model;

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Tensor};
use margay::convert::export::Shape;
use margay::convert::export::formats::{self, Format};
use margay::convert::load::Model;
use margay::progress::Silent;
use serde_json::{Value as Json, json};

const SHAPE: Shape = Shape { dtype: None, max_shard_bytes: 1 << 30 };

fn write(model: &Path, out: &Path) -> margay::Result<()> {
    let model = Model::open(model.to_str().unwrap(), &Silent)?;
    formats::write(&model, Format::Gguf, &SHAPE, out, &Silent).map(drop)
}

/// A model of `fixtures/families` with changes of its `config.json` and the byte tokenizer.
fn model(case: &str, changes: Json) -> tempfile::TempDir {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/families/{case}.json"));
    let mut config = parity::case(&path)["config"].clone();
    config["vocab_size"] = json!(260);
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    let folder = tiny_model::folder(&config, &parity::weights(&config));
    std::fs::write(folder.path().join("tokenizer.json"), byte_tokenizer::byte_tokenizer().to_string()).unwrap();
    folder
}

#[test]
fn tensors_and_numbers_are_the_checkpoints() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama-tiny");
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("new/tiny.gguf");
    write(&source, &path).unwrap();
    let mut file = std::fs::File::open(&path).unwrap();
    let content = Content::read(&mut file).unwrap();
    assert_eq!(content.tensor_infos.len(), 4 * 9 + 2);
    let number = |key: &str| content.metadata[key].to_u32().unwrap();
    assert_eq!([number("llama.embedding_length"), number("llama.attention.head_count_kv")], [128, 2]);
    assert_eq!([number("tokenizer.ggml.bos_token_id"), number("tokenizer.ggml.eos_token_id")], [0, 1]);
    let texts = |key: &str| content.metadata[key].to_vec().unwrap().clone();
    assert_eq!(texts("tokenizer.ggml.tokens").len(), 1024);
    assert!(matches!(&texts("tokenizer.ggml.tokens")[1], Value::String(text) if text == "<|end|>"));

    let model = Model::open(source.to_str().unwrap(), &Silent).unwrap();
    let stored = |name: &str| model.checkpoint.tensor(name, DType::F32, &Device::Cpu).unwrap();
    let mut read = |name: &str| {
        let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        tensor.dequantize(&Device::Cpu).unwrap()
    };
    let same = |a: &Tensor, b: &Tensor| a.dims() == b.dims() && random::flat(a) == random::flat(b);
    for (ours, theirs) in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.2.mlp.up_proj.weight", "blk.2.ffn_up.weight"),
        ("model.layers.2.self_attn.v_proj.weight", "blk.2.attn_v.weight"),
        ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
    ] {
        assert!(same(&stored(ours), &read(theirs)), "{ours}");
    }
    // Channels of a head that turn together, 16 apart in the checkpoint, lie beside each other.
    let (q, paired) = (stored("model.layers.1.self_attn.q_proj.weight"), read("blk.1.attn_q.weight"));
    for (row, at) in [(0, 0), (16, 1), (1, 2), (17, 3), (32 + 31, 63)] {
        assert!(same(&q.get(row).unwrap(), &paired.get(at).unwrap()), "row {row}");
    }
}

#[test]
fn what_llama_cpp_computes_otherwise_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (case, changes, why) in [
        ("llama-dynamic", json!({}), "rotary frequencies scaled this way"),
        (
            "qwen2",
            json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64 } }),
            "rotary frequencies",
        ),
        ("smollm3", json!({}), "list of layers that do not turn"),
        ("gemma2", json!({}), "multipliers"),
        ("gemma2", json!({ "query_pre_attn_scalar": 12, "final_logit_softcapping": null }), "soft-caps"),
        ("qwen3_moe", json!({}), "dense layers among sparse"),
        ("qwen3_moe-raw", json!({ "decoder_sparse_step": 1 }), "weights do not sum to 1"),
        ("starcoder2-window", json!({}), "projection without a bias"),
        ("qwen3", json!({ "attention_bias": true }), "bias in some place"),
        ("olmo2", json!({ "head_dim": 12 }), "heads of another width"),
        ("llama", json!({ "hidden_act": "gelu" }), "nonlinearity"),
    ] {
        let error = write(model(case, changes).path(), &dir.path().join("no")).unwrap_err();
        assert!(error.message.contains(why), "{case}: {}", error.message);
        assert!(error.hint.is_some(), "{case}");
    }
    assert!(!dir.path().join("no").exists());
}

/// `--dtype`-less files keep the types of the checkpoint; the chat template and special tokens go along.
#[test]
fn instruct_models_keep_their_template() {
    let dir = tempfile::tempdir().unwrap();
    let source = model("qwen3", json!({ "pad_token_id": 7 }));
    let template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}";
    let settings = json!({ "chat_template": template, "eos_token": "</s>", "bos_token": null, "add_bos_token": false });
    std::fs::write(source.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    write(source.path(), &dir.path().join("folder")).unwrap();
    let content = Content::read(&mut std::fs::File::open(dir.path().join("folder/model.gguf")).unwrap()).unwrap();
    let value = |key: &str| &content.metadata[&format!("tokenizer.{key}")];
    assert_eq!(value("chat_template").to_string().unwrap(), template);
    assert_eq!(value("ggml.eos_token_id").to_u32().unwrap(), byte_tokenizer::EOS);
    assert_eq!(value("ggml.padding_token_id").to_u32().unwrap(), 7);
    assert!(!value("ggml.add_bos_token").to_bool().unwrap());
    // One untied head, q and k norms: every tensor of the checkpoint and no other.
    assert_eq!(content.tensor_infos.len(), 4 * 11 + 2);
}

/// A tokenizer that llama.cpp would follow in its own way is refused, and so is a model without one.
#[test]
fn tokenizers_that_llama_cpp_has_not_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = model("qwen2", json!({}));
    let file = source.path().join("tokenizer.json");
    let plain = byte_tokenizer::byte_tokenizer();
    let splits = |regex: &str| {
        json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false }] })
    };
    for (key, value, why) in [
        ("pre_tokenizer", splits(r"\w+"), "it splits text by"),
        ("pre_tokenizer", json!({ "type": "Whitespace" }), "in a way of its own"),
        ("normalizer", json!({ "type": "Lowercase" }), "in a way of its own"),
    ] {
        let mut other = plain.clone();
        other[key] = value;
        std::fs::write(&file, other.to_string()).unwrap();
        let error = write(source.path(), &dir.path().join("no")).unwrap_err();
        assert!(error.message.contains(why), "{}", error.message);
    }
    std::fs::remove_file(&file).unwrap();
    let error = write(source.path(), &dir.path().join("no")).unwrap_err();
    assert!(error.message.contains("no `tokenizer.json`"), "{}", error.message);
}

/// Text is split by the pattern of the tokenizer, whatever its file calls itself.
#[test]
fn splits_have_names() {
    let dir = tempfile::tempdir().unwrap();
    let source = model("qwen2", json!({}));
    let llama = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let qwen = llama.replace("{1,3}", "");
    let split = |regex: &str| json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false });
    let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": regex });
    let digits = json!({ "type": "Digits", "individual_digits": true });
    for (n, (steps, whole, name)) in [
        (vec![bytes(true)], false, "gpt-2"),
        (vec![digits, bytes(true)], false, "starcoder"),
        (vec![split(llama), bytes(false)], true, "llama-bpe"),
        (vec![split(llama), bytes(false)], false, "dbrx"),
        (vec![split(&qwen), bytes(false)], false, "qwen2"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut tokenizer = byte_tokenizer::byte_tokenizer();
        tokenizer["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": steps });
        tokenizer["model"]["ignore_merges"] = json!(whole);
        std::fs::write(source.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let path = dir.path().join(format!("{n}.gguf"));
        write(source.path(), &path).unwrap();
        let content = Content::read(&mut std::fs::File::open(&path).unwrap()).unwrap();
        assert_eq!(content.metadata["tokenizer.ggml.pre"].to_string().unwrap(), name);
    }
}
