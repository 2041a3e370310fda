//! A norm of the stream or of heads, as the family defines it; all of them have gradients.

use std::borrow::Cow;

use candle_core::{D, Result as TensorResult, Tensor};

use crate::error::Result;
use crate::families::{Architecture, NormKind, Part, Role};
use crate::ops::loss::pulled;
use crate::ops::rms_norm::{rms_norm, rms_norm_back};
use crate::ops::wide;
use crate::params::Adapters;

/// One norm with its weights.
#[derive(Clone)]
pub struct Norm {
    kind: NormKind,
    /// `[N]`; 1 is already added where the family does that, in f32.
    pub(super) weight: Tensor,
    bias: Option<Tensor>,
    eps: f64,
}

impl Norm {
    /// Reads scale and, where there is one, shift.
    pub(super) fn load(a: &Architecture, read: impl Fn(Part) -> Result<Tensor>) -> Result<Norm> {
        let weight = read(Part::Weight)?;
        let weight = match a.norm {
            NormKind::RmsShifted => (weight.to_dtype(wide(weight.dtype()))? + 1.0)?,
            _ => weight,
        };
        let bias = if a.norm == NormKind::Layer { Some(read(Part::Bias)?) } else { None };
        Ok(Norm { kind: a.norm, weight, bias, eps: a.norm_eps })
    }

    /// The norm as `lora` changes it; `role` says what its parts are to the decoder.
    pub fn changed(&self, lora: Option<&Adapters>, role: impl Fn(Part) -> Role) -> TensorResult<Cow<'_, Norm>> {
        let changed = |part, tensor: &Tensor| lora.map_or(Ok(None), |lora| lora.changed(role(part), tensor));
        let weight = changed(Part::Weight, &self.weight)?;
        let bias = self.bias.as_ref().map_or(Ok(None), |bias| changed(Part::Bias, bias))?;
        if weight.is_none() && bias.is_none() {
            return Ok(Cow::Borrowed(self));
        }
        let (weight, bias) = (weight.unwrap_or_else(|| self.weight.clone()), bias.or_else(|| self.bias.clone()));
        Ok(Cow::Owned(Norm { weight, bias, ..*self }))
    }

    /// A part as the checkpoint has it.
    pub fn stored(&self, part: Part) -> TensorResult<Tensor> {
        match (part, &self.bias) {
            (Part::Weight, _) if self.kind == NormKind::RmsShifted => &self.weight - 1.0,
            (Part::Weight, _) => Ok(self.weight.clone()),
            (Part::Bias, Some(bias)) => Ok(bias.clone()),
            (Part::Bias, None) => candle_core::bail!("this norm has no bias"),
        }
    }

    /// Replaces a part by another that a checkpoint has.
    pub fn set(&mut self, part: Part, stored: &Tensor) -> TensorResult<()> {
        match part {
            Part::Weight if self.kind == NormKind::RmsShifted => {
                self.weight = (stored.to_dtype(self.weight.dtype())? + 1.0)?
            }
            Part::Weight => self.weight = stored.clone(),
            Part::Bias => self.bias = Some(stored.clone()),
        }
        Ok(())
    }

    /// `x` [.., N], normalised over the last axis.
    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        match (self.kind, &self.bias) {
            (NormKind::Rms | NormKind::RmsShifted, _) => rms_norm(x, &self.weight, self.eps),
            (NormKind::Layer, bias) => {
                let dtype = wide(x.dtype());
                let wide = x.to_dtype(dtype)?;
                let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
                let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?;
                let y = centred.broadcast_div(&deviation)?.broadcast_mul(&self.weight.to_dtype(dtype)?)?;
                match bias {
                    Some(bias) => y.broadcast_add(&bias.to_dtype(dtype)?)?.to_dtype(x.dtype()),
                    None => y.to_dtype(x.dtype()),
                }
            }
        }
    }

    /// What is added under the root, where this is an RMSNorm.
    pub(super) fn rms_eps(&self) -> Option<f64> {
        (self.kind != NormKind::Layer).then_some(self.eps)
    }

    /// What the gradient of [`Norm::forward`]'s result gives `x`.
    pub fn pull_back(&self, x: &Tensor, gradient: &Tensor) -> TensorResult<Tensor> {
        match self.kind {
            NormKind::Rms | NormKind::RmsShifted => rms_norm_back(x, &self.weight, self.eps, gradient),
            NormKind::Layer => pulled(x, gradient, |x| self.forward(x)),
        }
    }
}
