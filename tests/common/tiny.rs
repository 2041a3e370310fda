//! A Llama of two layers with hidden size 32, a byte tokenizer and random weights; text to train it on; and conversions
//! of it, here or in a child process that is stopped or killed at a chosen moment.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use candle_core::Device;
use margay::checkpoint::Config;
use margay::checkpoint::writer::{Data, Entry, sha256, write_sharded};
use margay::convert::{Converted, Options, Until, convert};
use margay::error::Result;
use margay::families;
use margay::progress::{Progress, Silent, request_stop};
use margay::recipe::Recipe;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::byte_tokenizer::byte_tokenizer;

pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 260,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "eos_token_id": 257,
    })
}

pub fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

/// How a model is written.
#[derive(Clone, Copy)]
pub struct Style {
    pub dtype: Dtype,
    /// The name of the embedding, where it is tied to the head.
    pub tied: Option<&'static str>,
    pub shard: u64,
}

pub const PLAIN: Style = Style { dtype: Dtype::F32, tied: None, shard: 1 << 30 };

/// A folder for a model, its text and what is made of them.
pub struct Home(pub TempDir);

impl Home {
    /// The model of `config` and text for it.
    pub fn new(config: &Value, style: Style) -> Self {
        let home = Home(TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        let model = home.model();
        fs::create_dir(&model).unwrap();
        write_model(&model, config, style, |_, _| {});
        fs::write(home.path("text.txt"), text()).unwrap();
        home
    }

    pub fn tiny() -> Self {
        Self::new(&config(), PLAIN)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn model(&self) -> PathBuf {
        self.path("model")
    }

    /// A small conversion of the model to `out`: window 16, 12 steps a stage.
    pub fn job(&self, out: &str, sets: &[&str]) -> Job {
        let source = format!("data.sources=[{:?}]", self.path("text.txt"));
        let stage = |name: &str| {
            ["tokens=3072", "seq_len=64", "batch=4", "lr=1e-2", "eval_every=4"].map(|key| format!("stage.{name}.{key}"))
        };
        let mut all = vec![source, "mixer.window=16".into(), "verify.contexts=[48]".into()];
        all.extend(stage("transfer").into_iter().chain(stage("recover")));
        all.extend(sets.iter().map(|s| s.to_string()));
        Job { model: self.model(), out: self.path(out), sets: all, until: false, restart: false, at: None }
    }
}

/// Writes a checkpoint with its tokenizer; `edit` may change the values of a tensor.
pub fn write_model(dir: &Path, config: &Value, style: Style, edit: impl Fn(&str, &mut Vec<f32>)) {
    let mut config = config.clone();
    config["tie_word_embeddings"] = json!(style.tied.is_some());
    // Spelled as other writers do, so that only a copy of the file has the same bytes.
    fs::write(dir.join("config.json"), config.to_string().replace("1e-5", "1e-05")).unwrap();
    fs::write(dir.join("tokenizer.json"), byte_tokenizer().to_string()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), r#"{"bos_token":  "<s>", "eos_token": "</s>"}"#).unwrap();
    fs::write(dir.join("generation_config.json"), r#"{ "eos_token_id": [257] }"#).unwrap();

    let parsed = Config::parse(config.to_string().as_bytes(), "config.json").unwrap();
    let tensors = families::of(&parsed).unwrap().1.tensors().into_iter().enumerate();
    let entry = |(n, (name, (_, shape))): (usize, (String, (families::Role, Vec<usize>)))| {
        let count: usize = shape.iter().product();
        let mut values: Vec<f32> = match shape.as_slice() {
            // A norm near one; a matrix that keeps the size of what it multiplies.
            [_] => (0..count).map(|i| 1.0 + 0.1 * noise(n, i)).collect(),
            [.., inner] => (0..count).map(|i| noise(n, i) * (3.0 / *inner as f32).sqrt()).collect(),
            [] => Vec::new(),
        };
        edit(&name, &mut values);
        let bytes = values.iter().flat_map(|x| encode(*x, style.dtype)).collect::<Vec<u8>>();
        let name = if name.contains("embed_tokens") { style.tied.map_or(name, String::from) } else { name };
        Entry { name, dtype: style.dtype, shape, data: Data::Lazy(Box::new(move || Ok(bytes.clone()))) }
    };
    write_sharded(dir, tensors.map(entry).collect(), style.shard, &BTreeMap::new(), &Silent).unwrap();
}

fn encode(x: f32, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    }
}

/// Element `i` of tensor `n`, uniform in ±1 (splitmix64).
fn noise(n: usize, i: usize) -> f32 {
    let mut z = ((n as u64) << 32 | i as u64).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// Template sentences, 20 kB.
fn text() -> String {
    let pick =
        |words: &[&'static str], n: usize, i: usize| words[((noise(n, i) + 1.0) * 0.499 * words.len() as f32) as usize];
    let line = |i: usize| {
        let who = pick(&["Clara", "Bruno", "Ruth", "Martin"], 1, i);
        let what = pick(&["owl", "duck", "key", "hat", "cup"], 2, i);
        format!(
            "{who} kept the {what} in {}; the {what} of {who} was {}.\n",
            pick(&["Marle", "Kelling"], 3, i),
            pick(&["red", "white", "old"], 4, i)
        )
    };
    (0..400).map(line).collect()
}

/// A conversion.
#[derive(Clone, Serialize, Deserialize)]
pub struct Job {
    pub model: PathBuf,
    pub out: PathBuf,
    pub sets: Vec<String>,
    /// Stop after transfer.
    pub until: bool,
    pub restart: bool,
    /// What to do at which event.
    pub at: Option<(String, Act)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Act {
    /// Ask the work to stop, as Ctrl-C does.
    Stop,
    /// SIGKILL to this very process.
    Kill,
    /// No file may grow beyond so many bytes: the errors of a full disk without one.
    Limit(u64),
}

impl Job {
    pub fn convert(&self) -> Result<Converted> {
        self.watched(&Silent)
    }

    pub fn watched(&self, progress: &dyn Progress) -> Result<Converted> {
        deep(|| {
            let options = Options {
                model: self.model.to_str().unwrap().into(),
                recipe: Recipe::load("llama/lolcats", &self.sets)?,
                out: self.out.clone(),
                device: Device::Cpu,
                until: self.until.then(|| Until::from("transfer")),
                restart: self.restart,
                tensorboard: None,
                timed: false,
            };
            convert(&options, progress)
        })
    }

    /// The same in a child process, which does `act` at `event` (see [`Watch`]).
    pub fn child(&self, event: &str, act: Act) -> Ended {
        let job = Job { at: Some((event.into(), act)), ..self.clone() };
        Ended::of(job.command().output().unwrap())
    }

    /// The command of a child process that runs this.
    pub fn command(&self) -> Command {
        private_cache();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["child", "--exact", "--nocapture"]).env("MARGAY_TEST_JOB", serde_json::to_string(self).unwrap());
        command
    }

    /// `<out>.margay`.
    pub fn work(&self) -> PathBuf {
        self.out.with_extension("margay")
    }

    /// States of a stage in the work folder, oldest first.
    pub fn states(&self, stage: &str) -> Vec<PathBuf> {
        files(&self.work().join(stage)).into_keys().map(|name| self.work().join(stage).join(name)).collect()
    }
}

/// How a child process ended.
#[derive(Debug, PartialEq)]
pub enum Ended {
    Done,
    Killed,
    /// Kind and message of the error.
    Failed(String),
}

impl Ended {
    pub fn of(output: std::process::Output) -> Self {
        let text = String::from_utf8_lossy(&output.stdout);
        match text.lines().find_map(|line| line.strip_prefix("answer: ")) {
            Some("done") => Ended::Done,
            Some(error) => Ended::Failed(error.into()),
            None if output.status.signal() == Some(libc::SIGKILL) => Ended::Killed,
            None => panic!("the child gave no answer: {text}\n{}", String::from_utf8_lossy(&output.stderr)),
        }
    }
}

/// The body of the test `child`: runs the job of a parent test, if there is one.
pub fn serve() {
    let Ok(job) = std::env::var("MARGAY_TEST_JOB") else { return };
    let job: Job = serde_json::from_str(&job).unwrap();
    let answer = match job.watched(&Watch::at(job.at.clone())) {
        Ok(_) => "done".into(),
        Err(e) => format!("{:?}: {} ({})", e.kind, e.message, e.hint.unwrap_or_default()).replace('\n', " "),
    };
    println!("\nanswer: {answer}");
}

/// Gives every event of a conversion a name, `<stage>:<n>` with n counted from 0 over the stage's calls, and acts at one.
#[derive(Default)]
pub struct Watch {
    pub at: Option<(String, Act)>,
    pub events: Mutex<Vec<String>>,
    counts: Mutex<(String, BTreeMap<String, usize>)>,
}

impl Watch {
    /// Acts at an event, if at any.
    pub fn at(at: Option<(String, Act)>) -> Self {
        Watch { at, ..Watch::default() }
    }

    fn event(&self, stage: Option<&str>) {
        let mut counts = self.counts.lock().unwrap();
        if let Some(stage) = stage {
            counts.0 = stage.into();
        }
        let stage = counts.0.clone();
        let n = counts.1.entry(stage.clone()).or_default();
        let name = format!("{stage}:{n}");
        *n += 1;
        match &self.at {
            Some((event, act)) if *event == name => act.perform(),
            _ => {}
        }
        self.events.lock().unwrap().push(name);
    }
}

impl Progress for Watch {
    fn begin(&self, stage: &str, _: u64, _: u64, _: &'static str) {
        self.event(Some(stage));
    }
    fn advance(&self, _: u64, _: &str) {
        self.event(None);
    }
    fn end(&self, _: &str) {
        self.event(None);
    }
}

impl Act {
    fn perform(self) {
        match self {
            Act::Stop => request_stop(),
            // SAFETY: the call takes two numbers; the process ends here.
            Act::Kill => unsafe {
                libc::kill(libc::getpid(), libc::SIGKILL);
            },
            Act::Limit(bytes) => {
                let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
                // SAFETY: both calls change this process alone, `limit` lives through the call, and ignoring the signal
                // turns it into an error of the write.
                let set = unsafe {
                    libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                    libc::setrlimit(libc::RLIMIT_FSIZE, &limit)
                };
                assert_eq!(set, 0);
            }
        }
    }
}

/// Works on a thread whose stack holds the recursion of a backward pass.
pub fn deep<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    private_cache();
    thread::scope(|s| {
        let worker = thread::Builder::new().stack_size(256 << 20).spawn_scoped(s, work).unwrap();
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Keeps the token cache of these tests out of the user's.
fn private_cache() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    // SAFETY: the standard library guards the environment against its own readers, and nothing these tests call reads
    // it any other way.
    ONCE.call_once(|| unsafe { std::env::set_var("MARGAY_CACHE", env!("CARGO_TARGET_TMPDIR")) });
}

/// Content of every file in a folder by name; empty where there is no folder.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).into_iter().flatten().map(|e| e.unwrap());
    let read = |e: fs::DirEntry| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap());
    entries.filter(|e| e.path().is_file()).map(read).collect()
}

/// The same of an export, with the files of its folder `adapter`.
pub fn exported(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let adapter = files(&out.join("adapter")).into_iter().map(|(name, bytes)| (format!("adapter/{name}"), bytes));
    files(out).into_iter().chain(adapter).collect()
}

/// sha256 of everything in an export that time does not enter: weights, configuration, tokenizer and training log.
pub fn fingerprint(out: &Path) -> BTreeMap<String, String> {
    let timed = ["README.md", "margay.json"];
    let files = exported(out).into_iter().filter(|(name, _)| !timed.contains(&name.as_str()));
    files.map(|(name, bytes)| (name, sha256(&bytes))).collect()
}
