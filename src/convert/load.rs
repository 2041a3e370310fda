//! A model to work on: checkpoint, family, fate of every tensor; and the net a converted model describes.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Var};
use serde::{Deserialize, Serialize};

use super::liger;
use crate::checkpoint::config::Config;
use crate::checkpoint::{Checkpoint, Headers};
use crate::error::{Error, Kind, Result};
use crate::families::{self, Architecture, Claim, Family, Role};
use crate::model::{Decoder, Net};
use crate::params::Param;
use crate::progress::Progress;
use crate::recipe;

/// The `linearization` object of an exported `config.json`: what turns the base model into the converted one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Linearization {
    pub format_version: u32,
    /// What the base model's `config.json` said.
    pub base_model_type: String,
    pub base_architectures: Vec<String>,
    /// Layers whose attention was replaced; the others are softmax.
    pub layers: Vec<usize>,
    pub mixer: recipe::Mixer,
    /// The model it came from and its commit.
    pub teacher: String,
    pub teacher_revision: Option<String>,
}

impl Linearization {
    pub const FORMAT: u32 = 1;

    /// What makes a converted model, ours or one of the official Liger code; `None` for an ordinary one.
    pub fn of(config: &Config) -> Result<Option<Self>> {
        let Some(value) = config.get("linearization") else { return liger::read(config) };
        let found: Self = serde_json::from_value(value.clone()).map_err(|e| {
            Error::new(Kind::Config, format!("{}: `linearization` cannot be read: {e}", config.file()))
                .hint("written by another version? `margay doctor` prints this one")
        })?;
        if found.format_version > Self::FORMAT {
            let version = found.format_version;
            let message = format!("{}: format version {version} is newer than this program reads", config.file());
            return Err(Error::new(Kind::Config, message).hint("update margay"));
        }
        Ok(Some(found))
    }

    /// Name and shape of every tensor the mixers add.
    pub fn tensors(&self, architecture: &Architecture) -> BTreeMap<String, Vec<usize>> {
        let specs = |layer: &usize| {
            let layer = *layer;
            let specs = self.mixer.design().specs(architecture);
            specs.into_iter().map(move |s| (tensor_name(architecture, layer, s.name), s.shape)).collect::<Vec<_>>()
        };
        self.layers.iter().flat_map(specs).collect()
    }
}

/// Checkpoint name of a mixer's tensor: under the attention of its layer.
pub fn tensor_name(architecture: &Architecture, layer: usize, suffix: &str) -> String {
    let names = architecture.names;
    format!("{}.{layer}.{}.{suffix}", names.blocks, names.attention())
}

/// The file of an adapter folder that holds its mixers; the base model's weights are not there.
pub const MIXERS: &str = "mixers.safetensors";

/// More layers than this are no model but a damaged configuration.
const MOST_LAYERS: usize = 10_000;

/// What a `config.json` says: family and architecture, and the mixers of a converted model.
pub fn understand(config: &Config) -> Result<(&'static Family, Architecture, Option<Linearization>)> {
    let linearization = Linearization::of(config)?;
    let (family, a) = match &linearization {
        Some(l) => families::named(config, &l.base_architectures)?,
        None => families::of(config)?,
    };
    if a.layers > MOST_LAYERS {
        let message = format!("{}: {} layers; more than {MOST_LAYERS} are refused", config.file(), a.layers);
        return Err(Error::new(Kind::Config, message).hint("the file is damaged, or describes no model"));
    }
    if let Some(layer) = linearization.iter().flat_map(|l| &l.layers).find(|layer| **layer >= a.layers) {
        let message = format!("{}: `linearization.layers` names layer {layer}", config.file());
        return Err(Error::new(Kind::Config, message).hint(format!("the model has {} layers", a.layers)));
    }
    Ok((family, a, linearization))
}

/// What is known of a model before its weights are read.
pub struct Description {
    pub family: &'static Family,
    pub architecture: Architecture,
    /// Fate of every tensor of the base model.
    pub claims: BTreeMap<String, Claim>,
    pub linearization: Option<Linearization>,
}

impl Description {
    /// Claims every tensor; one that is missing, misshapen or unknown is an error.
    pub fn of(headers: &Headers) -> Result<Self> {
        let (family, mut architecture, linearization) = understand(&headers.config)?;
        architecture.names = family.names(headers);
        let added = linearization.as_ref().map(|l| l.tensors(&architecture)).unwrap_or_default();
        let claims = families::claim(headers, family, &architecture, &added).map_err(|e| {
            match headers.files.iter().any(|file| file.name == MIXERS) {
                true => e.hint("this is an adapter, what changed alone; give the export that it was written from"),
                false => e,
            }
        })?;
        Ok(Description { family, architecture, claims, linearization })
    }

    /// The checkpoint's name of a role: a tied embedding may have that of the head.
    pub fn name(&self, role: Role) -> String {
        let found = self.claims.iter().find(|(_, claim)| **claim == Claim::Reads(role));
        found.map_or_else(|| self.architecture.name(role), |(name, _)| name.clone())
    }
}

/// A model on disk, opened and understood.
pub struct Model {
    pub checkpoint: Checkpoint,
    pub description: Description,
}

impl Model {
    /// Opens a folder or a hub id.
    pub fn open(model: &str, progress: &dyn Progress) -> Result<Self> {
        let checkpoint = Checkpoint::load(model, progress)?;
        let description = Description::of(checkpoint.headers())?;
        Ok(Model { checkpoint, description })
    }

    pub fn architecture(&self) -> &Architecture {
        &self.description.architecture
    }

    /// The frozen weights on a device.
    pub fn decoder(&self, device: &Device, progress: &dyn Progress) -> Result<Decoder> {
        Decoder::load(&self.checkpoint, self.architecture(), compute_dtype(device), device, progress)
    }

    /// The net this checkpoint describes: softmax everywhere, or the mixers of a converted model with their tensors.
    pub fn net(&self, device: &Device) -> Result<Net> {
        let a = self.architecture();
        let Some(l) = &self.description.linearization else { return Ok(Net::teacher(a)) };
        Net::of(a, l.mixer.design(), &l.layers, |layer, spec| {
            let name = tensor_name(a, layer, spec.name);
            let tensor = self.checkpoint.shaped(&name, &spec.shape, DType::F32, device)?;
            Ok(Param { name, var: Var::from_tensor(&tensor)?, scalar: spec.scalar })
        })
    }
}

/// Frozen weights and activations: f32 on the CPU, bf16 on a GPU.
pub fn compute_dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}
