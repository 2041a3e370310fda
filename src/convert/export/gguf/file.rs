//! The container GGUF, version 3: metadata, a list of tensors, their data.
//!
//! ```text
//! "GGUF"  version u32  tensors u64  pairs u64
//! pair:   key  type u32  value
//! tensor: name  rank u32  sizes u64, the innermost first  type u32  offset u64
//! data of every tensor, each from a multiple of 32 bytes on
//! ```
//!
//! Texts are their length as u64 and their bytes; everything is little-endian.

use std::path::Path;

use safetensors::Dtype;

use crate::checkpoint::byte_size;
use crate::checkpoint::writer::{AtomicFile, Entry, Written};
use crate::error::{Error, Kind, Result};
use crate::progress::{Progress, stop_requested};

const ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
}

impl Value {
    const ARRAY: u32 = 9;

    /// The number of its type, of its elements' for a list.
    fn code(&self) -> u32 {
        match self {
            Value::U32(_) => 4,
            Value::I32s(_) => 5,
            Value::F32(_) | Value::F32s(_) => 6,
            Value::Bool(_) | Value::Bools(_) => 7,
            Value::Text(_) | Value::Texts(_) => 8,
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        let list = |out: &mut Vec<u8>, length: usize| {
            out.extend(Self::ARRAY.to_le_bytes());
            out.extend(self.code().to_le_bytes());
            out.extend((length as u64).to_le_bytes());
        };
        match self {
            Value::U32(_) | Value::F32(_) | Value::Bool(_) | Value::Text(_) => out.extend(self.code().to_le_bytes()),
            Value::I32s(all) => list(out, all.len()),
            Value::F32s(all) => list(out, all.len()),
            Value::Bools(all) => list(out, all.len()),
            Value::Texts(all) => list(out, all.len()),
        }
        match self {
            Value::U32(x) => out.extend(x.to_le_bytes()),
            Value::F32(x) => out.extend(x.to_le_bytes()),
            Value::Bool(x) => out.push(u8::from(*x)),
            Value::Text(x) => text(out, x),
            Value::I32s(all) => all.iter().for_each(|x| out.extend(x.to_le_bytes())),
            Value::F32s(all) => all.iter().for_each(|x| out.extend(x.to_le_bytes())),
            Value::Bools(all) => out.extend(all.iter().map(|x| u8::from(*x))),
            Value::Texts(all) => all.iter().for_each(|x| text(out, x)),
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The number of a tensor's type.
fn code(dtype: Dtype) -> Result<u32> {
    match dtype {
        Dtype::F32 => Ok(0),
        Dtype::F16 => Ok(1),
        Dtype::BF16 => Ok(30),
        other => Err(Error::new(Kind::Unexpected, format!("no GGUF type for {other}"))),
    }
}

/// Writes the file `path` with `metadata` and `entries`, one tensor in memory at a time.
pub fn write(
    path: &Path,
    metadata: &[(String, Value)],
    entries: Vec<Entry>,
    progress: &dyn Progress,
) -> Result<Written> {
    let mut header = b"GGUF".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend((entries.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut header, key);
        value.put(&mut header);
    }
    let mut end = 0u64;
    for Entry { name, dtype, shape, .. } in &entries {
        text(&mut header, name);
        header.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| header.extend((*size as u64).to_le_bytes()));
        header.extend(code(*dtype)?.to_le_bytes());
        header.extend(end.to_le_bytes());
        end += byte_size(*dtype, shape).unwrap_or(0).next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);

    progress.begin("write", end, 0, "bytes");
    let mut out = AtomicFile::create(path)?;
    out.write(&header)?;
    for entry in entries {
        if stop_requested() {
            return Err(Error::new(Kind::Interrupted, format!("stopped while writing `{}`", path.display())));
        }
        let length = out.entry(entry)?;
        let padded = length.next_multiple_of(ALIGNMENT);
        out.write(&[0; ALIGNMENT as usize][..(padded - length) as usize])?;
        progress.advance(padded, "");
    }
    progress.end("");
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    out.finish(&name.unwrap_or_default())
}
