//! Launches that are recorded once and replayed.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{
    sys::{CUgraphInstantiate_flags as InstantiateFlags, CUstreamCaptureMode as CaptureMode},
    CudaGraph, CudaStream,
};
use candle_core::cuda_backend::WrapErr;
use candle_core::{bail, CudaDevice, Result};

use super::is_capturing;

const OP: &str = "DecodeGraph";

/// What some function launched.
pub(crate) struct Graph(CudaGraph);

impl Graph {
    /// Records what `launch` launches on `device`, which does not run.
    ///
    /// What it allocates it must also free, and it may free nothing else.
    pub(crate) fn capture(device: &CudaDevice, launch: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.synchronize().w()?;
        stream.begin_capture(CaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let capture = Capture { device, stream: &stream };
        let launched = launch();
        // What fails in a drop is kept, and would be returned in place of the end.
        let dropped = stream.context().check_err();
        let graph = capture.end();
        launched?;
        dropped.w()?;
        match graph? {
            Some(graph) => Ok(Self(graph)),
            None => bail!("{OP}: forward: expected it to launch something on the device of the tokens"),
        }
    }

    /// Runs it all, in the device's stream.
    pub(crate) fn launch(&self) -> Result<()> {
        self.0.launch().w()
    }
}

/// A capture under way, which ends where it is dropped: a stream left in one would serve nobody.
struct Capture<'a> {
    device: &'a CudaDevice,
    stream: &'a Arc<CudaStream>,
}

impl Capture<'_> {
    fn end(&self) -> Result<Option<CudaGraph>> {
        // Memory that a launch allocates and does not free is freed by the next.
        self.stream.end_capture(InstantiateFlags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH).w()
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if matches!(is_capturing(self.device), Ok(true)) {
            drop(self.end());
        }
    }
}

/// Fails on a device whose launches cannot be captured.
pub(crate) fn check_capturable(device: &CudaDevice) -> Result<()> {
    if device.cuda_stream().context().is_managing_stream_synchronization() {
        bail!(
            "{OP}: device: expected one whose tensors wait for no events, which a capture may not: make it by \
             Device::new_cuda, with no other stream on this GPU, or call CudaDevice::disable_event_tracking; got one \
             that tracks events between streams"
        );
    }
    Ok(())
}
