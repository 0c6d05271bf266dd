//! placeholder

mod cells;
mod fft;
mod lower;
mod pmf;
mod upper;
