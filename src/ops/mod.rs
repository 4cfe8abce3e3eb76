//! The steps of a decode, one op a folder: the public function and its checks (`mod.rs`), the CPU's kernel
//! (`cpu.rs`) and, with the feature `cuda`, the launch of the GPU's (`cuda.rs`; its source is in `kernels/`).
//!
//! On a GPU nothing is read back, so codes, positions and lengths that are out of range are no error there: a code counts
//! modulo the number of centroids, a position beyond the keys is passed over, a length is cut to its list.
//!
//! Every op is a Candle custom op without a backward pass. Its `Plan` is the only place where shapes, strides, dtypes
//! and limits are checked; the kernels trust it. [`PqAttention`](crate::PqAttention) chains them; each also stands on
//! its own.

#[cfg(feature = "cuda")]
mod append;
pub(crate) mod arg;
#[cfg(feature = "cuda")]
mod begin_step;
mod causal_softmax;
mod cluster_sums;
#[cfg(feature = "cuda")]
mod decode;
mod encode;
mod fast_scan;
mod group_mass;
mod indices_and_weights;
mod kmeans;
mod places;
mod score;
mod select;
mod side_output;
mod sparse_attend;
mod tail_attend;
mod topk;

#[cfg(feature = "cuda")]
pub(crate) use append::{append, New};
#[cfg(feature = "cuda")]
pub(crate) use begin_step::{begin_step, Appending, Due, Encoder, Indexed};
pub use causal_softmax::causal_softmax;
pub use cluster_sums::{cluster_sums, ClusterSums};
#[cfg(feature = "cuda")]
pub(crate) use decode::{decode, Sequences, Workspace};
pub use encode::encode;
#[cfg(feature = "cuda")]
pub(crate) use encode::{encode_into, EncodeOptions};
pub use fast_scan::{fast_scan, pack_codes};
pub use group_mass::group_mass;
pub use indices_and_weights::{dense_weights, indices_and_weights, Geometry, Selected, PADDING};
pub use kmeans::{kmeans, KmeansOptions};
pub(crate) use places::{place_of, Places, PAGE};
pub use score::{residual_score, score};
pub(crate) use score::{score_candidates, Coarse};
pub use select::{select, select_dense};
pub use sparse_attend::{dense_attend, sparse_attend, sparse_attend_with_tail, Attended};
pub(crate) use sparse_attend::{sparse_attend_to_cache, KeysAndValues};
pub use tail_attend::tail_attend;
pub(crate) use tail_attend::tail_attend_in_pages;
pub use topk::topk;

/// The largest head dimension.
pub const MAX_HEAD_DIM: usize = 256;
