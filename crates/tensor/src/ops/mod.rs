//! The differentiable operations, one file each: equation, forward, backward, what it keeps.
//!
//! Every op takes f32 or bf16 (all its inputs alike), computes in f32 and writes its inputs'
//! type. `T` tokens, `C` channels, `H` query heads, `K` key/value heads, `D`/`V` key and value
//! dims, `N` compressed blocks, `E` experts.

mod add;
mod attention_dense;
mod attention_nsa;
mod check;
mod compress;
mod dropout;
mod embedding;
mod expert_linear;
mod gather_rows;
mod gelu;
mod layer_norm;
mod linear;
mod linear_cross_entropy;
mod logits;
mod moe_route;
mod rms_norm;
mod rope;
mod scale;
mod scatter_rows;
mod sigmoid;
mod swiglu;
mod token_log_probs;

pub use add::add;
pub use attention_dense::attention_dense;
pub use attention_nsa::{NsaVars, attention_nsa};
pub use compress::{Phi, compress, compress_shift, compress_shifted};
pub(crate) use dropout::Mask;
pub use dropout::dropout;
pub use embedding::embedding;
pub use expert_linear::expert_linear;
pub use gather_rows::gather_rows;
pub use gelu::{Gelu, gelu};
pub use layer_norm::layer_norm;
pub use linear::linear;
pub(crate) use linear_cross_entropy::{HeadGrads, Wants};
pub use linear_cross_entropy::{linear_cross_entropy, linear_cross_entropy_sum};
pub use logits::logits;
pub use moe_route::{ExpertPlan, Routing, moe_route};
pub use rms_norm::rms_norm;
pub use rope::rope;
pub use scale::scale;
pub(crate) use scale::scale_in_place;
pub use scatter_rows::scatter_rows;
pub use sigmoid::sigmoid;
pub use swiglu::swiglu;
pub(crate) use token_log_probs::{Call, Found};
pub use token_log_probs::{TokenLogProbs, token_log_probs};
