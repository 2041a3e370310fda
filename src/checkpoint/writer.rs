//! Files written so that a kill leaves the old file or the new one: bounded safetensors shards with their index, and
//! whole small files.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{INDEX, SINGLE, byte_size};
use crate::error::{Error, Kind, Result};
use crate::progress::{Progress, stop_requested};

/// One tensor to write.
pub struct Entry<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Data<'a>,
}

/// The little-endian bytes of a tensor.
pub enum Data<'a> {
    /// Copied from where they are, such as a memory-mapped shard.
    Bytes(&'a [u8]),
    /// Made when their turn comes and dropped once written, so one such tensor is in memory at a time.
    Lazy(Box<dyn Fn() -> Result<Vec<u8>> + 'a>),
}

/// A file as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Name inside the folder.
    pub file: String,
    pub bytes: u64,
    /// Lower-case hex.
    pub sha256: String,
}

/// Writes `entries` in the given order as `model.safetensors`, or where that exceeds `max_shard_bytes` of tensor data as
/// `model-00001-of-0000N.safetensors` and their index. A tensor larger than the bound gets a shard of its own.
///
/// `metadata` goes into the header of every shard, beside `format: pt`, which other loaders ask for. Inside a shard
/// wider types come first (else in the given order), which keeps every tensor aligned to its element size.
pub fn write_sharded(
    dir: &Path,
    entries: Vec<Entry>,
    max_shard_bytes: u64,
    metadata: &BTreeMap<String, String>,
    progress: &dyn Progress,
) -> Result<Vec<Written>> {
    let mut names = HashSet::new();
    if let Some(twice) = entries.iter().find(|e| !names.insert(&e.name)) {
        return Err(Error::new(Kind::Unexpected, format!("tensor `{}` is to be written twice", twice.name)));
    }
    let mut total = 0u64;
    let mut shards: Vec<(u64, Vec<Entry>)> = Vec::new();
    for entry in entries {
        let bytes = byte_size(entry.dtype, &entry.shape).ok_or_else(|| {
            let Entry { name, shape, dtype, .. } = &entry;
            Error::new(Kind::Unexpected, format!("tensor `{name}` of {dtype} {shape:?} has no size in bytes"))
        })?;
        total += bytes;
        match shards.last_mut() {
            Some((held, shard)) if *held + bytes <= max_shard_bytes => {
                *held += bytes;
                shard.push(entry);
            }
            _ => shards.push((bytes, vec![entry])),
        }
    }
    if shards.is_empty() {
        shards.push((0, Vec::new()));
    }

    progress.begin("write", total, 0, "bytes");
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    let mut written = Vec::new();
    for (i, (_, mut shard)) in shards.into_iter().enumerate() {
        let file = match count {
            1 => SINGLE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        weight_map.extend(shard.iter().map(|e| (e.name.clone(), file.clone())));
        shard.sort_by_key(|e| std::cmp::Reverse(e.dtype.bitsize()));
        written.push(write_shard(&dir.join(&file), file, shard, metadata, progress)?);
    }
    if count > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        let mut out = AtomicFile::create(&dir.join(INDEX))?;
        out.write(format!("{index:#}\n").as_bytes())?;
        written.push(out.finish(INDEX)?);
    }
    progress.end("");
    Ok(written)
}

/// Writes `entries` as one safetensors file `name` in `dir`.
pub fn write_single(dir: &Path, name: &str, mut entries: Vec<Entry>, progress: &dyn Progress) -> Result<Written> {
    let bytes = entries.iter().filter_map(|e| byte_size(e.dtype, &e.shape)).sum();
    progress.begin("write", bytes, 0, "bytes");
    entries.sort_by_key(|e| std::cmp::Reverse(e.dtype.bitsize()));
    let written = write_shard(&dir.join(name), name.into(), entries, &BTreeMap::new(), progress)?;
    progress.end("");
    Ok(written)
}

/// Writes one safetensors file: length of the header, header padded with spaces to 8 bytes, data without gaps.
fn write_shard(
    path: &Path,
    file: String,
    entries: Vec<Entry>,
    metadata: &BTreeMap<String, String>,
    progress: &dyn Progress,
) -> Result<Written> {
    let mut about = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    about.extend(metadata.clone());
    let mut header = Map::from_iter([("__metadata__".to_string(), json!(about))]);
    let mut end = 0;
    for Entry { name, dtype, shape, .. } in &entries {
        let start = end;
        end += byte_size(*dtype, shape).unwrap_or(0);
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut out = AtomicFile::create(path)?;
    out.write(&(header.len() as u64).to_le_bytes())?;
    out.write(&header)?;
    for entry in entries {
        if stop_requested() {
            return Err(Error::new(Kind::Interrupted, format!("stopped while writing `{}`", path.display())));
        }
        let length = out.entry(entry)?;
        progress.advance(length, "");
    }
    out.finish(&file)
}

/// A file that appears under its name only when it is complete and on disk; dropped unfinished, it leaves nothing.
///
/// Its bytes gather in `.<name>.partial` beside the target, so a later run overwrites what a kill left.
pub struct AtomicFile {
    out: BufWriter<File>,
    hash: Sha256,
    bytes: u64,
    target: PathBuf,
    partial: PathBuf,
    finished: bool,
}

impl AtomicFile {
    pub fn create(target: &Path) -> Result<Self> {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let partial = target.with_file_name(format!(".{name}.partial"));
        let file = File::create(&partial).map_err(|e| output("create", target, e))?;
        Ok(AtomicFile {
            out: BufWriter::with_capacity(1 << 20, file),
            hash: Sha256::new(),
            bytes: 0,
            target: target.into(),
            partial,
            finished: false,
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|e| output("write", &self.target, e))
    }

    /// Writes the data of a tensor, which must have the size of its type and shape, and gives their length.
    pub fn entry(&mut self, Entry { name, dtype, shape, data }: Entry) -> Result<u64> {
        let made;
        let bytes = match data {
            Data::Bytes(bytes) => bytes,
            Data::Lazy(make) => {
                made = make()?;
                &made
            }
        };
        if Some(bytes.len() as u64) != byte_size(dtype, &shape) {
            let message = format!("tensor `{name}` of {dtype} {shape:?} came with {} bytes", bytes.len());
            return Err(Error::new(Kind::Unexpected, message));
        }
        self.write(bytes)?;
        Ok(bytes.len() as u64)
    }

    /// Flushes to the disk and renames into place; `file` is the name to report.
    pub fn finish(mut self, file: &str) -> Result<Written> {
        let fail = |e| output("write", &self.target, e);
        self.out.flush().map_err(fail)?;
        self.out.get_ref().sync_all().map_err(fail)?;
        std::fs::rename(&self.partial, &self.target).map_err(fail)?;
        self.finished = true;
        sync_folder(&self.target)?;
        let sha256 = hex(&self.hash.finalize_reset());
        Ok(Written { file: file.into(), bytes: self.bytes, sha256 })
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.finished {
            // The error that brought us here is reported; a leftover partial file is overwritten by the next run.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Writes a whole file so that a kill leaves the old content or the new, never a mixture.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut out = AtomicFile::create(path)?;
    out.write(bytes)?;
    out.finish("").map(drop)
}

/// Makes a rename inside the folder of `path` survive a power cut.
fn sync_folder(path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| output("write", folder, e))
}

/// A failure to write, with the hints of [`Error::io`].
pub fn output(action: &str, path: &Path, source: std::io::Error) -> Error {
    Error { kind: Kind::Output, ..Error::io(action, path, source) }
}

/// SHA-256 of a file, lower-case hex.
pub fn sha256_file(path: &Path) -> Result<String> {
    let fail = |e| Error::io("read", path, e);
    let mut file = File::open(path).map_err(fail)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(fail)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// SHA-256 of bytes, lower-case hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// `5GB` (10^9), `5GiB` (2^30), `500 MB`, `1.5GB`, or plain bytes. Zero and nonsense are errors of the recipe.
pub fn parse_size(text: &str) -> Result<u64> {
    let bad = || {
        Error::new(Kind::Recipe, format!("`{text}` is not a size"))
            .hint("write a number and a unit, such as `5GB` (10^9 bytes) or `500MiB` (2^20)")
    };
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..split].parse().map_err(|_| bad())?;
    let unit: f64 = match text[split..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024f64.powi(2),
        "gib" => 1024f64.powi(3),
        "tib" => 1024f64.powi(4),
        _ => return Err(bad()),
    };
    match (number * unit) as u64 {
        0 => Err(bad()),
        bytes => Ok(bytes),
    }
}

/// The little-endian bytes of `tensor` as F32, F16 or BF16 (rounded to nearest even), in row-major order.
pub fn tensor_bytes(tensor: &Tensor, dtype: Dtype) -> Result<Vec<u8>> {
    let dtype = match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => return Err(Error::new(Kind::Unexpected, format!("weights are not written as {other}"))),
    };
    let flat = tensor.detach().to_device(&Device::Cpu)?.to_dtype(dtype)?.contiguous()?;
    let (storage, layout) = flat.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + flat.elem_count();
    Ok(match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => little_endian(&v[range], |x| x.to_le_bytes()),
        Storage::Cpu(CpuStorage::F16(v)) => little_endian(&v[range], |x| x.to_le_bytes()),
        Storage::Cpu(CpuStorage::BF16(v)) => little_endian(&v[range], |x| x.to_le_bytes()),
        _ => return Err(Error::new(Kind::Unexpected, "a tensor moved to the CPU is not there")),
    })
}

fn little_endian<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    let mut out = vec![0; values.len() * N];
    for (place, value) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *place = bytes(*value);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("5GB", 5_000_000_000), ("2 GiB", 2 << 30), ("1.5kb", 1500), ("500MB", 500_000_000)] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "GB", "5XB", "0GB", "-1GB", "1..2GB"] {
            assert_eq!(parse_size(text).unwrap_err().kind, Kind::Recipe, "{text}");
        }
    }

    #[test]
    fn full_disk_is_an_output_error_with_a_hint() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = output("write", Path::new("model.safetensors"), full);
        assert_eq!(error.kind, Kind::Output);
        assert!(error.message.contains("model.safetensors") && error.hint.unwrap().contains("space"));
    }
}
