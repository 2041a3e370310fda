//! AdamW over f32 masters, with global-norm clipping (arXiv 1711.05101).
//!
//! Decoupled decay, bias correction, `eps` outside the square root.

use candle_core::{DType, Result as TensorResult, Tensor};

use crate::error::{Error, Kind};
use crate::params::Param;
use crate::recipe::Optimizer;

pub struct AdamW {
    settings: Optimizer,
    moments: Vec<(Tensor, Tensor)>,
    /// Updates done.
    pub steps: u64,
}

/// Why an update was refused; nothing was changed.
pub enum Refused {
    NotFinite { tensor: String },
    Tensor(candle_core::Error),
}

impl From<candle_core::Error> for Refused {
    fn from(e: candle_core::Error) -> Self {
        Refused::Tensor(e)
    }
}

impl Refused {
    pub fn at(self, stage: &str, step: u64) -> Error {
        match self {
            Refused::NotFinite { tensor } => {
                let message = format!("the gradient of `{tensor}` is not finite at step {step} of stage `{stage}`");
                let hint = format!("lower `{stage}.lr`; the last good checkpoint is kept");
                Error::new(Kind::Training, message).hint(hint)
            }
            Refused::Tensor(e) => e.into(),
        }
    }
}

impl AdamW {
    pub fn new(params: &[Param], settings: &Optimizer) -> TensorResult<Self> {
        let zeros = |p: &Param| Ok((p.var.zeros_like()?, p.var.zeros_like()?));
        Ok(AdamW {
            settings: settings.clone(),
            moments: params.iter().map(zeros).collect::<TensorResult<_>>()?,
            steps: 0,
        })
    }

    /// First and second moment of a parameter.
    pub fn moments(&self, slot: usize) -> (&Tensor, &Tensor) {
        (&self.moments[slot].0, &self.moments[slot].1)
    }

    pub fn restore(&mut self, slot: usize, m: &Tensor, v: &Tensor) -> TensorResult<()> {
        self.moments[slot] = (m.clone(), v.clone());
        Ok(())
    }

    /// One update at `lr` times each parameter's peak. Gives the global gradient norm before clipping.
    pub fn update(
        &mut self,
        params: &[Param],
        grads: &[Option<Tensor>],
        lr: f64,
        peaks: &[f64],
    ) -> Result<f64, Refused> {
        let mut square = 0f64;
        for (param, grad) in params.iter().zip(grads) {
            let Some(grad) = grad else { continue };
            let part = grad.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            if !part.is_finite() {
                return Err(Refused::NotFinite { tensor: param.name.clone() });
            }
            square += part;
        }
        let norm = square.sqrt();
        let s = &self.settings;
        let shrink = if s.clip > 0.0 && norm > s.clip { s.clip / norm } else { 1.0 };
        self.steps += 1;
        let (b1, b2) = (s.beta1, s.beta2);
        let correct1 = 1.0 - b1.powf(self.steps as f64);
        let correct2 = 1.0 - b2.powf(self.steps as f64);
        for (((param, grad), peak), (m, v)) in params.iter().zip(grads).zip(peaks).zip(&mut self.moments) {
            let Some(grad) = grad else { continue };
            let grad = (grad * shrink)?;
            *m = ((&*m * b1)? + (&grad * (1.0 - b1))?)?;
            *v = ((&*v * b2)? + (grad.sqr()? * (1.0 - b2))?)?;
            let lr = lr * peak;
            let change = ((&*m * (lr / correct1))? / ((&*v / correct2)?.sqrt()? + s.eps)?)?;
            let kept = (param.var.as_tensor() * (1.0 - lr * s.weight_decay))?;
            param.var.set(&(kept - change)?)?;
        }
        Ok(norm)
    }
}
