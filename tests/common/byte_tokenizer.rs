//! A tokenizer small enough to count by hand: one token a byte.

use serde_json::{Map, Value, json};

pub const BOS: u32 = 256;
pub const EOS: u32 = 257;

/// `tokenizer.json` of a byte tokenizer (id = byte, 256 `<s>`, 257 `</s>`) whose post-processor adds `<s>`.
pub fn byte_tokenizer() -> Value {
    // The byte-level alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on.
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0x100..;
    let mut letter = |b: u32| char::from_u32(if printable(b) { b } else { others.next().unwrap() }).unwrap();
    let vocab: Map<String, Value> = (0..256).map(|b| (letter(b).to_string(), json!(b))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": [special(BOS, "<s>"), special(EOS, "</s>")], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}
