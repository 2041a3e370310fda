//! Exports read by the programs they are made for: transformers gives the logits and the text that margay gives, with
//! padding, in pieces and token by token.
//!
//! `MARGAY_PYTHON` names a Python with `torch` and `transformers`, else it is `python3`; without them these
//! tests are skipped by name.

#[path = "common/random.rs"]
#[allow(dead_code)] // comparison is for the other tests
mod random;
#[path = "common/tiny_model.rs"]
mod tiny_model;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use margay::convert::export::{Parts, Shape, export};
use margay::convert::load::{Linearization, Model};
use margay::convert::swap::swap;
use margay::evaluate::Subject;
use margay::generate::{Sampler, generate};
use margay::model::{Decoder, Net};
use margay::progress::Silent;
use margay::recipe::{self, Mixer, Recipe};
use random::randn;
use serde_json::{Value, json};

/// The interpreter, where it can import what is needed.
fn python(modules: &str) -> Option<PathBuf> {
    let python = PathBuf::from(std::env::var_os("MARGAY_PYTHON").unwrap_or("python3".into()));
    let found = Command::new(&python).args(["-c", &format!("import {modules}")]).output();
    match found {
        Ok(output) if output.status.success() => Some(python),
        _ => {
            eprintln!("skipped: `{}` cannot import {modules}; MARGAY_PYTHON names another", python.display());
            None
        }
    }
}

/// Runs a script of `tests/interop` and gives the JSON lines it prints.
fn run(python: &Path, script: &str, args: &[&Path], home: &Path) -> Vec<Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop").join(script);
    let mut command = Command::new(python);
    command.arg("-B").arg(script).args(args).env("HF_HOME", home).env("HF_HUB_OFFLINE", "1");
    let output = command.output().unwrap();
    let (said, failed) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{failed}");
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A small model and the net that `mixer` makes of it, with parameters moved off their starts so that no zero hides
/// anything.
struct Case {
    model: Model,
    decoder: Decoder,
    net: Net,
    linearization: Linearization,
}

impl Case {
    fn new(dir: &Path, mixer: &Mixer, keep: &[usize]) -> Case {
        let (model, decoder) = tiny_model::open(dir).unwrap();
        let a = model.architecture();
        let layers: Vec<usize> = (0..a.layers).filter(|l| !keep.contains(l)).collect();
        mixer.design().check(a).unwrap();
        let net = swap(a, mixer.design(), &layers, 3, &Device::Cpu).unwrap();
        for (seed, param) in net.mixers.iter().flat_map(|m| m.params()).enumerate() {
            let noise = (randn(param.var.dims(), 1000 + seed as u64) * 0.1).unwrap().to_dtype(DType::F32).unwrap();
            param.var.set(&(param.var.as_tensor() + noise).unwrap()).unwrap();
        }
        let config = &model.checkpoint.headers().config;
        let linearization = Linearization {
            format_version: Linearization::FORMAT,
            base_model_type: config.model_type().unwrap().into(),
            base_architectures: config.architectures().unwrap().iter().map(|a| a.to_string()).collect(),
            layers,
            mixer: mixer.clone(),
            teacher: "org/base".into(),
            teacher_revision: None,
        };
        Case { model, decoder, net, linearization }
    }

    /// Writes the export and what margay makes of it: logits of a text, and the text it goes on with.
    fn write(&self, dir: &Path) {
        let shape = Shape { dtype: None, max_shard_bytes: 1 << 30 };
        let parts = Parts { model: &self.model, decoder: &self.decoder, student: &self.net, merged: &[] };
        export(&parts, Some(&self.linearization), &shape, dir, &Silent).unwrap();
        let vocab = self.model.architecture().vocab as u32;
        let ids: Vec<u32> = (0..150u32).map(|i| 2 + (i * i * 31 + i * 7 + 11) % (vocab - 2)).collect();
        let all = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let logits = self.decoder.logits(&self.decoder.hidden(&all, &self.net).unwrap()).unwrap();
        let subject = Subject { decoder: &self.decoder, net: &self.net };
        let mut text = Vec::new();
        let push = |id| {
            text.push(id);
            Ok(true)
        };
        generate(subject, &ids[..90], &mut Sampler::greedy(), 24, &[], push).unwrap();
        let text = Tensor::new(text.as_slice(), &Device::Cpu).unwrap();
        let expected = HashMap::from([("ids", all), ("logits", logits), ("text", text)]);
        candle_core::safetensors::save(&expected, dir.join("expected.safetensors")).unwrap();
    }
}

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama-tiny")
}

/// A Mistral of random weights, keys of 24 positions in the layers that stay.
fn mistral() -> tempfile::TempDir {
    let config = tiny_model::config(json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 24,
        "max_position_embeddings": 256, "head_dim": 12
    }));
    tiny_model::folder(&config, &tiny_model::weights(&config))
}

/// The mixer of a recipe with a window of 16.
fn mixer(name: &str, sets: &[&str]) -> Mixer {
    let mixer = Recipe::load(name, &[]).unwrap().recipe.mixer;
    let window = match &json!(mixer)["window"] {
        Value::Number(n) if n.as_u64() > Some(0) => "mixer.window=16",
        Value::Object(keys) if keys["size"].as_u64() > Some(0) => "mixer.window.size=16",
        _ => "verify.tokens=1",
    };
    let sets: Vec<String> = [window].iter().chain(sets).map(|s| s.to_string()).collect();
    Recipe::load(name, &sets).unwrap().recipe.mixer
}

/// Settings that no shipped recipe has.
const VARIANTS: [(&str, &[&str]); 22] = [
    ("llama/lolcats", &["mixer.window_kind=terraced"]),
    ("llama/lolcats", &["mixer.affine=true", "mixer.feature_map=exp_dim", "mixer.feature_dim=4"]),
    ("llama/lolcats", &["mixer.tie_qk=true", "mixer.skip_connection=true", "mixer.feature_dim=32"]),
    ("llama/lolcats", &["mixer.window=0", "mixer.bias=full"]),
    ("llama/lizard", &["mixer.affine=true", "mixer.gate.kind=scalar_head"]),
    ("llama/lizard", &["mixer.gate.kind=pooled", "mixer.gate.normaliser=16", "mixer.sinks=0", "mixer.feature_dim=5"]),
    ("llama/lizard", &["mixer.gate.kind=low_rank", "mixer.gate.normaliser=16"]),
    ("llama/lizard-paper", &["mixer.meta=kv", "mixer.alpha_per_head=true", "mixer.rotary=true"]),
    ("llama/lawcat", &["mixer.window=16", "mixer.tie_qk=false"]),
    ("llama/lawcat", &["mixer.window=16", "mixer.conv=2", "mixer.gate.kind=scalar_head"]),
    ("llama/gla", &["mixer.gate.kind=scalar_token", "mixer.rotary=true", "mixer.window.learn=false"]),
    ("llama/gla", &["mixer.feature_map=silu", "mixer.normalise=none", "mixer.output={norm=true,gate='silu'}"]),
    ("llama/gla", &["mixer.gate.kind=mamba2", "mixer.window.size=0", "mixer.output={norm=false,gate='sigmoid'}"]),
    ("llama/hgrn2", &["mixer.lower_bound=false", "mixer.query_map=silu", "mixer.output={norm=true,gate='silu'}"]),
    ("llama/gsa", &["mixer.slots=0", "mixer.feature_map=silu", "mixer.output={norm=true,gate='sigmoid'}"]),
    ("llama/gsa", &["mixer.slots=5", "mixer.gate={kind='pooled',normaliser=16.0}", "mixer.window.size=0"]),
    ("llama/delta", &["mixer.rotary=true", "mixer.conv=3", "mixer.silu=true", "mixer.scale=0.5"]),
    ("llama/mamba2", &["mixer.layout=mohawk", "mixer.bc_norm=false", "mixer.conv=0"]),
    ("llama/mamba2", &["mixer.silu=true", "mixer.output={norm=false,gate='none'}", "mixer.window.size=0"]),
    ("llama/mala", &["mixer.feature_map=softmax_dim", "mixer.rotary=true", "mixer.window.size=0"]),
    ("llama/rala", &["mixer.feature_map=exp_dim", "mixer.rotary=true", "mixer.window.size=0"]),
    ("llama/based", &["mixer.feature_dim=5"]),
];

#[test]
fn transformers_gives_the_same() {
    let Some(python) = python("torch, transformers") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mistral = mistral();
    let mut folders: Vec<PathBuf> = Vec::new();
    let mut add = |model: &Path, name: &str, sets: &[&str], keep: &[usize]| {
        let number = folders.len();
        let out = dir.path().join(format!("{number:02}-{}", name.replace(['/', '.'], "-")));
        Case::new(model, &mixer(name, sets), keep).write(&out);
        folders.push(out);
    };
    let recipes: Vec<String> = recipe::list().into_iter().map(|r| r.name).collect();
    for (n, name) in recipes.iter().enumerate() {
        // All layers, or with one that stays softmax.
        add(&llama(), name, &[], if n % 2 == 0 { &[] } else { &[1] });
    }
    for (n, (name, sets)) in VARIANTS.into_iter().enumerate() {
        add(&llama(), name, sets, if n % 2 == 0 { &[0, 2] } else { &[] });
    }
    for name in ["llama/lolcats", "llama/lizard", "llama/gated-delta", "llama/gla", "llama/mamba2"] {
        add(mistral.path(), name, &[], &[0]);
    }
    let folders: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
    let found = run(&python, "transformers_check.py", &folders, dir.path());
    assert_eq!(found.len(), folders.len());
    for case in found {
        eprintln!("{case}");
        for (what, most) in [("logits", 1e-4), ("pieces", 1e-4), ("padded", 1e-4), ("saved", 1e-5)] {
            let difference = case[what].as_f64().unwrap_or(f64::NAN);
            // Written so that a NaN fails.
            assert!(difference <= most, "{what} {difference:e}: {case}");
        }
        for what in ["text", "padded_text", "gradients"] {
            assert_eq!(case[what], true, "{what}: {case}");
        }
    }
}
