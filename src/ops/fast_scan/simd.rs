//! The sums of blocks of keys: a shuffle of a table's bytes by the keys' codes looks up as many keys as a register has
//! bytes.
//!
//! The intrinsics are safe where the instruction set is there for sure: in functions that enable it, which
//! `multiversion` calls on machines that have it. It makes none for what every machine of an architecture has, which
//! NEON is; with CRC instructions, which nearly all have, it does.

use multiversion::{multiversion, target::match_target};

use super::tables::{Bytes, Rounded};
use super::BLOCK;

/// Most blocks have no more keys than this that reach the bound.
const AT_ONCE: usize = 2;

/// The sum of each key of each block; no sum overflows, since two tables add up to a byte and there are 256 at most.
#[multiversion(targets("x86_64+avx2+avx512f+avx512bw", "x86_64+avx2", "aarch64+neon+crc"))]
pub(super) fn scan(blocks: &[u8], tables: &Rounded, sums: &mut [[u16; BLOCK]]) {
    let rows = tables.low.len();
    for (block, sums) in blocks.as_chunks().0.chunks_exact(rows).zip(sums) {
        *sums = match_target! {
            "x86_64+avx512f+avx512bw" => x86::block_512(block, &tables.low, &tables.high),
            "x86_64+avx2" => x86::block_256(block, &tables.low, &tables.high),
            "aarch64+neon+crc" => aarch64::block(block, &tables.low, &tables.high),
            _ => plain(block, &tables.low, &tables.high),
        };
    }
}

/// Positions of the sums that are `bound` or more, ascending.
#[multiversion(targets("x86_64+avx2+avx512f+avx512bw", "x86_64+avx2"))]
pub(super) fn reach(sums: &[u16], bound: u16) -> Vec<u32> {
    // Written a few ahead, without a branch that would be taken by chance; grown in long steps.
    let (mut positions, mut len) = (vec![0; AT_ONCE * BLOCK], 0);
    let (blocks, rest) = sums.as_chunks::<BLOCK>();
    for (block, sums) in blocks.iter().enumerate() {
        let mut bits = match_target! {
            "x86_64+avx512f+avx512bw" => x86::reach_512(sums, bound),
            "x86_64+avx2" => x86::reach_256(sums, bound),
            _ => plain_reach(sums, bound),
        };
        if len + BLOCK > positions.len() {
            positions.resize(2 * positions.len(), 0);
        }
        for _ in 0..AT_ONCE {
            positions[len] = (block * BLOCK) as u32 + bits.trailing_zeros();
            len += usize::from(bits != 0);
            bits &= bits.wrapping_sub(1);
        }
        while bits != 0 {
            positions[len] = (block * BLOCK) as u32 + bits.trailing_zeros();
            len += 1;
            bits &= bits - 1;
        }
    }
    positions.truncate(len);
    for (i, sum) in rest.iter().enumerate() {
        if *sum >= bound {
            positions.push((blocks.len() * BLOCK + i) as u32);
        }
    }
    positions
}

/// A bit for each sum that is `bound` or more.
#[allow(dead_code)] // as `plain`
fn plain_reach(sums: &[u16; BLOCK], bound: u16) -> u32 {
    let mut bits = 0;
    for (i, sum) in sums.iter().enumerate() {
        bits |= u32::from(*sum >= bound) << i;
    }
    bits
}

#[allow(dead_code)] // where every machine has better, but for the tests
fn plain(block: &[Bytes], low: &[Bytes], high: &[Bytes]) -> [u16; BLOCK] {
    let mut sums = [0; BLOCK];
    for ((codes, low), high) in block.iter().zip(low).zip(high) {
        for (sum, codes) in sums.iter_mut().zip(codes) {
            *sum += u16::from(low[usize::from(codes & 15)]) + u16::from(high[usize::from(codes >> 4)]);
        }
    }
    sums
}

/// Bytes are added in pairs, as 16-bit numbers `even + 256 odd`, and the odd ones once more alone: what they added to
/// the former is taken off again at the end, modulo 2^16.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use bytemuck::must_cast;

    use super::{Bytes, BLOCK};

    #[target_feature(enable = "avx2")]
    pub(super) fn block_256(block: &[Bytes], low: &[Bytes], high: &[Bytes]) -> [u16; BLOCK] {
        finish(block, low, high, _mm256_setzero_si256(), _mm256_setzero_si256())
    }

    /// Two rows at a time, each in a half of the registers.
    #[target_feature(enable = "avx2,avx512f,avx512bw")]
    pub(super) fn block_512(block: &[Bytes], low: &[Bytes], high: &[Bytes]) -> [u16; BLOCK] {
        let ((block, block_rest), (low, low_rest)) = (block.as_chunks::<2>(), low.as_chunks::<2>());
        let (high, high_rest) = high.as_chunks::<2>();
        let (mut all, mut odd) = (_mm512_setzero_si512(), _mm512_setzero_si512());
        let half = _mm512_set1_epi8(15);
        for ((codes, low), high) in block.iter().zip(low).zip(high) {
            let codes: __m512i = must_cast(*codes);
            let low = _mm512_shuffle_epi8(must_cast(*low), _mm512_and_si512(codes, half));
            let high = _mm512_shuffle_epi8(must_cast(*high), _mm512_and_si512(_mm512_srli_epi16(codes, 4), half));
            let both = _mm512_add_epi8(low, high);
            all = _mm512_add_epi16(all, both);
            odd = _mm512_add_epi16(odd, _mm512_srli_epi16(both, 8));
        }
        finish(block_rest, low_rest, high_rest, fold(all), fold(odd))
    }

    #[target_feature(enable = "avx2,avx512f,avx512bw")]
    pub(super) fn reach_512(sums: &[u16; BLOCK], bound: u16) -> u32 {
        _mm512_cmpge_epu16_mask(must_cast(*sums), _mm512_set1_epi16(bound.cast_signed()))
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn reach_256(sums: &[u16; BLOCK], bound: u16) -> u32 {
        let bound = _mm256_set1_epi16(bound.cast_signed());
        let [a, b]: [__m256i; 2] = must_cast(*sums);
        let reaches = |x| _mm256_cmpeq_epi16(_mm256_max_epu16(x, bound), x);
        // Packed within the halves of the registers: keys 0 to 7, 16 to 23, 8 to 15, 24 to 31.
        let bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(reaches(a), reaches(b)), 0b11_01_10_00);
        _mm256_movemask_epi8(bytes).cast_unsigned()
    }

    #[target_feature(enable = "avx2,avx512f,avx512bw")]
    fn fold(x: __m512i) -> __m256i {
        _mm256_add_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1))
    }

    /// Adds the rows to `all` and `odd`; the sums of the keys in order.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn finish(block: &[Bytes], low: &[Bytes], high: &[Bytes], mut all: __m256i, mut odd: __m256i) -> [u16; BLOCK] {
        let half = _mm256_set1_epi8(15);
        for ((codes, low), high) in block.iter().zip(low).zip(high) {
            let codes: __m256i = must_cast(*codes);
            let low = _mm256_shuffle_epi8(must_cast(*low), _mm256_and_si256(codes, half));
            let high = _mm256_shuffle_epi8(must_cast(*high), _mm256_and_si256(_mm256_srli_epi16(codes, 4), half));
            let both = _mm256_add_epi8(low, high);
            all = _mm256_add_epi16(all, both);
            odd = _mm256_add_epi16(odd, _mm256_srli_epi16(both, 8));
        }
        let even = _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8));
        // Keys 0 to 7 and 16 to 23; 8 to 15 and 24 to 31.
        let (a, b) = (_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd));
        must_cast([_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)])
    }
}

#[cfg(target_arch = "aarch64")]
mod aarch64 {
    use std::arch::aarch64::*;

    use bytemuck::must_cast;

    use super::{Bytes, BLOCK};

    #[target_feature(enable = "neon")]
    pub(super) fn block(block: &[Bytes], low: &[Bytes], high: &[Bytes]) -> [u16; BLOCK] {
        let mut sums = [vdupq_n_u16(0); 4];
        for ((codes, low), high) in block.iter().zip(low).zip(high) {
            let codes: [uint8x16_t; 2] = must_cast(*codes);
            let ([low, _], [high, _]): ([uint8x16_t; 2], [uint8x16_t; 2]) = (must_cast(*low), must_cast(*high));
            for (sums, codes) in sums.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                let low = vqtbl1q_u8(low, vandq_u8(codes, vdupq_n_u8(15)));
                let both = vaddq_u8(low, vqtbl1q_u8(high, vshrq_n_u8(codes, 4)));
                sums[0] = vaddw_u8(sums[0], vget_low_u8(both));
                sums[1] = vaddw_high_u8(sums[1], both);
            }
        }
        must_cast(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `scan` and `reach` on a machine without AVX-512.
    #[multiversion(targets("x86_64+avx2"))]
    fn narrow(block: &[Bytes], tables: &Rounded, bound: u16) -> ([u16; BLOCK], u32) {
        match_target! {
            "x86_64+avx2" => {
                let sums = x86::block_256(block, &tables.low, &tables.high);
                (sums, x86::reach_256(&sums, bound))
            },
            _ => {
                let sums = plain(block, &tables.low, &tables.high);
                (sums, plain_reach(&sums, bound))
            },
        }
    }

    #[test]
    fn every_instruction_set_computes_the_same() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        for rows in (1..=20).chain([127, 128]) {
            let blocks: Vec<[Bytes; 3]> =
                (0..rows).map(|_| [(); 3].map(|()| std::array::from_fn(|_| next()))).collect();
            let blocks: Vec<Bytes> = blocks.into_iter().flatten().collect();
            let mut table = |most: u8| {
                let half: [u8; 16] = std::array::from_fn(|i| if i == 0 { most } else { next() % (most + 1) });
                std::array::from_fn(|i| half[i % 16])
            };
            let tables = Rounded {
                low: (0..rows).map(|_| table(200)).collect(),
                high: (0..rows).map(|_| table(55)).collect(),
                band: 0,
            };
            let mut sums = [[0; BLOCK]; 3];
            scan(blocks.as_flattened(), &tables, &mut sums);
            for (block, sums) in blocks.chunks_exact(rows).zip(sums) {
                assert_eq!(sums, plain(block, &tables.low, &tables.high), "{rows} rows");
                let mut order = sums;
                order.sort();
                for bound in [0, order[0] + 1, order[16], order[31], order[31] + 1, u16::MAX] {
                    let bits = plain_reach(&sums, bound);
                    assert_eq!(narrow(block, &tables, bound), (sums, bits));
                    let want: Vec<u32> = (0..32).filter(|i| bits >> i & 1 == 1).collect();
                    assert_eq!(reach(&sums, bound), want);
                    assert_eq!(reach(&sums[..31], bound), want.into_iter().filter(|i| *i < 31).collect::<Vec<_>>());
                }
            }
        }
    }
}
