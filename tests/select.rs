//! Layers that a conversion chooses to keep: what the rankings say, that they survive a kill, and that they are reused.

#![cfg(unix)] // signals

#[path = "common/byte_tokenizer.rs"]
mod byte_tokenizer;
#[path = "common/tiny.rs"]
#[allow(dead_code)] // the tests here need a part of it
mod tiny;

use std::fs;
use std::path::Path;

use candle_core::Device;
use margay::convert::export::Manifest;
use margay::convert::load::Model;
use margay::convert::select::{Ranking, restore};
use margay::data::{Corpus, Tokenizer};
use margay::error::Kind;
use margay::evaluate::{Subject, quality};
use margay::model::Net;
use margay::progress::Silent;
use margay::recipe::{Best, By, Recipe};
use serde_json::json;
use tiny::{Act, Ended, Home, Job, PLAIN, Watch, config, fingerprint, with, write_model};

const LAYERS: usize = 4;

#[test]
fn child() {
    tiny::serve();
}

fn home() -> Home {
    Home::new(&with(config(), "num_hidden_layers", json!(LAYERS)), PLAIN)
}

/// A conversion without recovery.
fn job(home: &Home, out: &str, layers: &str) -> Job {
    home.job(out, &["stage.recover.tokens=0", &format!("layers={layers}")])
}

#[track_caller]
fn done(job: &Job) {
    let report = job.convert().unwrap_or_else(|e| panic!("{e}")).report.expect("it ran to the end");
    assert!(report.passed(), "{:#?}", report.checks);
}

fn ranking(dir: &Path) -> Ranking {
    serde_json::from_slice(&fs::read(dir.join(Ranking::FILE)).unwrap()).unwrap()
}

fn manifest(out: &Path) -> Manifest {
    Manifest::read(out).unwrap().expect("an export has a manifest")
}

/// Layers that an export kept.
fn kept(out: &Path) -> Vec<usize> {
    let model = Model::open(out.to_str().unwrap(), &Silent).unwrap();
    let net = model.net(&Device::Cpu).unwrap();
    (0..LAYERS).filter(|l| net.mixers[*l].is_softmax()).collect()
}

#[test]
fn restore_one_equals_measuring_every_variant() {
    let home = home();
    let (chosen, all) = (job(&home, "chosen", "{keep_best={count=2,tokens=4096}}"), job(&home, "all", "all"));
    done(&chosen);
    done(&all);
    let found = ranking(&chosen.out);

    let recipe = Recipe::load("llama/lolcats", &chosen.sets).unwrap().recipe;
    let model = Model::open(all.out.to_str().unwrap(), &Silent).unwrap();
    let decoder = model.decoder(&Device::Cpu, &Silent).unwrap();
    let tokenizer = Tokenizer::open(&home.model()).unwrap();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let corpus = Corpus::prepare(&recipe.data.sources, &recipe.data, 0, &tokenizer, 64, cache, &Silent).unwrap();
    let rows = corpus.train(64).unwrap().sample(2, 4096);
    assert_eq!(rows.len(), 64);
    let teacher = Net::teacher(model.architecture());
    let mut wanted: Vec<(usize, f64)> = (0..LAYERS)
        .map(|layer| {
            let mut student = model.net(&Device::Cpu).unwrap();
            restore(&mut student, model.architecture(), &[layer]);
            let [student, teacher] = [&student, &teacher].map(|net| Subject { decoder: &decoder, net });
            (layer, quality(student, Some(teacher), &rows, &Silent).unwrap().kl.unwrap())
        })
        .collect();
    wanted.sort_by(|a, b| a.1.total_cmp(&b.1));
    for (found, (layer, kl)) in found.layers.iter().zip(&wanted) {
        assert_eq!(found.layer, *layer, "{wanted:?}");
        // Sums over 64 rows in another order.
        assert!((found.score - kl).abs() < 1e-5 * kl, "layer {layer}: {} is not {kl}", found.score);
    }

    // The export keeps these layers, and says so everywhere.
    assert_eq!(kept(&chosen.out), found.best(2));
    let manifest = manifest(&chosen.out);
    assert!(manifest.files.iter().any(|f| f.file == Ranking::FILE));
    assert_eq!(manifest.stages["select"]["tokens"], 4096);
    let names: Vec<&str> = manifest.tensors.keys().map(String::as_str).collect();
    for layer in 0..LAYERS {
        let added = names.iter().any(|n| n.starts_with(&format!("model.layers.{layer}.self_attn.feature_map")));
        assert_eq!(added, !found.best(2).contains(&layer), "layer {layer}");
    }
    let report = manifest.verify.unwrap();
    let stages = report["stages"].as_array().unwrap();
    let kl = |name: &str| stages.iter().find(|s| s["name"] == name).unwrap()["quality"]["kl"].as_f64().unwrap();
    assert!(kl("selected") < kl("transfer"), "{} and {}", kl("selected"), kl("transfer"));
}

#[test]
fn gates_leave_their_start_and_keep_the_budget() {
    let home = home();
    let mut open = Vec::new();
    for count in [1, 3] {
        let layers = format!("{{keep_best={{count={count},by='gates',tokens=40960}}}}");
        let job = job(&home, &format!("gates{count}"), &layers);
        done(&job);
        let found = ranking(&job.out);
        assert_eq!(found.by, By::Gates);
        assert_eq!(kept(&job.out), found.best(count));
        let r: Vec<f64> = found.layers.iter().map(|r| r.score).collect();
        assert!(r.iter().all(|r| (0.0..=1.0).contains(r)), "{r:?}");
        assert!(r.is_sorted_by(|a, b| a >= b) && r.iter().any(|r| *r < 0.9), "{r:?}");
        open.push(r.iter().sum::<f64>());
    }
    assert!((open[0] - 1.0).abs() < 1.0 && (open[1] - 3.0).abs() < 1.0, "sums of gates: {open:?}");
}

#[test]
fn transfer_loss_ranks_and_recovery_follows() {
    let home = home();
    let job = home.job("out", &["layers={keep_best={fraction=0.25,by='transfer-mse'}}"]);
    done(&job);
    let (found, manifest) = (ranking(&job.out), manifest(&job.out));
    let losses: Vec<f64> = serde_json::from_value(manifest.stages["transfer"]["best"].clone()).unwrap();
    let worst = (0..LAYERS).max_by(|a, b| losses[*a].total_cmp(&losses[*b])).unwrap();
    assert_eq!((found.layers[0].layer, kept(&job.out)), (worst, vec![worst]));
    assert!(found.layers.iter().all(|r| r.score == losses[r.layer]));
    assert!(manifest.stages.contains_key("recover"));
}

#[test]
fn an_interrupted_selection_ends_with_the_same_bits() {
    let home = home();
    for (by, tokens) in [("restore-one-kl", 8192), ("gates", 4096)] {
        let layers = format!("{{keep_best={{count=1,by='{by}',tokens={tokens}}}}}");
        let whole = job(&home, &format!("{by}-whole"), &layers);
        let watch = Watch::default();
        whole.watched(&watch).unwrap();
        let events = watch.events.into_inner().unwrap();
        assert!(events.iter().filter(|e| e.starts_with("select:")).count() >= 5, "{events:?}");

        let cut = job(&home, &format!("{by}-cut"), &layers);
        assert_eq!(cut.child("select:1", Act::Kill), Ended::Killed);
        match cut.child("select:2", Act::Stop) {
            Ended::Failed(error) => assert!(error.starts_with("Interrupted"), "{error}"),
            other => panic!("{other:?}"),
        }
        assert!(!cut.work().join(Ranking::FILE).exists());
        // What was measured before the stop is not measured again, and what follows the selection can be killed too.
        assert_eq!(cut.child("write:0", Act::Kill), Ended::Killed);
        assert_eq!(ranking(&cut.work()), ranking(&whole.out));
        let watch = Watch::default();
        cut.watched(&watch).unwrap();
        assert!(!watch.events.into_inner().unwrap().iter().any(|e| e.starts_with("select:")));
        assert_eq!(fingerprint(&cut.out), fingerprint(&whole.out), "{by}");
    }
}

#[test]
fn a_ranking_serves_another_count_and_nothing_else() {
    let home = home();
    let first = job(&home, "first", "{keep_best={count=1,tokens=512}}");
    done(&first);
    let file = first.out.join(Ranking::FILE);
    let reuse = |more: &str| format!("{{keep_best={{count=3,ranking={file:?}{more}}}}}");
    let second = job(&home, "second", &reuse(""));
    let watch = Watch::default();
    second.watched(&watch).unwrap();
    assert!(!watch.events.into_inner().unwrap().iter().any(|e| e.starts_with("select:")), "it was ranked again");
    assert_eq!(kept(&second.out), ranking(&first.out).best(3));
    assert_eq!(ranking(&second.out), ranking(&first.out));

    let refused = |job: &Job, kind: Kind, words: &[&str]| {
        let error = job.convert().err().unwrap_or_else(|| panic!("{words:?}: was not refused"));
        assert_eq!(error.kind, kind, "{error}");
        words.iter().for_each(|word| assert!(error.message.contains(word), "`{word}` in: {error}"));
        assert!(error.hint.is_some() && !job.out.exists());
    };
    refused(&job(&home, "by", &reuse(",by='gates'")), Kind::Recipe, &["layers.json", "restore-one-kl", "gates"]);
    let mut mixer = job(&home, "mixer", &reuse(""));
    mixer.sets.push("mixer.window=8".into());
    refused(&mixer, Kind::Recipe, &["another mixer"]);
    fs::write(home.path("layers.txt"), "0, 1").unwrap();
    let text = format!("{{keep_best={{count=3,ranking={:?}}}}}", home.path("layers.txt"));
    refused(&job(&home, "text", &text), Kind::Recipe, &["layers.txt", "no ranking"]);
    refused(&job(&home, "gone", "{keep_best={count=3,ranking='gone.json'}}"), Kind::Io, &["gone.json"]);
    let config = with(config(), "num_hidden_layers", json!(LAYERS));
    write_model(&home.model(), &config, PLAIN, |_, values| values[0] += 0.5);
    refused(&job(&home, "other", &reuse("")), Kind::Recipe, &["another model"]);
}

#[test]
fn counts_that_make_no_hybrid_are_refused() {
    let kept = |count, fraction| Best { count, fraction, ..Best::default() }.kept(LAYERS);
    assert_eq!((kept(Some(3), None), kept(None, Some(0.25)), kept(None, Some(0.01))), (Ok(3), Ok(1), Ok(1)));
    assert!(kept(Some(LAYERS), None).unwrap_err().contains("keeps 4 layers"));
    assert!(kept(None, Some(0.9)).unwrap_err().contains("keeps 4 layers"));
    assert!(Ranking::new(By::Gates, String::new(), Recipe::default().mixer, &[0.0, f64::NAN]).is_err());
}
