//! The one product that Candle's matmul has no form of: f16 or bf16 in, f32 out.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::cuda_backend::CudaDType;
use candle_core::{bail, CpuStorage, CudaStorage, CustomOp2, DType, Error, Layout, Result, Shape, Tensor};
use half::{bf16, f16};

const OP: &str = "matmul_to_f32";

/// `queries · keysᵀ` in f32: attention scores of half-precision inputs, not rounded to them.
///
/// `queries`: `[b, h_kv, m, d]`, contiguous; `keys`: `[b, h_kv, n, d]` of the same dtype, with contiguous rows and one
/// distance between heads, as a cache has them; returns `[b, h_kv, m, n]`.
pub(crate) fn matmul_to_f32(queries: &Tensor, keys: &Tensor) -> Result<Tensor> {
    match queries.dtype() {
        DType::F32 => queries.matmul(&keys.t()?),
        _ => queries.apply_op2_no_bwd(keys, &MatmulToF32),
    }
}

struct MatmulToF32;

impl CustomOp2 for MatmulToF32 {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{OP}: expected tensors on a GPU, got CPU tensors")
    }

    fn cuda_fwd(
        &self,
        queries: &CudaStorage,
        queries_layout: &Layout,
        keys: &CudaStorage,
        keys_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let layouts = [queries_layout, keys_layout];
        match queries.dtype() {
            DType::F16 => run::<f16>(queries, keys, layouts, sys::cudaDataType_t::CUDA_R_16F),
            DType::BF16 => run::<bf16>(queries, keys, layouts, sys::cudaDataType_t::CUDA_R_16BF),
            dtype => bail!("{OP}: queries: expected dtype f16 or bf16, got {}", dtype.as_str()),
        }
    }
}

fn run<T: CudaDType>(
    queries: &CudaStorage,
    keys: &CudaStorage,
    [queries_layout, keys_layout]: [&Layout; 2],
    dtype: sys::cudaDataType_t,
) -> Result<(CudaStorage, Shape)> {
    let ((b, h_kv, m, d), (.., n, _)) = (queries_layout.shape().dims4()?, keys_layout.shape().dims4()?);
    let [between_batches, between_heads, row, 1] = *keys_layout.stride() else {
        bail!("{OP}: keys: expected contiguous rows, got strides {:?}", keys_layout.stride())
    };
    if !queries_layout.is_contiguous() || row != d || (b > 1 && between_batches != h_kv * between_heads) {
        bail!("{OP}: expected contiguous queries and keys of one distance, got {queries_layout:?} {keys_layout:?}");
    }
    let int = |x: usize| i32::try_from(x).map_err(Error::wrap);
    let stride = |x: usize| i64::try_from(x).map_err(Error::wrap);
    let device = queries.device();
    let shape = Shape::from((b, h_kv, m, n));
    let mut scores = super::output(device, shape.clone(), DType::F32)?;
    let blas = device.cublas_handle();
    let stream = device.cuda_stream();
    let (one, zero) = (1f32, 0f32);
    {
        let keys = T::as_cuda_slice(keys)?.slice(keys_layout.start_offset()..);
        let queries = T::as_cuda_slice(queries)?.slice(queries_layout.start_offset()..);
        let (keys, _keys_guard) = keys.device_ptr(&stream);
        let (queries, _queries_guard) = queries.device_ptr(&stream);
        let (scores, _scores_guard) = f32::as_cuda_slice_mut(&mut scores)?.device_ptr_mut(&stream);
        // SAFETY: cuBLAS counts by columns: it computes the transpose, [n, m] = (keys [d, n])ᵀ (queries [d, m]), for each
        // of b * h_kv pairs, whose extents and distances were taken from the layouts; the output is as large as they say,
        // and the guards keep all three until the product is in the stream.
        unsafe {
            result::gemm_strided_batched_ex(
                *blas.handle(),
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                int(n)?,
                int(m)?,
                int(d)?,
                (&raw const one).cast(),
                keys as *const _,
                dtype,
                int(d)?,
                stride(between_heads)?,
                queries as *const _,
                dtype,
                int(d)?,
                stride(m * d)?,
                (&raw const zero).cast(),
                scores as *mut _,
                sys::cudaDataType_t::CUDA_R_32F,
                int(n)?,
                stride(m * n)?,
                int(b * h_kv)?,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .map_err(Error::wrap)?;
    }
    Ok((scores, shape))
}
