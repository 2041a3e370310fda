//! Every shipped recipe converts the fixture: a few steps of each stage, verified and exported.

use std::path::Path;
use std::thread;

use candle_core::Device;
use margay::convert::{Options, convert};
use margay::progress::Silent;
use margay::recipe::{self, Recipe};

#[test]
fn every_recipe_converts_the_fixture() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama-tiny");
    let (model, text) = (root.to_str().unwrap(), root.join("train.jsonl"));
    let dir = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for shipped in recipe::list() {
        let name = &shipped.name;
        let stages = Recipe::load(name, &[]).unwrap().recipe.stages;
        let mut sets = vec![
            format!("data.sources=['{}']", text.display()),
            "data.format=auto".into(),
            "verify.tokens=256".into(),
            "data.validation_tokens=256".into(),
            "verify.contexts=[160]".into(),
            "base={}".into(),
        ];
        for stage in &stages {
            let small = [("tokens", 1024), ("seq_len", 128), ("batch", 2), ("eval_every", 100)];
            sets.extend(small.map(|(key, value)| format!("stage.{stage}.{key}={value}")));
        }
        let options = Options {
            model: model.into(),
            recipe: Recipe::load(name, &sets).unwrap(),
            out: dir.path().join(name.replace('/', "-")),
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
        assert_eq!(report.diagnostics.metrics["sum of a row of weights"].layers, [0, 1, 2, 3], "{name}");
        seen += 1;
    }
    assert!(seen > 25, "{seen} recipes");
}
