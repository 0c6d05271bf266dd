//! The fast CPU operator: tiled, threaded, SIMD chosen at run time, f32 arithmetic.

mod attend;
mod compress;
mod decode;
mod disjoint;
mod gate;
mod nsa;
mod pages;
pub mod pieces;
mod score;
mod select;
mod simd;

pub use attend::{AttendGrads, AttendInput, Mask, attend_backward, attend_forward};
pub use compress::{CompressInput, Phi, PhiGrads, compress_backward, compress_forward};
pub use decode::{CompressTail, DenseCache, NsaCache, NsaStep};
pub use nsa::{NsaGrads, NsaInput, NsaSaved, nsa_backward, nsa_forward};
pub use simd::isa_name;
