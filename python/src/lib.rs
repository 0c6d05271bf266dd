//! `tercet._native`: the operators of `tercet_attention` on DLPack tensors.
//!
//! The Python package around it (`tercet/`) allocates every output, registers the operators with
//! PyTorch and keeps the documentation; here arguments are checked and kernels called.

mod attend;
mod cache;
mod call;
mod compress;
mod cuda;
mod decode;
mod dlpack;
mod error;
mod nsa;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::attend::{backward as attend_backward, forward as attend_forward};
    #[pymodule_export]
    use super::cache::{PyCompressTail, PyDenseCache, PyNsaCache};
    #[pymodule_export]
    use super::compress::{
        backward as compress_backward, compressed_blocks, forward as compress_forward,
    };
    #[pymodule_export]
    use super::cuda::{cache_warning, capturing, memory, reset_memory, use_cache};
    #[pymodule_export]
    use super::decode::{PyCudaDenseCache, PyCudaNsaCache, dense as dense_rows, nsa as nsa_rows};
    #[pymodule_export]
    use super::nsa::{backward as nsa_backward, forward as nsa_forward};
    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
