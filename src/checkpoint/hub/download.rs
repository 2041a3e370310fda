//! Files of the hub into its cache: continued where they were cut, checked by size and hash.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use super::request::{Trouble, content_range};
use super::{Remote, RemoteFile, make_parent};
use crate::checkpoint::headers::{Folder, broken};
use crate::checkpoint::writer;
use crate::error::{Error, Kind, Result};
use crate::progress::{Progress, stop_requested};

impl RemoteFile {
    /// Whether the name of the blob is the SHA-256 of its content.
    fn is_hashed(&self) -> bool {
        self.etag.len() == 64 && self.etag.chars().all(|c| c.is_ascii_hexdigit())
    }
}

impl Remote<'_> {
    pub(super) fn download_all(&self, names: &[String], progress: &dyn Progress) -> Result<()> {
        let missing: Vec<&RemoteFile> =
            self.files.iter().filter(|f| names.contains(&f.name) && !self.pointer(&f.name).exists()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        progress.begin("download", missing.iter().filter_map(|f| f.bytes).sum(), 0, "bytes");
        // In the order asked for, which puts weights last.
        for file in names.iter().filter_map(|n| missing.iter().find(|f| f.name == *n)) {
            self.download(file, progress)?;
        }
        progress.end("");
        Ok(())
    }

    fn download(&self, file: &RemoteFile, progress: &dyn Progress) -> Result<()> {
        let blob = self.root().join("blobs").join(&file.etag);
        let partial = blob.with_file_name(format!("{}.incomplete", file.etag));
        let fail = |e| writer::output("write", &partial, e);
        if !blob.exists() {
            make_parent(&blob)?;
            let mut out = OpenOptions::new().create(true).append(true).open(&partial).map_err(fail)?;
            lock(&out, &file.name, progress)?;
            if blob.exists() {
                // Another process finished it while we waited; what we opened may be a fresh empty file.
                let _ = std::fs::remove_file(&partial);
            } else {
                progress.advance(out.metadata().map_err(fail)?.len(), &file.name);
                self.hub.retry(|| self.continue_download(file, &mut out, &partial, progress))?;
                out.sync_all().map_err(fail)?;
                if file.is_hashed() && writer::sha256_file(&partial)? != file.etag {
                    let _ = std::fs::remove_file(&partial);
                    let error = broken(format!("`{}` arrived damaged: its SHA-256 is wrong", self.shown(&file.name)));
                    return Err(error.hint("run the same command again to download it afresh"));
                }
                std::fs::rename(&partial, &blob).map_err(fail)?;
            }
        }
        let pointer = self.pointer(&file.name);
        make_parent(&pointer)?;
        let up = "../".repeat(2 + file.name.matches('/').count());
        link(&blob, Path::new(&format!("{up}blobs/{}", file.etag)), &pointer)
            .map_err(|e| writer::output("write", &pointer, e))
    }

    /// One request for what is missing of a file; appends what arrives.
    fn continue_download(
        &self,
        file: &RemoteFile,
        out: &mut File,
        partial: &Path,
        progress: &dyn Progress,
    ) -> Result<(), Trouble> {
        let fail = |e| writer::output("write", partial, e);
        let mut before = out.metadata().map_err(fail)?.len();
        if file.bytes == Some(before) {
            return Ok(());
        }
        // Without a known size a part cannot be told from the whole.
        if file.bytes.is_none_or(|bytes| before > bytes) {
            out.set_len(0).map_err(fail)?;
            before = 0;
        }
        let response =
            self.hub.get(&self.url(&file.name), (before > 0).then_some((before, None)), &self.id, Some(&file.name))?;
        let mut have = before;
        let range = content_range(&response);
        if range.map_or(0, |(start, _)| start) != before {
            // The server ignores ranges: from the beginning.
            out.set_len(0).map_err(fail)?;
            have = 0;
        }
        let body = response.into_body();
        let total = file.bytes.or(range.map(|(_, total)| total)).or(body.content_length());
        let mut reader = body.into_reader();
        let mut buffer = vec![0; 1 << 18];
        loop {
            if stop_requested() {
                return Err(Error::new(Kind::Interrupted, "stopped; the same command continues the download").into());
            }
            match reader.read(&mut buffer) {
                Ok(0) if total.is_some_and(|total| have < total) => {
                    let early = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                    return Err(self.hub.cut(&early, have > before));
                }
                Ok(0) => return Ok(()),
                Ok(n) => {
                    out.write_all(&buffer[..n]).map_err(fail)?;
                    have += n as u64;
                    progress.advance(n as u64, &file.name);
                }
                Err(e) => return Err(self.hub.cut(&e, have > before)),
            }
        }
    }
}

/// Waits until no other process downloads the same file.
fn lock(file: &File, name: &str, progress: &dyn Progress) -> Result<()> {
    let mut told = false;
    while let Err(TryLockError::WouldBlock) = file.try_lock() {
        if !std::mem::replace(&mut told, true) {
            progress.say(&format!("waiting for another process that downloads `{name}`"));
        }
        if stop_requested() {
            return Err(Error::new(Kind::Interrupted, format!("stopped while waiting for `{name}`")));
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    // A file system without locks is no reason to stop.
    Ok(())
}

/// Makes the snapshot's name for a blob, unless it is there.
fn link(blob: &Path, relative: &Path, pointer: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    let (made, _) = (std::os::unix::fs::symlink(relative, pointer), blob);
    #[cfg(not(unix))]
    let (made, _) = (std::fs::hard_link(blob, pointer), relative);
    match made {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    }
}
