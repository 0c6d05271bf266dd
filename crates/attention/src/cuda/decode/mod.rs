//! Decoding: one or a few new query tokens of many sequences over caches.
//!
//! [`NsaCache`] and [`DenseCache`] own their memory and do what the CPU's caches do: each sequence
//! has a place of its own that grows, or takes [`Pages`] as it grows. Whoever has pages of their own
//! calls [`nsa_rows`] and [`dense_rows`] with [`CacheView`]s. A row is one query
//! token, so that a chunk of a prompt is so many rows of one sequence.
//!
//! `step.cu` is the fast kernel for 16-bit numbers on sm_90: one launch a layer, a cluster of
//! blocks for each row and KV head, ranking inside the cluster. `plain.cu` serves everything else
//! and is its oracle. `shape.rs` decides which, and how the fast one is cut.

mod append;
mod book;
mod cache;
mod fresh;
mod pages;
mod shape;
mod step;
mod store;
mod tails;
mod view;

pub use cache::{DenseCache, NsaCache, NsaStep, NsaToken};
pub use pages::{Pages, Partial};
pub use step::{NsaCaches, Rows, dense_rows, nsa_rows};
pub use view::CacheView;
