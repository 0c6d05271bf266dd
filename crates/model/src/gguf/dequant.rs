//! ggml's block formats to f32 (`dequantize_row_*` in ggml-quants.c).

use half::{bf16, f16};

/// How a tensor's numbers are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quant {
    F32,
    F16,
    BF16,
    /// 32 numbers: scale, 32 × i8.
    Q8_0,
    /// 32 numbers: scale, 32 × 4 bits minus 8.
    Q4_0,
    /// 32 numbers: scale, minimum, 32 × 4 bits.
    Q4_1,
    /// 256 numbers: two scales, 8 × (6-bit scale, 6-bit minimum), 256 × 4 bits.
    Q4K,
    /// 256 numbers: 256 × 6 bits minus 32, 16 × i8 scales, one scale.
    Q6K,
}

impl Quant {
    /// From ggml's type number.
    pub fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            14 => Self::Q6K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// Numbers in one block.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Unpacks whole blocks.
    pub fn dequantise(self, bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![0f32; bytes.len() / self.block_bytes() * self.block_len()];
        let blocks = bytes.chunks_exact(self.block_bytes());
        for (block, out) in blocks.zip(out.chunks_exact_mut(self.block_len())) {
            match self {
                Self::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
                Self::F16 => out[0] = half(block, 0),
                Self::BF16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
                Self::Q8_0 => q8_0(block, out),
                Self::Q4_0 => q4(&block[2..], out, half(block, 0), -8.0 * half(block, 0)),
                Self::Q4_1 => q4(&block[4..], out, half(block, 0), half(block, 2)),
                Self::Q4K => q4_k(block, out),
                Self::Q6K => q6_k(block, out),
            }
        }
        out
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 0);
    for (o, &q) in out.iter_mut().zip(&block[2..]) {
        *o = f32::from(q as i8) * scale;
    }
}

/// Low halves of the 16 bytes first, then the high halves.
fn q4(nibbles: &[u8], out: &mut [f32], scale: f32, offset: f32) {
    for (j, &byte) in nibbles.iter().enumerate() {
        out[j] = f32::from(byte & 15) * scale + offset;
        out[j + 16] = f32::from(byte >> 4) * scale + offset;
    }
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (scale, min_scale) = (half(block, 0), half(block, 2));
    let (packed, nibbles) = (&block[4..16], &block[16..]);
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        // Eight 6-bit scales and minima in twelve bytes; the last four are split.
        let (s, m) = if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            (
                (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4),
                (packed[j + 4] >> 4) | (packed[j] >> 6 << 4),
            )
        };
        let (s, m) = (scale * f32::from(s), min_scale * f32::from(m));
        let bytes = &nibbles[j / 2 * 32..][..32];
        for (o, &byte) in out.iter_mut().zip(bytes) {
            let q = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
            *o = s * f32::from(q) - m;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 208);
    for (n, out) in out.chunks_exact_mut(128).enumerate() {
        let low = &block[64 * n..][..64];
        let high = &block[128 + 32 * n..][..32];
        let scales = &block[192 + 8 * n..][..8];
        for quarter in 0..4 {
            for l in 0..32 {
                let byte = low[l + 32 * (quarter % 2)];
                let four = if quarter < 2 { byte & 15 } else { byte >> 4 };
                let two = high[l] >> (2 * quarter) & 3;
                let q = i32::from(four | two << 4) - 32;
                let s = scales[l / 16 + 2 * quarter] as i8;
                out[32 * quarter + l] = scale * f32::from(s) * q as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f16_bytes(value: f32) -> [u8; 2] {
        f16::from_f32(value).to_le_bytes()
    }

    #[test]
    fn four_bit_blocks_unpack_low_halves_first() {
        let mut block = [f16_bytes(0.5), f16_bytes(-1.0)].concat();
        block.extend((0..16).map(|i| i | (15 - i) << 4));
        let out = Quant::Q4_1.dequantise(&block);
        for i in 0..16 {
            assert_eq!(out[i], 0.5 * i as f32 - 1.0);
            assert_eq!(out[16 + i], 0.5 * (15 - i) as f32 - 1.0);
        }
        let mut block = f16_bytes(2.0).to_vec();
        block.extend([0x80u8; 16]);
        let out = Quant::Q4_0.dequantise(&block);
        assert_eq!((out[0], out[16]), (-16.0, 0.0));
    }

    #[test]
    fn eight_bit_blocks_are_signed() {
        let mut block = f16_bytes(0.25).to_vec();
        block.extend((0..32).map(|i| (i as i8 - 16) as u8));
        let out = Quant::Q8_0.dequantise(&block);
        assert_eq!((out[0], out[16], out[31]), (-4.0, 0.0, 3.75));
    }

    /// Packs as ggml does (`quantize_row_q4_K_ref`'s layout) and asks for the same numbers back.
    #[test]
    fn q4_k_scales_split_over_twelve_bytes_come_back() {
        let scales: [u8; 8] = [1, 17, 33, 63, 2, 18, 34, 62];
        let mins: [u8; 8] = [5, 21, 37, 60, 6, 22, 38, 61];
        let mut packed = [0u8; 12];
        for j in 0..8 {
            if j < 4 {
                packed[j] |= scales[j];
                packed[j + 4] |= mins[j];
            } else {
                packed[j + 4] = (scales[j] & 15) | (mins[j] & 15) << 4;
                packed[j - 4] |= scales[j] >> 4 << 6;
                packed[j] |= mins[j] >> 4 << 6;
            }
        }
        let q: Vec<u8> = (0..256).map(|i| ((i * 7 + i / 32) % 16) as u8).collect();
        let mut block = [f16_bytes(0.5), f16_bytes(0.25)].concat();
        block.extend(packed);
        for pair in q.chunks_exact(64) {
            block.extend((0..32).map(|l| pair[l] | pair[l + 32] << 4));
        }
        let out = Quant::Q4K.dequantise(&block);
        for i in 0..256 {
            let j = i / 32;
            let expected = 0.5 * f32::from(scales[j]) * f32::from(q[i]) - 0.25 * f32::from(mins[j]);
            assert_eq!(out[i], expected, "{i}");
        }
    }

    #[test]
    fn q6_k_bits_come_back_from_both_halves() {
        let q: Vec<i32> = (0..256).map(|i| (i * 11 + i / 16) % 64 - 32).collect();
        let scales: Vec<i8> = (0..16).map(|i| i * 5 - 40).collect();
        let mut block = vec![0u8; 210];
        for (i, &q) in q.iter().enumerate() {
            let (n, r) = (i / 128, i % 128);
            let (quarter, l) = (r / 32, r % 32);
            let u = (q + 32) as u8;
            block[64 * n + l + 32 * (quarter % 2)] |= (u & 15) << (4 * (quarter / 2));
            block[128 + 32 * n + l] |= u >> 4 << (2 * quarter);
        }
        for (i, &s) in scales.iter().enumerate() {
            block[192 + i] = s as u8;
        }
        block[208..].copy_from_slice(&f16_bytes(0.5));
        let out = Quant::Q6K.dequantise(&block);
        for (i, &q) in q.iter().enumerate() {
            assert_eq!(out[i], 0.5 * f32::from(scales[i / 16]) * q as f32, "{i}");
        }
    }
}
