//! Private runs, end to end, on a model of a few thousand parameters.

#[path = "../../../train/tests/train/tiny_chat.rs"]
mod tiny_chat;

mod audit;
mod bits;
mod common;
mod device;
mod ledger;
mod methods;
mod planted;
mod refused;
mod told;
mod update;
