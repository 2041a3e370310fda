//! Weights from a mapped file to a GPU: while one pinned buffer is on its way, the next is filled by all threads.

use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, PinnedHostSlice, result};
use candle_core::{CudaDevice, DType, Error, Result, Tensor};
use rayon::prelude::*;

use crate::ops::cuda::Output;

/// Bytes of each of the two buffers.
const SIZE: usize = 32 << 20;

/// The buffers, made when the first tensor is uploaded.
#[derive(Default)]
pub struct Upload(Mutex<Option<Buffers>>);

struct Buffers {
    /// Pinned memory, and when the copy out of it is done.
    slots: [(PinnedHostSlice<u8>, CudaEvent); 2],
    turn: usize,
}

impl Buffers {
    fn new(device: &CudaDevice) -> Result<Buffers> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let slot = || -> Result<_> {
            // SAFETY: bytes need no initialisation; every one that is copied is written first.
            let memory = unsafe { context.alloc_pinned::<u8>(SIZE).map_err(Error::wrap)? };
            Ok((memory, context.new_event(None).map_err(Error::wrap)?))
        };
        Ok(Buffers { slots: [slot()?, slot()?], turn: 0 })
    }
}

impl Upload {
    /// The tensor of these little-endian bytes on the device.
    pub fn tensor(&self, bytes: &[u8], dtype: DType, shape: &[usize], device: &CudaDevice) -> Result<Tensor> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let buffers = match &mut *guard {
            Some(buffers) => buffers,
            none => none.insert(Buffers::new(device)?),
        };
        let stream = device.cuda_stream();
        let output = Output::new(device, shape, dtype)?;
        let target = output.pointer()? as u64;
        for (n, part) in bytes.chunks(SIZE).enumerate() {
            let (memory, copied) = &mut buffers.slots[buffers.turn];
            buffers.turn = 1 - buffers.turn;
            copied.synchronize().map_err(Error::wrap)?;
            let memory = &mut memory.as_mut_slice().map_err(Error::wrap)?[..part.len()];
            memory
                .par_chunks_mut(1 << 20)
                .zip(part.par_chunks(1 << 20))
                .for_each(|(to, from)| to.copy_from_slice(from));
            // SAFETY: the target holds the shape's bytes, the source lives until `copied` has passed.
            unsafe {
                result::memcpy_htod_async(target + (n * SIZE) as u64, memory, stream.cu_stream())
                    .map_err(Error::wrap)?;
            }
            copied.record(&stream).map_err(Error::wrap)?;
        }
        Ok(output.tensor())
    }
}
