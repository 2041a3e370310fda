//! The whole conversion, from a checkpoint to a verified export: what it writes, what it refuses, and that a kill at any
//! moment costs nothing.

#![cfg(unix)] // signals

#[path = "common/byte_tokenizer.rs"]
mod byte_tokenizer;
#[path = "common/tiny.rs"]
mod tiny;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use candle_core::Device;
use margay::checkpoint::Checkpoint;
use margay::checkpoint::writer::sha256;
use margay::convert::export::{self, Manifest};
use margay::convert::load::Model;
use margay::convert::verify::{Against, Report, verify};
use margay::error::{Error, Kind};
use margay::progress::Silent;
use safetensors::Dtype;
use serde_json::{Value, json};
use tiny::{Act, Ended, Home, Job, PLAIN, Style, Watch, config, exported, files, fingerprint, with, write_model};

const CPU: Device = Device::Cpu;

#[test]
fn child() {
    tiny::serve();
}

#[track_caller]
fn done(job: &Job) -> Report {
    let converted = job.convert().unwrap_or_else(|e| panic!("{e}\n{}", e.hint.clone().unwrap_or_default()));
    let report = converted.report.expect("it ran to the end");
    assert!(report.passed(), "{:#?}", report.checks);
    assert!(!job.work().exists(), "the work folder stayed");
    report
}

/// Bytes of every tensor.
fn tensors(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.names().map(|name| (name.to_string(), checkpoint.bytes(name).unwrap().to_vec())).collect()
}

fn manifest(out: &Path) -> Manifest {
    Manifest::read(out).unwrap().expect("an export has a manifest")
}

/// Loss of a stage before training and at its best, mean over its parts.
fn losses(out: &Path, stage: &str) -> (f64, f64) {
    let mean = |list: &Value| {
        let list: Vec<f64> = serde_json::from_value(list.clone()).unwrap();
        list.iter().sum::<f64>() / list.len() as f64
    };
    let outcome = &manifest(out).stages[stage];
    (mean(&outcome["first"]), mean(&outcome["best"]))
}

/// The error of a job; it must have these words and leave nothing in `out`.
#[track_caller]
fn refused(job: &Job, kind: Kind, words: &[&str]) -> Error {
    let Err(error) = job.convert() else { panic!("was not refused") };
    assert_eq!(error.kind, kind, "{error}");
    for word in words {
        assert!(error.message.contains(word), "`{word}` in: {error}");
    }
    assert!(!job.out.is_dir(), "half an export lies in the output folder");
    error
}

const STYLES: [Style; 4] = [
    PLAIN,
    Style { dtype: Dtype::F16, tied: None, shard: 20_000 },
    Style { dtype: Dtype::BF16, tied: Some("model.embed_tokens.weight"), shard: 1 << 30 },
    Style { dtype: Dtype::BF16, tied: Some("lm_head.weight"), shard: 1 << 30 },
];

#[test]
fn with_all_layers_kept_every_byte_comes_out_as_it_went_in() {
    for style in STYLES {
        let home = Home::new(&config(), style);
        fs::write(home.model().join("chat_template.jinja"), "{{ messages }}\r\n").unwrap();
        let job = home.job("out", &["layers={keep=[0,1]}", "stage.transfer.tokens=0", "stage.recover.tokens=0"]);
        let report = done(&job);
        assert_eq!(tensors(&job.model), tensors(&job.out));
        let (source, export) = (files(&job.model), files(&job.out));
        for (name, bytes) in source.iter().filter(|(name, _)| !name.contains("safetensors")) {
            assert!(export[name] == *bytes, "{name}");
        }
        let of = |name: &str| report.stages.iter().find(|s| s.name == name).unwrap().quality.perplexity;
        assert_eq!(of("teacher"), of("exported"));
        assert!(report.linear_shares.iter().all(Option::is_none));
    }
}

#[test]
fn a_kept_layer_keeps_its_bytes_and_gets_nothing_new() {
    let home = Home::tiny();
    let job = home.job("out", &["layers={keep=[0]}", "stage.recover.tokens=0"]);
    let report = done(&job);
    let (source, export) = (tensors(&job.model), tensors(&job.out));
    let new: Vec<&String> = export.keys().filter(|name| !source.contains_key(*name)).collect();
    assert!(!new.is_empty() && new.iter().all(|name| name.starts_with("model.layers.1.self_attn.")), "{new:?}");
    for (name, bytes) in &source {
        assert!(export[name] == *bytes, "{name} changed");
    }
    assert!(matches!(report.linear_shares[..], [None, Some(_)]), "{:?}", report.linear_shares);

    // Adapters change the projections they sit on, in every layer, and nothing else.
    let job = home.job("adapted", &["layers=[1]", "stage.recover.lora.targets=[\"v_proj\",\"down_proj\"]"]);
    done(&job);
    let adapted = tensors(&job.out);
    for (name, bytes) in &source {
        let target = name.contains("v_proj") || name.contains("down_proj");
        assert_eq!(adapted[name] == *bytes, !target, "{name}");
    }
}

#[test]
fn a_full_conversion_says_everything_and_reopens() {
    for style in STYLES {
        let home = Home::new(&config(), style);
        let job = home.job("out", &["export.max_shard_size='20KB'"]);
        let report = done(&job);
        let names: Vec<&str> = report.stages.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["teacher", "swapped", "transfer", "recover", "exported"]);
        for stage in ["transfer", "recover"] {
            let (first, best) = losses(&job.out, stage);
            assert!(best < 0.9 * first, "{stage}: {first} to {best}");
        }

        // margay.json: every file, every tensor, every setting.
        let (export, manifest) = (exported(&job.out), manifest(&job.out));
        let listed: BTreeSet<&str> = manifest.files.iter().map(|f| f.file.as_str()).collect();
        let written = export.keys().map(String::as_str).filter(|name| *name != Manifest::FILE);
        assert_eq!(listed, written.collect());
        assert!(listed.contains("model.safetensors.index.json"), "{listed:?}");
        for file in &manifest.files {
            let bytes = &export[&file.file];
            assert_eq!((file.bytes, &file.sha256), (bytes.len() as u64, &sha256(bytes)), "{}", file.file);
        }
        let headers = Checkpoint::open(&job.out).unwrap();
        assert!(headers.names().eq(manifest.tensors.keys().map(String::as_str)));
        assert_eq!((manifest.source.as_str(), manifest.recipe_origin.as_str()), ("model", "llama/lolcats"));
        assert_eq!(manifest.recipe.stage["transfer"].tokens, 3072);
        assert_eq!(manifest.stages["recover"]["tokens"], 3072);
        assert_eq!(manifest.data["sources"], json!(["text.txt"]));
        assert!(manifest.merged.as_ref().unwrap().weights == 8 && manifest.verify.is_some());
        let machine = home.0.path().to_str().unwrap();
        for (name, bytes) in &export {
            assert!(
                !String::from_utf8_lossy(bytes).replace(&format!("{machine}/text.txt"), "").contains(machine),
                "{name}"
            );
        }

        // The card: recipe and tables.
        let card = String::from_utf8(export["README.md"].clone()).unwrap();
        let recipe = manifest.recipe.to_toml();
        let rows = names.iter().map(|name| format!("| {name} |"));
        let rest = ["library_name: margay", "## Verification", "| 48 |", recipe.as_str()].map(String::from);
        for part in rows.chain(rest) {
            assert!(card.contains(&part), "`{part}` in {card}");
        }

        // config.json: the source's with what makes the difference.
        let read = |dir: &Path| -> Value { serde_json::from_slice(&files(dir)["config.json"]).unwrap() };
        let (was, is) = (read(&job.model), read(&job.out));
        for (key, value) in
            was.as_object().unwrap().iter().filter(|(k, _)| !["architectures", "model_type"].contains(&k.as_str()))
        {
            assert_eq!(is[key], *value, "{key}");
        }
        assert_eq!((&is["model_type"], &is["linearization"]["base_model_type"]), (&json!("margay"), &json!("llama")));
        assert_eq!(is["linearization"]["layers"], json!([0, 1]));

        // Reopened from disk alone it is the model that was in memory.
        let model = Model::open(job.out.to_str().unwrap(), &Silent).unwrap();
        let (decoder, net) = (model.decoder(&CPU, &Silent).unwrap(), model.net(&CPU).unwrap());
        let wanted = manifest.reference.clone().unwrap();
        let found = export::reference(&decoder, &net, &wanted.ids).unwrap();
        assert_eq!(found.top[0].0, wanted.top[0].0);
        assert!((found.top[0].1 - wanted.top[0].1).abs() < 1e-4);
        let again = |dir: &Path| verify(dir, &manifest, alone(), &CPU, &Silent).unwrap();
        assert!(again(&job.out).passed());

        // One changed byte is seen.
        let shard = job.out.join(manifest.files.iter().map(|f| &f.file).find(|f| f.ends_with(".safetensors")).unwrap());
        let mut bytes = fs::read(&shard).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&shard, bytes).unwrap();
        assert!(!again(&job.out).passed());
    }
}

/// Nothing but the export itself to verify against.
fn alone<'a>() -> Against<'a> {
    Against { student: None, teacher: None, source: None, merged: &[], valid: None, stages: Vec::new(), contexts: &[] }
}

/// Everything a resumed run must bring back: uneven accumulation, dropout, decay, teacher, schedules with memory.
const HARD: [&str; 12] = [
    "transfer.train=['mixer','v_proj']",
    "transfer.micro_batch=3",
    "transfer.eval_every=2",
    "transfer.schedule={kind='plateau',patience=0,factor=0.5}",
    "recover.train=['lora','mixer']",
    "recover.micro_batch=3",
    "recover.loss.logit_kl=0.5",
    "recover.lr_mixer=1e-3",
    "recover.lora.dropout=0.2",
    "recover.optimizer.weight_decay=0.01",
    "recover.schedule={kind='cosine',warmup=0.2}",
    // Trains v_proj on, beside a second LoRA, at half the length.
    "tune={train=['lora','v_proj'],loss={next_token=1,logit_kl=0.2},kl={direction='reverse',top_k=5,temperature=2},\
     tokens=1024,seq_len=32,batch=4,lr=1e-3,eval_every=4,lora={rank=2,dropout=0.1},schedule={kind='wsd'}}",
];

fn hard(home: &Home, out: &str) -> Job {
    let sets: Vec<String> = HARD.iter().map(|set| format!("stage.{set}")).collect();
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    home.job(out, &[&sets[..], &["stages=['transfer','recover','tune']"]].concat())
}

/// What the tests of interrupted runs are measured against.
struct Whole {
    home: Home,
    fingerprint: BTreeMap<String, String>,
    /// The events of a run, in order.
    events: Vec<String>,
    time: Duration,
}

fn uninterrupted() -> &'static Whole {
    static RUN: OnceLock<Whole> = OnceLock::new();
    RUN.get_or_init(|| {
        let home = Home::tiny();
        done(&hard(&home, "warm")); // the token cache is there from now on
        let (watch, started) = (Watch::default(), Instant::now());
        let job = hard(&home, "whole");
        job.watched(&watch).unwrap();
        let print = fingerprint(&job.out);
        assert!(print.contains_key("model.safetensors") && print.contains_key("training.jsonl"), "{print:?}");
        assert_eq!(print, fingerprint(&home.path("warm")), "the same run twice");
        Whole { home, fingerprint: print, events: watch.events.into_inner().unwrap(), time: started.elapsed() }
    })
}

#[track_caller]
fn finishes_like_the_uninterrupted(job: &Job) {
    done(job);
    assert_eq!(fingerprint(&job.out), uninterrupted().fingerprint);
}

#[test]
fn a_run_stopped_in_every_stage_ends_with_the_same_bits() {
    let home = &uninterrupted().home;
    let mut job = hard(home, "stopped");
    let interrupted = |job: &Job, event: &str, words: &str| match job.child(event, Act::Stop) {
        Ended::Failed(error) => assert!(error.starts_with("Interrupted") && error.contains(words), "{error}"),
        other => panic!("{event}: {other:?}"),
    };
    interrupted(&job, "measure:2", "measured");
    interrupted(&job, "transfer:3", "`transfer` after step 3 of 12");
    interrupted(&job, "transfer:4", "`transfer` after step 7 of 12");
    assert_eq!(job.states("transfer").len(), 2);
    assert_eq!(job.child("transfer:2", Act::Kill), Ended::Killed);

    // A torn newest state: the one before it is used.
    let newest = job.states("transfer").pop().unwrap();
    let bytes = fs::read(&newest).unwrap();
    fs::write(&newest, &bytes[..bytes.len() / 2]).unwrap();
    job.until = true;
    assert!(job.convert().unwrap().report.is_none());
    assert!(job.work().is_dir() && !job.out.exists());
    job.until = false;

    interrupted(&job, "recover:5", "`recover` after step 5 of 12");
    interrupted(&job, "recover:4", "`recover` after step 9 of 12");
    interrupted(&job, "tune:3", "`tune` after step 3 of 8");
    assert_eq!(job.child("tune:2", Act::Kill), Ended::Killed);
    interrupted(&job, "write:2", "while writing");
    finishes_like_the_uninterrupted(&job);
}

#[test]
fn a_kill_at_any_event_costs_nothing() {
    let Whole { home, events, .. } = uninterrupted();
    // One of each stage at least, and what comes between.
    let mut moments: Vec<&String> = (0..4).map(|i| &events[(7 + i * events.len()) / 4 % events.len()]).collect();
    let of = |stage: &str, n: usize| events.iter().filter(|e| e.starts_with(stage)).nth(n).unwrap();
    moments.extend([
        of("transfer", 6),
        of("recover", 9),
        of("tune", 5),
        of("write", 3),
        of("write", 0),
        events.last().unwrap(),
    ]);
    for (n, moment) in moments.into_iter().enumerate() {
        let job = hard(home, &format!("killed{n}"));
        assert_eq!(job.child(moment, Act::Kill), Ended::Killed, "{moment}");
        assert!(!job.out.exists(), "{moment}: half an export");
        finishes_like_the_uninterrupted(&job);
    }
}

#[test]
fn kills_at_random_times_cost_nothing() {
    let Whole { home, time, .. } = uninterrupted();
    let job = hard(home, "shot");
    let seed = std::process::id() as u64;
    println!("seed {seed}");
    let mut kills = 0;
    for n in 0..6 {
        let mut child = job.command().stdout(std::process::Stdio::piped()).spawn().unwrap();
        let share = (seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(11 * n) >> 40) as f64 / (1 << 24) as f64;
        std::thread::sleep(time.mul_f64(share));
        child.kill().unwrap();
        let ended = Ended::of(child.wait_with_output().unwrap());
        if ended == Ended::Done {
            break;
        }
        assert_eq!(ended, Ended::Killed);
        kills += 1;
    }
    println!("{kills} kills");
    match job.out.exists() {
        true => assert_eq!(fingerprint(&job.out), uninterrupted().fingerprint),
        false => finishes_like_the_uninterrupted(&job),
    }
    // Killed after the export had moved in: the refusal takes along what the kill left.
    refused_as_finished(&job);
}

#[track_caller]
fn refused_as_finished(job: &Job) {
    let before = files(&job.out);
    let error = job.convert().err().expect("a finished output is refused");
    assert!(error.kind == Kind::Output && error.message.contains("finished conversion"), "{error}");
    assert!(files(&job.out) == before && !job.work().exists());
}

#[test]
fn only_the_same_run_is_continued() {
    let home = Home::tiny();
    let mut job = home.job("out", &[]);
    job.until = true;
    job.convert().unwrap();
    job.until = false;

    let mut other = home.job("out", &["stage.recover.lr=2e-2"]);
    let error = refused(&other, Kind::Output, &["out.margay", "recipe", "lr = 0.02"]);
    assert!(error.hint.unwrap().contains("--restart"));
    let text = fs::read_to_string(home.path("text.txt")).unwrap();
    fs::write(home.path("text.txt"), text.replace("owl", "elk")).unwrap();
    refused(&job, Kind::Output, &["out.margay", "data"]);
    fs::write(home.path("text.txt"), text).unwrap();

    other.restart = true;
    done(&other);
    refused_as_finished(&other);
    let mut restarted = other.clone();
    restarted.restart = true;
    refused_as_finished(&restarted);
    // A restart of another run leaves no trace of the one it threw away.
    let clean = home.job("clean", &["stage.recover.lr=2e-2"]);
    done(&clean);
    assert_eq!(fingerprint(&clean.out), fingerprint(&other.out));
}

#[test]
fn a_full_disk_is_one_clear_error_and_costs_nothing() {
    let home = &uninterrupted().home;
    let job = hard(home, "full");
    for (event, file) in
        [("transfer:10", "00000012.safetensors"), ("recover:3", "metrics.jsonl"), ("write:0", "model.safetensors")]
    {
        let limit = if file == "metrics.jsonl" { 200 } else { 4000 };
        match job.child(event, Act::Limit(limit)) {
            Ended::Failed(error) => {
                assert!(error.starts_with("Output: cannot write") && error.contains(file), "{error}")
            }
            other => panic!("{event}: {other:?}"),
        }
        assert!(!job.out.exists());
    }
    finishes_like_the_uninterrupted(&job);
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama-tiny");
    let home = Home::tiny();
    let run = |model: &Path, out: String, threads: &str| {
        let job = Job { model: model.into(), ..hard(&home, &out) };
        let output = job.command().env("RAYON_NUM_THREADS", threads).output().unwrap();
        assert_eq!(Ended::of(output), Ended::Done);
        fingerprint(&job.out)
    };
    for (n, model) in [home.model(), fixture].iter().enumerate() {
        let [one, two, again] = ["1", "2", "2"].map(|threads| {
            let out = format!("{n}-{threads}-{}", home.path(&format!("{n}-{threads}-0")).exists() as u8);
            run(model, out, threads)
        });
        assert_eq!(two, again, "{}: twice the same", model.display());
        assert_eq!(one, two, "{}: one thread and two", model.display());
    }
}

#[test]
fn every_option_of_training_trains() {
    let home = Home::tiny();
    let alpaca = home.path("alpaca.json");
    let row = |i: usize| json!({"instruction": format!("Say {i}"), "input": "", "output": format!("{i} {i} and {i}.")});
    fs::write(&alpaca, json!((0..120).map(row).collect::<Vec<_>>()).to_string()).unwrap();
    let alpaca = format!("data.sources=[{alpaca:?}]");
    let mut base = None;
    let runs: [(&str, &[&str], &str); 7] = [
        ("plain", &["stage.recover.tokens=0"], "transfer"),
        ("masked", &[&alpaca, "stage.transfer.seq_len=32"], "recover"),
        ("unmasked", &[&alpaca, "data.mask_prompt=false"], "recover"),
        ("weights", &["stage.transfer.loss={attention_ce=1,output_mse=0}", "stage.recover.tokens=0"], "transfer"),
        ("kl", &["stage.recover.loss={logit_kl=1,next_token=0}", "stage.recover.lora.dropout=0.1"], "recover"),
        ("frozen", &[], "recover"),
        ("mixers", &["stage.recover.train=['lora','mixer']"], "recover"),
    ];
    for (name, sets, stage) in runs {
        let job = home.job(name, sets);
        done(&job);
        let (first, best) = losses(&job.out, stage);
        assert!(best < first, "{name}: {first} to {best}");

        let mut added = tensors(&job.out);
        added.retain(|tensor, _| tensor.contains("feature_map") || tensor.contains("window"));
        assert!(!added.is_empty());
        let plain: &BTreeMap<String, Vec<u8>> = base.get_or_insert_with(|| added.clone());
        match name {
            "frozen" | "kl" => assert!(added == *plain, "{name}: recovery leaves the mixers alone"),
            "mixers" => assert!(added != *plain, "recovery trains the mixers"),
            _ => {}
        }
    }
    let kl = |name: &str| {
        manifest(&home.path(name)).verify.unwrap()["stages"].as_array().unwrap().last().unwrap()["quality"]["kl"]
            .as_f64()
    };
    assert!(kl("kl") < kl("frozen"), "KL {:?} where it is trained, {:?} where not", kl("kl"), kl("frozen"));
}

/// A list of stages of one's own: two sets of LoRA and projections in full are merged to what they were together, and the
/// last stage learns the answers of its own text.
#[test]
fn the_last_stage_may_have_its_own_text() {
    let home = Home::tiny();
    let alpaca = home.path("chats.json");
    let row = |i: usize| json!({"instruction": format!("Say {i}"), "input": "", "output": format!("{i} {i} and {i}.")});
    fs::write(&alpaca, json!((0..120).map(row).collect::<Vec<_>>()).to_string()).unwrap();
    let run = |name: &str, data: &str| {
        let tune = format!(
            "stage.tune={{train=['mixer','lora','o_proj'],loss={{next_token=1}},tokens=2048,seq_len=64,batch=4,lr=3e-3,\
             eval_every=4,data={{sources=[{alpaca:?}]{data}}}}}"
        );
        let align = "stage.align={train=['mixer','q_proj','k_proj','v_proj','o_proj'],loss={hidden_l2=1},tokens=3072,\
                     seq_len=64,batch=4,lr=3e-4,lr_mixer=1e-2,eval_every=2}";
        let job = home.job(name, &["layers=[1]", align, &tune, "stages=['align','recover','tune']"]);
        let report = done(&job);
        let names: Vec<&str> = report.stages.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["teacher", "swapped", "align", "recover", "tune", "exported"]);
        let manifest = manifest(&job.out);
        assert!(manifest.stages.keys().eq(["align", "recover", "tune"]), "in the order they ran");
        assert_eq!(manifest.data["sources"], json!(["text.txt"]));
        assert_eq!(manifest.data["stages"]["tune"]["sources"], json!(["chats.json"]));
        for stage in ["align", "recover", "tune"] {
            let (first, best) = losses(&job.out, stage);
            assert!(best < 0.99 * first, "{stage}: {first} to {best}");
        }
        let merged = manifest.merged.unwrap();
        assert_eq!(merged.weights, 8, "q, k, v, o of both layers");
        // f32 sums in another order.
        assert!(merged.max_logit_difference < 1e-5 * merged.max_logit.max(1.0), "{}", merged.max_logit_difference);
        tensors(&job.out)
    };
    let (answers, all) = (run("answers", ""), run("all", ",mask_prompt=false"));
    assert!(answers != all, "without its mask the last stage learns something else");
}

/// Norms, embedding and head by name: merged, exported once where they are one tensor, and kept apart in the adapter.
#[test]
fn norms_embeddings_and_head_train_by_name() {
    let all =
        "stage.recover.train=['mixer','input_layernorm','post_attention_layernorm','norm','embed_tokens','lm_head']";
    // Apart; tied; tied and saved under both names, or under that of the head alone.
    let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
    for (case, tied, twice) in [
        ("apart", None, false),
        ("tied", Some(embedding), false),
        ("both", Some(embedding), true),
        ("head", Some(head), false),
    ] {
        let home = Home::new(&config(), Style { tied, ..PLAIN });
        if twice {
            let file = home.model().join("model.safetensors");
            let mut tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
            tensors.insert(head.into(), tensors[embedding].clone());
            candle_core::safetensors::save(&tensors, &file).unwrap();
        }
        let job = home.job(case, &["layers=[1]", all]);
        let report = done(&job);
        assert!(report.passed(), "{case}");
        let (first, best) = losses(&job.out, "recover");
        assert!(best < first, "{case}: {first} to {best}");

        let manifest = manifest(&job.out);
        let merged = manifest.merged.as_ref().unwrap();
        assert_eq!(merged.weights, if tied.is_some() { 4 } else { 5 }, "{case}");
        assert!(merged.max_logit_difference < 1e-5 * merged.max_logit.max(1.0), "{case}");
        let (before, after) = (tensors(&home.model()), tensors(&job.out));
        let changed: Vec<&str> = before
            .iter()
            .filter(|(name, bytes)| after.get(*name) != Some(bytes))
            .map(|(name, _)| name.as_str())
            .collect();
        let mut wanted = vec![
            "model.layers.1.input_layernorm.weight",
            "model.layers.1.post_attention_layernorm.weight",
            "model.norm.weight",
        ];
        wanted.extend(if tied == Some(head) {
            vec![head]
        } else if tied.is_some() && !twice {
            vec![embedding]
        } else {
            vec![embedding, head]
        });
        wanted.sort();
        assert_eq!(changed, wanted, "{case}");
        assert_eq!(
            [embedding, head].iter().filter(|name| after.contains_key(**name)).count(),
            if tied.is_some() { 1 } else { 2 },
            "{case}"
        );
        let apart =
            candle_core::safetensors::load(job.out.join("adapter/changed.safetensors"), &candle_core::Device::Cpu);
        assert_eq!(apart.unwrap().len(), merged.weights, "{case}");
    }
}

#[test]
fn only_a_stage_of_the_recipe_is_stopped_after() {
    let home = Home::tiny();
    let mut job = home.job("out", &["stages=['recover']"]);
    job.until = true; // after transfer
    let error = refused(&job, Kind::Usage, &["no stage `transfer`"]);
    assert!(error.hint.unwrap().contains("plan, swap, recover, merge, export"));
}

#[test]
fn an_explosion_names_its_place_and_keeps_the_last_good_state() {
    let home = Home::tiny();
    let job = home.job("out", &["stage.transfer.lr=1e30"]);
    refused(&job, Kind::Training, &["model.layers.0.self_attn.", "step 1 ", "`transfer`"]);
    let job = home.job("late", &["stage.recover.lr=1e30"]);
    let error = refused(&job, Kind::Training, &["model.layers.0.self_attn.", "lora_", "step 1 ", "`recover`"]);
    assert!(error.hint.unwrap().contains("stage.recover.lr"));
    assert_eq!(job.states("transfer").len(), 1, "what transfer reached is there");

    // Weights that are finite, activations that are not: the loss itself is named.
    let home = Home::tiny();
    write_model(&home.model(), &config(), PLAIN, |name, values| {
        if name.contains("up_proj") || name.contains("gate_proj") {
            values.iter_mut().for_each(|x| *x *= 1e25);
        }
    });
    let job = home.job("out", &[]);
    refused(&job, Kind::Training, &["validation loss", "layer 1", "step 0 ", "`transfer`", "model.layers.1.self_attn"]);
}

#[test]
fn bad_input_is_one_clear_error_and_leaves_no_output() {
    let home = Home::tiny();
    let job = home.job("out", &[]);
    let data = |name: &str, bytes: &[u8]| {
        fs::write(home.path(name), bytes).unwrap();
        home.job("out", &[&format!("data.sources=[{:?}]", home.path(name))])
    };
    refused(&data("empty.txt", b""), Kind::Data, &["empty.txt", "empty"]);
    refused(&data("latin.txt", b"caf\xe9 au lait\n"), Kind::Data, &["latin.txt", "UTF-8"]);
    refused(&data("short.txt", b"Not much.\n"), Kind::Data, &["short.txt", "11 tokens"]);
    refused(&home.job("out", &["data.sources=['nowhere.txt']"]), Kind::Io, &["nowhere.txt"]);
    refused(&home.job("out", &["data.sources=[]"]), Kind::Data, &["no text"]);
    refused(&home.job("out", &["stage.transfer.batch=100000"]), Kind::Data, &["100000 sequences"]);
    refused(&home.job("out", &["layers=[2]"]), Kind::Recipe, &["layer 2"]);

    let file = home.path("file");
    fs::write(&file, "").unwrap();
    let under = Job { out: file.join("out"), ..job.clone() };
    refused(&under, Kind::Output, &["file/out"]);
    fs::create_dir(home.path("taken")).unwrap();
    fs::write(home.path("taken/mine.txt"), "precious").unwrap();
    let error = home.job("taken", &[]).convert().err().unwrap();
    assert!(error.kind == Kind::Output && error.message.contains("taken"), "{error}");
    assert_eq!(files(&home.path("taken")).len(), 1);
    refused(&Job { model: home.path("gone"), ..job.clone() }, Kind::Checkpoint, &["gone"]);

    let refused_model = |config: &Value, edit: &dyn Fn(&str, &mut Vec<f32>), kind: Kind, words: &[&str]| {
        let home = Home::tiny();
        write_model(&home.model(), config, PLAIN, edit);
        let job = home.job("out", &[]);
        refused(&job, kind, words);
        job
    };
    let poison = |bad: f32| {
        move |name: &str, values: &mut Vec<f32>| {
            if name == "model.layers.1.mlp.up_proj.weight" {
                values[7] = bad;
            }
        }
    };
    for bad in [f32::NAN, f32::INFINITY] {
        refused_model(
            &config(),
            &poison(bad),
            Kind::Checkpoint,
            &["model.layers.1.mlp.up_proj.weight", "model.safetensors", "not finite"],
        );
    }
    refused_model(
        &with(config(), "vocab_size", json!(200)),
        &|_, _| {},
        Kind::Checkpoint,
        &["vocabulary mismatch", "257", "200"],
    );
    let home = Home::tiny();
    let job = home.job("out", &[]);
    let text = fs::read_to_string(job.model.join("config.json")).unwrap();
    let other = text.replace("LlamaForCausalLM", "MambaForCausalLM").replace(r#""llama""#, r#""mamba""#);
    fs::write(job.model.join("config.json"), other).unwrap();
    refused(&job, Kind::Config, &["MambaForCausalLM", "mamba", "config.json"]);
    fs::write(job.model.join("config.json"), text).unwrap();
    fs::remove_file(job.model.join("tokenizer.json")).unwrap();
    refused(&job, Kind::Checkpoint, &["tokenizer.json"]);
}

#[test]
fn a_converted_model_is_not_converted_again() {
    let home = Home::tiny();
    let job = home.job("out", &["stage.recover.tokens=0"]);
    done(&job);
    let again = Job { model: job.out.clone(), ..home.job("again", &[]) };
    refused(&again, Kind::Config, &["converted already", "`model`"]);
    assert!(!again.work().exists());
}
