//! Several recipes in one run: each comes to what it would alone, and what cannot be shared is said or refused.

#![cfg(unix)] // the conversions these are compared with are stopped by signals elsewhere

#[path = "common/byte_tokenizer.rs"]
mod byte_tokenizer;
#[path = "common/tiny.rs"]
#[allow(dead_code)] // the tests here need a part of it
mod tiny;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use candle_core::Device;
use margay::convert::compare::{Comparison, Options, compare};
use margay::convert::export::Manifest;
use margay::error::{Kind, Result};
use margay::progress::{Progress, Silent};
use margay::recipe::Recipe;
use serde_json::json;
use tiny::{Act, Home, Watch, deep};

/// Variants that differ in all that may differ: mixer, what trains, rates, clipping, optimiser and schedule. Gradients
/// are clipped at every step, and plateaus end early.
const WINDOW: &str = r#"
extends = "llama/lolcats"
mixer = { window = 16 }
stage.transfer.lr = 1e-2
stage.transfer.optimizer.clip = 0.05
stage.transfer.schedule = { kind = "plateau", patience = 0, factor = 0.5 }
"#;
const GATED: &str = r#"
extends = "llama/lolcats"
mixer = { kind = "gla", window = { size = 8 } }
stage.transfer.lr = 3e-3
stage.transfer.optimizer = { clip = 0.5, beta2 = 0.95, weight_decay = 0.1 }
stage.transfer.schedule = { kind = "cosine", warmup = 0.2 }
"#;
const LORA: &str = r#"
extends = "llama/lolcats"
mixer = { window = 0 }
layers = [1]
stage.transfer.train = ["mixer", "lora"]
stage.transfer.lora = { targets = ["q_proj", "v_proj"], dropout = 0.1 }
"#;
/// Nothing to train.
const FIXED: &str = r#"
extends = "llama/lolcats"
mixer = { kind = "gla", feature_map = "softmax", gate = { kind = "pooled" }, window = { size = 8, learn = false } }
stages = ["recover"]
"#;

/// What all share; over a file's own keys.
fn sets(home: &Path) -> Vec<String> {
    let source = format!("data.sources=[{:?}]", home.join("text.txt"));
    let keys = ["tokens=3072", "seq_len=64", "batch=4", "eval_every=2"].map(|key| format!("stage.transfer.{key}"));
    [source].into_iter().chain(keys).collect()
}

/// A comparison of files of these names and texts, of the model in `home`.
fn options(home: &Path, files: &[(&str, &str)], sets: &[String]) -> Result<Options> {
    let recipe = |(name, text): &(&str, &str)| {
        let file = home.join(format!("{name}.toml"));
        fs::write(&file, text).unwrap();
        Recipe::load(file.to_str().unwrap(), sets)
    };
    Ok(Options {
        model: home.join("model").to_str().unwrap().into(),
        recipes: files.iter().map(recipe).collect::<Result<_>>()?,
        tokens: None,
        out: None,
        restart: false,
        device: Device::Cpu,
    })
}

fn run(home: &Home, files: &[(&str, &str)], sets: &[String], progress: &dyn Progress) -> Result<Comparison> {
    let options = options(home.0.path(), files, sets)?;
    deep(|| compare(&options, progress))
}

const RESUMED: &str = "MARGAY_TEST_COMPARISON";

/// Two variants whose parameters have the same names, with progress in `home`.
fn resumed(home: &Path) -> Options {
    let other = "extends = \"llama/lolcats\"\nmixer.window = 4\nstage.transfer.lr = 2e-3";
    let options = options(home, &[("window", WINDOW), ("other", other)], &sets(home)).unwrap();
    Options { out: Some(home.join("compared")), ..options }
}

/// Compares in a process that is stopped, as Ctrl-C does it, behind the third step.
#[test]
fn child() {
    let Some(home) = std::env::var_os(RESUMED) else { return };
    let watch = Watch::at(Some(("transfer:3".into(), Act::Stop)));
    let error = deep(|| compare(&resumed(Path::new(&home)), &watch)).unwrap_err();
    assert_eq!(error.kind, Kind::Interrupted);
    assert!(error.message.contains("after step 3 of 12") && error.hint.unwrap().contains("continues"));
}

#[test]
fn a_stopped_comparison_goes_on_to_the_same() {
    let home = Home::tiny();
    let options = resumed(home.0.path());
    let wanted = deep(|| compare(&Options { out: None, ..resumed(home.0.path()) }, &Silent)).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    let child = child.args(["child", "--exact"]).env(RESUMED, home.0.path()).output().unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    assert!(!home.path("compared").exists() && home.path("compared.margay/run.json").is_file());

    // Another comparison does not go on from there.
    let more = Options { tokens: Some(4096), ..resumed(home.0.path()) };
    let error = deep(|| compare(&more, &Silent)).unwrap_err();
    assert!(error.message.contains("unfinished run with another recipe"), "{error}");

    let watch = Watch::default();
    let found = deep(|| compare(&options, &watch)).unwrap();
    let steps = watch.events.into_inner().unwrap().into_iter().filter(|event| event.starts_with("transfer:"));
    assert_eq!(steps.count(), 1 + 9 + 1, "begin, steps, end");
    for (found, wanted) in found.variants.iter().zip(&wanted.variants) {
        assert_eq!((json!(found.layers), found.perplexity), (json!(wanted.layers), wanted.perplexity));
    }
    let written: serde_json::Value =
        serde_json::from_slice(&fs::read(home.path("compared/compare.json")).unwrap()).unwrap();
    assert_eq!(written["variants"][1]["layers"], json!(found.variants[1].layers));
    assert!(home.path("compared/compare.svg").is_file() && !home.path("compared.margay").exists());
    assert!(deep(|| compare(&options, &Silent)).unwrap_err().message.contains("not empty"));
}

#[test]
fn together_as_alone() {
    let home = Home::tiny();
    let sets = sets(home.0.path());
    let files = [("window", WINDOW), ("fixed", FIXED), ("gated", GATED), ("lora", LORA)];
    let together = run(&home, &files, &sets, &Silent).unwrap();
    assert_eq!(together.variants.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), files.map(|f| f.0));
    for (file, variant) in files.iter().zip(&together.variants) {
        if file.0 == "fixed" {
            continue; // alone it has no stage to take sequences of
        }
        let alone = run(&home, &[*file], &sets, &Silent).unwrap();
        let alone = &alone.variants[0];
        assert_eq!(json!(alone.layers), json!(variant.layers), "{}", file.0);
        assert_eq!(alone.perplexity, variant.perplexity, "{}", file.0);
        assert!(variant.loss.best < variant.loss.first && variant.tokens_per_second.is_some(), "{}", file.0);
        assert!(variant.relative_error.best < variant.relative_error.first, "{}", file.0);
    }

    let [window, fixed, gated, lora] = &together.variants[..] else { panic!("four variants") };
    assert_eq!((fixed.trainable, fixed.loss.first, fixed.seconds), (0, fixed.loss.best, 0.0));
    assert_eq!((fixed.layers.len(), fixed.tokens_per_second), (2, None));
    assert_eq!((lora.layers.len(), lora.layers[0].layer, lora.linear_share), (1, 1, 1.0));
    assert!(window.linear_share > 0.0 && window.linear_share < 1.0 && gated.linear_share < 1.0);
    // A linear state stays as it is, the cache of a layer that stays softmax grows.
    assert_eq!(window.state_bytes[0], window.state_bytes[1]);
    assert_eq!(lora.state_bytes[1] - lora.state_bytes[0], (32_768 - 1024) * 2 * 2 * 8 * 4);
    // Three students train; their times and the teacher's are within the whole.
    assert_eq!(together.spent.students.len(), 3);
    assert!(together.spent.teacher > 0.0 && together.spent.total() <= together.seconds);
    assert_eq!((together.tokens, together.steps), (3072, 12));
    assert_eq!(together.figures().len(), 2);
}

#[test]
fn a_variant_is_the_conversion_of_its_recipe() {
    let home = Home::tiny();
    let own = ["stage.recover.tokens=0", "stage.transfer.eval_every=2", "stage.transfer.optimizer.clip=0.05"];
    let job = home.job("out", &own);
    job.convert().unwrap();
    let wanted = Manifest::read(&job.out).unwrap().unwrap().stages["transfer"].clone();

    let found = run(&home, &[("gated", GATED), ("plain", "extends = \"llama/lolcats\"")], &job.sets, &Silent);
    // `--set mixer.window=16` is no key of the gated mixer.
    assert_eq!(found.unwrap_err().kind, Kind::Recipe);
    let sets: Vec<String> = job.sets.iter().filter(|set| !set.starts_with("mixer")).cloned().collect();
    let lolcats = "extends = \"llama/lolcats\"\nmixer.window = 16";
    let found = run(&home, &[("gated", GATED), ("plain", lolcats)], &sets, &Silent).unwrap();
    let losses = |of: fn(&margay::convert::compare::Layer) -> f64| {
        json!(found.variants[1].layers.iter().map(of).collect::<Vec<_>>())
    };
    assert_eq!(losses(|layer| layer.loss.first), wanted["first"]);
    assert_eq!(losses(|layer| layer.loss.best), wanted["best"]);
    for span in ["teacher", "data", "evaluation", "saving"] {
        assert!(wanted["spent"][span].as_f64().unwrap() > 0.0, "{span}");
    }
}

#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);
impl Progress for Warnings {
    fn warn(&self, line: &str) {
        self.0.lock().unwrap().push(line.into());
    }
}

#[test]
fn what_all_share_is_the_first_recipes() {
    let home = Home::tiny();
    let source = sets(home.0.path())[..1].to_vec();
    let stage = "stage.transfer = { tokens = 512, seq_len = 64, batch = 4, lr = 2e-3 }\n";
    let first = format!("extends = \"llama/lolcats\"\n{stage}");
    // Its first stage has another name.
    let other = "extends = \"llama/lolcats\"\nstages = [\"align\"]\nseed = 7\nmixer.window = 4\n
        [stage.align]\ntokens = 512\nseq_len = 64\nbatch = 2\nloss = { hidden_l2 = 1 }\n[data]\nvalidation = 0.5\n";
    let warnings = Warnings::default();
    let found = run(&home, &[("first", &first), ("other", other)], &source, &warnings).unwrap();
    let warnings = warnings.0.into_inner().unwrap();
    let [warning] = &warnings[..] else { panic!("{warnings:?}") };
    for word in ["`other`", "`first`", "`stage.transfer.batch` = 2", "`seed` = 7", "`data`"] {
        assert!(warning.contains(word), "`{word}` in: {warning}");
    }
    assert!(!warning.contains("tokens") && !warning.contains("lr"), "{warning}");
    assert_eq!((found.batch, found.steps), (4, 2));
    let [stage] = &found.variants[1].recipe.stage.values().collect::<Vec<_>>()[..] else { panic!("one stage") };
    assert_eq!((stage.batch, stage.loss.hidden_l2, stage.loss.output_mse), (4, 1.0, 0.0));
    let alone = run(&home, &[("first", &first)], &source, &Silent).unwrap();
    assert_eq!(json!(alone.variants[0].layers), json!(found.variants[0].layers));
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let home = Home::tiny();
    let sets = sets(home.0.path());
    let refused = |files: &[(&str, &str)], kind: Kind, words: &[&str]| {
        let error = run(&home, files, &sets, &Silent).expect_err("it is refused");
        assert_eq!(error.kind, kind, "{error}");
        let text = format!("{error} {}", error.hint.clone().unwrap_or_default());
        words.iter().for_each(|word| assert!(text.contains(word), "`{word}` in: {text}"));
    };
    let whole = "extends = \"llama/lolcats\"\nstages = [\"recover\"]";
    refused(&[("window", WINDOW), ("whole", whole)], Kind::Recipe, &["whole.toml", "layer by layer", "output_mse"]);
    refused(&[("window", WINDOW), ("window", WINDOW)], Kind::Usage, &["two of the recipes are called `window`"]);
    refused(&[], Kind::Usage, &["no recipe"]);
    let textless = run(&home, &[("window", WINDOW)], &sets[1..], &Silent).unwrap_err();
    assert!(textless.message.contains("names no text"), "{textless}");
    let wide = "extends = \"llama/lolcats\"\nlayers = [0, 9]";
    refused(&[("window", WINDOW), ("wide", wide)], Kind::Recipe, &["wide.toml"]);
}
