//! The operations under the mixers and the decoder, one file each.
//!
//! A file holds, in this order: formula and shapes; the plain tensor form, whose gradient is the oracle; the fast CPU
//! form with its hand-written backward; the launch of the CUDA form (`kernels/<op>.cu`); tests. Every public function
//! takes the fast form where it exists (f32 on the CPU, bf16 and mostly f32 on a GPU) and the plain form elsewhere.
//!
//! Sequences are laid out `[batch, time, heads, dim]`, the layout projections produce, with queries, keys and values
//! packed along the head axis: heads `0..H` are queries, then `Hkv` keys, then `Hkv` values.
//!
//! candle-nn's fused `softmax_last_dim`, `RmsNorm::forward`, `LayerNorm::forward` and `rope` have no gradient and give
//! no error; nothing here or above uses them.

#[cfg(test)]
pub(crate) mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cuda")]
pub mod decode;
pub mod delta_rule;
pub mod feature_map;
pub mod gate;
pub mod gated_linear_attn;
pub mod glu;
pub mod head_loss;
pub mod head_norm;
pub mod hybrid_attn;
pub mod linear;
pub mod loss;
pub mod mix;
pub mod project;
pub mod rms_norm;
pub mod rope;
pub mod shares;
pub mod short_conv;
pub mod softmax;
pub mod softmax_attn;
pub mod taylor;

use candle_core::{DType, Device, Result, Tensor};

/// Opens GPU `number`; an error where this build has no CUDA.
pub fn gpu(number: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    let device = cuda::open(number);
    #[cfg(not(feature = "cuda"))]
    let device = Device::new_cuda(number);
    device
}

/// Most bytes in use on a GPU since [`forget_peak`]; `None` elsewhere.
pub fn peak(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return cuda::peak_memory(device).ok();
    }
    let _ = device;
    None
}

/// Begins a new peak at what is in use now.
pub fn forget_peak(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        // Without it the next peak is an older one, which nothing but a report reads.
        let _ = cuda::reset_peak_memory(device);
    }
    let _ = device;
}

/// Whether the fast CPU form of an op can run on this tensor.
pub(crate) fn fast(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cpu) && x.dtype() == DType::F32
}

/// `x` times a number that is not rounded to the precision of `x`.
pub(crate) fn scaled(x: &Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 {
        return Ok(x.clone());
    }
    (x.to_dtype(wide(x.dtype()))? * factor)?.to_dtype(x.dtype())
}

/// The precision plain forms compute in: at least f32.
pub(crate) fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
