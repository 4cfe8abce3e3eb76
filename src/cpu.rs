//! What the CPU kernels share: dtype widening, a vectorisable `exp`, reductions.
//!
//! The kernels are plain loops over fixed-width lane arrays that the compiler vectorises, in functions marked
//! `#[multiversion]`: compiled for several instruction sets, of which the running machine's best is called, so a build
//! for a generic CPU still runs at full width. What such a function calls in its loops must be `#[inline(always)]`, or
//! it is compiled for the baseline. No kernel uses fused multiply-add and every reduction has a fixed order, so results
//! are the same bits on each of them and for any number of threads.

use candle_core::{bail, CpuStorage, Result, Storage, WithDType};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use multiversion::multiversion;
use rayon::prelude::*;

use crate::ops::arg::View;

/// Lanes of a kernel's accumulators: one AVX-512 register, two of AVX2.
pub(crate) const LANES: usize = 16;

/// An element type of queries, keys and values.
pub(crate) trait Elem: WithDType {
    /// Converts `src` into `out`, which is as long.
    fn widen(src: &[Self], out: &mut [f32]);

    /// `src` itself where it is f32.
    #[inline(always)]
    fn as_f32(_src: &[Self]) -> Option<&[f32]> {
        None
    }

    /// Rounds an f32 result to this type.
    fn narrow(x: f32) -> Self;
}

impl Elem for f32 {
    #[inline(always)]
    fn widen(src: &[Self], out: &mut [f32]) {
        out.copy_from_slice(src);
    }

    #[inline(always)]
    fn as_f32(src: &[f32]) -> Option<&[f32]> {
        Some(src)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
}

impl Elem for f16 {
    #[inline(always)]
    fn widen(src: &[Self], out: &mut [f32]) {
        src.convert_to_f32_slice(out);
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl Elem for bf16 {
    #[inline(always)]
    fn widen(src: &[Self], out: &mut [f32]) {
        // A shift, which vectorises; the library's own conversion looks after NaN payloads and does not.
        for (y, x) in out.iter_mut().zip(src) {
            *y = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

/// Calls `$run::<T>` for the element type of a storage that a plan has already checked to be f32, f16 or bf16.
macro_rules! dispatch_float {
    ($storage:expr, $run:ident($($arg:expr),* $(,)?)) => {
        match $storage {
            candle_core::CpuStorage::F16(_) => $run::<half::f16>($($arg),*),
            candle_core::CpuStorage::BF16(_) => $run::<half::bf16>($($arg),*),
            _ => $run::<f32>($($arg),*),
        }
    };
}
pub(crate) use dispatch_float;

/// The elements of a storage; an error where it holds another type.
pub(crate) fn slice<T: WithDType>(storage: &CpuStorage) -> Result<&[T]> {
    storage.as_slice::<T>()
}

/// The elements of a tensor that an op holds beside Candle's three inputs, of which Candle checks the device.
pub(crate) fn held<'a, T: WithDType>(op: &str, name: &str, storage: &'a Storage) -> Result<&'a [T]> {
    match storage {
        Storage::Cpu(storage) => slice(storage),
        _ => bail!("{op}: {name}: expected a tensor on the device of the other arguments"),
    }
}

/// Fails if one of the codes `[b, h_kv, n, codes a key]` is not below `limit`; of 256 every byte is.
pub(crate) fn check_codes(op: &str, name: &str, view: &View<4>, codes: &[u8], limit: usize) -> Result<()> {
    const KEYS: usize = 4096;
    if limit == 256 {
        return Ok(());
    }
    let [b, h_kv, n, len] = view.dims;
    // Keys whose codes adjoin are checked together.
    let keys = if view.has_adjacent_rows() { KEYS } else { 1 };
    let runs = n.div_ceil(keys);
    let largest = (0..b * h_kv * runs).into_par_iter().map(|i| {
        let (row, first) = (i / runs, i % runs * keys);
        let at = view.at(&[row / h_kv, row % h_kv, first]);
        largest(&codes[at..at + keys.min(n - first) * len])
    });
    match largest.max() {
        Some(code) if usize::from(code) >= limit => {
            bail!("{op}: {name}: expected codes below n_centroids {limit}, got {code}")
        }
        _ => Ok(()),
    }
}

#[multiversion(targets = "simd")]
fn largest(codes: &[u8]) -> u8 {
    let mut acc = [0u8; 4 * LANES];
    let (chunks, tail) = codes.as_chunks::<{ 4 * LANES }>();
    for codes in chunks {
        for l in 0..4 * LANES {
            acc[l] = acc[l].max(codes[l]);
        }
    }
    acc.iter().chain(tail).copied().fold(0, u8::max)
}

/// `e^x` to about 2 ulp; 0 below -87.3, no more than `e^88.3`, and NaN for NaN.
///
/// Splits `x = n ln 2 + r` with `|r| <= ln 2 / 2` and takes a degree-6 polynomial for `e^r` (coefficients of the
/// Cephes library's `expf`). Unlike `f32::exp` it has no call and no branch, so loops over it vectorise.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to the nearest integer
    let clamped = x.clamp(-87.3, 88.3);
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let e = p * r * r + r + 1.0;
    let scale = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.3 {
        0.0
    } else {
        e * scale
    }
}

/// `Σ a[i] b[i]`, in [`LANES`] partial sums that are added in a fixed order.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0f32; LANES];
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    for (x, y) in a_chunks.iter().zip(b_chunks) {
        for l in 0..LANES {
            acc[l] += x[l] * y[l];
        }
    }
    for (l, (x, y)) in a_tail.iter().zip(b_tail).enumerate() {
        acc[l] += x * y;
    }
    // One after the other: a tree of additions tempts the compiler to break up the vectors of the loop above.
    acc.iter().sum()
}

/// The largest element, ignoring NaN; negative infinity for none.
#[inline(always)]
pub(crate) fn max(xs: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = xs.as_chunks::<LANES>();
    for x in chunks {
        for l in 0..LANES {
            acc[l] = if x[l] > acc[l] { x[l] } else { acc[l] };
        }
    }
    acc.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Replaces every `x` by `exp(x * scale - shift)` and returns their sum.
#[inline(always)]
pub(crate) fn exp_and_sum(xs: &mut [f32], scale: f32, shift: f32) -> f32 {
    let mut acc = [0f32; LANES];
    let (chunks, tail) = xs.as_chunks_mut::<LANES>();
    for x in chunks {
        for l in 0..LANES {
            x[l] = exp(x[l] * scale - shift);
            acc[l] += x[l];
        }
    }
    for (l, x) in tail.iter_mut().enumerate() {
        *x = exp(*x * scale - shift);
        acc[l] += *x;
    }
    acc.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_follows_the_f64_one() {
        for i in -900_000..880_000 {
            let x = i as f32 * 1e-4;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            let tolerance = if x < -87.0 { 1e-37 } else { 3e-7 * want };
            assert!((got - want).abs() <= tolerance, "exp({x}) = {got}, expected {want}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_cover_the_tail() {
        for n in [0, 1, 15, 16, 17, 50] {
            let xs: Vec<f32> = (0..n).map(|i| i as f32 - 3.0).collect();
            let want = xs.iter().map(|x| x * x).sum::<f32>();
            assert_eq!(dot(&xs, &xs), want);
            assert_eq!(max(&xs), xs.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut ys = xs.clone();
            let sum = exp_and_sum(&mut ys, 0.5, 1.0);
            let want: f32 = xs.iter().map(|x| (x * 0.5 - 1.0).exp()).sum();
            assert!((sum - want).abs() <= 1e-5 * want);
        }
    }
}
