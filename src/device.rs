//! The device that a model runs on. It enters a run once: weights are put on it as they are loaded, what follows from
//! them stays on it, and values leave through [`to_host`].

use std::str::FromStr;

pub use candle_core::Device;
use candle_core::Tensor;

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
            Self::Cuda(index) => Device::new_cuda(index),
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

#[cfg(test)]
mod tests {
    use super::*;

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
