//! Tables rounded to bytes, and what the rounding may hide.
//!
//! A table's entries are counted in steps above its least one and rounded down. The step is the same for all tables,
//! so the sum of a key's bytes is its score in steps, less a constant and less what was cut off: no less than 0 and, for
//! each table, no more than its worst entry lost. Two tables share a row of the codes; the step is such that the
//! entries of both add up to a byte.

use super::MAX_CENTROIDS;

/// The exact tables, one a subspace.
pub(super) type Table = [f32; MAX_CENTROIDS];

/// A rounded table, twice: of 32 keys that are looked up at a time each half has one of its own.
pub(super) type Bytes = [u8; 32];

/// Rounded tables, two a row of packed codes, for its low and its high halves.
pub(super) struct Rounded {
    pub(super) low: Vec<Bytes>,
    pub(super) high: Vec<Bytes>,
    /// A key whose sum is larger by more than this has the larger score, as `score` computes it.
    pub(super) band: u16,
}

impl Rounded {
    /// None where an entry or a score may be too large for f32, or is NaN.
    pub(super) fn new(tables: &[Table]) -> Option<Self> {
        let ranges: Vec<(f64, f64)> = tables.iter().map(least_and_largest).collect();
        // No sum of entries is larger, in whatever order.
        let magnitude: f64 = ranges.iter().map(|(least, largest)| least.abs().max(largest.abs())).sum();
        let finite = tables.as_flattened().iter().all(|x| x.is_finite());
        if !finite || magnitude > f64::from(f32::MAX) / 2.0 {
            return None;
        }
        let width = |(least, largest): &(f64, f64)| largest - least;
        let widest = ranges.chunks(2).map(|pair| pair.iter().map(width).sum::<f64>()).fold(0.0, f64::max);
        let step = if widest > 0.0 { widest / 255.0 } else { 1.0 };
        let (mut low, mut high, mut lost) = (vec![], vec![], 0.0);
        for (m, (table, (least, _))) in tables.iter().zip(&ranges).enumerate() {
            let steps = table.map(|x| (f64::from(x) - least) / step);
            let half = steps.map(|x| x as u8); // rounds down
            lost += steps.iter().zip(half).map(|(x, byte)| x - f64::from(byte)).fold(0.0, f64::max);
            let bytes = std::array::from_fn(|i| half[i % MAX_CENTROIDS]);
            if m % 2 == 0 { &mut low } else { &mut high }.push(bytes);
        }
        high.resize(low.len(), [0; 32]);
        // Each of the additions of two scores in f32 is off by half a unit in the last place of the magnitude at most;
        // doubled, for what the bound itself and the f64 arithmetic here round.
        let additions = 2.0 * tables.len() as f64 * magnitude * f64::from(f32::EPSILON);
        Some(Self { low, high, band: (lost + additions / step + 1e-6).min(65_535.0) as u16 })
    }
}

fn least_and_largest(table: &Table) -> (f64, f64) {
    let fold = |first, pick: fn(f32, f32) -> f32| f64::from(table.iter().copied().fold(first, pick));
    (fold(f32::INFINITY, f32::min), fold(f32::NEG_INFINITY, f32::max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_rounded_is_left() {
        let table = |x| [x, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN] {
            assert!(Rounded::new(&[table(0.5), table(x)]).is_none());
        }
        // Steps far below the rounding of f32 tell nothing; sums of nothing but zeros are exact.
        assert_eq!(Rounded::new(&[[1e12; 16], table(0.0)]).unwrap().band, u16::MAX);
        assert_eq!(Rounded::new(&[[0.0; 16]]).unwrap().band, 0);
        assert_eq!(Rounded::new(&[table(255.0), [7.0; 16]]).unwrap().low[0][..4], [255, 0, 1, 2]);
    }
}
