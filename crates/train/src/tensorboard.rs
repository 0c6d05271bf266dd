//! Event files that TensorBoard reads, written by hand.
//!
//! A file is a row of TFRecords: length (u64), masked CRC-32C of the length, data, masked CRC-32C
//! of the data, all little-endian. The data are protocol buffers of type `tensorflow.Event`; only
//! four of its fields are needed here: `wall_time` (1, double), `step` (2, int64),
//! `file_version` (3, string), `summary` (5, message) and `session_log` (7, message).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// A file that receives scalars.
pub struct EventFile {
    file: File,
    path: std::path::PathBuf,
    /// The time that every point has, where its own may not be told.
    at: Option<f64>,
}

impl EventFile {
    /// Begins a new file in `folder`, whose first point will be that of step `next`. Points that
    /// earlier files hold from there on are superseded: TensorBoard drops them. Unless `timed`, all
    /// points have the time at which the file was made.
    pub fn create(folder: &Path, next: u64, timed: bool) -> Result<Self> {
        crate::files::create_folder(folder)?;
        let now = wall_time();
        // The name must contain `tfevents`; TensorBoard reads files of a folder in name order.
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.{}",
            now as u64,
            (now.fract() * 1e9) as u32,
            std::process::id()
        );
        let path = folder.join(name);
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let file = file.map_err(Error::io("write", &path))?;
        let mut events = Self { file, path, at: (!timed).then_some(now) };
        events.write(&event(now, 0, &bytes_field(3, b"brain.Event:2")))?;
        // SessionLog { status: START }.
        events.write(&event(now, next, &bytes_field(7, &varint_field(1, 1))))?;
        Ok(events)
    }

    /// Adds one point to each curve.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut point = bytes_field(1, tag.as_bytes());
            point.push(2 << 3 | 5);
            point.extend((*value as f32).to_le_bytes());
            summary.extend(bytes_field(1, &point));
        }
        let time = self.at.unwrap_or_else(wall_time);
        self.write(&event(time, step, &bytes_field(5, &summary)))
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        // In one call, so that a crash leaves whole records or a last one cut short.
        self.file.write_all(&record(data)).map_err(Error::io("write", &self.path))
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

/// An `Event` message.
fn event(wall_time: f64, step: u64, what: &[u8]) -> Vec<u8> {
    let mut data = vec![1 << 3 | 1];
    data.extend(wall_time.to_le_bytes());
    data.extend(varint_field(2, step));
    data.extend(what);
    data
}

fn varint_field(field: u8, value: u64) -> Vec<u8> {
    let mut data = vec![field << 3];
    varint(&mut data, value);
    data
}

fn bytes_field(field: u8, bytes: &[u8]) -> Vec<u8> {
    let mut data = vec![field << 3 | 2];
    varint(&mut data, bytes.len() as u64);
    data.extend(bytes);
    data
}

fn varint(data: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        data.push(value as u8 | 0x80);
        value >>= 7;
    }
    data.push(value as u8);
}

/// Frames `data` as a TFRecord.
pub fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend(length);
    out.extend(masked(crc32c(&length)).to_le_bytes());
    out.extend(data);
    out.extend(masked(crc32c(data)).to_le_bytes());
    out
}

/// TFRecord's mask: a CRC of data that holds CRCs would be a poor one.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C (Castagnoli), reflected, bit by bit: a few hundred bytes a step need no table.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ ((crc & 1) * 0x82F6_3B78);
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_matches_the_vectors_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
    }

    #[test]
    fn a_record_is_framed_as_tensorflow_frames_it() {
        // The first record of every event file with wall_time 0, as TensorFlow writes it.
        let data = event(0.0, 0, &bytes_field(3, b"brain.Event:2"));
        let framed = record(&data);
        assert_eq!(framed[..8], (data.len() as u64).to_le_bytes());
        assert_eq!(framed.len(), data.len() + 16);
        let stored = u32::from_le_bytes([framed[8], framed[9], framed[10], framed[11]]);
        // Undoing the mask gives the CRC of the length back.
        assert_eq!(stored.wrapping_sub(0xA282_EAD8).rotate_left(15), crc32c(&framed[..8]));
    }

    #[test]
    fn numbers_above_127_take_several_bytes() {
        assert_eq!(varint_field(2, 300), [0x10, 0xAC, 0x02]);
    }
}
