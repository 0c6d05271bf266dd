//! Zstandard files as a plain reader.
//!
//! `zstd`, `pzstd` and appending writers put several frames into a file; the decoder itself
//! reads one, and leaves checking the checksum to its caller.

use std::io::{self, BufRead, Read};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// All frames of `source`, unpacked, one after the other.
pub struct Frames<R> {
    source: R,
    decoder: FrameDecoder,
    /// Whether a frame has begun and not ended.
    within: bool,
    /// Whether any has: a file of no bytes is no file of Zstandard.
    any: bool,
}

impl<R: BufRead> Frames<R> {
    /// Nothing is read before the first `read`.
    pub fn new(source: R) -> Self {
        Self { source, decoder: FrameDecoder::new(), within: false, any: false }
    }

    /// Begins the frame at the source's position, or passes over a skippable one.
    fn begin(&mut self) -> io::Result<()> {
        self.any = true;
        match self.decoder.init(&mut self.source) {
            Ok(()) => self.within = true,
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                length,
                ..
            })) => {
                let length = u64::from(length);
                if io::copy(&mut (&mut self.source).take(length), &mut io::sink())? < length {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Err(error) => return Err(damaged(error)),
        }
        Ok(())
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.within {
                if self.source.fill_buf()?.is_empty() {
                    return if self.any { Ok(0) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
                }
                self.begin()?;
                continue;
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(damaged)?;
            }
            let n = self.decoder.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            let stored = self.decoder.get_checksum_from_data();
            if stored.is_some() && stored != self.decoder.get_calculated_checksum() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "wrong checksum"));
            }
            self.within = false;
        }
    }
}

fn damaged(error: FrameDecoderError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}
