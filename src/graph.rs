//! Decode steps of a whole model as CUDA graphs.

use candle_core::{bail, Result, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaDevice, Device};

use crate::cache::{PqKvCache, Replayable};
#[cfg(feature = "cuda")]
use crate::cuda::{check_capturable, Graph};

const OP: &str = "DecodeGraph";

/// A model's decode step, which on a GPU is captured as a CUDA graph and replayed for each token: hundreds of launches
/// become one, and the host is free.
///
/// `forward(tokens, position, caches)` runs the model, with one cache a layer, and appends one key to each. The first
/// [`step`](Self::step) runs it as it is, the second captures it, those after replay what was captured. Where a step does
/// what no replay can, it is run as it is, and the one after captured anew: when a codebook is trained
/// ([`PqConfig::refresh`](crate::PqConfig::refresh)), when attention turns sparse, when a cache grows, is truncated below
/// what was encoded, or is another. On a CPU each step is run as it is. The results are the same in any case, to the bit
/// where those of Candle's ops are.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_pq_attn::{DecodeGraph, PqAttention, PqConfig};
///
/// let device = Device::Cpu; // or Device::new_cuda(0)?
/// let attn = PqAttention::new(PqConfig::default(), 0.125)?;
/// let mut caches = [attn.new_cache([1, 1, 64], 100, DType::F32, &device)?];
/// let embeddings = Tensor::randn(0f32, 1., (1000, 64), &device)?;
///
/// let mut graph = DecodeGraph::new(|tokens, _position, caches| {
///     let x = embeddings.embedding(tokens)?.reshape((1, 1, 1, 64))?;
///     let x = attn.forward(&x, &x, &x, &mut caches[0])?;
///     x.reshape((1, 64))?.matmul(&embeddings.t()?)?.argmax(1)
/// });
/// let mut token = Tensor::new(&[7u32], &device)?;
/// for _ in 0..3 {
///     token = graph.step(&token, &mut caches)?;
/// }
/// assert_eq!(caches[0].len(), 3);
/// # candle_core::Result::Ok(())
/// ```
///
/// # What `forward` may do
/// A capture records launches with the addresses and sizes that they have. What changes from token to token must
/// therefore be read from `tokens` and `position`, whose memory stays, or from the caches:
/// - **Position.** `position` is `[1]` u32 on the device: the number of keys before this one. For rotary embedding take
///   `cos.index_select(position, 0)`. A `cos.narrow(0, n, 1)`, as Candle's models have it, is captured with the `n` of that
///   moment, and every replay silently rotates by it.
/// - **Caches.** Those of this crate. Candle's grow by concatenation, into other memory and to other sizes each time.
/// - **No results on the host**: `to_vec1`, `to_scalar`, sampling by `LogitsProcessor`. They are errors in a capture; do
///   it with what `step` returns, or take an `argmax` within.
/// - **Nothing from the host** that differs between tokens: such a `Tensor::new` is an error, since Candle keeps what the
///   step before uploaded, shapes and strides for its kernels above all, and finds it by its bytes.
/// - **No memory from outside given back**: a tensor that `forward` keeps from one call to the next, other than in the
///   caches, must not be replaced. Nor random numbers: all replays would draw the same.
///
/// # What Candle needs
/// - A device by `Device::new_cuda`. Where there are several streams on a GPU (`Device::new_cuda_with_stream`), Candle's
///   tensors wait for each other's events, which cannot be captured, unless `CudaDevice::disable_event_tracking` was called.
/// - A GPU and a driver with memory pools: intermediate results are allocated and freed within the graph. Without pools
///   Candle allocates by a call that no capture allows.
/// - One thread: the stream of `Device::new_cuda` is the calling thread's own, and so are the buffers of the attention. Other threads must not work with the same
///   stream during a capture.
pub struct DecodeGraph<F> {
    forward: F,
    inputs: Option<Inputs>,
    /// What the last step that was run as it is found, a cache each.
    layers: Option<Vec<Layer>>,
    #[cfg(feature = "cuda")]
    captured: Option<Captured>,
}

/// Where every step finds what it is given.
struct Inputs {
    tokens: Tensor,
    position: Tensor,
}

struct Layer {
    relies_on: Replayable,
    trains: bool,
}

#[cfg(feature = "cuda")]
struct Captured {
    /// Where a replay leaves its result.
    out: Tensor,
    graph: Option<Graph>,
}

impl<F> DecodeGraph<F>
where
    F: FnMut(&Tensor, &Tensor, &mut [PqKvCache]) -> Result<Tensor>,
{
    /// A step by `forward(tokens, position, caches)`, which is captured with the tensors that it uses: it must use no
    /// others later.
    pub fn new(forward: F) -> Self {
        Self {
            forward,
            inputs: None,
            layers: None,
            #[cfg(feature = "cuda")]
            captured: None,
        }
    }

    /// Whether the next step of `caches` is no other than the last, so that on a GPU it is captured or replayed.
    pub fn is_replay(&self, caches: &[PqKvCache]) -> bool {
        let fits = |(cache, layer): (&PqKvCache, &Layer)| cache.replayable(layer.trains) == Some(layer.relies_on);
        let same = |layers: &Vec<_>| layers.len() == caches.len() && caches.iter().zip(layers).all(fits);
        self.layers.as_ref().is_some_and(same)
    }

    /// Runs or replays a step, and returns what `forward` does.
    ///
    /// `tokens` is given to `forward` as it is, on the device of the caches: ids of any shape, or embeddings. With other
    /// shapes than before a graph is captured anew.
    ///
    /// # Errors
    /// Those of `forward` or of its capture, or caches of different lengths, before the step or after. The caches are then
    /// as before.
    pub fn step(&mut self, tokens: &Tensor, caches: &mut [PqKvCache]) -> Result<Tensor> {
        let len = common_len(caches)?;
        self.set_inputs(tokens, len)?;
        let before: Vec<_> = caches.iter().map(PqKvCache::checkpoint).collect();
        let out = self.step_on_device(tokens, caches);
        if out.is_err() {
            self.forget();
            let caches = caches.iter_mut().zip(before).filter(|(cache, _)| cache.len() >= len);
            caches.into_iter().try_for_each(|(cache, before)| cache.restore(before))?;
        }
        out
    }

    fn step_on_device(&mut self, tokens: &Tensor, caches: &mut [PqKvCache]) -> Result<Tensor> {
        match tokens.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => self.step_on_gpu(device, caches),
            _ => self.run_anew(caches),
        }
    }

    /// Runs a step as it is.
    fn run_anew(&mut self, caches: &mut [PqKvCache]) -> Result<Tensor> {
        self.forget();
        // What `forward` was given, or the caches hold, is written again by later steps.
        let out = self.run(caches)?.force_contiguous()?;
        // Dense steps leave encoding to the next sparse one; a replay encodes one block at most.
        caches.iter_mut().try_for_each(PqKvCache::encode_blocks)?;
        let layer = |cache: &PqKvCache| Layer { relies_on: cache.last_step(), trains: !cache.is_training_due() };
        self.layers = Some(caches.iter().map(layer).collect());
        Ok(out)
    }

    /// Calls `forward`.
    fn run(&mut self, caches: &mut [PqKvCache]) -> Result<Tensor> {
        let Some(Inputs { tokens, position }) = &self.inputs else { bail!("{OP}: a step has no inputs") };
        let expected = common_len(caches)? + 1;
        let out = (self.forward)(tokens, position, caches)?;
        match caches.iter().position(|cache| cache.len() != expected) {
            None => Ok(out),
            Some(layer) => bail!(
                "{OP}: forward: expected it to append one key to each cache, which makes {expected}, got {} in cache {layer}",
                caches[layer].len()
            ),
        }
    }

    fn set_inputs(&mut self, tokens: &Tensor, position: usize) -> Result<()> {
        let Ok(position) = u32::try_from(position) else {
            bail!("{OP}: caches: expected at most {} keys, got {position}", u32::MAX)
        };
        let device = tokens.device();
        let is_like = |inputs: &Inputs| {
            let (dims, dtype) = (inputs.tokens.dims(), inputs.tokens.dtype());
            (dims, dtype) == (tokens.dims(), tokens.dtype()) && inputs.tokens.device().same_device(device)
        };
        if let Some(inputs) = self.inputs.as_ref().filter(|inputs| is_like(inputs)) {
            overwrite(&inputs.tokens, tokens)?;
            return overwrite(&inputs.position, &Tensor::new(&[position], device)?);
        }
        self.forget();
        let tokens = tokens.contiguous()?.copy()?;
        self.inputs = Some(Inputs { tokens, position: Tensor::new(&[position], device)? });
        Ok(())
    }

    /// Has the next step run as it is.
    fn forget(&mut self) {
        self.layers = None;
        #[cfg(feature = "cuda")]
        {
            self.captured = None;
        }
    }
}

#[cfg(feature = "cuda")]
impl<F> DecodeGraph<F>
where
    F: FnMut(&Tensor, &Tensor, &mut [PqKvCache]) -> Result<Tensor>,
{
    fn step_on_gpu(&mut self, device: &CudaDevice, caches: &mut [PqKvCache]) -> Result<Tensor> {
        let is_replay = self.is_replay(caches);
        let (graph, out) = match self.captured.take().filter(|_| is_replay) {
            None => {
                check_capturable(device)?;
                // Has Candle keep what it uploads for this step: a capture finds it there.
                let _kept = device.enable_cuda_graph_htod_cache();
                let out = self.run_anew(caches)?;
                self.captured = Some(Captured { out: out.copy()?, graph: None });
                return Ok(out);
            }
            Some(Captured { graph: None, out }) => (self.capture(device, &out, caches)?, out),
            Some(Captured { graph: Some(graph), out }) => {
                caches.iter_mut().try_for_each(|cache| cache.advance(1))?;
                (graph, out)
            }
        };
        graph.launch()?;
        let copy = out.copy();
        self.captured = Some(Captured { out, graph: Some(graph) });
        copy
    }

    /// Records a step that leaves its result in `out`, and is yet to be launched; for the host it is taken.
    fn capture(&mut self, device: &CudaDevice, out: &Tensor, caches: &mut [PqKvCache]) -> Result<Graph> {
        let _kept = device.enable_cuda_graph_htod_cache();
        Graph::capture(device, || {
            let got = self.run(caches)?.contiguous()?;
            if (got.dims(), got.dtype()) != (out.dims(), out.dtype()) {
                let (expected, got) = ((out.dims(), out.dtype()), (got.dims(), got.dtype()));
                bail!("{OP}: forward: expected it to return {expected:?} as in the step before, got {got:?}");
            }
            overwrite(out, &got)
        })
    }
}

/// Copies `from` to where `to` is, a contiguous tensor of the same shape.
fn overwrite(to: &Tensor, from: &Tensor) -> Result<()> {
    to.flatten_all()?.slice_set(&from.flatten_all()?, 0, 0)
}

fn common_len(caches: &[PqKvCache]) -> Result<usize> {
    let Some(first) = caches.first() else { bail!("{OP}: caches: expected at least one, got none") };
    match caches.iter().position(|cache| cache.len() != first.len()) {
        None => Ok(first.len()),
        Some(other) => bail!(
            "{OP}: caches: expected as many keys in each, got {} in cache 0 and {} in cache {other}",
            first.len(),
            caches[other].len()
        ),
    }
}
