//! `margay doctor`: program, machine and caches, what is wrong and what to do.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use clap::Args;
use margay::convert::cache_dir;
use margay::convert::plan::{Section, bytes};
use margay::error::Result;
use margay::progress::Progress;
use serde::Serialize;
use serde_json::json;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use super::output::Output;

/// Less free space than this is worth a word.
const LITTLE_DISK: u64 = 10_000_000_000;

#[derive(Args)]
pub struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Findings {
    version: &'static str,
    features: Vec<&'static str>,
    cpu: String,
    threads: usize,
    cores: usize,
    memory: u64,
    memory_free: u64,
    /// NVIDIA GPUs that the system names.
    gpus: Vec<String>,
    /// Those that this build can use.
    cuda_devices: usize,
    hub: Option<Hub>,
    token_cache: Folder,
    working_folder: Folder,
    problems: Vec<Problem>,
}

#[derive(Serialize)]
struct Hub {
    endpoint: String,
    offline: bool,
    /// Whether there is one; never what it is.
    token: bool,
    cache: Folder,
}

#[derive(Serialize)]
struct Folder {
    path: PathBuf,
    /// What lies in it; `None` where that was not counted.
    bytes: Option<u64>,
    /// On its disk.
    free: Option<u64>,
    writable: bool,
}

#[derive(Serialize)]
struct Problem {
    problem: String,
    hint: String,
}

impl Doctor {
    pub fn run(&self, out: &Output) -> Result<()> {
        let findings = Findings::gather();
        if self.json {
            return out.json(&json!(findings));
        }
        out.tables(&findings.sections())?;
        if findings.problems.is_empty() {
            out.say("\nall is well");
        }
        for Problem { problem, hint } in &findings.problems {
            out.log(super::output::Level::Warning, problem, Some(hint));
        }
        Ok(())
    }
}

impl Findings {
    fn gather() -> Findings {
        let kinds =
            RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()).with_memory(MemoryRefreshKind::everything());
        let system = System::new_with_specifics(kinds).ok();
        let mut problems = Vec::new();
        let hub = hub(&mut problems);
        let features = [("hub", cfg!(feature = "hub")), ("cuda", cfg!(feature = "cuda"))];
        let here = std::env::current_dir().unwrap_or_else(|_| ".".into());
        let mut findings = Findings {
            version: env!("CARGO_PKG_VERSION"),
            features: features.into_iter().filter(|f| f.1).map(|f| f.0).collect(),
            cpu: system
                .as_ref()
                .and_then(|s| s.cpus().first())
                .map_or_else(String::new, |c| c.brand().trim().to_string()),
            threads: rayon::current_num_threads(),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            memory: system.as_ref().map_or(0, System::total_memory),
            memory_free: system.as_ref().map_or(0, System::available_memory),
            gpus: gpus(),
            cuda_devices: if cfg!(feature = "cuda") {
                (0..64).take_while(|n| Device::new_cuda(*n).is_ok()).count()
            } else {
                0
            },
            hub,
            token_cache: Folder::look(cache_dir(), true),
            working_folder: Folder::look(here, false),
            problems,
        };
        findings.judge();
        findings
    }

    fn judge(&mut self) {
        let mut found = Vec::new();
        let mut problem = |problem: String, hint: &str| found.push(Problem { problem, hint: hint.into() });
        if !cfg!(feature = "cuda") && Path::new("/proc/driver/nvidia").exists() {
            problem(
                "there is an NVIDIA driver, but this build has no feature `cuda`".into(),
                "build with `--features cuda`",
            );
        }
        if cfg!(feature = "cuda") && self.cuda_devices == 0 {
            problem(
                "no CUDA device can be opened; work runs on the CPU".into(),
                "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
            );
        }
        if self.threads < self.cores {
            let text = format!("{} of {} cores are used", self.threads, self.cores);
            problem(text, "RAYON_NUM_THREADS sets the number of threads");
        }
        if self.hub.as_ref().is_some_and(|h| h.offline) {
            let text = "HF_HUB_OFFLINE is set: only models that are in the cache are found";
            problem(text.into(), "unset HF_HUB_OFFLINE to download");
        }
        let hub_cache = self.hub.as_ref().map(|h| (&h.cache, "HF_HOME to move the hub cache"));
        let folders = [Some((&self.token_cache, "MARGAY_CACHE to move the token cache")), hub_cache];
        for (folder, advice) in folders.into_iter().flatten() {
            if !folder.writable {
                let text = format!("`{}` cannot be written to", folder.path.display());
                problem(text, &format!("correct its permissions, or set {advice}"));
            }
        }
        let all = [Some(&self.working_folder), Some(&self.token_cache), self.hub.as_ref().map(|h| &h.cache)];
        for folder in all.into_iter().flatten() {
            if let Some(free) = folder.free.filter(|free| *free < LITTLE_DISK) {
                let text = format!("only {} are free on the disk of `{}`", bytes(free), folder.path.display());
                problem(text, "free some space; `margay plan` says what a conversion needs");
            }
        }
        self.problems.extend(found);
    }

    fn sections(&self) -> Vec<Section> {
        let features = if self.features.is_empty() { "none".into() } else { self.features.join(", ") };
        let gpus = match (self.gpus.as_slice(), self.cuda_devices) {
            ([], 0) => "none".into(),
            (names, usable) => format!("{}; {usable} usable", names.join(", ")),
        };
        let mut sections = vec![
            Section::list("Program", [("version", self.version.to_string()), ("features", features)]),
            Section::list(
                "Machine",
                [
                    ("CPU", self.cpu.clone()),
                    ("threads", format!("{} on {} cores", self.threads, self.cores)),
                    ("memory", format!("{}, {} free", bytes(self.memory), bytes(self.memory_free))),
                    ("NVIDIA GPUs", gpus),
                ],
            ),
        ];
        if let Some(hub) = &self.hub {
            let token = if hub.token { "yes" } else { "none; models with a licence gate need one" };
            let rows = [
                ("endpoint", hub.endpoint.clone()),
                ("token", token.into()),
                ("offline", if hub.offline { "yes" } else { "no" }.into()),
                ("cache", hub.cache.line()),
            ];
            sections.push(Section::list("Hub", rows));
        }
        let folders = [("token cache", self.token_cache.line()), ("working folder", self.working_folder.line())];
        sections.push(Section::list("Folders", folders));
        sections
    }
}

impl Folder {
    fn look(path: PathBuf, count: bool) -> Folder {
        let existing = path.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("/"));
        Folder {
            bytes: count.then(|| size(&path)),
            free: fs4::available_space(existing).ok(),
            writable: tempfile::tempfile_in(existing).is_ok(),
            path,
        }
    }

    fn line(&self) -> String {
        let holds = self.bytes.map(|n| format!(", holds {}", bytes(n))).unwrap_or_default();
        let free = self.free.map(|n| format!(", {} free", bytes(n))).unwrap_or_default();
        format!("{}{holds}{free}", self.path.display())
    }
}

/// Bytes of all files below a folder; links count nothing.
fn size(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let of = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => size(&entry.path()),
        Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |m| m.len()),
        _ => 0,
    };
    entries.map(of).sum()
}

/// Models of the GPUs that the NVIDIA driver names.
fn gpus() -> Vec<String> {
    let folders = fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten();
    let model = |folder: fs::DirEntry| {
        let text = fs::read_to_string(folder.path().join("information")).ok()?;
        text.lines().find_map(|line| Some(line.strip_prefix("Model:")?.trim().to_string()))
    };
    folders.filter_map(model).collect()
}

#[cfg(feature = "hub")]
fn hub(problems: &mut Vec<Problem>) -> Option<Hub> {
    match margay::checkpoint::hub::Options::from_env() {
        Ok(o) => Some(Hub {
            endpoint: o.endpoint,
            offline: o.offline,
            token: o.token.is_some(),
            cache: Folder::look(o.cache, true),
        }),
        Err(e) => {
            problems.push(Problem { problem: e.message, hint: e.hint.unwrap_or_default() });
            None
        }
    }
}

#[cfg(not(feature = "hub"))]
fn hub(problems: &mut Vec<Problem>) -> Option<Hub> {
    let hint = "build with `--features hub`, or download models by other means";
    problems.push(Problem { problem: "this build cannot reach the hub".into(), hint: hint.into() });
    None
}
