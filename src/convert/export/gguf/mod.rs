//! One file for llama.cpp, of a model whose layers are all softmax: its architectures know no other mixers.
//!
//! [`target`] knows its architectures, [`vocabulary`] its tokenizers, [`file`] the container. Tensors get the names and the
//! layout that it reads; vectors, norms and routers are f32, as its kernels want them.

mod file;
mod target;
mod vocabulary;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;

use super::{FileRow, Shape, create, natural, row};
use crate::checkpoint::writer::{Data, Entry, tensor_bytes};
use crate::convert::load::Model;
use crate::error::{Error, Kind, Result};
use crate::families::{Architecture, Claim, Layout, NormKind, Part, Place, Projection, Role, RopeScaling};
use crate::progress::Progress;
use file::Value;
use target::Target;

/// Name of the file where a folder is asked for.
const FILE: &str = "model.gguf";

/// Writes `model` as the file `out`, or as `model.gguf` in the folder `out` where that does not end in `.gguf`.
///
/// A model with converted layers is refused, and one of which llama.cpp would compute anything else.
pub fn write(model: &Model, shape: &Shape, out: &Path, progress: &dyn Progress) -> Result<Vec<FileRow>> {
    let a = model.architecture();
    let refuse = |what: String| Error::new(Kind::Usage, format!("no GGUF of this model: {what}"));
    if let Some(l) = model.description.linearization.as_ref().filter(|l| !l.layers.is_empty()) {
        let layers: Vec<String> = l.layers.iter().map(usize::to_string).collect();
        let what = match layers.as_slice() {
            [one] => format!("layer {one} is"),
            all => format!("layers {} are", all.join(", ")),
        };
        let kind = l.mixer.design().name();
        let hint = "`--to transformers` runs everywhere PyTorch does; a model whose layers are all softmax can be GGUF";
        return Err(refuse(format!("{what} `{kind}`, and no architecture of llama.cpp has this mixer")).hint(hint));
    }
    let target = Target::of(a).map_err(|what| {
        refuse(format!("llama.cpp would compute another one; {what}")).hint("`--to transformers` keeps all of it")
    })?;
    let context = target.context(a);
    if context < a.max_positions {
        progress.warn(&format!(
            "llama.cpp's `{}` knows no sliding windows: `context_length` is {context}, up to where they make no difference",
            target.name
        ));
    }
    if let Some(RopeScaling::Long { original, .. }) = a.ropes.first().map(|rope| &rope.scaling) {
        progress.warn(&format!(
            "llama.cpp takes LongRoPE's divisors by its context, not by the text: up to `-c {original}` it takes the short"
        ));
    }
    let entries = entries(model, target, shape.dtype)?;
    let metadata = metadata(model, target, &entries)?;
    let path = if is_file(out) { out.to_path_buf() } else { out.join(FILE) };
    if let Some(parent) = path.parent().filter(|parent| *parent != PathBuf::new()) {
        create(parent)?;
    }
    Ok(vec![row(file::write(&path, &metadata, entries, progress)?)])
}

/// Whether a path names the file itself.
pub fn is_file(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "gguf")
}

/// What llama.cpp reads before the tensors.
fn metadata(model: &Model, target: &Target, entries: &[Entry]) -> Result<Vec<(String, Value)>> {
    let a = model.architecture();
    let id = model.checkpoint.source.repo.as_ref().unwrap_or(&model.checkpoint.source.id);
    let name = Path::new(id).file_name().map_or(id.clone(), |name| name.to_string_lossy().into_owned());
    // The type of most weights, by llama.cpp's numbers.
    let kind = entries.iter().find(|e| e.name == "blk.0.attn_output.weight").map(|e| e.dtype);
    let kind = match kind {
        Some(Dtype::F16) => 1,
        Some(Dtype::BF16) => 32,
        _ => 0,
    };
    let mut all = vec![
        ("general.architecture".to_string(), Value::Text(target.name.into())),
        ("general.type".to_string(), Value::Text("model".into())),
        ("general.name".to_string(), Value::Text(name)),
        ("general.file_type".to_string(), Value::U32(kind)),
    ];
    all.extend(target.numbers(a).into_iter().map(|(key, value)| (format!("{}.{key}", target.name), value)));
    all.extend(vocabulary::metadata(&model.checkpoint, a.vocab)?);
    Ok(all)
}

/// Every tensor under its name and in its layout; matrices in `dtype`, or as they are stored where that is `None`.
fn entries<'a>(model: &'a Model, target: &'static Target, dtype: Option<Dtype>) -> Result<Vec<Entry<'a>>> {
    let (a, checkpoint) = (model.architecture(), &model.checkpoint);
    let mut all = Vec::new();
    for (source, claim) in &model.description.claims {
        let Claim::Reads(role) = *claim else { continue };
        let info = checkpoint.info(source)?;
        let (names, shape) = match role {
            // One tensor for all experts of a projection.
            Role::Expert(_, first, _) if first > 0 => continue,
            Role::Expert(l, _, p) => {
                let experts = a.experts(l).map_or(0, |experts| experts.count);
                let names = (0..experts).map(|e| a.name(Role::Expert(l, e, p))).collect();
                (names, [&[experts], info.shape.as_slice()].concat())
            }
            Role::Weight(..) if a.layout == Layout::Columns => {
                (vec![source.clone()], info.shape.iter().rev().copied().collect())
            }
            _ => (vec![source.clone()], info.shape.clone()),
        };
        let narrow = matches!(role, Role::Router(_) | Role::Positions) || shape.len() == 1;
        let dtype = if narrow { Dtype::F32 } else { dtype.unwrap_or(info.dtype) };
        let data = if dtype == info.dtype && stays(a, target, role) {
            Data::Bytes(checkpoint.bytes(source)?)
        } else {
            let wide = if shifted(a, role) { DType::F32 } else { DType::try_from(info.dtype)? };
            Data::Lazy(Box::new(move || {
                let mut bytes = Vec::new();
                for name in &names {
                    let stored = checkpoint.tensor(name, wide, &Device::Cpu)?;
                    bytes.extend(tensor_bytes(&laid_out(a, target, role, stored)?, dtype)?);
                }
                Ok(bytes)
            }))
        };
        if role == Role::Embedding && a.tied && target.own_head {
            let source = source.clone();
            let read = move || tensor_bytes(&checkpoint.tensor(&source, DType::F32, &Device::Cpu)?, dtype);
            let name = name(a, Role::Head);
            all.push(Entry { name, dtype, shape: shape.clone(), data: Data::Lazy(Box::new(read)) });
        }
        all.push(Entry { name: name(a, role), dtype, shape, data });
    }
    for (name, divisors) in target::divisors(a) {
        let shape = vec![divisors.len()];
        let bytes = move || Ok(divisors.iter().flat_map(|x| x.to_le_bytes()).collect());
        all.push(Entry { name: name.into(), dtype: Dtype::F32, shape, data: Data::Lazy(Box::new(bytes)) });
    }
    all.sort_by_key(|e| natural(&e.name));
    Ok(all)
}

/// Whether the bytes of a tensor are those that llama.cpp reads.
fn stays(a: &Architecture, target: &Target, role: Role) -> bool {
    match role {
        Role::Expert(..) => false,
        _ if shifted(a, role) => false,
        Role::Weight(_, p) | Role::Bias(_, p) => a.layout == Layout::Rows && !(target.pairs && turns(p)),
        _ => true,
    }
}

/// A tensor of the checkpoint as llama.cpp wants it.
fn laid_out(a: &Architecture, target: &Target, role: Role, stored: Tensor) -> Result<Tensor> {
    Ok(match role {
        // Its norms multiply by the weight itself.
        _ if shifted(a, role) => (stored + 1.0)?,
        Role::Weight(_, p) | Role::Bias(_, p) => {
            let rows = a.rows(p, &stored)?;
            if target.pairs && turns(p) { paired(&rows, a.head_dim)? } else { rows }
        }
        _ => stored,
    })
}

/// Whether a tensor is the weight of a norm that multiplies by one more.
fn shifted(a: &Architecture, role: Role) -> bool {
    a.norm == NormKind::RmsShifted && matches!(role, Role::Norm(..) | Role::FinalNorm(_) | Role::HeadNorm(..))
}

fn turns(p: Projection) -> bool {
    matches!(p, Projection::Q | Projection::K)
}

/// Rows whose heads have the channels that turn together beside each other, from such half a head apart.
fn paired(rows: &Tensor, head_dim: usize) -> Result<Tensor> {
    let heads = rows.dim(0)? / head_dim;
    let halves = rows.reshape([&[heads, 2, head_dim / 2], &rows.dims()[1..]].concat())?;
    Ok(halves.transpose(1, 2)?.contiguous()?.reshape(rows.shape())?)
}

/// What llama.cpp calls a tensor.
fn name(a: &Architecture, role: Role) -> String {
    let end = |part: Part| if part == Part::Weight { "weight" } else { "bias" };
    let projection = |p: Projection| match p {
        Projection::Q if a.names.beside(p).count() == 3 => "attn_qkv",
        Projection::Q => "attn_q",
        Projection::K => "attn_k",
        Projection::V => "attn_v",
        Projection::O => "attn_output",
        // Of gate and up in one tensor, gate comes first and the name is that of up.
        Projection::Gate if a.names.beside(p).count() == 2 => "ffn_up",
        Projection::Gate => "ffn_gate",
        Projection::Up => "ffn_up",
        Projection::Down => "ffn_down",
    };
    match role {
        Role::Embedding => "token_embd.weight".into(),
        Role::Positions => "position_embd.weight".into(),
        Role::FinalNorm(part) => format!("output_norm.{}", end(part)),
        Role::Head => "output.weight".into(),
        Role::Norm(l, place, part) => {
            let norm = match place {
                Place::BeforeAttention => "attn_norm",
                Place::AfterAttention => "post_attention_norm",
                Place::BeforeMlp => "ffn_norm",
                Place::AfterMlp => "post_ffw_norm",
            };
            format!("blk.{l}.{norm}.{}", end(part))
        }
        Role::HeadNorm(l, Projection::K) => format!("blk.{l}.attn_k_norm.weight"),
        Role::HeadNorm(l, _) => format!("blk.{l}.attn_q_norm.weight"),
        Role::Weight(l, p) => format!("blk.{l}.{}.weight", projection(p)),
        Role::Bias(l, p) => format!("blk.{l}.{}.bias", projection(p)),
        Role::Router(l) => format!("blk.{l}.ffn_gate_inp.weight"),
        Role::Expert(l, _, p) => format!("blk.{l}.{}_exps.weight", projection(p)),
    }
}
