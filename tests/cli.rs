//! The program as users see it: exit code, stdout and stderr.
//!
//! `INSTA_UPDATE=always cargo test --test cli` writes the snapshots anew.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use insta::assert_snapshot;
use serde_json::Value;
use tempfile::TempDir;

const FIXTURE: &str = "fixtures/llama-tiny";

/// The program in the folder of the project, far from the user's settings and caches.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_margay"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null()).env("COLUMNS", "100");
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR"));
    command.env("MARGAY_CACHE", cache.join("tokens")).env("HF_HOME", cache.join("hub")).env("HF_HUB_OFFLINE", "1");
    for name in ["HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "NO_COLOR", "CLICOLOR_FORCE"] {
        command.env_remove(name);
    }
    command
}

fn margay(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What stdout says where all goes well.
#[track_caller]
fn says(args: &[&str]) -> String {
    let output = margay(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

#[track_caller]
fn json(args: &[&str]) -> Value {
    serde_json::from_str(&says(args)).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// Exit code, stdout and stderr in one text, temporary folders named `[DIR]`.
fn shown(args: &[&str], dir: &Path) -> String {
    let output = margay(args);
    let code = output.status.code().unwrap();
    let text = format!("exit: {code}\n----- stdout\n{}----- stderr\n{}", stdout(&output), stderr(&output));
    text.replace(&dir.display().to_string(), "[DIR]")
}

/// A copy of the fixture without `missing`.
fn copy_without(missing: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURE)).unwrap().flatten() {
        if entry.file_name() != missing {
            fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    dir
}

#[test]
fn help() {
    assert_snapshot!("help", says(&["--help"]));
    for name in [
        "convert",
        "compare",
        "plan",
        "inspect",
        "verify",
        "eval",
        "report",
        "generate",
        "recipe",
        "doctor",
        "completions",
        "export",
    ] {
        assert_snapshot!(format!("help-{name}"), says(&[name, "--help"]));
    }
    for name in ["list", "show", "copy", "check", "schema"] {
        assert_snapshot!(format!("help-recipe-{name}"), says(&["recipe", name, "--help"]));
    }
}

#[test]
fn help_starts_fast() {
    let run = |_| {
        let started = Instant::now();
        says(&["--help"]);
        started.elapsed()
    };
    // The fastest of a few, since other work may slow any one of them.
    let fastest = (0..10).map(run).min().unwrap();
    assert!(fastest < Duration::from_millis(20), "{fastest:?}");
}

#[test]
fn comparing_recipes() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("gated.toml").display().to_string();
    fs::write(&file, "extends = \"tiny/lolcats\"\nmixer.kind = \"gla\"\nstage.transfer.lr = 1e-3\n").unwrap();
    let out = dir.path().join("out").display().to_string();
    let recipes = format!("tiny/lolcats,{file}");
    let sets = ["--set", "data.validation_tokens=512", "--set", "verify.tokens=512"];
    let args = [&["compare", FIXTURE, "--recipes", &recipes, "--tokens", "2048", "--out", &out, "--json"], &sets[..]];
    let found = json(&args.concat());
    assert_eq!(
        keys(&found),
        [
            "margay",
            "model",
            "device",
            "data",
            "tokens",
            "steps",
            "seq_len",
            "batch",
            "teacher_perplexity",
            "variants",
            "spent",
            "seconds"
        ]
    );
    let [first, gated] = &found["variants"].as_array().unwrap()[..] else { panic!("two variants") };
    assert_eq!((&first["name"], &gated["name"]), (&"tiny/lolcats".into(), &"gated".into()));
    assert_eq!(
        keys(gated),
        [
            "name",
            "mixer",
            "trainable",
            "loss",
            "relative_error",
            "linear_share",
            "layers",
            "state_bytes",
            "seconds",
            "tokens_per_second",
            "perplexity",
            "recipe"
        ]
    );
    assert_eq!(keys(&gated["layers"][0]), ["layer", "loss", "relative_error", "linear_share"]);
    let out = dir.path().join("out");
    let written: Value = serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    assert_eq!(written, found);
    let drawn = fs::read_to_string(out.join("compare.svg")).unwrap();
    assert!(drawn.contains("gated: ") && drawn.contains("Share of the linear branch"), "{drawn}");
    // A folder that is there is not written into.
    assert_snapshot!("compare-taken", shown(args[0], dir.path()));
}

#[test]
fn recipes() {
    assert_snapshot!("recipe-list", says(&["recipe", "list"]));
    assert_snapshot!("recipe-show", says(&["recipe", "show", "llama/lolcats"]));
    let dir = TempDir::new().unwrap();
    let family = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families/gemma2.json");
    let family: Value = serde_json::from_slice(&fs::read(family).unwrap()).unwrap();
    fs::write(dir.path().join("config.json"), family["config"].to_string()).unwrap();
    let fitting = json(&["recipe", "list", "--json", "--model", dir.path().to_str().unwrap()]);
    let names: Vec<&str> = fitting.as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(names[..3], ["gemma2/liger-gla", "gemma2/lizard", "gemma2/lolcats"]);
    assert!(names.contains(&"llama/kda") && names.contains(&"tiny/lolcats"));
    for absent in ["llama/lolcats", "llama/gsa", "llama/3.2-1b-lolcats", "qwen2/lolcats"] {
        assert!(!names.contains(&absent), "{absent} is its own, does not serve it, or is another model's");
    }
    let listed = json(&["recipe", "list", "--json"]);
    assert!(listed.as_array().unwrap().iter().any(|r| r["name"] == "tiny/lolcats" && r["about"] != ""));
    assert_eq!(json(&["recipe", "schema"])["type"], "object");
}

#[test]
fn a_shown_recipe_is_the_recipe() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("own.toml").display().to_string();
    let text = says(&["recipe", "show", "llama/lolcats", "--set", "stage.transfer.tokens=20000"]);
    assert!(text.contains("tokens = 20000"));
    fs::write(&file, &text).unwrap();
    says(&["recipe", "check", &file]);
    assert_eq!(says(&["recipe", "show", &file]), text);
}

#[test]
fn copying_a_recipe_overwrites_nothing() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("own.toml").display().to_string();
    says(&["recipe", "copy", "tiny/lolcats", &file]);
    let written = fs::read_to_string(&file).unwrap();
    assert!(written.contains("[stage.transfer]"));
    assert_snapshot!("recipe-copy-again", shown(&["recipe", "copy", "llama/lolcats", &file], dir.path()));
    assert_eq!(fs::read_to_string(&file).unwrap(), written);
}

#[test]
fn a_wrong_recipe_shows_all_its_problems() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("own.toml").display().to_string();
    fs::write(&file, "extends = \"llama/lolcats\"\nsede = 1\n\n[mixer]\nwindw = 32\n\n[stage.transfer]\nlr = \"fast\"\n\n[recover]\nlr = 1\n")
        .unwrap();
    assert_snapshot!("recipe-check", shown(&["recipe", "check", &file], dir.path()));
}

#[test]
fn refusals() {
    let none = Path::new("/nowhere");
    let tiny = ["--recipe", "tiny/lolcats", "--out", "unused"];
    let convert = |model: &'static str, more: &[&'static str]| [&["convert", model], more].concat();
    assert_snapshot!("no-model", shown(&convert("./no/model", &tiny), none));
    assert_snapshot!("no-recipe", shown(&convert(FIXTURE, &tiny[2..]), none));
    assert_snapshot!("recipe-typo", shown(&convert(FIXTURE, &["--recipe", "tiny/lolcat", "--out", "unused"]), none));
    let set = [&tiny[..], &["--set", "stage.transfer.tokns=1"]].concat();
    assert_snapshot!("set-typo", shown(&convert(FIXTURE, &set), none));
    assert_snapshot!("out-taken", shown(&convert(FIXTURE, &["--recipe", "tiny/lolcats", "--out", "src"]), none));
    assert_snapshot!("no-device", shown(&convert(FIXTURE, &[&tiny[..], &["--device", "tpu"]].concat()), none));
    assert_snapshot!("no-command", shown(&["convrt"], none));
    assert_snapshot!("nothing-to-measure", shown(&["eval", FIXTURE], none));
    assert_snapshot!("no-export", shown(&["verify", FIXTURE], none));
    if !cfg!(feature = "cuda") {
        assert_snapshot!("no-cuda", shown(&convert(FIXTURE, &[&tiny[..], &["--device", "cuda:1"]].concat()), none));
    }
    assert!(!Path::new(env!("CARGO_MANIFEST_DIR")).join("unused.margay").exists());
}

#[test]
fn a_model_without_its_tokenizer() {
    let dir = copy_without("tokenizer.json");
    let model = dir.path().display().to_string();
    assert_snapshot!("no-tokenizer", shown(&["generate", &model, "--prompt", "x"], dir.path()));
    let output = margay(&["eval", &model, "--data", "fixtures/llama-tiny/valid.jsonl"]);
    assert_eq!(output.status.code(), Some(1));
    says(&["plan", &model, "--recipe", "tiny/lolcats"]);
}

#[test]
fn plan_and_inspection() {
    let plan = json(&["plan", FIXTURE, "--recipe", "tiny/lolcats", "--json"]);
    let wanted = ["model", "recipe", "device", "layers", "tensors", "fates", "stages", "verify", "disk", "warnings"];
    assert_eq!(keys(&plan), wanted);
    assert_eq!(plan["layers"]["converted"], serde_json::json!([0, 1, 2, 3]));
    let stages: Vec<&Value> = plan["stages"].as_array().unwrap().iter().map(|s| &s["name"]).collect();
    assert_eq!(stages, ["transfer", "recover"]);
    let gpu = json(&["plan", FIXTURE, "--recipe", "tiny/lolcats", "--device", "cuda", "--json"]);
    assert_eq!((&plan["device"], &gpu["device"]), (&"cpu".into(), &"cuda".into()));

    let inspection = json(&["inspect", FIXTURE, "--json"]);
    assert_eq!((&inspection["family"], &inspection["mixers"][3]), (&"llama".into(), &"softmax".into()));
    for command in [&["plan", FIXTURE, "--recipe", "tiny/lolcats"][..], &["inspect", FIXTURE]] {
        let text = says(command);
        assert!(text.lines().all(|line| line.trim_end() == line && !line.contains('\x1b')), "{text}");
        assert!(text.contains("919 k"), "{text}");
    }
}

#[test]
fn evaluation() {
    let text = "fixtures/llama-tiny/valid.jsonl";
    let base = ["eval", FIXTURE, "--data", text, "--seq-len", "128", "--tokens", "1024", "--json"];
    let plain = json(&base);
    assert_eq!(keys(&plain), ["tokens", "perplexity", "bits_per_byte"]);
    assert_eq!(plain["tokens"], 1024);

    let two = TempDir::new().unwrap();
    let prompts = two.path().join("recall.jsonl");
    let all = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURE).join("recall.jsonl")).unwrap();
    fs::write(&prompts, all.lines().take(2).collect::<Vec<_>>().join("\n")).unwrap();
    let prompts = prompts.display().to_string();
    let full = json(&[&base[..], &["--teacher", FIXTURE, "--recall", &prompts]].concat());
    let wanted = ["tokens", "perplexity", "bits_per_byte", "teacher_perplexity", "kl", "top1_agreement", "recall"];
    assert_eq!(keys(&full), wanted);
    assert_eq!(full["perplexity"], plain["perplexity"]);
    assert_eq!(full["top1_agreement"], 1.0);
    let by_pairs = full["recall"].as_object().unwrap();
    assert!(by_pairs.values().all(|r| keys(r) == ["right", "asked", "accuracy"]));
    assert_eq!(by_pairs.values().map(|r| r["asked"].as_u64().unwrap()).sum::<u64>(), 2);
    assert_eq!(keys(&json(&["eval", FIXTURE, "--recall", &prompts, "--json"])), ["recall"]);
    let parts = json(&[&base[..], &["--by-position"]].concat());
    assert_eq!(parts["positions"].as_array().unwrap().len(), 2);
    assert_eq!(parts["tokens"], 1024);
}

#[test]
fn suites() {
    let dir = TempDir::new().unwrap();
    let plot = dir.path().join("grids.svg").display().to_string();
    let base = ["eval", FIXTURE, "--suite", "recall", "--samples", "1", "--seq-len", "96"];
    let found = json(&[&base[..], &["--json", "--teacher", FIXTURE, "--plot", &plot]].concat());
    let grids = found["recall_suite"]["grids"].as_array().unwrap();
    assert_eq!(
        grids.iter().map(|g| g["task"].as_str().unwrap()).collect::<Vec<_>>(),
        ["associative", "passkey", "copy", "induction"]
    );
    assert_eq!(fs::read_to_string(&plot).unwrap().matches("<svg ").count(), 1 + 8);
    let table = says(&base);
    assert!(table.contains("Associative recall") && table.contains("depth in % \\ length in tokens"), "{table}");

    let file = dir.path().join("questions.jsonl").display().to_string();
    let row =
        |i: usize| format!("{{\"query\": \"Number {i}:\", \"choices\": [\"one\", \"zzzz\"], \"answer\": {}}}\n", i % 2);
    fs::write(&file, (0..4).map(row).collect::<String>()).unwrap();
    let mc = ["eval", FIXTURE, "--suite", "mc", &file, "--few-shot", "2", "--json"];
    let answers = &json(&mc)["choices"];
    assert_eq!((&answers["questions"], &answers["shots"]), (&2.into(), &2.into()));
    assert_eq!(answers["gold"], serde_json::json!([1, 1]));
    assert_eq!(json(&[&mc[..], &["--shots", &file]].concat())["choices"]["questions"], 4);
    for wrong in [&["--suite", "mc"][..], &["--suite", "recall", &file], &["--recall", "x", "--plot", "p.svg"]] {
        assert_ne!(margay(&[&["eval", FIXTURE], wrong].concat()).status.code(), Some(0), "{wrong:?}");
    }
}

#[test]
fn generation() {
    let text = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURE).join("reference.json")).unwrap();
    let reference: Value = serde_json::from_slice(&text).unwrap();
    let (prompt, wanted) = (reference["prompt"].as_str().unwrap(), reference["greedy_text"].as_str().unwrap());
    let args = ["generate", FIXTURE, "--max-tokens", "24", "--prompt"];
    assert_eq!(says(&[&args[..], &[prompt]].concat()), format!("{wanted}\n"));

    let mut child =
        command(&[&args[..], &["-", "-q"]].concat()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), prompt.as_bytes()).unwrap();
    assert_eq!(stdout(&child.wait_with_output().unwrap()), format!("{wanted}\n"));

    let drawn = |seed| says(&["generate", FIXTURE, "--prompt", "The", "--temperature", "1", "--seed", seed]);
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
    let endless = margay(&["generate", FIXTURE, "--prompt", "The", "--ignore-eos", "--max-tokens", "300"]);
    assert!(stderr(&endless).contains("generated: 300 tokens"), "{}", stderr(&endless));
    assert_eq!(margay(&["generate", FIXTURE, "--prompt", "x", "--top-p", "2"]).status.code(), Some(2));
}

#[test]
fn conversation() {
    let model = copy_without("recall.jsonl");
    let dir = model.path().to_str().unwrap();
    let refused = margay(&["generate", dir, "--chat", "--prompt", "x"]);
    assert!(stderr(&refused).contains("no chat template"), "{}", stderr(&refused));

    let template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}\
                    {% endif %}{% endfor %}";
    fs::write(model.path().join("chat_template.jinja"), template).unwrap();
    let plain = |prompt: &str| says(&["generate", dir, "--max-tokens", "6", "--prompt", prompt]);
    let first = plain("The old fox");
    assert_eq!(says(&["generate", dir, "--chat", "--max-tokens", "6", "--prompt", "The old fox"]), first);
    let system = ["generate", dir, "--chat", "--max-tokens", "6", "--system", "The old ", "--prompt", "fox"];
    assert_eq!(says(&system), first);
    assert_eq!(margay(&["generate", dir, "--system", "a", "--prompt", "b"]).status.code(), Some(2));

    // Turns from stdin give what one prompt of all that was said gives.
    let mut child = command(&["generate", dir, "--chat", "--max-tokens", "6", "-q"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"The old fox\n\nThe key\n").unwrap();
    let second = plain(&format!("The old fox{}<|end|>The key", first.trim_end_matches('\n')));
    assert_eq!(stdout(&child.wait_with_output().unwrap()), format!("{first}{second}"));
}

#[test]
fn what_is_said_and_how() {
    let eval = ["eval", FIXTURE, "--data", "fixtures/llama-tiny/valid.jsonl", "--tokens", "1024", "--json"];
    assert_eq!(stderr(&margay(&[&eval[..], &["-q"]].concat())), "");
    let lines = stderr(&margay(&[&eval[..], &["--json-logs"]].concat()));
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().all(|e| e["time"].is_f64() && e["level"] == "info" && e["message"].is_string()));
    let end = events.iter().find(|e| e["stage"] == "measure" && e["message"] == "end").unwrap();
    assert_eq!((&end["done"], &end["total"]), (&1024.into(), &1024.into()));

    let output = margay(&["--json-logs", "verify", FIXTURE]);
    let error: Value = serde_json::from_str(&stderr(&output)).unwrap();
    assert!(error["level"] == "error" && error["hint"].is_string(), "{error}");
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = command(&["recipe", "schema"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(stderr(&output), "");
}

#[test]
fn doctor_and_completions() {
    let findings = json(&["doctor", "--json"]);
    assert_eq!(findings["version"], env!("CARGO_PKG_VERSION"));
    assert!(findings["threads"].as_u64().unwrap() > 0);
    let problems = findings["problems"].as_array().unwrap();
    let offline = |p: &Value| p["problem"].as_str().unwrap().contains("HF_HUB_OFFLINE");
    assert_eq!(problems.iter().any(offline), cfg!(feature = "hub"));
    assert!(says(&["doctor"]).contains("token cache"));
    assert!(says(&["completions", "bash"]).contains("_margay"));
}

/// A conversion that trains almost nothing.
fn convert(out: &Path) -> Vec<String> {
    let sets = [
        "stage.transfer.tokens=2048",
        "stage.transfer.seq_len=128",
        "stage.transfer.eval_every=100",
        "stage.recover.tokens=1024",
        "stage.recover.seq_len=128",
        "stage.recover.eval_every=100",
        "data.validation_tokens=512",
        "verify.tokens=1024",
        "verify.contexts=[64]",
    ];
    let mut args: Vec<String> = ["convert", FIXTURE, "--recipe", "tiny/lolcats", "--out"].map(Into::into).into();
    args.push(out.display().to_string());
    args.extend(sets.iter().flat_map(|set| ["--set".to_string(), set.to_string()]));
    args
}

/// The page that `report` writes: closed elements, nothing to load, no script.
#[track_caller]
fn page(args: &[&str], file: &Path) -> String {
    assert_eq!(says(&[&["report"], args].concat()), "");
    let html = fs::read_to_string(file).unwrap();
    let bare = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for word in ["http", "src=", "@import", "url(", "<script", "<link", "NaN"] {
        assert!(!bare.contains(word), "`{word}` in {}", file.display());
    }
    let mut open = Vec::new();
    for tag in bare.split('<').skip(1).map(|rest| rest.split('>').next().unwrap()) {
        let name = tag.split([' ', '\n']).next().unwrap();
        match name.strip_prefix('/') {
            Some(closed) => assert_eq!(open.pop(), Some(closed.to_string())),
            None if tag.ends_with('/') || ["!doctype", "meta"].contains(&name) => {}
            None => open.push(name.to_string()),
        }
    }
    assert!(open.is_empty(), "{open:?}");
    html
}

fn anchors(html: &str) -> Vec<&str> {
    html.split("<section id=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect()
}

/// A browser, where there is one, reads the page as it was written.
fn in_a_browser(file: &Path, html: &str) {
    let browsers = ["chromium", "chromium-browser", "google-chrome"];
    let dump = |name: &&str| {
        let mut browser = Command::new(name);
        browser.args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]);
        browser.arg(format!("file://{}", file.display())).stderr(Stdio::null()).output().ok()
    };
    let Some(output) = browsers.iter().find_map(dump) else { return eprintln!("skipped: no browser") };
    let dom = stdout(&output);
    assert_eq!(anchors(&dom), anchors(html));
    for tag in ["<svg ", "<table", "<tr", "<td", "<path ", "<rect ", "<text "] {
        assert_eq!(dom.matches(tag).count(), html.matches(tag).count(), "{tag}");
    }
}

#[test]
fn conversion_and_verification() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out");
    let export = out.display().to_string();
    let (args, events) = (convert(&out), dir.path().join("events").display().to_string());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();

    let planned = margay(&[&args[..], &["--until", "plan"]].concat());
    assert!(planned.status.success() && stderr(&planned).contains("nothing was written"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let halfway = margay(&[&args[..], &["--until", "transfer", "--tensorboard", &events]].concat());
    assert!(halfway.status.success(), "{}", stderr(&halfway));
    assert_eq!(stdout(&halfway), "");
    let unfinished = page(&[&export], &dir.path().join("out.margay/report.html"));
    assert_eq!(anchors(&unfinished), ["quality", "training", "recipe"]);

    let done = margay(&[&args[..], &["--no-progress", "--tensorboard", &events]].concat());
    let file = fs::read_dir(&events).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    let text = String::from_utf8_lossy(&fs::read(&file[0]).unwrap()).into_owned();
    assert_eq!((file.len(), text.matches("recover/validation loss").count() > 1), (1, true));
    let (table, told) = (stdout(&done), stderr(&done));
    assert!(done.status.success(), "{told}");
    assert!(told.contains("continuing the unfinished run") && told.contains("margay generate"), "{told}");
    for word in ["teacher", "swapped", "transfer", "recover", "exported", "ok", "linear", "window", "tokens/s"] {
        assert!(table.contains(word), "`{word}` is not in\n{table}");
    }
    assert!(!table.contains("FAILED") && !table.contains('\x1b'), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
    let again = margay(&args);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("is a finished conversion"));

    let text = ["--data", "fixtures/llama-tiny/valid.jsonl", "--tokens", "1024", "--seq-len", "256"];
    let report = json(&[&["verify", &export, "--teacher", FIXTURE, "--json"], &text[..]].concat());
    assert_eq!(report["passed"], true);
    assert!(report["stages"][0]["quality"]["kl"].as_f64().unwrap() > 0.0);
    let measured = json(&[&["eval", &export, "--json"], &text[..]].concat());
    assert_eq!(measured["perplexity"], report["stages"][0]["quality"]["perplexity"]);
    assert_eq!(json(&["inspect", &export, "--json"])["mixers"][0], "lolcats");
    says(&["generate", &export, "--prompt", "The", "--max-tokens", "4"]);

    // The same for other programs.
    let written = |format: &str| {
        let folder = dir.path().join(format);
        says(&["export", &export, "--to", format, "--out", &folder.display().to_string()]);
        let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        (folder.display().to_string(), names)
    };
    let (again, _) = written("transformers");
    assert_eq!(json(&["verify", &again, "--teacher", FIXTURE, "--json"])["passed"], true);
    let (_, names) = written("adapter");
    let adapter = ["adapter_config.json", "adapter_model.safetensors", "config.json", "mixers.safetensors"];
    assert!(adapter.iter().all(|name| names.iter().any(|n| n == name)), "{names:?}");
    let (official, names) = written("lolcats");
    assert_eq!(names, ["llama-tiny.yaml", "llama-tiny_distill.pt", "llama-tiny_ft.pt", "llama-tiny_ft.yaml"]);
    let [distill, ft] = ["distill", "ft"].map(|stage| format!("{official}/llama-tiny_{stage}.pt"));
    let back = dir.path().join("back").display().to_string();
    says(&["export", &distill, &ft, "--base", FIXTURE, "--recipe", "tiny/lolcats", "--out", &back]);
    assert_eq!(json(&["verify", &back, "--teacher", FIXTURE, "--json"])["passed"], true);
    let weights = |folder: &str| fs::read(Path::new(folder).join("model.safetensors")).unwrap();
    assert!(weights(&back) == weights(&export));
    for (format, why) in [("gguf", "layers 0, 1, 2, 3 are `lolcats`"), ("liger", "the official Liger code has no")] {
        let refused =
            margay(&["export", &export, "--to", format, "--out", &dir.path().join("no").display().to_string()]);
        assert!(refused.status.code() == Some(2) && stderr(&refused).contains(why), "{}", stderr(&refused));
    }

    let html = page(&[&export], &out.join("report.html"));
    let parts = ["quality", "training", "verification", "attention", "memory", "plan", "data", "recipe"];
    assert_eq!(anchors(&html), parts);
    // Two losses of each stage, the layers of one, six heat maps of its heads; memory and speed have one figure where one
    // context was timed.
    assert_eq!(html.matches("<svg ").count(), 12);
    let own = dir.path().join("full.html");
    let own_text = own.display().to_string();
    let suites = ["--suites", "--samples", "1", "--seq-len", "128", "--tokens", "1024", "--out", &own_text];
    let more =
        [&[&export[..]], &suites[..], &["--data", "fixtures/llama-tiny/valid.jsonl", "--teacher", FIXTURE]].concat();
    let html = page(&more, &own);
    assert_eq!(anchors(&html)[2..4], ["recall", "position"]);
    assert_eq!(html.matches("<svg ").count(), 12 + 8 + 1);
    in_a_browser(&own, &html);

    let weights = out.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let damaged = margay(&["verify", &export]);
    assert_eq!(damaged.status.code(), Some(1));
    assert!(stdout(&damaged).contains("FAILED"));
    assert!(stderr(&damaged).contains("model.safetensors changed"), "{}", stderr(&damaged));
    fs::remove_file(weights).unwrap();
    assert_eq!(margay(&["verify", &export]).status.code(), Some(1));
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_the_same_command_goes_on() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out");
    let mut args = convert(&out);
    args.extend(["--set", "stage.transfer.tokens=2000000", "--json-logs"].map(Into::into));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut child = command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    lines.by_ref().map(Result::unwrap).find(|line| line.contains(r#""stage":"transfer","message":"begin""#)).unwrap();
    // SAFETY: a signal to a child that was not waited for yet.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("saving and stopping")), "{rest:?}");
    assert!(rest.last().unwrap().contains("progress is saved"), "{rest:?}");
    assert!(PathBuf::from(format!("{}.margay", out.display())).join("transfer").is_dir());
    assert!(!out.exists());
}

/// What a terminal of 100 columns gets to see.
#[cfg(target_os = "linux")]
fn on_terminal(mut command: Command) -> String {
    use std::io::Read;
    use std::os::fd::FromRawFd;
    let (mut master, mut slave) = (0, 0);
    let size = libc::winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    let null = std::ptr::null_mut();
    // SAFETY: plain out-parameters; the two new descriptors are owned by the two files from here on.
    let (mut screen, terminal) = unsafe {
        assert_eq!(libc::openpty(&mut master, &mut slave, null, null as *const _, &size), 0);
        (fs::File::from_raw_fd(master), fs::File::from_raw_fd(slave))
    };
    let mut child = command.stdout(terminal.try_clone().unwrap()).stderr(terminal).spawn().unwrap();
    drop(command); // it holds the terminal open
    let mut text = Vec::new();
    _ = screen.read_to_end(&mut text); // ends in an error when the last writer is gone
    assert!(child.wait().unwrap().success());
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(target_os = "linux")]
#[test]
fn colour_only_where_it_is_wanted() {
    assert!(on_terminal(command(&["inspect", FIXTURE])).contains("\x1b[1mModel"));
    let mut plain = command(&["inspect", FIXTURE]);
    plain.env("NO_COLOR", "1");
    let text = on_terminal(plain);
    assert!(text.contains("Model") && !text.contains('\x1b'), "{text:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn bars_only_where_they_are_wanted() {
    let eval = ["eval", FIXTURE, "--data", "fixtures/llama-tiny/valid.jsonl", "--tokens", "8192"];
    assert!(on_terminal(command(&eval)).contains('━'));
    let text = on_terminal(command(&[&eval[..], &["--no-progress"]].concat()));
    assert!(!text.contains('━') && text.contains("perplexity"), "{text:?}");
}
