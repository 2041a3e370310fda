//! One conversion's folder on disk: progress that survives a kill.
//!
//! For `--out DIR` all work happens in `DIR.margay/` beside it, and `DIR` appears only when the export is complete:
//!
//! | in `DIR.margay/` | what |
//! |---|---|
//! | `run.json` | what the run is made of ([`Fingerprint`]) and the results of finished stages |
//! | `<stage>/<step>.safetensors` | the newest two states of a stage: tensors, JSON state, digest of both |
//! | `metrics.jsonl` | one line per logged step |
//! | `export/` | the export while it is assembled; renamed to `DIR` at the end |
//! | `lock` | held while a process works here |
//!
//! Files are written aside, synced and renamed, so a kill leaves the old one or the new one; a file that is damaged all
//! the same is found by its digest, and the one before it is used. A work folder whose removal a kill cut short is
//! removed the next time its `DIR` is named.

mod folder;
mod state;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::writer::{output, write_atomic};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::train::tensorboard::Board;

use folder::{clear, entries, name_of, put_in_place, remove, remove_work, take_lock, work_of};

pub use folder::{fill, refuse_taken};
pub use state::Saved;

/// Everything the result of a run depends on. An unfinished run is continued only by its equal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The full recipe as TOML.
    pub recipe: String,
    /// Digest of the source checkpoint.
    pub source: String,
    /// Digest of the training text.
    pub data: String,
    pub seed: u64,
    /// Version of the program.
    pub program: String,
}

impl Fingerprint {
    /// What differs from `old`, in words.
    fn differences(&self, old: &Fingerprint) -> Vec<String> {
        let line = || {
            let mut pairs = self.recipe.lines().zip(old.recipe.lines());
            match pairs.find(|(new, old)| new != old) {
                Some((new, old)) => format!("recipe (`{new}` instead of `{old}`)"),
                None => "recipe".into(),
            }
        };
        let parts = [
            (self.recipe != old.recipe, line()),
            (self.source != old.source, "source checkpoint".into()),
            (self.data != old.data, "data".into()),
            (self.seed != old.seed, format!("seed ({} instead of {})", self.seed, old.seed)),
            (self.program != old.program, format!("program version ({} instead of {})", self.program, old.program)),
        ];
        parts.into_iter().filter(|(differs, _)| *differs).map(|(_, what)| what).collect()
    }
}

/// `run.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Run {
    fingerprint: Fingerprint,
    /// Results of finished stages.
    done: Map<String, Value>,
}

/// What an unfinished run says to those who do not work on it.
#[derive(Debug, Clone)]
pub struct Record {
    pub fingerprint: Fingerprint,
    /// Results of finished stages.
    pub done: Map<String, Value>,
    /// The training log, lines of JSON.
    pub log: String,
}

/// The run in a work folder, or in the one of the output folder `dir`, with its place; `None` where there is none.
pub fn look(dir: &Path) -> Result<Option<(PathBuf, Record)>> {
    let beside = dir.file_name().map(|name| work_of(dir, name));
    for work in [Some(dir.to_path_buf()), beside].into_iter().flatten() {
        let record = work.join("run.json");
        if record.is_file()
            && let Some(Run { fingerprint, done }) = read_run(&work, &record, false)?
        {
            let log = work.join(LOG);
            let log = match fs::read_to_string(&log) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
                read => read.map_err(|e| Error::io("read", &log, e))?,
            };
            return Ok(Some((work, Record { fingerprint, done, log })));
        }
    }
    Ok(None)
}

/// The folder of one conversion, held by this process until it is dropped.
#[derive(Debug)]
pub struct RunDir {
    out: PathBuf,
    work: PathBuf,
    run: Run,
    /// Takes the lines of the log too.
    board: Option<Mutex<Board>>,
    _lock: File,
}

impl RunDir {
    /// Starts the run that ends in `out`, or continues the unfinished one there; `restart` throws that one away.
    ///
    /// Errors: `out` exists and is not empty; the unfinished run has another fingerprint (naming what differs); another
    /// process works on it; the place is not writable.
    pub fn open(out: &Path, fingerprint: &Fingerprint, restart: bool) -> Result<RunDir> {
        let name = name_of(out)?;
        refuse_taken(out)?;
        let work = work_of(out, name);
        fs::create_dir_all(&work).map_err(|e| output("create", &work, e))?;
        let lock = take_lock(&work)?;
        // Another process may have finished between the first look and the lock.
        refuse_taken(out)?;

        let record = work.join("run.json");
        let old = read_run(&work, &record, restart)?;
        let run = match old {
            Some(old) if !restart => {
                let differences = fingerprint.differences(&old.fingerprint);
                if !differences.is_empty() {
                    let message =
                        format!("`{}` holds an unfinished run with another {}", work.display(), differences.join(", "));
                    let hint = "repeat the command of that run to continue it, or add --restart to throw it away";
                    return Err(Error::new(Kind::Output, message).hint(hint));
                }
                old
            }
            _ => {
                clear(&work)?;
                Run { fingerprint: fingerprint.clone(), done: Map::new() }
            }
        };
        let run_dir = RunDir { out: out.into(), work, run, board: None, _lock: lock };
        run_dir.save_run()?;
        run_dir.retain_log(|_| true)?;
        Ok(run_dir)
    }

    /// From here on the log goes to the TensorBoard event file in `dir` too.
    pub fn tensorboard(&mut self, dir: &Path) -> Result<()> {
        let log = self.log()?.unwrap_or_default();
        self.board = Some(Mutex::new(Board::open(dir, &String::from_utf8_lossy(&log))?));
        Ok(())
    }

    /// The folder of this run, for what else a stage keeps between runs.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// The final folder.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Where the export is assembled, emptied of what an earlier attempt left.
    pub fn fresh_export(&self) -> Result<PathBuf> {
        let export = self.export();
        remove(&export)?;
        fs::create_dir_all(&export).map_err(|e| output("create", &export, e))?;
        Ok(export)
    }

    /// Where the export is assembled.
    pub fn export(&self) -> PathBuf {
        self.work.join("export")
    }

    /// Saves the state after `step` steps of a stage and drops all but the newest two.
    ///
    /// `state` comes back exactly, except that JSON has no NaN and no infinity: they turn to null. The log lines of `step`
    /// belong before this call, so that a resumed log has them.
    pub fn save_state(&self, stage: &str, step: u64, tensors: &BTreeMap<String, Tensor>, state: &Value) -> Result<()> {
        let folder = self.work.join(stage);
        fs::create_dir_all(&folder).map_err(|e| output("create", &folder, e))?;
        let log = self.log_path();
        if let Ok(file) = File::open(&log) {
            file.sync_all().map_err(|e| output("write", &log, e))?;
        }

        state::write(&state::path(&folder, step), step, tensors, state)?;
        for step in state::steps(&folder)?.into_iter().rev().skip(2) {
            remove(&state::path(&folder, step))?;
        }
        Ok(())
    }

    /// The newest intact state of a stage, with the log cut back to it; `None` starts the stage over, log included.
    ///
    /// A damaged file is removed with a warning and the one before it is used.
    pub fn load_state(&self, stage: &str, progress: &dyn Progress) -> Result<Option<Saved>> {
        let folder = self.work.join(stage);
        for step in state::steps(&folder)?.into_iter().rev() {
            let path = state::path(&folder, step);
            let file = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            match state::read(step, &file) {
                Ok(saved) => {
                    self.truncate_log(stage, step)?;
                    return Ok(Some(saved));
                }
                Err(why) => {
                    progress.warn(&format!("`{}` is damaged ({why}); using the one before it", path.display()));
                    remove(&path)?;
                }
            }
        }
        self.retain_log(|line| line["stage"] != stage)?;
        self.on_board(|board| board.cut(stage, None))?;
        Ok(None)
    }

    /// Records that a stage is finished, with its result.
    pub fn mark_done(&mut self, stage: &str, result: &Value) -> Result<()> {
        self.run.done.insert(stage.into(), result.clone());
        self.save_run()
    }

    /// The result of a stage, where it is finished.
    pub fn done(&self, stage: &str) -> Option<&Value> {
        self.run.done.get(stage)
    }

    /// Adds a line to `metrics.jsonl`: an object with `stage` and `step`.
    pub fn append_log(&self, line: &Value) -> Result<()> {
        let path = self.log_path();
        let append =
            |text: String| OpenOptions::new().create(true).append(true).open(&path)?.write_all(text.as_bytes());
        append(format!("{line}\n")).map_err(|e| output("write", &path, e))?;
        self.on_board(|board| board.add(line))
    }

    /// Cuts from the log what a stage wrote after `step`.
    pub fn truncate_log(&self, stage: &str, step: u64) -> Result<()> {
        self.retain_log(|line| line["stage"] != stage || line["step"].as_u64().is_some_and(|at| at <= step))?;
        self.on_board(|board| board.cut(stage, Some(step)))
    }

    /// The training log, where anything was trained.
    pub fn log(&self) -> Result<Option<Vec<u8>>> {
        let path = self.log_path();
        match fs::read(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("read", &path, e)),
        }
    }

    /// Renames the finished export to `out` and removes the work folder.
    pub fn finish(mut self) -> Result<()> {
        self.mark_done(FINISH, &Value::Null)?;
        let RunDir { out, work, _lock: lock, .. } = self;
        put_in_place(&work.join("export"), &out)?;
        remove_work(&work, lock)
    }

    fn on_board(&self, act: impl FnOnce(&mut Board) -> Result<()>) -> Result<()> {
        let Some(board) = &self.board else { return Ok(()) };
        act(&mut board.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    fn log_path(&self) -> PathBuf {
        self.work.join(LOG)
    }

    fn save_run(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.run)
            .map_err(|e| Error::new(Kind::Unexpected, format!("cannot write `run.json`: {e}")))?;
        write_atomic(&self.work.join("run.json"), text.as_bytes())
    }

    /// Keeps the log lines that hold, byte for byte; one torn by a kill goes.
    fn retain_log(&self, keep: impl Fn(&Value) -> bool) -> Result<()> {
        let path = self.log_path();
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            read => read.map_err(|e| Error::io("read", &path, e))?,
        };
        let whole = |line: &&str| line.ends_with('\n') && serde_json::from_str(line).is_ok_and(|line| keep(&line));
        let kept: String = text.split_inclusive('\n').filter(whole).collect();
        if kept == text { Ok(()) } else { write_atomic(&path, kept.as_bytes()) }
    }
}

/// The training log.
const LOG: &str = "metrics.jsonl";

/// The stage of `run.json` that says: once `export/` is gone from here, it became the output folder.
const FINISH: &str = "finish";

/// `run.json`; `None` in a folder that is new. A folder with other things in it is not ours to use.
fn read_run(work: &Path, record: &Path, restart: bool) -> Result<Option<Run>> {
    match fs::read(record) {
        Ok(text) => match serde_json::from_slice(&text) {
            Ok(run) => Ok(Some(run)),
            Err(_) if restart => Ok(None),
            Err(e) => Err(Error::new(Kind::Output, format!("`{}` cannot be read: {e}", record.display()))
                .hint("--restart throws the unfinished run away")),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => match entries(work)?.first() {
            None => Ok(None),
            Some(foreign) => {
                let message = format!("`{}` is needed for work, but holds `{}`", work.display(), foreign.display());
                Err(Error::new(Kind::Output, message).hint("choose another --out, or move that folder away"))
            }
        },
        Err(e) => Err(Error::io("read", record, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use candle_core::{DType, Device};
    use serde_json::json;

    fn fingerprint() -> Fingerprint {
        Fingerprint {
            recipe: "about = \"x\"\nseed = 0\n".into(),
            source: "a".into(),
            data: "b".into(),
            seed: 0,
            program: "0.1.0".into(),
        }
    }

    fn open(out: &Path) -> RunDir {
        RunDir::open(out, &fingerprint(), false).unwrap()
    }

    fn refused(out: &Path, fingerprint: &Fingerprint, restart: bool) -> (String, String) {
        let error = RunDir::open(out, fingerprint, restart).unwrap_err();
        assert_eq!(error.kind, Kind::Output);
        (error.message, error.hint.unwrap_or_default())
    }

    fn tensors(x: f32) -> BTreeMap<String, Tensor> {
        let cpu = &Device::Cpu;
        let odd = [x, -0.0, f32::MIN_POSITIVE / 8.0, f32::INFINITY, f32::from_bits(0x7fc0_1234), 1.0 + f32::EPSILON];
        BTreeMap::from([
            ("f32".into(), Tensor::new(&odd, cpu).unwrap().reshape((2, 3)).unwrap().t().unwrap()),
            ("u8".into(), Tensor::new(&[0u8, 255, 7], cpu).unwrap()),
            ("u32".into(), Tensor::new(&[u32::MAX, 1], cpu).unwrap()),
            ("i64".into(), Tensor::new(i64::MIN, cpu).unwrap()),
            ("empty".into(), Tensor::zeros((0, 4), DType::F32, cpu).unwrap()),
        ])
    }

    fn assert_same(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) {
        assert!(a.keys().eq(b.keys()));
        for (name, x) in a {
            let y = &b[name];
            assert_eq!(
                (x.dims(), x.dtype(), state::bytes(x).unwrap()),
                (y.dims(), y.dtype(), state::bytes(y).unwrap()),
                "{name}"
            );
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
    fn states_come_back_bit_for_bit_and_the_newest_two_stay() {
        let home = tempfile::tempdir().unwrap();
        let run = open(&home.path().join("out"));
        assert!(run.load_state("transfer", &Silent).unwrap().is_none());
        // Floats that a JSON reader which rounds carelessly gets wrong.
        let hard: Vec<f64> = (1..1000).map(|i| (i as f64).sqrt().sin()).collect();
        let state = json!({ "rng": [1, u64::MAX], "loss": hard });
        for step in [1, 20, 300] {
            run.save_state("transfer", step, &tensors(step as f32), &state).unwrap();
        }
        let saved = run.load_state("transfer", &Silent).unwrap().unwrap();
        assert_eq!((saved.step, &saved.state), (300, &state));
        assert_same(&saved.tensors, &tensors(300.0));
        assert_eq!(state::steps(&run.work.join("transfer")).unwrap(), [20, 300]);
        assert!(run.load_state("recover", &Silent).unwrap().is_none());
    }

    #[test]
    fn a_torn_or_changed_file_gives_way_to_the_one_before() {
        let home = tempfile::tempdir().unwrap();
        let run = open(&home.path().join("out"));
        let newest = state::path(&run.work.join("transfer"), 2);
        run.save_state("transfer", 1, &tensors(1.0), &Value::Null).unwrap();
        run.save_state("transfer", 2, &tensors(2.0), &Value::Null).unwrap();
        let whole = fs::read(&newest).unwrap();
        let mut damaged: Vec<Vec<u8>> =
            [0, 5, 40, whole.len() / 2, whole.len() - 1].map(|n| whole[..n].to_vec()).into();
        // One changed bit: in the last tensor, in the JSON state, in the digest.
        let header = String::from_utf8_lossy(&whole).into_owned();
        for at in [whole.len() - 1, header.find("null").unwrap(), header.find("sha256").unwrap() + 12] {
            let mut copy = whole.clone();
            copy[at] ^= 1;
            damaged.push(copy);
        }
        for file in damaged {
            fs::write(&newest, &file).unwrap();
            let warnings = Warnings::default();
            let saved = run.load_state("transfer", &warnings).unwrap().unwrap();
            assert_eq!(saved.step, 1);
            assert_same(&saved.tensors, &tensors(1.0));
            let warnings = warnings.0.into_inner().unwrap();
            assert!(warnings.len() == 1 && warnings[0].contains("00000002.safetensors` is damaged"), "{warnings:?}");
            assert!(!newest.exists());
        }
        fs::write(&newest, &whole).unwrap();
        assert_eq!(run.load_state("transfer", &Silent).unwrap().unwrap().step, 2);
    }

    #[test]
    fn a_state_under_another_step_is_damaged() {
        let home = tempfile::tempdir().unwrap();
        let run = open(&home.path().join("out"));
        run.save_state("transfer", 1, &tensors(1.0), &Value::Null).unwrap();
        let folder = run.work.join("transfer");
        fs::rename(state::path(&folder, 1), state::path(&folder, 9)).unwrap();
        assert!(run.load_state("transfer", &Silent).unwrap().is_none());
    }

    #[test]
    fn an_unfinished_run_is_continued_only_by_its_equal() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("deep/er/out");
        let mut run = open(&out);
        run.mark_done("transfer", &json!({ "loss": 0.5 })).unwrap();
        run.save_state("recover", 3, &tensors(0.0), &Value::Null).unwrap();
        drop(run);
        let run = open(&out);
        assert_eq!(run.done("transfer"), Some(&json!({ "loss": 0.5 })));
        assert_eq!(run.done("recover"), None);
        assert_eq!(run.load_state("recover", &Silent).unwrap().unwrap().step, 3);
        drop(run);

        let other = Fingerprint { recipe: "about = \"x\"\nseed = 1\n".into(), seed: 1, ..fingerprint() };
        let (message, hint) = refused(&out, &other, false);
        assert!(
            message.ends_with("another recipe (`seed = 1` instead of `seed = 0`), seed (1 instead of 0)"),
            "{message}"
        );
        assert!(hint.contains("--restart"), "{hint}");
        let run = RunDir::open(&out, &other, true).unwrap();
        assert_eq!(run.done("transfer"), None);
        assert!(run.load_state("recover", &Silent).unwrap().is_none());
    }

    #[test]
    fn one_run_has_one_process() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("out");
        let run = open(&out);
        for restart in [false, true] {
            assert!(refused(&out, &fingerprint(), restart).0.starts_with("another process is working in"));
        }
        drop(run);
        open(&out);
    }

    #[test]
    fn a_taken_output_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("out");
        fs::create_dir(&out).unwrap();
        drop(open(&out));
        fs::write(out.join("notes.txt"), "mine").unwrap();
        for restart in [false, true] {
            let (message, hint) = refused(&out, &fingerprint(), restart);
            assert!(message.ends_with("already exists and is not empty") && hint.contains("--out"), "{message} {hint}");
        }
        fs::write(out.join("margay.json"), "{}").unwrap();
        let (message, hint) = refused(&out, &fingerprint(), false);
        assert!(message.ends_with("is a finished conversion") && hint.contains("margay verify"), "{message} {hint}");
        let file = home.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(refused(&file, &fingerprint(), false).0.contains("not empty"));
        assert!(refused(&file.join("under"), &fingerprint(), false).0.contains("cannot"));
        assert!(refused(Path::new("/"), &fingerprint(), false).0.contains("cannot be made the output folder"));
        #[cfg(unix)]
        {
            let link = home.path().join("link");
            std::os::unix::fs::symlink(home.path().join("nowhere"), &link).unwrap();
            assert!(refused(&link, &fingerprint(), false).0.ends_with("is a symbolic link"));
        }
    }

    #[test]
    fn a_work_folder_that_is_not_ours_is_left_alone() {
        let home = tempfile::tempdir().unwrap();
        let thesis = home.path().join("out.margay/thesis.txt");
        fs::create_dir(thesis.parent().unwrap()).unwrap();
        fs::write(&thesis, "precious").unwrap();
        for restart in [false, true] {
            assert!(refused(&home.path().join("out"), &fingerprint(), restart).0.contains("thesis.txt"));
        }
        assert_eq!(fs::read_to_string(&thesis).unwrap(), "precious");
    }

    #[test]
    fn a_resumed_log_equals_an_uninterrupted_one() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("out");
        let line = |stage: &str, step: u64| json!({ "stage": stage, "step": step, "loss": 1.0 / step as f64 });
        let run = open(&out);
        let all = [("transfer", 1), ("transfer", 2), ("recover", 1), ("recover", 2), ("recover", 3)];
        all.iter().for_each(|(stage, step)| run.append_log(&line(stage, *step)).unwrap());
        let whole = fs::read_to_string(run.log_path()).unwrap();
        fs::write(run.log_path(), format!("{whole}{{\"stage\":\"rec")).unwrap();
        drop(run);

        let run = open(&out);
        assert_eq!(fs::read_to_string(run.log_path()).unwrap(), whole);
        run.truncate_log("recover", 1).unwrap();
        (2..4).for_each(|step| run.append_log(&line("recover", step)).unwrap());
        assert_eq!(fs::read_to_string(run.log_path()).unwrap(), whole);

        let lines = || fs::read_to_string(run.log_path()).unwrap().lines().count();
        run.save_state("transfer", 1, &BTreeMap::new(), &Value::Null).unwrap();
        run.load_state("transfer", &Silent).unwrap().unwrap();
        assert_eq!(lines(), 4);
        assert!(run.load_state("recover", &Silent).unwrap().is_none());
        assert_eq!(lines(), 1);
    }

    #[test]
    fn finish_moves_the_export_in_and_leaves_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("out");
        let run = open(&out);
        fs::create_dir_all(run.export().join("stale")).unwrap();
        let export = run.fresh_export().unwrap();
        fs::write(export.join("margay.json"), "{}").unwrap();
        run.finish().unwrap();
        let left: Vec<_> = fs::read_dir(home.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["out"]);
        assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_is_filled_whole_or_not_at_all() {
        let home = tempfile::tempdir().unwrap();
        let (out, aside) = (home.path().join("out"), home.path().join(".out.partial"));
        let write = |dir: &Path, end: Result<u8>| {
            assert!(!dir.exists() && !out.exists());
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("half"), "").unwrap();
            end
        };
        let full = || Err(Error::new(Kind::Io, "full"));
        assert_eq!(fill(&out, |dir| write(dir, full())).unwrap_err().message, "full");
        assert!(!out.exists() && !aside.exists());
        fs::create_dir_all(aside.join("killed")).unwrap();
        assert_eq!(fill(&out, |dir| write(dir, Ok(7))).unwrap(), 7);
        assert_eq!((fs::read_dir(&out).unwrap().count(), aside.exists()), (1, false));
        assert!(fill(Path::new("/"), |_| Ok(())).is_err());
    }

    #[test]
    fn what_a_kill_leaves_of_a_finished_run_is_swept() {
        let home = tempfile::tempdir().unwrap();
        let (out, work) = (home.path().join("out"), home.path().join("out.margay"));
        let left = |sweepable: bool| {
            assert!(refused(&out, &fingerprint(), false).0.ends_with("is a finished conversion"));
            assert_eq!(work.exists(), !sweepable);
        };
        // Killed after the rename, before anything was removed.
        let mut run = open(&out);
        run.save_state("transfer", 1, &tensors(1.0), &Value::Null).unwrap();
        run.mark_done(FINISH, &Value::Null).unwrap();
        fs::create_dir(&out).unwrap();
        fs::write(out.join("margay.json"), "{}").unwrap();
        left(false); // it still works there
        drop(run);
        left(true);
        // Killed between the last two removals.
        fs::create_dir(&work).unwrap();
        fs::write(work.join("lock"), "").unwrap();
        left(true);
        // Progress of another run is not touched, and neither is what is not ours.
        fs::remove_dir_all(&out).unwrap();
        drop(open(&out));
        fs::create_dir(&out).unwrap();
        fs::write(out.join("margay.json"), "{}").unwrap();
        left(false);
        fs::remove_file(work.join("run.json")).unwrap();
        fs::write(work.join("thesis.txt"), "precious").unwrap();
        left(false);
    }
}
