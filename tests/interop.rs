//! Exports read by the programs they are made for: transformers gives the logits and the text that margay gives, with
//! padding, in pieces and token by token.
//!
//! `MARGAY_PYTHON` names a Python with `torch` and `transformers`, else it is `python3`; without them these
//! tests are skipped by name.

#[allow(dead_code)] // ids of its marks are for other tests
#[path = "common/byte_tokenizer.rs"]
mod byte_tokenizer;
#[path = "common/parity.rs"]
mod parity;
#[path = "common/random.rs"]
mod random;
#[path = "common/tiny_model.rs"]
mod tiny_model;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use margay::convert::export::adapter::Adapter;
use margay::convert::export::formats::{self, Format};
use margay::convert::export::{Parts, Shape, export, lolcats};
use margay::convert::load::{Linearization, Model};
use margay::convert::merge::fold;
use margay::convert::swap::swap;
use margay::evaluate::Subject;
use margay::families::Projection;
use margay::generate::{Sampler, generate};
use margay::model::{Decoder, Net};
use margay::params::{Adapters, LowRank};
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

    /// Merges LoRA of rank 2 and 3 into every other layer, 4 more into one projection, and with `full` changes of a whole
    /// weight, the norms, the embeddings and the head; keeps them apart in the export `dir`.
    fn adapt(&mut self, dir: &Path, full: bool) -> Vec<String> {
        let a = self.decoder.architecture.clone();
        let mut lora = Vec::new();
        let mut add = |layer: usize, projection: Projection, rank: usize| {
            let [out, inner] = a.shape(projection);
            let seed = lora.len() as u64;
            let noise = |shape: [usize; 2], seed| (randn(&shape, seed) * 0.1).unwrap().to_dtype(DType::F32).unwrap();
            let (a, b) = (noise([rank, inner], 2 * seed), noise([out, rank], 2 * seed + 1));
            lora.push(LowRank { layer, projection, a, b, alpha: 2.0 * rank as f64 });
        };
        for layer in (0..a.layers).step_by(2) {
            add(layer, Projection::Q, 2);
            add(layer, Projection::O, 3);
        }
        add(0, Projection::Q, 4);
        let mut adapters = Adapters::of(lora).unwrap();
        if full {
            adapters.add_full(&a, &[(1, Projection::V)], &Device::Cpu).unwrap();
            let whole: Vec<_> = a.names.words().flat_map(|word| a.named(word)).collect();
            adapters.add_whole(&a, &whole, &Device::Cpu).unwrap();
            for trained in adapters.trained() {
                let noise = (randn(trained.param.var.dims(), 99) * 0.1).unwrap().to_dtype(DType::F32).unwrap();
                trained.param.var.set(&noise).unwrap();
            }
        }
        let apart = Adapter::of(&adapters, &self.decoder, &self.model.description).unwrap();
        let stored = |name: &str| self.model.checkpoint.info(name).map(|i| i.dtype);
        let merged = fold(&mut self.decoder, &adapters, &self.model).unwrap();
        std::fs::create_dir_all(dir).unwrap();
        apart.write("org/base", a.layers, stored, dir, &Silent).unwrap();
        merged
    }

    /// Writes the export and what margay makes of it: logits of a text, and the text it goes on with.
    fn write(&self, dir: &Path, merged: &[String]) {
        let parts = Parts { model: &self.model, decoder: &self.decoder, student: &self.net, merged };
        export(&parts, Some(&self.linearization), &SHAPE, dir, &Silent).unwrap();
        let vocab = self.model.architecture().vocab as u32;
        let ids: Vec<u32> = (0..150u32).map(|i| 2 + (i * i * 31 + i * 7 + 11) % (vocab - 2)).collect();
        let all = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let logits = self.decoder.logits(&self.decoder.hidden(&all, &self.net).unwrap(), &self.net).unwrap();
        let subject = Subject { decoder: &self.decoder, net: &self.net };
        let mut text = Vec::new();
        let push = |id| {
            text.push(id);
            Ok(true)
        };
        generate(subject, &ids[..90], &mut Sampler::greedy(), 24, &[], push).unwrap();
        let text = Tensor::new(text.as_slice(), &Device::Cpu).unwrap();
        let expected = HashMap::from([("ids", all), ("logits", logits), ("text", text)]);
        candle_core::safetensors::save(&expected, dir.join(EXPECTED)).unwrap();
    }
}

const SHAPE: Shape = Shape { dtype: None, max_shard_bytes: 1 << 30 };
const EXPECTED: &str = "expected.safetensors";

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

/// Writes the export `from` in another format.
fn rewrite(from: &Path, format: Format, shape: &Shape, out: &Path) {
    let model = Model::open(from.to_str().unwrap(), &Silent).unwrap();
    formats::write(&model, format, shape, out, &Silent).unwrap();
}

/// Bytes of every tensor by name.
fn tensors(dir: &Path) -> HashMap<String, Vec<u8>> {
    let model = Model::open(dir.to_str().unwrap(), &Silent).unwrap();
    let names = model.checkpoint.names().map(String::from).collect::<Vec<_>>();
    names.into_iter().map(|n| (n.clone(), model.checkpoint.bytes(&n).unwrap().to_vec())).collect()
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
const VARIANTS: [(&str, &[&str]); 26] = [
    ("llama/lolcats", &["mixer.window_kind=terraced"]),
    ("llama/lolcats", &["mixer.affine=true", "mixer.feature_map=exp_dim", "mixer.feature_dim=4"]),
    ("llama/lolcats", &["mixer.tie_qk=true", "mixer.skip_connection=true", "mixer.feature_dim=32"]),
    ("llama/lolcats", &["mixer.window=0", "mixer.bias=full"]),
    ("llama/lizard", &["mixer.affine=true", "mixer.gate.kind=scalar_head"]),
    ("llama/lizard", &["mixer.gate.kind=pooled", "mixer.gate.normaliser=16", "mixer.sinks=0", "mixer.feature_dim=5"]),
    ("llama/lizard", &["mixer.gate.kind=low_rank", "mixer.gate.normaliser=16"]),
    ("llama/lizard", &["mixer.exponents=recentred", "mixer.feature_map=exp", "mixer.gate.bias=0"]),
    ("llama/lizard-paper", &["mixer.exponents=recentred", "mixer.feature_map=exp", "mixer.gate.bias=0"]),
    ("llama/lizard-paper", &["mixer.meta=kv", "mixer.alpha_per_head=true", "mixer.rotary=true"]),
    ("llama/lawcat", &["mixer.window=16", "mixer.tie_qk=false"]),
    ("llama/lawcat", &["mixer.window=16", "mixer.conv=2", "mixer.gate.kind=scalar_head"]),
    ("llama/gla", &["mixer.gate.kind=scalar_token", "mixer.rotary=true", "mixer.window.learn=false"]),
    ("llama/gla", &["mixer.feature_map=silu", "mixer.normalise=none", "mixer.output={norm=true,gate='silu'}"]),
    ("llama/gla", &["mixer.gate.kind=mamba2", "mixer.window.size=0", "mixer.output={norm=false,gate='sigmoid'}"]),
    ("llama/hgrn2", &["mixer.lower_bound=false", "mixer.query_map=silu", "mixer.output={norm=true,gate='silu'}"]),
    ("llama/hgrn2", &["mixer.bound_start=cumulative"]),
    ("llama/gsa", &["mixer.slots=0", "mixer.feature_map=silu", "mixer.output={norm=true,gate='sigmoid'}"]),
    ("llama/gsa", &["mixer.slots=5", "mixer.gate={kind='pooled',normaliser=16.0}", "mixer.window.size=0"]),
    ("llama/delta", &["mixer.rotary=true", "mixer.conv=3", "mixer.silu=true", "mixer.scale=0.5"]),
    ("llama/gated-delta", &["mixer.window.gate=true"]),
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
        Case::new(model, &mixer(name, sets), keep).write(&out, &[]);
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
        assert_same(&case, &[("logits", 1e-4), ("pieces", 1e-4), ("padded", 1e-4), ("saved", 1e-5)]);
        // bfloat16 keeps 8 bits.
        assert!(case["low"].as_f64().is_some_and(|d| d < 0.1), "{case}");
    }
}

/// What transformers says of a folder: differences within bounds, and everything that is yes or no.
fn assert_same(case: &Value, bounds: &[(&str, f64)]) {
    for (what, most) in bounds {
        let difference = case[*what].as_f64().unwrap_or(f64::NAN);
        // Written so that a NaN fails.
        assert!(difference <= *most, "{what} {difference:e}: {case}");
    }
    for what in ["text", "padded_text", "beams", "last", "gradients", "wide"] {
        assert_eq!(case[what], true, "{what}: {case}");
    }
}

/// A tiny model of a family.
fn family(config: &Value) -> tempfile::TempDir {
    tiny_model::folder(config, &parity::weights(config))
}

/// GPT-2 in the spelling of its first checkpoints.
fn bare_gpt2() -> tempfile::TempDir {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families/gpt2.json");
    let config = parity::case(&path)["config"].clone();
    let weights = parity::weights(&config).into_iter();
    tiny_model::folder(&config, &weights.map(|(name, x)| (name.replace("transformer.", ""), x)).collect())
}

/// Every family, its rotations, windows, scales, biases and experts around mixers that see them in different places.
#[test]
fn transformers_gives_the_same_of_every_family() {
    let Some(python) = python("torch, transformers") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (mut folders, mut grows) = (Vec::new(), Vec::new());
    let bases = parity::cases().into_iter().map(|(name, path)| (name, family(&parity::case(&path)["config"])));
    let others = ["lizard", "gla", "lizard-paper", "gated-delta", "lawcat", "mamba2", "hgrn2", "rala", "mala"];
    for (n, (family, base)) in bases.chain([("gpt2-bare".into(), bare_gpt2())]).enumerate() {
        for (name, keep) in [("lolcats", &[][..]), (others[n % others.len()], &[0, 3])] {
            let out = dir.path().join(format!("{family}-{name}"));
            let case = Case::new(base.path(), &mixer(&format!("llama/{name}"), &[]), keep);
            case.write(&out, &[]);
            grows.push(case.model.architecture().ropes.iter().any(|rope| rope.grows()));
            folders.push(out);
        }
    }
    let folders: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
    let found = run(&python, "transformers_check.py", &folders, dir.path());
    assert_eq!(found.len(), folders.len());
    for (case, grows) in found.iter().zip(grows) {
        eprintln!("{case}");
        // Where frequencies depend on the length, a text in pieces or beside a longer one has others.
        let bounds = [("logits", 1e-4), ("saved", 1e-5), ("pieces", 1e-4), ("padded", 1e-4)];
        assert_same(case, &bounds[..if grows { 2 } else { 4 }]);
    }
}

#[test]
fn peft_loads_an_adapter() {
    let Some(python) = python("torch, transformers, peft") else { return };
    let dir = tempfile::tempdir().unwrap();
    let named = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/families/{name}.json"));
        family(&parity::case(&path)["config"])
    };
    // Projections apart, in one tensor, taking turns in it, lying the other way round, beside experts.
    let bases = [mistral(), named("phi3"), named("gpt_neox"), named("gpt2"), bare_gpt2(), named("mixtral")];
    let mut triples = Vec::new();
    for (n, base) in bases.iter().enumerate() {
        for (name, full) in [("lolcats", false), ("gated-delta", true)] {
            let (export, adapter) =
                (dir.path().join(format!("{n}-{name}")), dir.path().join(format!("{n}-{name}-apart")));
            let mut case = Case::new(base.path(), &mixer(&format!("llama/{name}"), &[]), &[2]);
            let merged = case.adapt(&export, full);
            case.write(&export, &merged);
            rewrite(&export, Format::Adapter, &SHAPE, &adapter);
            triples.extend([base.path().to_path_buf(), adapter, export.join(EXPECTED)]);
        }
    }
    let args: Vec<&Path> = triples.iter().map(PathBuf::as_path).collect();
    for case in run(&python, "adapter_check.py", &args, dir.path()) {
        eprintln!("{case}");
        let [bare, whole] = ["without", "logits"].map(|what| case[what].as_f64().unwrap_or(f64::NAN));
        // Written so that a NaN fails; without its LoRA it is another model.
        assert!(whole <= 1e-4 && bare > 1e-2, "{case}");
    }
}

#[test]
fn an_export_written_anew_is_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let (first, again, low) = (dir.path().join("first"), dir.path().join("again"), dir.path().join("low"));
    let mut case = Case::new(&llama(), &mixer("llama/lizard", &[]), &[1]);
    let merged = case.adapt(&first, false);
    case.write(&first, &merged);
    rewrite(&first, Format::Transformers, &SHAPE, &again);
    assert_eq!(tensors(&first), tensors(&again));
    for name in ["config.json", "modeling_margay.py", "tokenizer.json"] {
        assert_eq!(std::fs::read(first.join(name)).unwrap(), std::fs::read(again.join(name)).unwrap(), "{name}");
    }

    // In another precision and in small shards.
    let small = Shape { dtype: Some(safetensors::Dtype::F16), max_shard_bytes: 200_000 };
    rewrite(&first, Format::Transformers, &small, &low);
    let model = Model::open(low.to_str().unwrap(), &Silent).unwrap();
    assert!(model.checkpoint.files.len() > 2, "{:?}", model.checkpoint.files);
    for (name, info) in &model.checkpoint.tensors {
        let new = case.linearization.tensors(model.architecture()).contains_key(name);
        let wanted = if new { safetensors::Dtype::F32 } else { safetensors::Dtype::F16 };
        assert_eq!(info.dtype, wanted, "{name}");
    }
    assert_eq!(model.checkpoint.config.get("dtype"), Some(&json!("float16")));
    let (wide, narrow) = (Model::open(first.to_str().unwrap(), &Silent).unwrap(), model);
    let name = "model.layers.1.mlp.up_proj.weight";
    let read = |m: &Model| m.checkpoint.tensor(name, DType::F32, &Device::Cpu).unwrap();
    random::close(name, &read(&narrow), &read(&wide), 1e-3);
}

#[test]
fn official_lolcats_checkpoints_go_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let sets = ["mixer.window_kind=terraced", "mixer.window=16"];
    let mut case = Case::new(&llama(), &mixer("llama/lolcats", &sets), &[1]);
    let mut merged = case.adapt(&path("export"), false);
    merged.sort();
    case.write(&path("export"), &merged);
    rewrite(&path("export"), Format::Lolcats, &SHAPE, &path("official"));
    let files: Vec<PathBuf> = ["distill", "ft"].map(|s| path("official").join(format!("base_{s}.pt"))).into();
    let settings = std::fs::read_to_string(path("official").join("base.yaml")).unwrap();
    let settings: Value = serde_json::from_str(&settings).unwrap();
    assert_eq!(settings["attention"]["attention_type"], "lolcats_llama_window_tk");
    assert_eq!(settings["attention"]["softmax_attentions"], json!([1]));

    let import = |files: &[PathBuf], sets: &[&str], out: &str| {
        let recipe = Recipe::load("llama/lolcats", &sets.iter().map(|s| s.to_string()).collect::<Vec<_>>()).unwrap();
        lolcats::import(llama().to_str().unwrap(), &recipe, files, &SHAPE, &path(out), &Silent)
    };
    let differing = |out: &str| -> Vec<String> {
        let (wanted, mut found) = (tensors(&path("export")), tensors(&path(out)));
        let differ = wanted.into_iter().filter(|(name, bytes)| found.remove(name).as_ref() != Some(bytes));
        let mut names: Vec<String> = differ.map(|(name, _)| name).collect();
        names.extend(found.into_keys());
        names.sort();
        names
    };
    import(&files[..1], &sets, "distilled").unwrap();
    assert_eq!(differing("distilled"), merged);
    import(&files, &sets, "whole").unwrap();
    // Two stages added to one projection: their sum is rounded once, not twice.
    let twice = "model.layers.0.self_attn.q_proj.weight";
    assert!(differing("whole").iter().all(|name| name == twice), "{:?}", differing("whole"));
    let read = |dir: &str| {
        let model = Model::open(path(dir).to_str().unwrap(), &Silent).unwrap();
        model.checkpoint.tensor(twice, DType::F32, &Device::Cpu).unwrap()
    };
    random::close(twice, &read("whole"), &read("export"), 1.0 / 256.0);

    // A recipe of another mixer than the files have.
    for (sets, word) in [(&["mixer.window=0"][..], "window_factors"), (&["mixer.feature_dim=8"][..], "feature_dim")] {
        let error = import(&files, sets, "refused").unwrap_err();
        assert!(format!("{} {:?}", error.message, error.hint).contains(word), "{}", error.message);
    }

    // The official trainer's way of saving and reading.
    let Some(python) = python("torch") else { return };
    let args: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let said = run(&python, "lolcats_check.py", &args, dir.path());
    assert_eq!(said, [json!({ "tensors": 9 }), json!({ "tensors": 8 })]);
    import(&files, &sets, "saved-again").unwrap();
    assert_eq!(tensors(&path("saved-again")), tensors(&path("whole")));
}

#[test]
fn official_liger_folders_go_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    // As transformers 5 spells rotations, with scales that the default is not.
    let rope = json!({ "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32 });
    let newer = tiny_model::config(json!({ "head_dim": 12, "rope_parameters": rope, "dtype": "float32" }));
    let newer = tiny_model::folder(&newer, &tiny_model::weights(&newer));
    let qwen =
        family(&parity::case(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families/qwen2.json"))["config"]);
    let (llama, mistral) = (llama(), mistral());
    let cases: [(&Path, &str, &str, &[&str], usize); 7] = [
        (&llama, "liger-gla", "liger_gla", &[], 32),
        (&llama, "liger-gsa", "liger_gsa", &[], 32),
        (&llama, "liger-gsa", "liger_gsa", &["mixer.slots=8"], 8),
        (&llama, "liger-hgrn2", "liger_hgrn2", &[], 32),
        (newer.path(), "liger-gla", "liger_gla", &[], 12),
        (mistral.path(), "liger-gla", "liger_mistral_gla", &[], 12),
        (qwen.path(), "liger-gla", "liger_qwen2_gla", &[], 8),
    ];
    for (number, (base, name, model_type, sets, pool)) in cases.into_iter().enumerate() {
        let path = |what: &str| dir.path().join(format!("{number}-{what}"));
        let (export, liger, back) = (path("export"), path("official"), path("back"));
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        let mixer = Recipe::load(&format!("llama/{name}"), &sets).unwrap().recipe.mixer;
        let mut case = Case::new(base, &mixer, &[]);
        let merged = case.adapt(&export, false);
        case.write(&export, &merged);
        rewrite(&export, Format::Liger, &SHAPE, &liger);
        let config: Value = serde_json::from_slice(&std::fs::read(liger.join("config.json")).unwrap()).unwrap();
        assert_eq!((&config["model_type"], &config["pool_size"]), (&json!(model_type), &json!(pool)));
        assert!(config.get("linearization").is_none());
        if base == newer.path() {
            assert_eq!((&config["rope_theta"], &config["rope_scaling"]["factor"]), (&json!(500.0), &json!(4.0)));
            assert_eq!((config.get("rope_parameters"), &config["torch_dtype"]), (None, &json!("float32")));
        }
        // The base model's tensors and no other, merged.
        assert_eq!(tensors(&liger), tensors(&export), "{model_type}");

        // Read as what it is, and written as ours again.
        let model = Model::open(liger.to_str().unwrap(), &Silent).unwrap();
        let (decoder, net) = (model.decoder(&Device::Cpu, &Silent).unwrap(), model.net(&Device::Cpu).unwrap());
        let expected = candle_core::safetensors::load(export.join(EXPECTED), &Device::Cpu).unwrap();
        let logits = decoder.logits(&decoder.hidden(&expected["ids"], &net).unwrap(), &net).unwrap();
        assert_eq!(random::flat(&logits), random::flat(&expected["logits"]), "{model_type}");
        rewrite(&liger, Format::Transformers, &SHAPE, &back);
        let config: Value = serde_json::from_slice(&std::fs::read(back.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["linearization"]["teacher"], "org/base", "{model_type}");
        assert_eq!(tensors(&back), tensors(&export), "{model_type}");
    }

    // What Liger has no word for.
    let export = dir.path().join("learned");
    let mixer = Recipe::load("llama/liger-gla", &["mixer.window.learn=true".into()]).unwrap().recipe.mixer;
    Case::new(&llama, &mixer, &[]).write(&export, &[]);
    let model = Model::open(export.to_str().unwrap(), &Silent).unwrap();
    let error = formats::write(&model, Format::Liger, &SHAPE, &dir.path().join("no"), &Silent).unwrap_err();
    assert!(error.message.contains("window"), "{}", error.message);
}

/// What a GGUF file is made of: a model of `fixtures/families` with changes. `known` where the reader of transformers
/// knows all of it: it leaves out keys of some architectures and has none of others.
struct Gguf {
    case: &'static str,
    changes: Value,
    known: bool,
}

/// Models of every family that llama.cpp computes.
fn gguf_cases() -> Vec<Gguf> {
    let case = |case, changes, known| Gguf { case, changes, known };
    let full = json!({ "sliding_window": null });
    // The numbers that transformers takes for granted.
    let gemma2 = json!({ "head_dim": 256, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0 });
    let gemma3 = json!({ "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window_pattern": 6,
        "rope_scaling": null, "rope_local_base_freq": 10_000.0 });
    vec![
        case("llama", json!({ "attention_bias": false, "mlp_bias": false }), true),
        case("llama", json!({}), false),
        case("llama-llama3", json!({}), false),
        case("llama-linear", json!({}), false),
        case("llama-yarn", json!({}), false),
        case("llama-yarn-mscale", json!({}), false),
        case("mistral", full.clone(), true),
        case("mistral", json!({}), true),
        case("ministral", json!({}), true),
        case("qwen2", json!({}), true),
        case("qwen2-window", json!({}), true),
        case("qwen3", json!({ "head_dim": 128 }), true),
        case("qwen3", json!({}), false),
        case("smollm3", json!({ "no_rope_layers": null, "no_rope_layer_interval": 4 }), false),
        case("granite", json!({}), false),
        case("olmo2", json!({}), false),
        case("gemma2", gemma2, true),
        case("gemma2", json!({ "query_pre_attn_scalar": 12 }), false),
        case("gemma3", gemma3, true),
        case("gemma3", json!({ "query_pre_attn_scalar": 12 }), false),
        case("gemma3-newer", json!({}), false),
        case("phi3", full, true),
        case("phi3", json!({}), true),
        // llama.cpp takes the divisors by the size of its context, of which it makes a multiple of 256.
        case("phi3-longrope", json!({ "original_max_position_embeddings": 256 }), false),
        case("mixtral", json!({}), false),
        case("qwen3_moe", json!({ "mlp_only_layers": [] }), false),
        case("gpt_neox", json!({}), false),
        case("gpt_neox-serial", json!({}), false),
        case("gpt2", json!({ "n_positions": 1024 }), true),
        case("starcoder2", json!({ "rope_theta": 10_000.0 }), true),
        case("starcoder2", json!({ "sliding_window": 40 }), false),
    ]
}

/// Texts and their ids as margay's tokenizer has them, BOS included where it puts one.
fn texts(model: &Path, to: &Path) {
    let tokenizer = margay::data::Tokenizer::open(model).unwrap();
    let texts = [
        "The margay is a small cat.",
        "It's 1984, isn't  it?\n\n  I've 12345 reasons: na\u{ef}ve caf\u{e9}, \u{6771}\u{4eac}, \u{1f408}!",
        "",
        " a",
        "def f(x):\n    return x ** 2  # squares\n",
    ];
    let pairs: Vec<Value> = texts.map(|text| json!([text, tokenizer.encode_prompt(text).unwrap()])).into();
    std::fs::write(to, json!(pairs).to_string()).unwrap();
}

/// What others read of GGUF files: `(model, file)`, with the texts for their tokenizers beside the file.
fn read_gguf(python: &Path, files: &[(PathBuf, PathBuf)], home: &Path) -> Vec<Value> {
    let lists: Vec<PathBuf> = files.iter().map(|(_, file)| file.with_extension("json")).collect();
    files.iter().zip(&lists).for_each(|((model, _), list)| texts(model, list));
    let args = files.iter().zip(&lists).flat_map(|((model, file), list)| [model.as_path(), file, list]);
    let found = run(python, "gguf_check.py", &args.collect::<Vec<_>>(), home);
    assert_eq!(found.len(), files.len());
    for case in &found {
        // Where llama.cpp is there, its tokenizer gives margay's ids.
        assert!(case["ids"].is_null() || case["ids"].as_array().unwrap().iter().all(|same| *same == true), "{case}");
    }
    found
}

#[test]
fn gguf_files_are_the_same_models() {
    let Some(python) = python("torch, transformers, gguf") else { return };
    let dir = tempfile::tempdir().unwrap();
    let single = Shape { dtype: Some(safetensors::Dtype::F32), ..SHAPE };
    let (mut bases, mut files) = (Vec::new(), Vec::new());
    for (n, Gguf { case, changes, .. }) in gguf_cases().into_iter().enumerate() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/families/{case}.json"));
        let mut config = parity::case(&path)["config"].clone();
        config["vocab_size"] = json!(260); // of the byte tokenizer
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let base = family(&config);
        std::fs::write(base.path().join("tokenizer.json"), byte_tokenizer::byte_tokenizer().to_string()).unwrap();
        let file = dir.path().join(format!("{n:02}-{case}.gguf"));
        rewrite(base.path(), Format::Gguf, &single, &file);
        files.push((base.path().to_path_buf(), file));
        bases.push(base);
    }
    for (found, Gguf { case, known, .. }) in read_gguf(&python, &files, dir.path()).iter().zip(gguf_cases()) {
        let (transformers, llama_cpp) = (&found["transformers"], &found["llama_cpp"]);
        eprintln!("{case}: transformers {transformers}, llama.cpp {llama_cpp}");
        assert!(!known || transformers.as_f64().is_some_and(|d| d <= 1e-5), "{case}: {transformers}");
        // Its GELU is a table in f16.
        let gelu = ["gemma2", "gemma3", "gptneox", "gpt2", "starcoder2"].iter().any(|a| found["architecture"] == *a);
        let bound = if gelu { 5e-3 } else { 1e-5 };
        assert!(llama_cpp.is_null() || llama_cpp.as_f64().is_some_and(|d| d <= bound), "{case}: {llama_cpp}");
    }
}

/// Trained models with tokenizers of their own, byte-level and by SentencePiece.
#[test]
fn gguf_files_have_the_tokenizer() {
    let Some(python) = python("torch, transformers, gguf") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    let dtypes = [("bf16", None), ("f16", Some(safetensors::Dtype::F16)), ("f32", Some(safetensors::Dtype::F32))];
    for (name, dtype) in dtypes {
        let file = dir.path().join(format!("{name}.gguf"));
        rewrite(&llama(), Format::Gguf, &Shape { dtype, ..SHAPE }, &file);
        files.push((llama(), file));
    }
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
    let own = tempfile::tempdir().unwrap();
    let mut models: Vec<PathBuf> = ["stories260k", "scribe-11m"].map(|name| shared.join("models").join(name)).into();
    if let Ok(bytes) = std::fs::read(shared.join("tokenizers/sp-bpe-32k/tokenizer.json")) {
        let config = tiny_model::config(json!({ "vocab_size": 32_064 }));
        let folder = tiny_model::folder(&config, &tiny_model::weights(&config));
        std::fs::write(folder.path().join("tokenizer.json"), bytes).unwrap();
        models.push(folder.keep());
    }
    let there = models.len();
    models.retain(|model| model.is_dir());
    if models.len() < there {
        eprintln!("skipped in part: {} is not there", shared.display());
    }
    for (n, model) in models.iter().enumerate() {
        let folder = own.path().join(n.to_string());
        rewrite(model, Format::Gguf, &SHAPE, &folder);
        files.push((model.clone(), folder.join("model.gguf")));
    }
    let found = read_gguf(&python, &files, dir.path());
    for (found, (name, bound)) in found.iter().zip([("BF16", 1e-5), ("F16", 1e-2), ("F32", 1e-5)]) {
        let tensors = found["tensors"].as_object().unwrap();
        assert_eq!(tensors["blk.0.attn_q.weight"], json!([name, 128, 128]));
        assert_eq!(tensors["token_embd.weight"], json!([name, 1024, 128]));
        assert_eq!(tensors["blk.3.ffn_down.weight"], json!([name, 128, 384]));
        assert_eq!(tensors["blk.3.ffn_norm.weight"], json!(["F32", 128]));
        assert_eq!(tensors.len(), 4 * 9 + 2); // tied: no head
        assert!(found["transformers"].as_f64().is_some_and(|d| d <= bound), "{}", found["transformers"]);
        let (keys, name) = (&found["keys"], "llama-tiny");
        assert_eq!((&keys["general.name"], &keys["llama.block_count"]), (&json!(name), &json!(4)));
        assert_eq!(
            (&keys["tokenizer.ggml.pre"], &keys["tokenizer.ggml.add_bos_token"]),
            (&json!("gpt-2"), &json!(true))
        );
    }
    for found in &found {
        eprintln!("{}: transformers {}, llama.cpp {}", found["name"], found["transformers"], found["llama_cpp"]);
        // bf16 products of llama.cpp are those of bf16 activations.
        assert!(found["llama_cpp"].is_null() || found["llama_cpp"].as_f64().is_some_and(|d| d < 0.05), "{found}");
    }
}
