//! The device that a model runs on. It enters a run once: weights are put on it as they are loaded, what follows from
//! them stays on it, and values leave through [`to_host`].

use std::fmt;
use std::str::FromStr;

pub use candle_core::Device;
use candle_core::{CpuStorage, DType, Layout, Tensor, bail};

/// The memory of the process: files are read into it, and matrices are decomposed and quantized in it.
pub const HOST: Device = Device::Cpu;

/// A device by its name, before it is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The host.
    #[default]
    Cpu,
    /// The CUDA device of this number.
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

impl DeviceChoice {
    /// Opens the device. Tensors can meet only on one that was opened once.
    ///
    /// # Errors
    /// There is no such device, or its driver fails.
    pub fn open(self) -> candle_core::Result<Device> {
        match self {
            Self::Cpu => Ok(HOST),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => {
                let device = Device::new_cuda(index)?;
                crate::process::keep_freed_memory(device.as_cuda_device()?)?;
                Ok(device)
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        #[cfg(feature = "cuda")]
        if let Some(index) = cuda_index(name) {
            return Ok(Self::Cuda(index));
        }
        if name == "cpu" { Ok(Self::Cpu) } else { Err(EXPECTED.into()) }
    }
}

const EXPECTED: &str = if cfg!(feature = "cuda") {
    "expected `cpu`, `cuda` or `cuda:N`"
} else {
    "expected `cpu`, the only device that this lrc was built for"
};

/// 0 of `cuda`, N of `cuda:N`.
#[cfg(feature = "cuda")]
fn cuda_index(name: &str) -> Option<usize> {
    match name.strip_prefix("cuda")? {
        "" => Some(0),
        rest => rest.strip_prefix(':')?.parse().ok(),
    }
}

/// A copy of the values of a tensor, row-major, from whatever device.
///
/// # Errors
/// The tensor is not of f32, or the device fails.
pub fn to_host(x: &Tensor) -> candle_core::Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

/// A copy of the indices of a tensor of u32.
///
/// # Errors
/// The tensor is not of u32, or the device fails.
pub(crate) fn to_host_indices(x: &Tensor) -> candle_core::Result<Vec<u32>> {
    x.flatten_all()?.to_vec1()
}

/// A gradient with respect to `x`: a tensor of its shape, on its device.
///
/// # Errors
/// The device fails.
pub(crate) fn like(x: &Tensor, values: Vec<f32>) -> candle_core::Result<Option<Tensor>> {
    Tensor::from_vec(values, x.shape(), x.device()).map(Some)
}

/// The values of a contiguous tensor of f32 in the memory of the process.
///
/// # Errors
/// It is neither.
pub(crate) fn host_slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let Some((begin, end)) = layout.contiguous_offsets() else { bail!("this operation needs contiguous tensors") };
    Ok(&storage.as_slice::<f32>()?[begin..end])
}

/// The same of a tensor whose values are changed in place.
///
/// # Errors
/// As [`host_slice`].
pub(crate) fn host_slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((begin, end))) => Ok(&mut values[begin..end]),
        _ => bail!("this operation needs contiguous tensors of f32"),
    }
}

/// The same as [`to_host`] of a tensor of f64.
///
/// # Errors
/// The tensor is not of f64, or the device fails.
pub(crate) fn to_host_f64(x: &Tensor) -> candle_core::Result<Vec<f64>> {
    x.flatten_all()?.to_vec1()
}

/// `Σ x` (n) over the rows of `x` (n_rows, n) of f32, summed in f64 where it is.
///
/// # Errors
/// The device fails.
pub(crate) fn column_sums(x: &Tensor) -> candle_core::Result<Vec<f64>> {
    to_host_f64(&x.to_dtype(DType::F64)?.sum(0)?)
}

#[cfg(test)]
thread_local! {
    static IS_ELSEWHERE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `f` as if every tensor of this thread were on another device: in portable forms, with sums on the device.
#[cfg(test)]
pub(crate) fn elsewhere<T>(f: impl FnOnce() -> T) -> T {
    IS_ELSEWHERE.set(true);
    let result = f();
    IS_ELSEWHERE.set(false);
    result
}

/// Whether tensors of a device are in the memory of the process, where kernels and threads reach them. On any other
/// device, work is expressed in candle's operations, and leaves as finished results. One thread hands it out: candle
/// gives each thread a stream of its own, and does not order one after another.
pub(crate) fn is_host(device: &Device) -> bool {
    #[cfg(test)]
    if IS_ELSEWHERE.get() {
        return false;
    }
    device.is_cpu()
}

/// A sum of matrices that stays on a device. Each is computed in f32 and added in f64, in the order of the calls.
#[derive(Debug)]
pub(crate) struct DeviceSum(Tensor);

/// Rows of a sum that leave the device at once.
const ROWS_AT_ONCE: usize = 1024;

impl DeviceSum {
    /// The sum of one matrix (rows, columns) in f32.
    ///
    /// # Errors
    /// The device fails.
    pub fn of(first: &Tensor) -> candle_core::Result<Self> {
        first.to_dtype(DType::F64).map(Self)
    }

    /// Its rows.
    pub fn n(&self) -> usize {
        self.0.dims()[0]
    }

    /// Adds a matrix of the same shape, in f32.
    ///
    /// # Errors
    /// The shapes differ, or the device fails.
    pub fn add(&mut self, next: &Tensor) -> candle_core::Result<()> {
        self.0 = (&self.0 + next.to_dtype(DType::F64)?)?;
        Ok(())
    }

    /// Adds the lower triangle of a square sum to `triangle`, row by row: row i has i + 1 entries.
    ///
    /// # Errors
    /// The device fails.
    pub fn add_lower_to(&self, triangle: &mut [f64]) -> candle_core::Result<()> {
        let n = self.n();
        let mut rest = triangle;
        for first in (0..n).step_by(ROWS_AT_ONCE) {
            let n_rows = ROWS_AT_ONCE.min(n - first);
            let rows = self.0.narrow(0, first, n_rows)?.narrow(1, 0, first + n_rows)?;
            for (i, row) in to_host_f64(&rows)?.chunks_exact(first + n_rows).enumerate() {
                let (here, later) = rest.split_at_mut(first + i + 1);
                here.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
                rest = later;
            }
        }
        Ok(())
    }

    /// All values, row-major.
    ///
    /// # Errors
    /// The device fails.
    pub fn values(&self) -> candle_core::Result<Vec<f64>> {
        to_host_f64(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_on_a_device_leave_as_a_triangle() {
        for n in [1, 3, ROWS_AT_ONCE + 5] {
            let value = |i: usize| ((i * 7919) % 101) as f32 - 50.0;
            let one = Tensor::from_vec((0..n * n).map(value).collect::<Vec<f32>>(), (n, n), &HOST).unwrap();
            let mut sum = DeviceSum::of(&one).unwrap();
            sum.add(&one.affine(2.0, 0.0).unwrap()).unwrap();
            let mut triangle = vec![1.0; n * (n + 1) / 2];
            sum.add_lower_to(&mut triangle).unwrap();
            let expected = (0..n).flat_map(|i| (0..=i).map(move |j| 1.0 + 3.0 * f64::from(value(i * n + j))));
            assert!(triangle.iter().copied().eq(expected));
            assert!(sum.values().unwrap().into_iter().eq((0..n * n).map(|i| 3.0 * f64::from(value(i)))));
        }
    }

    #[test]
    fn a_device_is_known_by_its_name() {
        assert_eq!("cpu".parse(), Ok(DeviceChoice::Cpu));
        for unknown in ["", "CPU", "gpu", "cuda:", "cuda:x", "cuda0"] {
            assert!(unknown.parse::<DeviceChoice>().is_err(), "{unknown}");
        }
        for gpu in ["cuda", "cuda:1"] {
            assert_eq!(gpu.parse::<DeviceChoice>().is_ok(), cfg!(feature = "cuda"));
        }
    }

    #[test]
    fn values_leave_in_the_order_of_rows() {
        let x = Tensor::new(&[[1f32, 2., 3.], [4., 5., 6.]], &HOST).unwrap();
        assert_eq!(to_host(&x.t().unwrap()).unwrap(), [1., 4., 2., 5., 3., 6.]);
    }
}
