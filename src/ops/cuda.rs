//! What the CUDA forms share: whether kernels can run, device pointers, fresh outputs, error codes.
//!
//! Every kernel runs on the one stream of its device, in the order of the calls, so an operand may be dropped as soon as
//! the launch returned: its memory is given back in stream order.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_strided_batched_ex;
use candle_core::cuda_backend::cudarc::cublas::sys as cublas;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, sys};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape,
    Storage, Tensor, bail,
};
use half::{bf16, f16};

/// Oldest compute capability that kernels are built for.
pub const OLDEST: (i32, i32) = (8, 0);

/// Opens GPU `number` the way the kernels need it: no events between streams (there is one stream), and memory given
/// back to the driver only at the end, since every step asks for the same sizes again.
pub fn open(number: usize) -> Result<Device> {
    let device = Device::new_cuda(number)?;
    let Device::Cuda(cuda) = &device else { bail!("GPU {number} did not open as a CUDA device") };
    let (have, least) = (capability(cuda)?, OLDEST);
    if have < least {
        tracing::warn!(
            "GPU {number} has compute capability {}.{}, and kernels are made for {}.{} and newer: plain tensor operations \
             run, several times slower",
            have.0,
            have.1,
            least.0,
            least.1
        );
    }
    // SAFETY: all tensors of this device live on its one stream.
    unsafe { cuda.disable_event_tracking() };
    let (pool, mut keep) = (pool(cuda)?, u64::MAX);
    // SAFETY: reads the u64 that this attribute is.
    unsafe {
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let value = std::ptr::from_mut(&mut keep).cast::<c_void>();
        sys::cuMemPoolSetAttribute(pool, threshold, value).result().map_err(candle_core::Error::wrap)?;
    }
    Ok(device)
}

/// The device's memory pool.
fn pool(device: &CudaDevice) -> Result<sys::CUmemoryPool> {
    let mut pool = std::ptr::null_mut();
    let number = device.cuda_stream().context().ordinal() as i32;
    // SAFETY: a driver call on an open device that fills a local.
    unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, number).result().map_err(candle_core::Error::wrap)? };
    Ok(pool)
}

/// Most bytes of tensors and scratch at once since [`reset_peak_memory`].
pub fn peak_memory(device: &CudaDevice) -> Result<u64> {
    let (pool, mut bytes) = (pool(device)?, 0u64);
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: fills the u64 that this attribute is.
    unsafe {
        let value = std::ptr::from_mut(&mut bytes).cast::<c_void>();
        sys::cuMemPoolGetAttribute(pool, attribute, value).result().map_err(candle_core::Error::wrap)?;
    }
    Ok(bytes)
}

/// Begins a new peak at what is in use now.
pub fn reset_peak_memory(device: &CudaDevice) -> Result<()> {
    let (pool, mut zero) = (pool(device)?, 0u64);
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: reads the u64 that this attribute is; zero resets it.
    unsafe {
        let value = std::ptr::from_mut(&mut zero).cast::<c_void>();
        sys::cuMemPoolSetAttribute(pool, attribute, value).result().map_err(candle_core::Error::wrap)
    }
}

/// Compute capability of a device.
pub fn capability(device: &CudaDevice) -> Result<(i32, i32)> {
    device.cuda_stream().context().compute_capability().map_err(candle_core::Error::wrap)
}

/// Whether kernels run on this tensor: on a GPU that is new enough, in a precision they have.
pub fn ready(x: &Tensor) -> bool {
    let Device::Cuda(device) = x.device() else { return false };
    matches!(x.dtype(), DType::BF16 | DType::F32) && capability(device).is_ok_and(|c| c >= OLDEST)
}

/// The number that kernels know a precision by.
pub fn code(dtype: DType) -> Result<i32> {
    match dtype {
        DType::F32 => Ok(0),
        DType::BF16 => Ok(1),
        _ => bail!("kernels have f32 and bf16, not {dtype:?}"),
    }
}

pub fn device_of(x: &Tensor) -> Result<&CudaDevice> {
    x.device().as_cuda_device()
}

/// Address of the first element of a contiguous tensor.
pub fn pointer(x: &Tensor) -> Result<*const c_void> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => storage_pointer(storage, layout),
        _ => bail!("a kernel got a tensor on {:?}", x.device().location()),
    }
}

/// Address of the first element of a contiguous storage.
pub fn storage_pointer(storage: &CudaStorage, layout: &Layout) -> Result<*const c_void> {
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("a kernel needs contiguous memory, got strides {:?}", layout.stride())
    };
    let stream = storage.device().cuda_stream();
    macro_rules! address {
        ($t:ty) => {
            storage.as_cuda_slice::<$t>()?.device_ptr(&stream).0 as usize
        };
    }
    let base = match storage.dtype() {
        DType::F32 => address!(f32),
        DType::BF16 => address!(bf16),
        DType::F16 => address!(f16),
        DType::U32 => address!(u32),
        DType::U8 => address!(u8),
        DType::I64 => address!(i64),
        DType::F64 => address!(f64),
        dtype => bail!("a kernel got {dtype:?}"),
    };
    Ok((base + start * storage.dtype().size_in_bytes()) as *const c_void)
}

/// Calls a launcher with the device's stream; its result is a `cudaError_t`.
pub fn launch(device: &CudaDevice, what: &str, call: impl FnOnce(*mut c_void) -> i32) -> Result<()> {
    let stream = device.cuda_stream();
    match call(stream.cu_stream().cast()) {
        0 => Ok(()),
        code => bail!("kernel `{what}` failed with CUDA error {code}"),
    }
}

/// `y += x w`, or `x wᵀ` where w is `turned`: y [rows, columns], x [rows, inner], w [inner, columns] or turned
/// [columns, inner], all contiguous in one precision, summed in f32.
///
/// # Safety
/// The pointers hold that many elements of `dtype`, on `device`, and nothing else uses y.
pub unsafe fn add_product(
    device: &CudaDevice,
    dtype: DType,
    y: *mut c_void,
    (x, w): (*const c_void, *const c_void),
    [rows, columns, inner]: [usize; 3],
    turned: bool,
) -> Result<()> {
    use cublas::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t};
    let kind = match dtype {
        DType::BF16 => cudaDataType_t::CUDA_R_16BF,
        DType::F32 => cudaDataType_t::CUDA_R_32F,
        _ => bail!("products have f32 and bf16, not {dtype:?}"),
    };
    let one = 1f32;
    let factor = std::ptr::from_ref(&one).cast::<c_void>();
    // The library counts along columns first, so it is given wᵀ xᵀ.
    let (of_w, w_step) = match turned {
        true => (cublasOperation_t::CUBLAS_OP_T, inner),
        false => (cublasOperation_t::CUBLAS_OP_N, columns),
    };
    let (m, n, k) = (columns as i32, rows as i32, inner as i32);
    let handle = device.cublas_handle();
    // SAFETY: the caller's.
    unsafe {
        gemm_strided_batched_ex(
            *handle.handle(),
            of_w,
            cublasOperation_t::CUBLAS_OP_N,
            m,
            n,
            k,
            factor,
            w,
            kind,
            w_step as i32,
            0,
            x,
            kind,
            k,
            0,
            factor,
            y,
            kind,
            m,
            0,
            1,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .map_err(candle_core::Error::wrap)
}

/// Memory that a kernel will fill.
pub struct Output {
    storage: CudaStorage,
    shape: Shape,
}

impl Output {
    /// Uninitialised elements.
    pub fn new(device: &CudaDevice, shape: impl Into<Shape>, dtype: DType) -> Result<Output> {
        let shape = shape.into();
        let count = shape.elem_count();
        // SAFETY (all): the kernel this is for writes every element before anything reads one.
        let storage = match dtype {
            DType::F32 => CudaStorage::wrap_cuda_slice(unsafe { device.alloc::<f32>(count)? }, device.clone()),
            DType::BF16 => CudaStorage::wrap_cuda_slice(unsafe { device.alloc::<bf16>(count)? }, device.clone()),
            DType::U32 => CudaStorage::wrap_cuda_slice(unsafe { device.alloc::<u32>(count)? }, device.clone()),
            DType::U8 => CudaStorage::wrap_cuda_slice(unsafe { device.alloc::<u8>(count)? }, device.clone()),
            _ => bail!("kernels give no {dtype:?}"),
        };
        Ok(Output { storage, shape })
    }

    /// Scratch memory of `bytes`.
    pub fn scratch(device: &CudaDevice, bytes: usize) -> Result<Output> {
        Output::new(device, bytes.max(16), DType::U8)
    }

    pub fn pointer(&self) -> Result<*mut c_void> {
        Ok(storage_pointer(&self.storage, &Layout::contiguous(&self.shape))?.cast_mut())
    }

    /// What [`candle_core::CustomOp1::cuda_fwd`] and its kin return.
    pub fn parts(self) -> (CudaStorage, Shape) {
        (self.storage, self.shape)
    }

    /// A tensor outside any graph.
    pub fn tensor(self) -> Tensor {
        Tensor::from_storage(Storage::Cuda(self.storage), self.shape, BackpropOp::none(), false)
    }
}

/// The backward pass of a node: from its inputs, its result and the gradient of the result, the gradients of the inputs.
pub type Backward<const N: usize> =
    Box<dyn Fn(&[&Tensor; N], &Tensor, &Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync>;

impl Output {
    /// A tensor of the graph, with `inputs` before it. Unlike an op, its backward may keep what the forward computed.
    pub fn node<const N: usize>(self, inputs: [&Tensor; N], what: &'static str, backward: Backward<N>) -> Result<Tensor>
    where
        Node<N>: Attach<N>,
    {
        Node { output: Mutex::new(Some(self)), what, backward }.attach(inputs)
    }
}

/// A computed output on its way into the graph.
pub struct Node<const N: usize> {
    output: Mutex<Option<Output>>,
    what: &'static str,
    backward: Backward<N>,
}

/// Puts a node behind its inputs.
pub trait Attach<const N: usize> {
    fn attach(self, inputs: [&Tensor; N]) -> Result<Tensor>;
}

impl<const N: usize> Node<N> {
    fn take(&self) -> Result<(CudaStorage, Shape)> {
        match self.output.lock().ok().and_then(|mut o| o.take()) {
            Some(output) => Ok(output.parts()),
            None => bail!("the output of `{}` was taken twice", self.what),
        }
    }

    fn on_cpu<T>(&self) -> Result<T> {
        bail!("`{}` was computed on a GPU, its inputs are on the CPU", self.what)
    }
}

impl Attach<1> for Node<1> {
    fn attach(self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        x.apply_op1(self)
    }
}

impl Attach<2> for Node<2> {
    fn attach(self, [x, y]: [&Tensor; 2]) -> Result<Tensor> {
        x.apply_op2(y, self)
    }
}

impl Attach<3> for Node<3> {
    fn attach(self, [x, y, z]: [&Tensor; 3]) -> Result<Tensor> {
        x.apply_op3(y, z, self)
    }
}

impl CustomOp1 for Node<1> {
    fn name(&self) -> &'static str {
        self.what
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, x: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [dx] = (self.backward)(&[x], res, &grad.contiguous()?)?;
        Ok(dx)
    }
}

impl CustomOp2 for Node<2> {
    fn name(&self) -> &'static str {
        self.what
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dy] = (self.backward)(&[x, y], res, &grad.contiguous()?)?;
        Ok((dx, dy))
    }
}

impl CustomOp3 for Node<3> {
    fn name(&self) -> &'static str {
        self.what
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dy, dz] = (self.backward)(&[x, y, z], res, &grad.contiguous()?)?;
        Ok((dx, dy, dz))
    }
}

/// A result of [`joint`] with its gradient; `None` where nothing that was differentiated depends on it.
pub type Given = Option<(Tensor, Tensor)>;

/// Several results of one computation as tensors of the graph, with at most nine `inputs` before them: one backward pass,
/// from the gradients of the results to those of the inputs; those of inputs outside the graph are dropped.
///
/// An op has at most three inputs and one result, so single elements stand between: `results -> core -> carriers ->
/// inputs`. Results leave their gradients with the core, which runs the backward pass; carriers hand the inputs' on.
pub fn joint<F>(inputs: &[&Tensor], results: Vec<Output>, what: &'static str, backward: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Given]) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
{
    let tracked: Vec<bool> = inputs.iter().map(|x| x.track_op()).collect();
    if !tracked.contains(&true) {
        return Ok(results.into_iter().map(Output::tensor).collect());
    }
    let device = device_of(inputs[0])?;
    let element = || Output::new(device, 1, DType::F32);
    let found: Arc<Mutex<Vec<Option<Tensor>>>> = Arc::default();
    let given: Arc<Mutex<Vec<Given>>> = Arc::new(Mutex::new(results.iter().map(|_| None).collect()));

    let carriers = inputs.chunks(3).enumerate().map(|(n, chunk)| {
        let (found, count) = (found.clone(), chunk.len());
        element()?.behind(chunk, what, move |_, _| {
            let mut found = lock(&found)?;
            Ok((0..count).map(|i| found.get_mut(3 * n + i).and_then(Option::take)).collect())
        })
    });
    let carriers = carriers.collect::<Result<Vec<_>>>()?;
    let (carried, theirs, count) = (carriers.iter().collect::<Vec<_>>(), given.clone(), carriers.len());
    let core = element()?.behind(&carried, what, move |_, grad| {
        let results: Vec<Given> = lock(&theirs)?.iter_mut().map(Option::take).collect();
        let grads = backward(&results)?;
        *lock(&found)? = grads.into_iter().zip(&tracked).map(|(g, wanted)| g.filter(|_| *wanted)).collect();
        Ok(vec![Some(grad.clone()); count])
    })?;
    let attach = |(i, result): (usize, Output)| {
        let given = given.clone();
        result.behind(&[&core], what, move |result, grad| {
            if let Some(slot) = lock(&given)?.get_mut(i) {
                *slot = Some((result.clone(), grad.clone()));
            }
            Ok(vec![Some(Tensor::zeros(1, DType::F32, grad.device())?)])
        })
    };
    results.into_iter().enumerate().map(attach).collect()
}

fn lock<T>(x: &Mutex<T>) -> Result<std::sync::MutexGuard<'_, T>> {
    x.lock().map_err(|_| candle_core::Error::msg("a kernel's backward pass panicked"))
}

impl Output {
    /// [`Output::node`] behind one to three inputs, their number not known to the compiler.
    fn behind<F>(self, inputs: &[&Tensor], what: &'static str, backward: F) -> Result<Tensor>
    where
        F: Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
    {
        fn exactly<const N: usize>(grads: Vec<Option<Tensor>>) -> Result<[Option<Tensor>; N]> {
            grads.try_into().map_err(|_| candle_core::Error::msg("a node's gradients are not as many as its inputs"))
        }
        match *inputs {
            [x] => self.node([x], what, Box::new(move |_, y, dy| exactly(backward(y, dy)?))),
            [x, y] => self.node([x, y], what, Box::new(move |_, y, dy| exactly(backward(y, dy)?))),
            [x, y, z] => self.node([x, y, z], what, Box::new(move |_, y, dy| exactly(backward(y, dy)?))),
            _ => bail!("a node of `{what}` behind {} inputs", inputs.len()),
        }
    }
}
