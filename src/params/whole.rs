//! Changes in full of what is no projection: embeddings, norms and head. Such a tensor is `w + Δ` with Δ in f32, which
//! starts at 0.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::{Adapted, Adapters, Param};
use crate::families::{Architecture, Role};

pub(super) struct Whole {
    /// Of the parameter.
    name: String,
    /// In the shape of the tensor.
    delta: Var,
    pub(super) trains: bool,
}

impl Adapters {
    /// Changes of these tensors that train: those that are there already, or new ones.
    pub fn add_whole(
        &mut self,
        architecture: &Architecture,
        tensors: &[(Role, Vec<usize>)],
        device: &Device,
    ) -> Result<()> {
        for (role, shape) in tensors {
            match self.whole.get_mut(role) {
                Some(there) => there.trains = true,
                None => {
                    let delta = Var::zeros(shape.as_slice(), DType::F32, device)?;
                    let name = format!("{}.delta", architecture.name(*role));
                    self.whole.insert(*role, Whole { name, delta, trains: true });
                }
            }
        }
        Ok(())
    }

    /// Whether this tensor trains.
    pub fn trains(&self, role: Role) -> bool {
        self.whole.get(&role).is_some_and(|change| change.trains)
    }

    /// The change of a tensor in f32, without gradient where it rests.
    pub fn delta(&self, role: Role) -> Option<Tensor> {
        let of = |change: &Whole| match change.trains {
            true => change.delta.as_tensor().clone(),
            false => change.delta.as_detached_tensor(),
        };
        self.whole.get(&role).map(of)
    }

    /// `tensor` with its change, in f32; `None` where it has none.
    pub fn changed(&self, role: Role, tensor: &Tensor) -> Result<Option<Tensor>> {
        self.delta(role).map(|delta| tensor.to_dtype(DType::F32)? + delta).transpose()
    }

    /// The tensors that are changed.
    pub fn roles(&self) -> impl Iterator<Item = Role> {
        self.whole.keys().copied()
    }

    pub(super) fn trained_whole(&self) -> impl Iterator<Item = Adapted> {
        self.whole.iter().filter(|(_, change)| change.trains).map(|(role, change)| Adapted {
            param: Param { name: change.name.clone(), var: change.delta.clone(), scalar: false },
            layer: role.layer(),
            full: true,
        })
    }
}
