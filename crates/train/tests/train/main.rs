//! Tests of the training crate, one file a subject, in one binary so that they link once.

mod checkpoint;
mod common;
mod config;
mod data;
mod disk;
mod kill;
mod logs;
mod resume;
mod run;
mod schedule;
mod tiny_chat;
mod tokenizer;
mod tune_rows;
mod tune_run;
