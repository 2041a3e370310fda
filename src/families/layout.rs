//! Between a projection as it lies in a checkpoint and the rows that the decoder multiplies by.

use candle_core::{Result, Tensor};

use super::{Architecture, Layout, Projection};

impl Architecture {
    /// The rows [out, in] (of a bias `[out]`) of all projections in the tensor that `p` stands for, one projection behind
    /// the other, from what is `stored`.
    pub fn rows(&self, p: Projection, stored: &Tensor) -> Result<Tensor> {
        match self.layout {
            Layout::Heads if self.takes_turns(p) => {
                let rest = &stored.dims()[1..];
                let heads = stored.reshape([&[self.heads, 3, self.head_dim], rest].concat())?;
                heads.transpose(0, 1)?.contiguous()?.reshape(stored.shape())
            }
            Layout::Columns if stored.rank() == 2 => stored.t()?.contiguous(),
            _ => Ok(stored.clone()),
        }
    }

    /// The inverse of [`Architecture::rows`].
    pub fn stored(&self, p: Projection, rows: &Tensor) -> Result<Tensor> {
        match self.layout {
            Layout::Columns if rows.rank() == 2 => rows.t()?.contiguous(),
            _ => self.in_order(p, rows),
        }
    }

    /// The rows of [`Architecture::rows`] in the order of the checkpoint's outputs.
    pub fn in_order(&self, p: Projection, rows: &Tensor) -> Result<Tensor> {
        if self.layout != Layout::Heads || !self.takes_turns(p) {
            return Ok(rows.clone());
        }
        let rest = &rows.dims()[1..];
        let heads = rows.reshape([&[3, self.heads, self.head_dim], rest].concat())?;
        heads.transpose(0, 1)?.contiguous()?.reshape(rows.shape())
    }

    fn takes_turns(&self, p: Projection) -> bool {
        p == Projection::Q && self.names.beside(p).count() == 3
    }
}
