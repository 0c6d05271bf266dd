//! Alignment runs on a chat model of a few thousand parameters, in one binary so that they link
//! once.

mod accumulate;
mod begin;
mod device;
mod pairs;
mod precompute;
mod resume;
mod room;
#[path = "../../../train/tests/train/tiny_chat.rs"]
mod tiny_chat;
