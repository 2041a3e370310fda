//! Every shipped recipe converts a tiny model of its family: a few steps of each stage, verified and exported.

#[path = "common/byte_tokenizer.rs"]
mod byte_tokenizer;
#[allow(dead_code)] // the list of all is for other tests
#[path = "common/parity.rs"]
mod parity;
#[allow(dead_code)] // comparisons are for other tests
#[path = "common/random.rs"]
mod random;
#[allow(dead_code)] // its Llama is for other tests
#[path = "common/tiny_model.rs"]
mod tiny_model;

use std::path::{Path, PathBuf};
use std::thread;

use candle_core::Device;
use margay::convert::load::Model;
use margay::convert::verify::Report;
use margay::convert::{Options, convert};
use margay::families::REGISTRY;
use margay::progress::Silent;
use margay::recipe::{self, Recipe};
use serde_json::json;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama-tiny")
}

/// Converts `model` by a shipped recipe into `out`.
fn run(name: &str, model: &Path, out: &Path, seq_len: usize, contexts: &[usize]) -> Report {
    let stages = Recipe::load(name, &[]).unwrap().recipe.stages;
    let mut sets = vec![
        format!("data.sources=['{}']", fixture().join("train.jsonl").display()),
        "data.format=auto".into(),
        "verify.tokens=256".into(),
        "data.validation_tokens=256".into(),
        format!("verify.contexts={contexts:?}"),
        "base={}".into(),
    ];
    for stage in &stages {
        let small = [("tokens", 8 * seq_len), ("seq_len", seq_len), ("batch", 2), ("eval_every", 100)];
        sets.extend(small.map(|(key, value)| format!("stage.{stage}.{key}={value}")));
    }
    let options = Options {
        model: model.to_str().unwrap().into(),
        recipe: Recipe::load(name, &sets).unwrap(),
        out: out.into(),
        device: Device::Cpu,
        until: None,
        restart: false,
        tensorboard: None,
        timed: false,
    };
    // The recursion of a backward pass needs a larger stack than a test has.
    let work = || convert(&options, &Silent);
    let done = thread::scope(|s| {
        let worker = thread::Builder::new().stack_size(256 << 20).spawn_scoped(s, work).unwrap();
        worker.join().unwrap()
    });
    let report = done.unwrap_or_else(|e| panic!("{name}: {e}")).report.unwrap();
    assert!(report.passed(), "{name}: {:?}", report.checks);
    let forms: Vec<&str> = report.stages.iter().map(|s| s.name.as_str()).collect();
    let stages: Vec<&str> = stages.iter().map(String::as_str).collect();
    assert_eq!(forms, [&["teacher", "swapped"], &stages[..], &["exported"]].concat(), "{name}");
    assert!(report.stages.iter().all(|s| s.quality.perplexity.is_finite()), "{name}");
    report
}

/// The family that a recipe is for: its folder.
fn folder(name: &str) -> &str {
    name.split('/').next().unwrap()
}

#[test]
fn recipes_of_llama_convert_the_fixture() {
    let dir = tempfile::tempdir().unwrap();
    let shipped = recipe::list();
    let own = shipped.iter().filter(|r| ["llama", "mistral", "tiny"].contains(&folder(&r.name)));
    let mut seen = 0;
    for name in own.map(|r| &r.name) {
        let report = run(name, &fixture(), &dir.path().join(name.replace('/', "-")), 128, &[160]);
        assert_eq!(report.diagnostics.metrics["sum of a row of weights"].layers, [0, 1, 2, 3], "{name}");
        seen += 1;
    }
    assert!(seen > 25, "{seen} recipes");
}

#[test]
fn recipes_of_other_families_convert_models_of_theirs() {
    let dir = tempfile::tempdir().unwrap();
    for family in REGISTRY.iter().map(|f| f.name).filter(|name| !["llama", "mistral"].contains(name)) {
        let short = family.trim_end_matches("_text");
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/families/{short}.json"));
        let mut config = parity::case(&file)["config"].clone();
        config["vocab_size"] = json!(260); // of the byte tokenizer
        let weights = parity::weights(&config);
        let model = tiny_model::folder(&config, &weights);
        std::fs::write(model.path().join("tokenizer.json"), byte_tokenizer::byte_tokenizer().to_string()).unwrap();
        let shipped = recipe::list();
        let own: Vec<&str> = shipped.iter().map(|r| r.name.as_str()).filter(|name| folder(name) == short).collect();
        assert!(own.len() >= 3, "{family} has {own:?}");
        for name in own {
            let out = dir.path().join(name.replace('/', "-"));
            let report = run(name, model.path(), &out, 64, &[96, 600]);
            // GPT-2 has 512 positions here: the last steps are timed at them.
            let contexts: Vec<usize> = report.speeds.iter().map(|s| s.context).collect();
            assert_eq!(contexts, [96, if family == "gpt2" { 494 } else { 600 }], "{name}");
            // The source's own tensors under their own names and in their own layout, beside those of the mixers.
            let export = Model::open(out.to_str().unwrap(), &Silent).unwrap();
            let headers = export.checkpoint.headers();
            for (tensor, before) in &weights {
                assert_eq!(headers.info(tensor).unwrap().shape, before.dims(), "{name}: {tensor}");
            }
            let linearization = export.description.linearization.unwrap();
            let new = linearization.tensors(&export.description.architecture).len();
            assert_eq!(headers.tensors.len(), weights.len() + new, "{name}");
        }
    }
}
