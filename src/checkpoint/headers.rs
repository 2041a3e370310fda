//! What a checkpoint says about itself without its weights: `config.json`, the headers of its shards, its other files.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use safetensors::Dtype;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{Config, INDEX, Place, SINGLE, hub, writer};
use crate::error::{Error, Kind, Result};

/// Larger headers are refused, as by the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// Where and what a tensor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: u64,
    /// Index into [`Headers::files`].
    pub file: usize,
    /// First byte, counted from the start of the file.
    pub offset: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|d| *d as u64).product()
    }
}

/// A shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInfo {
    pub name: String,
    pub bytes: u64,
}

/// Where a checkpoint came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    /// As the user typed it.
    pub id: String,
    /// The folder, where the files are on this disk.
    pub dir: Option<PathBuf>,
    /// `org/name`, where it came from the hub.
    pub repo: Option<String>,
    /// The commit that was read, where it came from the hub.
    pub revision: Option<String>,
}

/// Everything known without reading weights.
#[derive(Debug, Clone)]
pub struct Headers {
    pub config: Config,
    pub tensors: BTreeMap<String, TensorInfo>,
    pub files: Vec<FileInfo>,
    /// Names of the tokenizer, chat-template, generation and licence files beside the weights.
    pub side_files: Vec<String>,
    pub source: Source,
}

impl Headers {
    /// Reads a local folder, or a hub id by ranged reads; downloads no weights.
    pub fn open(model: &str) -> Result<Self> {
        match Place::of(model)? {
            Place::Local(dir) => {
                let source = Source { id: model.into(), dir: Some(dir.clone()), ..Source::default() };
                Headers::read(&LocalFolder(dir), source)
            }
            Place::Hub(id) => hub::headers(&id),
        }
    }

    /// Whether a `tokenizer.json` is there.
    pub fn tokenizer(&self) -> bool {
        self.side_files.iter().any(|f| f == "tokenizer.json")
    }

    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        self.tensors.values().map(TensorInfo::elements).sum()
    }

    /// Bytes of tensor data.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.bytes).sum()
    }

    /// The tensor, or an error with the nearest name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| {
            let error = Error::new(Kind::Checkpoint, format!("tensor `{name}` is not in `{}`", self.source.id));
            match crate::error::closest(name, self.tensors.keys().map(String::as_str)) {
                Some(near) => error.hint(format!("the nearest name there is `{near}`")),
                None => error,
            }
        })
    }

    /// SHA-256 over config, file sizes, and name, type and shape of every tensor: tells checkpoints apart cheaply.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(Value::Object(self.config.object().clone()).to_string());
        for FileInfo { name, bytes } in &self.files {
            hash.update(format!("\0{name}\0{bytes}"));
        }
        for (name, TensorInfo { dtype, shape, .. }) in &self.tensors {
            hash.update(format!("\0{name}\0{dtype}{shape:?}"));
        }
        writer::hex(&hash.finalize())
    }

    /// Reads and validates what `folder` holds.
    pub(super) fn read(folder: &dyn Folder, source: Source) -> Result<Self> {
        let names = folder.names()?;
        if !names.iter().any(|n| n == "config.json") {
            let error = Error::new(Kind::Config, format!("`config.json` is missing in `{}`", source.id));
            return Err(error.hint("give the folder or hub id of a model in the Hugging Face layout"));
        }
        let config = Config::parse(&folder.read("config.json")?, &folder.shown("config.json"))?;
        let index = match names.iter().any(|n| n == INDEX) {
            true => Some(parse_index(&folder.read(INDEX)?, &folder.shown(INDEX))?),
            false => None,
        };
        let shards = shard_names(&names, index.as_ref(), &source.id)?;
        let mut files = Vec::with_capacity(shards.len());
        let mut tensors = BTreeMap::new();
        for (file, (name, header)) in shards.iter().zip(read_headers(folder, &shards)?).enumerate() {
            for (tensor, info) in parse_header(&header, &folder.shown(name), file)? {
                if let Some(index) = &index
                    && index.get(&tensor) != Some(name)
                {
                    let listed = match index.get(&tensor) {
                        Some(other) => format!("`{INDEX}` places it in `{other}`"),
                        None => format!("`{INDEX}` does not list it"),
                    };
                    return Err(broken(format!("tensor `{tensor}` is in `{}`, but {listed}", folder.shown(name))));
                }
                if let Some(TensorInfo { file, .. }) = tensors.insert(tensor.clone(), info) {
                    return Err(broken(format!("tensor `{tensor}` is both in `{}` and in `{name}`", shards[file])));
                }
            }
            files.push(FileInfo { name: name.clone(), bytes: header.file_bytes });
        }
        if let Some((tensor, file)) = index.iter().flatten().find(|(tensor, _)| !tensors.contains_key(*tensor)) {
            return Err(broken(format!("`{INDEX}` places tensor `{tensor}` in `{file}`, but it is not there")));
        }
        let side_files = names.into_iter().filter(|n| is_side_file(n)).collect();
        Ok(Headers { config, tensors, files, side_files, source })
    }
}

/// A model folder, on disk or on the hub.
pub(super) trait Folder: Sync {
    /// File names, without those of subfolders.
    fn names(&self) -> Result<Vec<String>>;
    /// A whole small file.
    fn read(&self, name: &str) -> Result<Vec<u8>>;
    /// Up to `count` bytes from `start` (fewer at the end of the file), and the length of the whole file.
    fn range(&self, name: &str, start: u64, count: u64) -> Result<(Vec<u8>, u64)>;
    /// What messages call the file.
    fn shown(&self, name: &str) -> String;
}

pub(super) struct LocalFolder(pub PathBuf);

impl Folder for LocalFolder {
    fn names(&self) -> Result<Vec<String>> {
        let fail = |e| Error::io("read the folder", &self.0, e);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.0).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            // Through the link: the hub's cache holds links to its files.
            let is_file = std::fs::metadata(entry.path()).is_ok_and(|m| m.is_file());
            names.extend(entry.file_name().into_string().ok().filter(|_| is_file));
        }
        names.sort();
        Ok(names)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.0.join(name);
        std::fs::read(&path).map_err(|e| Error::io("read", path, e))
    }

    fn range(&self, name: &str, start: u64, count: u64) -> Result<(Vec<u8>, u64)> {
        let path = self.0.join(name);
        let read = || {
            let mut file = File::open(&path)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(start))?;
            let mut bytes = Vec::new();
            file.take(count).read_to_end(&mut bytes)?;
            Ok((bytes, length))
        };
        read().map_err(|e| Error::io("read", &path, e))
    }

    fn shown(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

/// The JSON of a shard's header and the size of the shard.
struct RawHeader {
    json: Vec<u8>,
    file_bytes: u64,
}

/// The headers of all shards, in order; several at once, since over the network each costs two round trips.
fn read_headers(folder: &dyn Folder, shards: &[String]) -> Result<Vec<RawHeader>> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut read = Vec::new();
        while let i = next.fetch_add(1, Ordering::Relaxed)
            && let Some(name) = shards.get(i)
        {
            read.push((i, read_header(folder, name)));
        }
        read
    };
    let mut all: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..shards.len().min(8)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|w| w.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    all.sort_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, header)| header).collect()
}

fn read_header(folder: &dyn Folder, name: &str) -> Result<RawHeader> {
    let shown = folder.shown(name);
    let (length, file_bytes) = folder.range(name, 0, 8)?;
    let Ok(length) = <[u8; 8]>::try_from(length) else {
        return Err(truncated(format!("`{shown}` has {file_bytes} bytes, too few for a safetensors file")));
    };
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        let message = format!("the header of `{shown}` claims {length} bytes; more than {MAX_HEADER} are refused");
        return Err(broken(message).hint("this is not a safetensors file, or its first bytes are damaged"));
    }
    if 8 + length > file_bytes {
        let message =
            format!("`{shown}` is truncated: its header needs {} bytes, the file has {file_bytes}", 8 + length);
        return Err(truncated(message));
    }
    let (json, _) = folder.range(name, 8, length)?;
    match json.len() as u64 == length {
        true => Ok(RawHeader { json, file_bytes }),
        false => Err(truncated(format!("`{shown}` ended while its header was read"))),
    }
}

/// The tensors of one shard, after checking that they cover its data exactly: in range, no overlap, no gap.
fn parse_header(raw: &RawHeader, shown: &str, file: usize) -> Result<Vec<(String, TensorInfo)>> {
    let header: Map<String, Value> = serde_json::from_slice(&raw.json)
        .map_err(|e| broken(format!("the header of `{shown}` is not a JSON object: {e}")))?;
    let mut tensors = Vec::with_capacity(header.len());
    for (name, value) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let place = format!("tensor `{name}` in `{shown}`");
        let safetensors::tensor::TensorInfo { dtype, shape, data_offsets: (start, end) } =
            serde_json::from_value(value).map_err(|e| broken(format!("the header entry of {place} is wrong: {e}")))?;
        let bytes = byte_size(dtype, &shape)
            .ok_or_else(|| broken(format!("{place} of {dtype} {shape:?} has no size in whole bytes")))?;
        let (start, end) = (start as u64, end as u64);
        if end.checked_sub(start) != Some(bytes) {
            let message = format!("{place} of {dtype} {shape:?} needs {bytes} bytes, its offsets are {start} to {end}");
            return Err(broken(message));
        }
        tensors.push((start, name, TensorInfo { dtype, shape, bytes, file, offset: start }));
    }
    tensors.sort_by_key(|(start, _, info)| (*start, info.bytes));

    let data_start = 8 + raw.json.len() as u64;
    let mut covered = 0;
    for i in 0..tensors.len() {
        let (start, name, _) = &tensors[i];
        if *start < covered {
            return Err(broken(format!("tensors `{}` and `{name}` in `{shown}` overlap", tensors[i - 1].1)));
        }
        if *start > covered {
            return Err(broken(format!("`{shown}` has {} unused bytes before tensor `{name}`", start - covered)));
        }
        covered += tensors[i].2.bytes;
        tensors[i].2.offset += data_start;
    }
    let data = raw.file_bytes - data_start;
    if covered > data {
        let message = format!("`{shown}` is truncated: its tensors need {covered} bytes, the file has {data} of them");
        return Err(truncated(message));
    }
    if covered < data {
        return Err(broken(format!("`{shown}` has {} unused bytes after its last tensor", data - covered)));
    }
    Ok(tensors.into_iter().map(|(_, name, info)| (name, info)).collect())
}

/// Bytes of a tensor; `None` where that overflows or is no whole number.
pub fn byte_size(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let bits = shape.iter().try_fold(dtype.bitsize() as u64, |n, d| n.checked_mul(*d as u64))?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// Tensor name to shard name.
pub(super) type Index = BTreeMap<String, String>;

/// Parses `model.safetensors.index.json`; refuses names that are not plain names of safetensors files in the folder.
pub(super) fn parse_index(bytes: &[u8], shown: &str) -> Result<Index> {
    #[derive(serde::Deserialize)]
    struct File {
        weight_map: Index,
    }
    let File { weight_map } =
        serde_json::from_slice(bytes).map_err(|e| broken(format!("`{shown}` is not a safetensors index: {e}")))?;
    match weight_map.iter().find(|(_, file)| !is_plain_name(file) || !file.ends_with(".safetensors")) {
        Some((tensor, file)) => {
            let message =
                format!("`{shown}` places tensor `{tensor}` in `{file}`, which is no safetensors file of its folder");
            Err(broken(message).hint("an index may only name files beside itself; do not use files from this source"))
        }
        None => Ok(weight_map),
    }
}

/// The shards of a model, by its index, else `model.safetensors`, else the safetensors files that are there.
pub(super) fn shard_names(names: &[String], index: Option<&Index>, model: &str) -> Result<Vec<String>> {
    let there: HashSet<&str> = names.iter().map(String::as_str).collect();
    let present = |shards: BTreeSet<String>, by: &str| match shards.iter().find(|s| !there.contains(s.as_str())) {
        Some(missing) => Err(broken(format!("shard `{missing}`, named by {by}, is missing in `{model}`"))
            .hint("download the missing file, or the whole model again")),
        None => Ok(shards.into_iter().collect()),
    };
    if let Some(index) = index {
        return present(index.values().cloned().collect(), &format!("`{INDEX}`"));
    }
    if there.contains(SINGLE) {
        return Ok(vec![SINGLE.into()]);
    }
    let shards: BTreeSet<String> = names.iter().filter(|n| n.ends_with(".safetensors")).cloned().collect();
    if let Some((name, (stem, count))) = shards.iter().find_map(|name| Some((name, numbered(name)?))) {
        let all = (1..=count).map(|i| format!("{stem}-{i:05}-of-{count:05}.safetensors")).collect();
        return present(all, &format!("the numbering of `{name}`"));
    }
    if !shards.is_empty() {
        return Ok(shards.into_iter().collect());
    }
    let pickle = names.iter().find(|n| [".bin", ".pt", ".pth", ".ckpt", ".pkl"].iter().any(|end| n.ends_with(end)));
    Err(match pickle {
        Some(pickle) => broken(format!("`{model}` has no safetensors weights, only pickle files such as `{pickle}`"))
            .hint(
                "pickle files can run code and are not read; convert them to safetensors first, for example with \
                   `save_pretrained(..., safe_serialization=True)` of transformers",
            ),
        None => broken(format!("`{model}` has no safetensors weights"))
            .hint(format!("a model folder holds `{SINGLE}`, or shards with `{INDEX}`")),
    })
}

/// `model-00001-of-00003.safetensors` to (`model`, 3).
fn numbered(name: &str) -> Option<(&str, u32)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let five = |s: &str| (s.len() == 5).then(|| s.parse().ok()).flatten();
    five(number)?;
    Some((stem, five(count)?))
}

/// A name without folders, so that joining it to a folder stays inside.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

/// Tokenizer, chat-template, generation and licence files: what an export carries along unchanged.
pub(super) fn is_side_file(name: &str) -> bool {
    const EXACT: [&str; 6] = [
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "tekken.json",
        "NOTICE",
        "USE_POLICY.md",
    ];
    const START: [&str; 6] = ["tokenizer", "vocab", "merges", "chat_template", "LICENSE", "LICENCE"];
    const END: [&str; 3] = [".tiktoken", ".spm", "spiece.model"];
    is_plain_name(name)
        && (EXACT.contains(&name) || START.iter().any(|s| name.starts_with(s)) || END.iter().any(|e| name.ends_with(e)))
}

pub(super) fn broken(message: String) -> Error {
    Error::new(Kind::Checkpoint, message)
}

fn truncated(message: String) -> Error {
    broken(message).hint("the file was not copied or downloaded completely; fetch it again")
}
