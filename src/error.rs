//! Every way a conversion can fail: where it happened, and what to do about it.
//!
//! An error prints as one line naming the file, tensor, key or line, then a `hint:` line where there is something to do.

use std::fmt;
use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of thing went wrong; decides the exit code and lets callers match without reading text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A checkpoint file, tensor or index that is broken, missing or of the wrong shape.
    Checkpoint,
    /// A key of `config.json` that is missing, of the wrong type or not supported.
    Config,
    /// The recipe: unknown keys, wrong types, impossible combinations.
    Recipe,
    /// Training or evaluation text.
    Data,
    /// The hub: not found, not allowed, not reachable.
    Hub,
    /// The run or output folder: not empty, not ours, not writable, disk full.
    Output,
    /// Training went wrong: NaN, explosion.
    Training,
    /// The device has too little memory.
    Memory,
    /// A check of `verify` failed.
    Verify,
    /// Stopped by the user; progress is saved.
    Interrupted,
    /// A command line that makes no sense.
    Usage,
    /// Reading or writing failed in the operating system.
    Io,
    /// A bug or a failure of the tensor library.
    Unexpected,
}

/// One failure with its place and, where there is something to do, a hint.
#[derive(Debug)]
pub struct Error {
    pub kind: Kind,
    pub message: String,
    pub hint: Option<String>,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), hint: None }
    }

    /// Says what to do; replaces an earlier hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// An operating-system error at a path, with a hint for the usual causes.
    pub fn io(action: &str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let path: PathBuf = path.as_ref().into();
        let hint = match source.kind() {
            K::StorageFull | K::QuotaExceeded => Some("free some space and give the same command again"),
            K::PermissionDenied => Some("check the owner and permissions of this path"),
            K::NotFound => Some("check the spelling; a relative path is read from the current folder"),
            _ => None,
        };
        Error {
            kind: Kind::Io,
            message: format!("cannot {action} `{}`: {source}", path.display()),
            hint: hint.map(Into::into),
        }
    }

    /// 1: refused or failed verification; 2: usage or unexpected failure.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Usage | Kind::Unexpected => 2,
            Kind::Interrupted => 130,
            _ => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        let text = e.to_string();
        // The driver's own name of the error, through two libraries' wrappers.
        if text.contains("CUDA_ERROR_OUT_OF_MEMORY") || text.contains("CUBLAS_STATUS_ALLOC_FAILED") {
            return Error::new(Kind::Memory, "the GPU has too little free memory")
                .hint("lower `micro_batch` or `seq_len`; `margay plan` tells what each stage needs");
        }
        Error::new(Kind::Unexpected, format!("tensor library: {text}"))
    }
}

/// The known name closest to `wanted`, for "did you mean".
pub fn closest<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(wanted, name), name))
        .filter(|(distance, name)| *distance <= 1 + name.len().max(wanted.len()) / 3)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}
