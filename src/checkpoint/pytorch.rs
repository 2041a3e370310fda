//! PyTorch's own files, as `torch.save` writes them: a zip archive of raw values, and a pickle that says which belong to
//! which tensor. Reading never runs a pickle; writing makes one of tensors and whole numbers only, which
//! `torch.load(weights_only=True)` takes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Cursor, Write};
use std::path::Path;

use candle_core::pickle::PthTensors;
use candle_core::{DType, Tensor};
use safetensors::Dtype;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::writer::{tensor_bytes, write_atomic};
use crate::error::{Error, Kind, Result};

/// Where trainers put the tensors.
const STATE: &str = "model_state_dict";

/// The tensors under `model_state_dict` of a file, in their own types.
pub fn read(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let wrong = |e: candle_core::Error| {
        Error::new(Kind::Checkpoint, format!("`{}` is not a PyTorch checkpoint with `{STATE}`: {e}", path.display()))
            .hint("give a file that `torch.save` wrote in its zip format")
    };
    let file = PthTensors::new(path, Some(STATE)).map_err(wrong)?;
    let mut tensors = BTreeMap::new();
    for name in file.tensor_infos().keys() {
        if let Some(tensor) = file.get(name).map_err(wrong)? {
            tensors.insert(name.clone(), tensor);
        }
    }
    // The reader passes over what it cannot read: no tensor may be lost that way.
    let held = values(path).map_err(|e| wrong(candle_core::Error::wrap(e)))?;
    match tensors.len() >= held && held > 0 {
        true => Ok(tensors),
        false => {
            let (path, read) = (path.display(), tensors.len());
            Err(Error::new(Kind::Checkpoint, format!("`{path}` holds {held} tensors, {read} of them under `{STATE}`"))
                .hint("give a checkpoint of trained weights in f32, f16 or bf16, and nothing else"))
        }
    }
}

/// Files with the values of tensors in an archive.
fn values(path: &Path) -> Result<usize, zip::result::ZipError> {
    let zip = ZipArchive::new(File::open(path)?)?;
    let names = zip.file_names().collect::<Result<Vec<_>, _>>()?;
    Ok(names.iter().filter(|name| name.contains("/data/")).count())
}

/// Writes `{"model_state_dict": tensors, "step": step}`, all tensors in f32.
pub fn write(path: &Path, tensors: &[(String, Tensor)], step: u32) -> Result<()> {
    let failed = |e: zip::result::ZipError| {
        Error::new(Kind::Unexpected, format!("cannot make the archive `{}`: {e}", path.display()))
    };
    // PyTorch maps the values of an archive: nothing is compressed.
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let mut put = |name: &str, bytes: &[u8]| -> Result<()> {
        zip.start_file(format!("archive/{name}"), stored).map_err(failed)?;
        zip.write_all(bytes).map_err(|e| Error::io("write", path, e))
    };
    put("data.pkl", &pickle(tensors, step))?;
    put("byteorder", b"little")?;
    for (key, (_, tensor)) in tensors.iter().enumerate() {
        put(&format!("data/{key}"), &tensor_bytes(&tensor.to_dtype(DType::F32)?, Dtype::F32)?)?;
    }
    put("version", b"3\n")?;
    let bytes = zip.finish().map_err(failed)?.into_inner();
    write_atomic(path, &bytes)
}

/// The pickle, protocol 2.
fn pickle(tensors: &[(String, Tensor)], step: u32) -> Vec<u8> {
    let mut out = Pickle(vec![0x80, 2]);
    out.op(b"}(");
    out.text(STATE);
    out.op(b"}(");
    for (key, (name, tensor)) in tensors.iter().enumerate() {
        out.text(name);
        out.tensor(key, tensor.dims());
    }
    out.op(b"u");
    out.text("step");
    out.int(step as usize);
    out.op(b"u.");
    out.0
}

struct Pickle(Vec<u8>);

impl Pickle {
    /// Opcodes: `(` mark, `t` tuple, `}` dict, `u` its items, `c` global, `Q` persistent id, `R` call, `.` end.
    fn op(&mut self, code: &[u8]) {
        self.0.extend(code);
    }

    fn text(&mut self, text: &str) {
        self.op(b"X");
        self.0.extend((text.len() as u32).to_le_bytes());
        self.op(text.as_bytes());
    }

    /// A signed number of four bytes, of eight where it needs them.
    fn int(&mut self, n: usize) {
        match i32::try_from(n) {
            Ok(n) => {
                self.op(b"J");
                self.0.extend(n.to_le_bytes());
            }
            Err(_) => {
                self.op(&[0x8a, 8]);
                self.0.extend((n as i64).to_le_bytes());
            }
        }
    }

    fn ints(&mut self, list: &[usize]) {
        self.op(b"(");
        list.iter().for_each(|n| self.int(*n));
        self.op(b"t");
    }

    /// `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, its storage the file `data/<key>`.
    fn tensor(&mut self, key: usize, shape: &[usize]) {
        self.op(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        self.op(b"ctorch\nFloatStorage\n");
        self.text(&key.to_string());
        self.text("cpu");
        self.int(shape.iter().product());
        self.op(b"tQ");
        self.int(0);
        let strides: Vec<usize> = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
        self.ints(shape);
        self.ints(&strides);
        self.op(b"\x89ccollections\nOrderedDict\n)RtR");
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.pt");
        let cube = Tensor::arange(0f32, 24.0, &Device::Cpu).unwrap().reshape((2, 3, 4)).unwrap();
        let row = Tensor::new(&[0.5f32, -2.0], &Device::Cpu).unwrap();
        write(&path, &[("a.cube".into(), cube.clone()), ("b".into(), row.clone())], 7).unwrap();
        let found = read(&path).unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), ["a.cube", "b"]);
        for (name, wanted) in [("a.cube", cube), ("b", row)] {
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!((found[name].dims(), values(&found[name])), (wanted.dims(), values(&wanted)), "{name}");
        }
    }

    #[test]
    fn what_is_no_checkpoint_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.pt");
        std::fs::write(&path, b"no archive").unwrap();
        let error = read(&path).unwrap_err();
        assert!(error.message.contains("a.pt") && error.hint.is_some(), "{}", error.message);
    }
}
