//! Where a run's folders stand: the output folder, which appears whole or not at all, and the locked work folder beside it.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::{FINISH, read_run};
use crate::checkpoint::writer::output;
use crate::error::{Error, Kind, Result};

/// `DIR.margay` beside `DIR`, whose last part is `name`.
pub(super) fn work_of(out: &Path, name: &OsStr) -> PathBuf {
    out.with_file_name(format!("{}.margay", name.to_string_lossy()))
}

/// Fills the new folder `out`, which appears when it is complete: `fill` writes into one beside it.
pub fn fill<T>(out: &Path, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let aside = out.with_file_name(format!(".{}.partial", name_of(out)?.to_string_lossy()));
    remove(&aside)?; // what a kill left
    let filled = fill(&aside).and_then(|done| put_in_place(&aside, out).map(|()| done));
    if filled.is_err() {
        let _ = remove(&aside);
    }
    filled
}

/// The last part of an output folder's path.
pub(super) fn name_of(out: &Path) -> Result<&OsStr> {
    out.file_name().ok_or_else(|| {
        Error::new(Kind::Output, format!("`{}` cannot be made the output folder", out.display()))
            .hint("name a folder that does not exist yet")
    })
}

/// Renames a finished folder to `out`, which may be an empty one.
pub(super) fn put_in_place(finished: &Path, out: &Path) -> Result<()> {
    refuse_taken(out)?;
    if out.is_dir() {
        fs::remove_dir(out).map_err(|e| output("replace", out, e))?;
    }
    fs::rename(finished, out).map_err(|e| output("rename the export to", out, e))
}

/// Refuses an output folder that has something in it, and a link, which no folder can be renamed to.
pub fn refuse_taken(out: &Path) -> Result<()> {
    if out.is_symlink() {
        let message = format!("output `{}` is a symbolic link", out.display());
        return Err(Error::new(Kind::Output, message).hint("name the folder it leads to, or choose another --out"));
    }
    let empty = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => true,
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => !out.exists(),
        Err(e) => return Err(output("look into", out, e)),
    };
    if empty {
        return Ok(());
    }
    let finished = out.join("margay.json").is_file();
    if finished {
        sweep(out);
    }
    let (what, hint) = match finished {
        true => ("is a finished conversion", format!("`margay verify {}` reopens it; ", out.display())),
        false => ("already exists and is not empty", String::new()),
    };
    let message = format!("output `{}` {what}", out.display());
    Err(Error::new(Kind::Output, message).hint(format!("{hint}choose another --out")))
}

/// Removes what is left of the work folder of a conversion that is finished, where a kill cut its removal short. The
/// refusal of `out` is reported, so nothing here is an error; a folder that may hold progress stays.
fn sweep(out: &Path) {
    let Some(work) = out.file_name().map(|name| work_of(out, name)).filter(|work| work.is_dir()) else { return };
    let Ok(lock) = take_lock(&work) else { return };
    let done = match read_run(&work, &work.join("run.json"), false) {
        Ok(Some(run)) => run.done.contains_key(FINISH) && !work.join("export").exists(),
        Ok(None) => true,
        Err(_) => false,
    };
    if done {
        let _ = remove_work(&work, lock);
    }
}

/// Removes a work folder; `run.json` and the lock last, so that what a kill leaves is known for what it is.
pub(super) fn remove_work(work: &Path, lock: File) -> Result<()> {
    clear(work)?;
    drop(lock);
    remove(work)
}

pub(super) fn take_lock(work: &Path) -> Result<File> {
    let path = work.join("lock");
    let file = File::create(&path).map_err(|e| output("write to", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let message = format!("another process is working in `{}`", work.display());
            Err(Error::new(Kind::Output, message).hint("wait for it to end or stop it; one run has one process"))
        }
        Err(TryLockError::Error(e)) => Err(output("lock", &path, e)),
    }
}

/// What lies in the work folder, beside the lock and a `run.json` that was never finished.
pub(super) fn entries(work: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> io::Result<Vec<PathBuf>> { fs::read_dir(work)?.map(|entry| Ok(entry?.path())).collect() };
    let mut found = read().map_err(|e| output("look into", work, e))?;
    found.retain(|path| !path.ends_with("lock") && !path.ends_with(".run.json.partial"));
    found.sort();
    Ok(found)
}

/// Empties the work folder; `run.json` goes last, because a folder without it but with other things is not ours.
pub(super) fn clear(work: &Path) -> Result<()> {
    let mut found = entries(work)?;
    found.sort_by_key(|path| path.ends_with("run.json"));
    found.iter().try_for_each(|path| remove(path))
}

/// Removes a file or folder, if it is there.
pub(super) fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(output("remove", path, e)),
        _ => Ok(()),
    }
}
