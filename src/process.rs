//! Settings of the whole process, made once before any thread starts.

/// Bytes of freed memory that the end of the heap keeps for the next large arrays. Without it glibc maps and unmaps
/// each: a pass of SmolLM2-135M spends a fifth of its time in page faults.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES: i32 = 256 << 20;

/// The largest value that every version of glibc accepts.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGEST_MMAP_THRESHOLD: i32 = 32 << 20;

/// Prepares the process for windows that go through a model side by side: memory is reused, and candle's element-wise
/// operations run in the thread that calls them instead of a pool of spinning threads that one
/// caller at a time may use. The number of threads, if it is not set, becomes a setting too: candle asks for it before
/// every product, and would read a description of all cores from the system each time.
///
/// Results do not depend on it, but speed does. To be called first in `main`.
#[allow(unsafe_code)]
pub fn prepare() {
    // SAFETY: no other thread exists that could read or write the environment.
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    // What rayon takes by itself.
    if std::env::var_os("RAYON_NUM_THREADS").is_none()
        && let Ok(n_threads) = std::thread::available_parallelism()
    {
        // SAFETY: as above.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", n_threads.to_string()) };
    }
    // SAFETY: `mallopt` changes settings of the allocator; it takes no pointers.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
    }
}

/// Keeps freed memory of a GPU for the next tensors. By default the driver returns it to the system whenever the host
/// waits for a result, which is often, and the next large tensor waits for the driver to map it again.
///
/// # Errors
/// The driver fails.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub(crate) fn keep_freed_memory(device: &candle_core::cuda::CudaDevice) -> candle_core::Result<()> {
    use candle_core::cuda::WrapErr;
    use candle_core::cuda::cudarc::driver::{result, sys};
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut kept_bytes = u64::MAX;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the driver opened the device; the attribute is a number of 64 bits, which is read during the call.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device()).w()?;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut kept_bytes).cast()).w()
    }
}
