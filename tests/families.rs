//! The decoder against reference logits and against its own definition, and what is refused.

#[path = "common/random.rs"]
mod random;
#[path = "common/tiny_model.rs"]
mod tiny_model;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use margay::checkpoint::Config;
use margay::error::{Error, Kind};
use margay::evaluate::Subject;
use margay::families::{self, Rope, RopeScaling};
use margay::generate::{Continuation, Sampler, generate};
use margay::model::{Decoder, Net};
use margay::ops::head_loss::{Target, measure};
use random::{close, close_slices, flat, randn};
use serde_json::{Value, json};

const CPU: Device = Device::Cpu;

fn ids(list: &[u32]) -> Tensor {
    Tensor::new(list, &CPU).unwrap().unsqueeze(0).unwrap()
}

/// Logits [T, V] of whole sequences.
fn logits(decoder: &Decoder, net: &Net, tokens: &[u32]) -> Tensor {
    decoder.logits(&decoder.hidden(&ids(tokens), net).unwrap(), net).unwrap().squeeze(0).unwrap()
}

/// Logits, greedy continuation by recurrent decoding and mean loss of a `reference.json`, all made in float64.
fn matches_reference(folder: &Path) {
    let text = std::fs::read_to_string(folder.join("reference.json")).unwrap();
    let wanted: Value = serde_json::from_str(&text).unwrap();
    let list = |key: &str| -> Vec<u32> {
        wanted[key].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
    };
    let (model, decoder) = tiny_model::open(folder).unwrap();
    let net = model.net(&CPU).unwrap();
    let prompt = list("input_ids");

    let all = logits(&decoder, &net, &prompt);
    let last = flat(&all.narrow(0, prompt.len() - 1, 1).unwrap());
    let first16: Vec<f64> =
        wanted["prompt_last_logits_first16"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    close_slices("logits", &last[..16], &first16, 2e-5);
    for top in wanted["prompt_last_top5"].as_array().unwrap() {
        let (id, value) = (top[0].as_u64().unwrap() as usize, top[1].as_f64().unwrap());
        assert!((last[id] - value).abs() < 2e-4, "logit {id} is {}, not {value}", last[id]);
    }
    let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
    assert_eq!(best as u64, wanted["prompt_last_top5"][0][0].as_u64().unwrap());

    let greedy = list("greedy_new_ids");
    let mut new = Vec::new();
    let subject = Subject { decoder: &decoder, net: &net };
    generate(subject, &prompt, &mut Sampler::greedy(), greedy.len(), &[], |id| {
        new.push(id);
        Ok(true)
    })
    .unwrap();
    assert_eq!(new, greedy);

    // Read and written by turns: the last token of a turn is read with the next.
    let (mut continuation, mut turns) = (Continuation::new(subject, greedy.len()), Vec::new());
    for (read, write) in [(&prompt[..], 3), (&greedy[3..5], greedy.len() - 5)] {
        turns.extend_from_slice(if turns.is_empty() { &[] } else { read });
        assert!(continuation.fits(read.len() + write));
        let each = |id| {
            turns.push(id);
            Ok(true)
        };
        continuation.generate(read, &mut Sampler::greedy(), write, &[], each).unwrap();
    }
    assert_eq!(turns, greedy);

    let tokens = list("eval_ids");
    let hidden = decoder.hidden(&ids(&tokens[..tokens.len() - 1]), &net).unwrap().squeeze(0).unwrap();
    let next = Tensor::new(&tokens[1..], &CPU).unwrap();
    let target = Target {
        tokens: &next,
        mask: None,
        teacher: None,
        teacher_head: None,
        ce_weight: 1.0,
        kl_weight: 0.0,
        kl: margay::recipe::Kl::default(),
    };
    let sums = measure(&hidden, decoder.head(None).unwrap(), &target).unwrap();
    assert!((sums.nll / sums.rows - wanted["eval_mean_nll"].as_f64().unwrap()).abs() < 1e-5);
}

#[test]
fn llama_tiny_matches_its_reference() {
    matches_reference(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama-tiny"));
}

#[test]
fn stories260k_matches_its_reference() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/models/stories260k");
    if !folder.exists() {
        eprintln!("skipped: stories260k is not beside this checkout");
        return;
    }
    matches_reference(&folder);
}

/// The decoder as loops over f64, written from the papers: logits [T V].
struct Definition<'a> {
    config: &'a Value,
    weights: &'a HashMap<String, Tensor>,
}

impl Definition<'_> {
    fn number(&self, key: &str) -> Option<usize> {
        self.config[key].as_u64().map(|n| n as usize)
    }

    /// Inverse frequencies for `length` positions.
    fn frequencies(&self, dim: usize, length: usize) -> Vec<f64> {
        let nested = &self.config["rope_parameters"];
        let scaling = if nested.is_object() { nested } else { &self.config["rope_scaling"] };
        let theta = nested["rope_theta"].as_f64().or(self.config["rope_theta"].as_f64()).unwrap_or(10_000.0);
        let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default");
        let number = |key: &str| scaling[key].as_f64().unwrap();
        let plain = |theta: f64| (0..dim / 2).map(move |i| 1.0 / theta.powf((2 * i) as f64 / dim as f64));
        match kind {
            "linear" => plain(theta).map(|f| f / number("factor")).collect(),
            "dynamic" => {
                let longest = self.number("max_position_embeddings").unwrap() as f64;
                let length = (length as f64).max(longest);
                let grown = number("factor") * length / longest - (number("factor") - 1.0);
                plain(theta * grown.powf(dim as f64 / (dim as f64 - 2.0))).collect()
            }
            "llama3" => {
                let original = number("original_max_position_embeddings");
                let (low, high, factor) = (number("low_freq_factor"), number("high_freq_factor"), number("factor"));
                let scaled = plain(theta).map(|f| match std::f64::consts::TAU / f {
                    wave if wave < original / high => f,
                    wave if wave > original / low => f / factor,
                    wave => {
                        let smooth = (original / wave - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                });
                scaled.collect()
            }
            _ => plain(theta).collect(),
        }
    }

    fn linear(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let weight = flat(&self.weights[&format!("{name}.weight")]);
        let bias = self.weights.get(&format!("{name}.bias")).map(flat);
        let apply = |x: &Vec<f64>| {
            let rows = weight.chunks(x.len()).enumerate();
            rows.map(|(o, w)| dot(w, x) + bias.as_ref().map_or(0.0, |b| b[o])).collect()
        };
        x.iter().map(apply).collect()
    }

    fn norm(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let weight = flat(&self.weights[name]);
        let eps = self.config["rms_norm_eps"].as_f64().unwrap();
        let apply = |x: &Vec<f64>| {
            let size = (dot(x, x) / x.len() as f64 + eps).sqrt();
            x.iter().zip(&weight).map(|(x, w)| x / size * w).collect()
        };
        x.iter().map(apply).collect()
    }

    fn logits(&self, tokens: &[u32]) -> Vec<f64> {
        let (hidden, heads) = (self.number("hidden_size").unwrap(), self.number("num_attention_heads").unwrap());
        let kv_heads = self.number("num_key_value_heads").unwrap_or(heads);
        let dim = self.number("head_dim").unwrap_or(hidden / heads);
        let window = self.number("sliding_window").unwrap_or(usize::MAX);
        let frequencies = self.frequencies(dim, tokens.len());
        let head = if self.config["tie_word_embeddings"] == true { "model.embed_tokens" } else { "lm_head" };
        let table = flat(&self.weights["model.embed_tokens.weight"]);
        let mut x: Vec<Vec<f64>> = tokens.iter().map(|t| table[*t as usize * hidden..][..hidden].to_vec()).collect();
        for layer in 0..self.number("num_hidden_layers").unwrap() {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let inner = self.norm(&x, &name("input_layernorm.weight"));
            let part = |p: &str| self.linear(&inner, &name(&format!("self_attn.{p}_proj")));
            let (mut q, mut k, v) = (part("q"), part("k"), part("v"));
            for rows in [&mut q, &mut k] {
                for (t, row) in rows.iter_mut().enumerate() {
                    row.chunks_mut(dim).for_each(|head| turn(head, t, &frequencies));
                }
            }
            let mut y = vec![Vec::new(); tokens.len()];
            for (i, y) in y.iter_mut().enumerate() {
                for h in 0..heads {
                    let of = |x: &Vec<f64>, head: usize| x[head * dim..][..dim].to_vec();
                    let group = h * kv_heads / heads;
                    let seen = (i + 1).saturating_sub(window)..=i;
                    let weigh = |j| (dot(&of(&q[i], h), &of(&k[j], group)) / (dim as f64).sqrt()).exp();
                    let weights: Vec<f64> = seen.clone().map(weigh).collect();
                    let total: f64 = weights.iter().sum();
                    let value = |d| seen.clone().zip(&weights).map(|(j, w)| w / total * of(&v[j], group)[d]).sum();
                    y.extend((0..dim).map(value).collect::<Vec<f64>>());
                }
            }
            add(&mut x, &self.linear(&y, &name("self_attn.o_proj")));
            let inner = self.norm(&x, &name("post_attention_layernorm.weight"));
            let (gate, up) = (self.linear(&inner, &name("mlp.gate_proj")), self.linear(&inner, &name("mlp.up_proj")));
            let gated = gate.iter().zip(&up);
            let gated: Vec<Vec<f64>> =
                gated.map(|(g, u)| g.iter().zip(u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()).collect();
            add(&mut x, &self.linear(&gated, &name("mlp.down_proj")));
        }
        self.linear(&self.norm(&x, "model.norm.weight"), head).concat()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [Vec<f64>], change: &[Vec<f64>]) {
    x.iter_mut().zip(change).for_each(|(x, c)| x.iter_mut().zip(c).for_each(|(x, c)| *x += c));
}

fn turn(head: &mut [f64], position: usize, frequencies: &[f64]) {
    let half = frequencies.len();
    for (d, frequency) in frequencies.iter().enumerate() {
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        (head[d], head[d + half]) = (head[d] * cos - head[d + half] * sin, head[d + half] * cos + head[d] * sin);
    }
}

const TOKENS: [u32; 24] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9, 7, 9, 39, 0, 3, 8, 4, 6, 2, 6, 4, 3];

#[test]
fn every_setting_of_the_decoder_equals_its_definition() {
    let mistral = |window| {
        let mut config = json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral"});
        config["sliding_window"] = window;
        config
    };
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    // Tensors beside those of a plain model: one head, and per layer seven projections, two norms and the biases.
    let cases = [
        ("grouped keys", json!({}), 0),
        ("a key head each", json!({"num_key_value_heads": 4}), 0),
        ("one key head", json!({"num_key_value_heads": 1}), 0),
        ("head count by default", json!({"num_key_value_heads": null}), 0),
        ("head_dim beyond hidden / heads", json!({"head_dim": 12}), 0),
        ("head_dim below hidden / heads", json!({"head_dim": 4}), 0),
        ("attention biases", json!({"attention_bias": true}), 4 * 3),
        ("all biases", json!({"attention_bias": true, "mlp_bias": true}), 7 * 3),
        ("tied", json!({"tie_word_embeddings": true}), -1),
        ("llama3 rope", json!({"rope_scaling": llama3.clone(), "rope_theta": 500.0}), 0),
        ("linear rope", json!({"rope_scaling": {"type": "linear", "factor": 4.0}}), 0),
        (
            "dynamic rope",
            json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}),
            0,
        ),
        ("no scaling", json!({"rope_scaling": null, "rope_theta": null}), 0),
        (
            "newer spelling",
            json!({"rope_theta": null, "rope_parameters": {"rope_theta": 30.0, "rope_type": "default"}}),
            0,
        ),
        ("newer spelling, llama3", json!({"rope_theta": 77.0, "rope_parameters": llama3}), 0),
        ("mistral", mistral(json!(5)), 0),
        ("mistral without a window", mistral(Value::Null), 0),
    ];
    for (what, changes, more) in cases {
        let config = tiny_model::config(changes);
        let weights = tiny_model::weights(&config);
        assert_eq!(weights.len() as i64, 3 + 3 * 9 + more, "{what}");
        let folder = tiny_model::folder(&config, &weights);
        let (model, decoder) = tiny_model::open(folder.path()).unwrap();
        let net = Net::teacher(model.architecture());
        let y = logits(&decoder, &net, &TOKENS);
        let wanted = Definition { config: &config, weights: &weights }.logits(&TOKENS);
        close_slices(what, &flat(&y), &wanted, 2e-5);

        if model.architecture().ropes[0].grows() {
            continue; // whose earlier keys keep the frequencies of their time when decoding
        }
        let mut states = net.states();
        let mut parts = Vec::new();
        for piece in [&TOKENS[..9], &TOKENS[9..10], &TOKENS[10..21], &TOKENS[21..22], &TOKENS[22..]] {
            let hidden = decoder.extend(&ids(piece), &net, &mut states).unwrap();
            parts.push(decoder.logits(&hidden, &net).unwrap().squeeze(0).unwrap());
        }
        close(&format!("{what}, decoded in pieces"), &Tensor::cat(&parts, 0).unwrap(), &y, 2e-5);
    }
}

#[test]
fn decoding_keeps_no_graph() {
    let config = tiny_model::config(json!({}));
    let folder = tiny_model::folder(&config, &tiny_model::weights(&config));
    let (model, decoder) = tiny_model::open(folder.path()).unwrap();
    let design = margay::mixers::lolcats::Config { window: 2, ..Default::default() };
    let net = margay::convert::swap::swap(model.architecture(), &design, &[0, 2], 0, &CPU).unwrap();
    assert!(!decoder.hidden(&ids(&TOKENS), &net).unwrap().track_op());
    let mut states = net.states();
    for piece in TOKENS.chunks(5) {
        assert!(!decoder.extend(&ids(piece), &net, &mut states).unwrap().track_op());
        assert!(states.iter().flat_map(|s| s.tensors.values()).all(|t| !t.track_op()));
    }
    assert!(states[0].tensors.contains_key("s"), "the window has been left");
}

#[test]
fn the_window_of_the_teacher_hides_what_lies_before_it() {
    let window = |n: Value| {
        tiny_model::config(
            json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": n}),
        )
    };
    let weights = tiny_model::weights(&window(json!(5)));
    let run = |n: Value| {
        let folder = tiny_model::folder(&window(n), &weights);
        let (model, decoder) = tiny_model::open(folder.path()).unwrap();
        flat(&logits(&decoder, &Net::teacher(model.architecture()), &TOKENS))
    };
    let (narrow, open) = (run(json!(5)), run(Value::Null));
    assert_eq!(narrow[..5 * 40], open[..5 * 40]);
    assert!((5..TOKENS.len()).all(|t| narrow[t * 40..][..40] != open[t * 40..][..40]));
    assert_eq!(run(json!(1000)), open);
}

#[test]
fn tied_embeddings_in_both_spellings() {
    let config = tiny_model::config(json!({"tie_word_embeddings": true}));
    let weights = tiny_model::weights(&config);
    let (embedding, head) = ("model.embed_tokens.weight".to_string(), "lm_head.weight".to_string());
    let mut as_head = weights.clone();
    let table = as_head.remove(&embedding).unwrap();
    as_head.insert(head.clone(), table.clone());
    let mut both = weights.clone();
    both.insert(head.clone(), table);
    let run = |weights: &HashMap<String, Tensor>| {
        let folder = tiny_model::folder(&config, weights);
        let (model, decoder) = tiny_model::open(folder.path()).unwrap();
        assert_eq!(model.description.claims.len(), weights.len());
        flat(&logits(&decoder, &Net::teacher(model.architecture()), &TOKENS))
    };
    let wanted = run(&weights);
    assert_eq!(run(&as_head), wanted);
    assert_eq!(run(&both), wanted);

    // Without the tie both are needed.
    let untied = tiny_model::config(json!({}));
    for missing in [embedding, head] {
        let mut weights = tiny_model::weights(&untied);
        weights.remove(&missing);
        let error = refused(&untied, &weights);
        assert!(error.message.contains(&format!("`{missing}` is missing")), "{error}");
    }
}

/// Llama 3.2 1B, linear by 4, and dynamic by 2 over 2048 positions. The literals are the output of
///
/// ```python
/// import math
/// inv = lambda theta, d: [theta ** (-2 * i / d) for i in range(d // 2)]
/// def llama3(f, factor, low, high, original):
///     wave = 2 * math.pi / f
///     if wave < original / high: return f
///     if wave > original / low: return f / factor
///     s = (original / wave - low) / (high - low)
///     return (1 - s) * f / factor + s * f
/// print([[llama3(f, 32.0, 1.0, 4.0, 8192) for f in inv(500000.0, 64)][i] for i in (0, 9, 15, 16, 17, 18, 31)])
/// print([f / 4.0 for f in inv(10000.0, 8)])
/// grown = lambda length: 10000.0 * (2.0 * length / 2048 - 1.0) ** (8 / 6)
/// print(inv(10000.0, 8)); print(inv(grown(2049), 8)); print(inv(grown(8192), 8))
/// ```
#[test]
fn scaled_frequencies() {
    let llama3 = RopeScaling::Llama3 { factor: 32.0, low: 1.0, high: 4.0, original: 8192 };
    let all = Rope { theta: 500_000.0, scaling: llama3 }.inverse_frequencies(64, 10);
    let picked = [0, 9, 15, 16, 17, 18, 31].map(|i| all[i]);
    let wanted = [
        1.0,
        0.024_955_408_670_558_694,
        0.001_290_547_928_209_264,
        0.000_429_556_796_559_368_15,
        9.708_287_802_627_67e-5,
        1.946_163_818_483_112_5e-5,
        9.418_306_725_434_91e-8,
    ];
    for (i, (got, wanted)) in picked.iter().zip(wanted).enumerate() {
        assert!((got / wanted - 1.0).abs() < 1e-12, "{i}: {got} is not {wanted}");
    }
    let of = |scaling, length| Rope { theta: 10_000.0, scaling }.inverse_frequencies(8, length);
    close_slices("linear", &of(RopeScaling::Linear { factor: 4.0 }, 99), &[0.25, 0.025, 0.0025, 0.00025], 1e-12);
    let dynamic = |length| of(RopeScaling::Dynamic { factor: 2.0, original: 2048 }, length);
    close_slices("dynamic, not yet grown", &dynamic(2048), &[1.0, 0.1, 0.01, 0.001], 1e-12);
    let wanted = [1.0, 0.099_967_469_093_345_4, 0.009_993_494_876_928_97, 0.000_999_024_390_243_902_6];
    close_slices("dynamic at 2049", &dynamic(2049), &wanted, 1e-12);
    let wanted = [1.0, 0.052_275_795_857_471_025, 0.002_732_758_832_531_984_4, 0.000_142_857_142_857_142_87];
    close_slices("dynamic at 8192", &dynamic(8192), &wanted, 1e-12);
}

fn refused(config: &Value, weights: &HashMap<String, Tensor>) -> Error {
    tiny_model::open(tiny_model::folder(config, weights).path()).err().expect("to be refused")
}

fn hint(error: &Error) -> &str {
    error.hint.as_deref().unwrap_or_default()
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let config = tiny_model::config(json!({}));
    let weights = tiny_model::weights(&config);
    let with = |name: &str, shape: &[usize]| {
        let mut all = weights.clone();
        all.insert(name.into(), randn(shape, 1).to_dtype(DType::F32).unwrap());
        refused(&config, &all)
    };

    let unknown = with("model.layers.1.self_attn.q_norm.weight", &[8]);
    assert_eq!(
        unknown.message,
        "`model.layers.1.self_attn.q_norm.weight` in `model.safetensors` is not part of family `llama`"
    );
    assert!(hint(&unknown).contains("config.json says `model_type: llama`"), "{}", hint(&unknown));
    assert_eq!(unknown.kind, Kind::Checkpoint);
    // A layer too many, a bias that config.json does not speak of.
    for name in ["model.layers.3.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"] {
        assert!(with(name, &[32]).message.starts_with(&format!("`{name}` in `model.safetensors` is not part")));
    }

    let name = "model.layers.2.self_attn.k_proj.weight";
    let shape = with(name, &[32, 32]);
    assert!(shape.message.contains(name) && shape.message.contains("[32, 32]"), "{shape}");
    assert!(shape.message.contains("asks for [16, 32]") && hint(&shape).contains("head counts"), "{shape}");
    let vocabulary = with("model.embed_tokens.weight", &[41, 32]);
    assert!(vocabulary.message.contains("[41, 32]") && hint(&vocabulary).contains("vocab_size"), "{vocabulary}");

    let mut fewer = weights.clone();
    fewer.remove("model.layers.2.mlp.up_proj.weight");
    let missing = refused(&config, &fewer);
    assert!(missing.message.starts_with("`model.layers.2.mlp.up_proj.weight` is missing"), "{missing}");
    assert!(hint(&missing).contains("3 layers of family `llama`"), "{}", hint(&missing));

    // Buffers of old exports carry nothing.
    let mut old = weights.clone();
    old.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), Tensor::ones(4, DType::F32, &CPU).unwrap());
    tiny_model::open(tiny_model::folder(&config, &old).path()).unwrap();
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let error = |changes: Value| {
        let text = tiny_model::config(changes).to_string();
        let error =
            families::of(&Config::parse(text.as_bytes(), "here/config.json").unwrap()).err().expect("to be refused");
        assert_eq!(error.kind, Kind::Config, "{error}");
        assert!(error.message.contains("here/config.json"), "{error}");
        error
    };
    let unknown = error(json!({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}));
    assert!(unknown.message.contains("`spiral` is not supported") && hint(&unknown).contains("llama3"), "{unknown}");
    let unknown = error(json!({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}));
    assert!(unknown.message.contains("`spiral` is not supported"), "{unknown}");
    let missing = error(json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}));
    assert!(missing.message.contains("rope_scaling.low_freq_factor"), "{missing}");

    let cases = [
        (json!({"hidden_size": 30}), "does not divide into 4 heads"),
        (json!({"num_key_value_heads": 3}), "do not divide into 3"),
        (json!({"num_key_value_heads": 0}), "do not divide into 0"),
        (json!({"num_attention_heads": 0}), "0 heads"),
        (json!({"head_dim": 7}), "`head_dim` 7 is not even"),
        (json!({"hidden_act": "relu6"}), "`hidden_act` is `relu6`"),
        (json!({"hidden_size": "32"}), "hidden_size"),
        (json!({"num_hidden_layers": null}), "num_hidden_layers"),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}), "`rope_scaling.factor`"),
        (json!({"rope_scaling": {"rope_type": "dynamic", "factor": -1.0}}), "`rope_scaling.factor`"),
        (
            json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 0}),
            "`sliding_window` is 0",
        ),
    ];
    for (changes, words) in cases {
        let error = error(changes);
        assert!(error.message.contains(words), "{error}");
    }

    let family = error(json!({"architectures": ["BertForMaskedLM"], "model_type": "bert"}));
    assert!(family.message.contains("`BertForMaskedLM`") && family.message.contains("`bert`"), "{family}");
    assert!(hint(&family).contains("LlamaForCausalLM") && hint(&family).contains("MistralForCausalLM"), "{family}");
    let typo = error(json!({"architectures": ["LlamaForCasualLM"]}));
    assert!(hint(&typo).contains("closest known architecture is `LlamaForCausalLM`"), "{}", hint(&typo));
}
