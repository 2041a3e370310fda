//! Checkpoints on disk: Hugging Face folders of sharded safetensors, read lazily by tensor name.
//!
//! [`Headers`] is what is known without weights, for planning; [`Checkpoint`] adds the memory-mapped shards. Everything
//! about the files is checked when they are opened; the values of a tensor are checked when it is read.

pub mod config;
mod headers;
#[cfg(feature = "hub")]
pub mod hub;
#[cfg(not(feature = "hub"))]
#[path = "hub_off.rs"]
pub mod hub;
pub mod pytorch;
#[cfg(feature = "cuda")]
mod upload;
pub mod writer;

use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::Dtype;

pub use config::Config;
pub use headers::{FileInfo, Headers, Source, TensorInfo, byte_size};

use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use headers::broken;

/// The weights of an unsharded model.
pub const SINGLE: &str = "model.safetensors";
/// Which shard holds which tensor.
pub const INDEX: &str = "model.safetensors.index.json";

/// What `<MODEL>` on the command line means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Local(PathBuf),
    Hub(HubId),
}

/// `org/name` or `org/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    pub repo: String,
    /// Branch, tag or commit; `main` when none was given.
    pub revision: String,
}

impl Place {
    /// A path that exists or begins with `.`, `/` or `~` is local; `org/name[@revision]` is a hub id.
    pub fn of(model: &str) -> Result<Self> {
        let path = match (model.strip_prefix("~/"), std::env::home_dir()) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => PathBuf::from(model),
        };
        if path.is_file() {
            let error = Error::new(Kind::Usage, format!("`{model}` is a file, not a model folder"));
            return Err(error.hint("give the folder that holds `config.json` and the safetensors files"));
        }
        if path.exists() {
            return Ok(Place::Local(path));
        }
        match HubId::parse(model) {
            Some(id) if !model.starts_with(['.', '/', '~']) => Ok(Place::Hub(id)),
            _ => Err(Error::new(Kind::Checkpoint, format!("there is no folder `{model}`"))
                .hint("give a local model folder, or a hub id such as `org/name` or `org/name@revision`")),
        }
    }
}

impl HubId {
    /// `None` where the text cannot be a hub id.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, name) = repo.split_once('/')?;
        let word = |s: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            headers::is_plain_name(s) && s.chars().all(allowed)
        };
        // A revision may have slashes, such as `refs/pr/1`.
        let valid = word(org) && word(name) && revision.split('/').all(word);
        valid.then(|| HubId { repo: repo.into(), revision: revision.into() })
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.repo),
            revision => write!(f, "{}@{revision}", self.repo),
        }
    }
}

/// A checkpoint whose shards are memory-mapped; tensors are read one at a time.
pub struct Checkpoint {
    headers: Headers,
    /// One per [`Headers::files`].
    maps: Vec<Mmap>,
    dir: PathBuf,
    #[cfg(feature = "cuda")]
    upload: upload::Upload,
}

impl std::ops::Deref for Checkpoint {
    type Target = Headers;

    fn deref(&self) -> &Headers {
        &self.headers
    }
}

impl Checkpoint {
    /// Opens a local folder and validates everything but the values.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::with_source(dir, Source { id: dir.display().to_string(), ..Source::default() })
    }

    /// Opens a local folder, or downloads a hub id into the cache first.
    pub fn load(model: &str, progress: &dyn Progress) -> Result<Self> {
        let id = model.to_string();
        match Place::of(model)? {
            Place::Local(dir) => Self::with_source(&dir, Source { id, ..Source::default() }),
            Place::Hub(hub_id) => {
                let (dir, sha) = hub::fetch_model(&hub_id, progress)?;
                Self::with_source(&dir, Source { id, dir: None, repo: Some(hub_id.repo), revision: Some(sha) })
            }
        }
    }

    fn with_source(dir: &Path, source: Source) -> Result<Self> {
        let source = Source { dir: Some(dir.into()), ..source };
        let headers = Headers::read(&headers::LocalFolder(dir.into()), source)?;
        let map = |file: &FileInfo| {
            let path = dir.join(&file.name);
            let handle = File::open(&path).map_err(|e| Error::io("read", &path, e))?;
            // SAFETY: the map is only read. Another program that shortens the file while it is mapped would end this
            // one, as with every memory-mapped reader; nothing here writes to a checkpoint that is open.
            let map = unsafe { Mmap::map(&handle) }.map_err(|e| Error::io("map", &path, e))?;
            match map.len() as u64 == file.bytes {
                true => Ok(map),
                false => Err(broken(format!("`{}` changed its size while it was opened", path.display()))),
            }
        };
        let maps = headers.files.iter().map(map).collect::<Result<_>>()?;
        Ok(Checkpoint {
            headers,
            maps,
            dir: dir.into(),
            #[cfg(feature = "cuda")]
            upload: upload::Upload::default(),
        })
    }

    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Tensor names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tokenizer, chat-template, generation and licence files, to carry to an export byte for byte.
    pub fn side_files(&self) -> Vec<PathBuf> {
        self.headers.side_files.iter().map(|name| self.dir.join(name)).collect()
    }

    /// The little-endian bytes of a tensor, in the mapped file.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let TensorInfo { file, offset, bytes, .. } = self.info(name)?;
        let start = *offset as usize;
        self.maps[*file].get(start..start + *bytes as usize).ok_or_else(|| {
            let file = &self.files[*file].name;
            broken(format!("tensor `{name}` lies outside of `{file}`"))
        })
    }

    /// One F32, F16 or BF16 tensor as F32, F16 or BF16 on `device`; a value that is not finite is an error.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let TensorInfo { dtype: stored, shape, file, .. } = self.info(name)?;
        let place = || format!("tensor `{name}` in `{}`", self.dir.join(&self.files[*file].name).display());
        let bytes = self.bytes(name)?;
        let bad = match stored {
            Dtype::F32 => first(bytes, |b| !f32::from_le_bytes(b).is_finite()),
            Dtype::F16 => first(bytes, |b| !f16::from_le_bytes(b).is_finite()),
            Dtype::BF16 => first(bytes, |b| !bf16::from_le_bytes(b).is_finite()),
            other => {
                let error = broken(format!("{} is {other}; weights are F32, F16 or BF16", place()));
                return Err(error.hint("quantized checkpoints are not read; use the original weights"));
            }
        };
        if let Some(index) = bad {
            let message = format!("{} has a value that is not finite (NaN or infinity) at index {index}", place());
            return Err(broken(message).hint("the checkpoint is damaged; fetch the file again or use another revision"));
        }
        let shape = shape.as_slice();
        #[cfg(feature = "cuda")]
        if let Device::Cuda(gpu) = device
            && matches!(stored, Dtype::F32 | Dtype::BF16)
        {
            let stored = if *stored == Dtype::F32 { DType::F32 } else { DType::BF16 };
            return Ok(self.upload.tensor(bytes, stored, shape, gpu)?.to_dtype(dtype)?);
        }
        let tensor = match (stored, dtype) {
            (Dtype::F16, DType::F16) => Tensor::from_vec(values(bytes, f16::from_le_bytes), shape, device),
            (Dtype::F16, _) => Tensor::from_vec(values(bytes, |b| f16::from_le_bytes(b).to_f32()), shape, device),
            (Dtype::BF16, DType::BF16) => Tensor::from_vec(values(bytes, bf16::from_le_bytes), shape, device),
            (Dtype::BF16, _) => {
                // BF16 is the upper half of F32.
                let widen = |b| f32::from_bits((u16::from_le_bytes(b) as u32) << 16);
                Tensor::from_vec(values(bytes, widen), shape, device)
            }
            _ => Tensor::from_vec(values(bytes, f32::from_le_bytes), shape, device),
        };
        Ok(tensor?.to_dtype(dtype)?)
    }

    /// [`Checkpoint::tensor`] that must have this shape.
    pub fn shaped(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let found = &self.info(name)?.shape;
        if found != shape {
            let message = format!("tensor `{name}` in `{}` has shape {found:?}, expected {shape:?}", self.source.id);
            return Err(broken(message).hint("`config.json` does not describe these weights"));
        }
        self.tensor(name, dtype, device)
    }
}

/// The elements of little-endian bytes.
fn values<T, const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|b| read(*b)).collect()
}

/// Index of the first element that is `bad`.
fn first<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool + Sync) -> Option<usize> {
    const BLOCK: usize = 1 << 16;
    let all = bytes.as_chunks::<N>().0;
    // Blocks are tested without branches, which vectorises; only one with a hit is searched.
    let block = all.par_chunks(BLOCK).position_first(|b| b.iter().fold(false, |hit, v| hit | bad(*v)))?;
    all.iter().skip(block * BLOCK).position(|v| bad(*v)).map(|i| block * BLOCK + i)
}
