//! The state of a training stage as one file: a safetensors file whose header also holds the step, the JSON state, and a
//! digest of everything.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::checkpoint::writer::{AtomicFile, hex};
use crate::error::{Error, Kind, Result};

/// A state read back.
#[derive(Debug)]
pub struct Saved {
    /// Steps done when it was saved.
    pub step: u64,
    /// On the CPU, bit for bit as saved.
    pub tensors: BTreeMap<String, Tensor>,
    pub state: Value,
}

/// Where the state after `step` steps lies.
pub(super) fn path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("{step:08}.safetensors"))
}

/// Steps with a state, ascending.
pub(super) fn steps(folder: &Path) -> Result<Vec<u64>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.map_err(|e| Error::io("look into", folder, e))?,
    };
    let step = |name: &str| name.strip_suffix(".safetensors")?.parse().ok();
    let mut steps: Vec<u64> = entries.flatten().filter_map(|e| step(e.file_name().to_str()?)).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// Writes a state so that a kill leaves no half file.
pub(super) fn write(path: &Path, step: u64, tensors: &BTreeMap<String, Tensor>, state: &Value) -> Result<()> {
    // The digest stands in the header, before the data: tensors are turned into bytes twice and never all at once.
    let state = state.to_string();
    let mut digest = StateDigest::new(step, &state);
    let mut header = Map::new();
    let mut end = 0;
    for (name, tensor) in tensors {
        let (dtype, bytes) = (Dtype::from(tensor.dtype()), bytes(tensor)?);
        digest.tensor(name, dtype, tensor.dims(), &bytes);
        let start = end;
        end += bytes.len();
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": tensor.dims(), "data_offsets": [start, end] }));
    }
    let metadata = json!({ "step": step.to_string(), "state": state, "sha256": digest.finish() });
    header.insert("__metadata__".into(), metadata);
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = AtomicFile::create(path)?;
    file.write(&(header.len() as u64).to_le_bytes())?;
    file.write(&header)?;
    for tensor in tensors.values() {
        file.write(&bytes(tensor)?)?;
    }
    file.finish("").map(drop)
}

/// SHA-256 over everything a state says.
struct StateDigest(Sha256);

impl StateDigest {
    fn new(step: u64, state: &str) -> Self {
        let mut digest = StateDigest(Sha256::new());
        digest.part(&step.to_le_bytes());
        digest.part(state.as_bytes());
        digest
    }

    /// Lengths go in too, so that no two states share their bytes.
    fn part(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    fn tensor(&mut self, name: &str, dtype: Dtype, shape: &[usize], data: &[u8]) {
        self.part(name.as_bytes());
        self.part(format!("{dtype:?} {shape:?}").as_bytes());
        self.part(data);
    }

    fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

/// Little-endian bytes in row-major order.
pub(super) fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    macro_rules! little_endian {
        ($t:ty) => {
            tensor.flatten_all()?.to_vec1::<$t>()?.into_iter().flat_map(|x| x.to_le_bytes()).collect()
        };
    }
    Ok(match tensor.dtype() {
        DType::U8 => little_endian!(u8),
        DType::U32 => little_endian!(u32),
        DType::I64 => little_endian!(i64),
        DType::F16 => little_endian!(half::f16),
        DType::BF16 => little_endian!(half::bf16),
        DType::F32 => little_endian!(f32),
        DType::F64 => little_endian!(f64),
        other => return Err(Error::new(Kind::Unexpected, format!("a state cannot hold a tensor of {other:?}"))),
    })
}

/// A state file's content, or what is wrong with it.
pub(super) fn read(step: u64, file: &[u8]) -> Result<Saved, String> {
    let (_, header) = SafeTensors::read_metadata(file).map_err(|e| e.to_string())?;
    let views = SafeTensors::deserialize(file).map_err(|e| e.to_string())?;
    let about = |key: &str| header.metadata().as_ref()?.get(key).cloned();
    let (Some(state), Some(written)) = (about("state"), about("sha256")) else {
        return Err("its header lacks the state or the digest".into());
    };
    let views: BTreeMap<String, _> = views.tensors().into_iter().collect();
    let mut digest = StateDigest::new(step, &state);
    for (name, view) in &views {
        digest.tensor(name, view.dtype(), view.shape(), view.data());
    }
    if digest.finish() != written {
        return Err("its digest does not match".into());
    }
    let tensor = |view: &safetensors::tensor::TensorView| {
        Tensor::from_raw_buffer(view.data(), view.dtype().try_into()?, view.shape(), &Device::Cpu)
    };
    let tensors: candle_core::Result<_> = views.iter().map(|(name, view)| Ok((name.clone(), tensor(view)?))).collect();
    let state = serde_json::from_str(&state).map_err(|e| e.to_string())?;
    Ok(Saved { step, tensors: tensors.map_err(|e| e.to_string())?, state })
}
