//! Who searches what in a launch.

use super::fused::{CHUNK, MAX_SPLITS, WARPS};

/// Rows of a block, at most. Also in `kernels/decode/layout.cuh`.
const MAX_PARTS: usize = 8;

/// What a team takes of each of its blocks beside its keys (tables, meetings, histograms), in keys that it could search
/// meanwhile: about 18 us.
const KEYS_OF_TABLES: usize = 6144;

/// The work of all teams in a row, cut into equal pieces, of which each block has one.
pub(super) struct Work {
    pub(super) units_per_block: usize,
    /// Units of a team of each sequence.
    pub(super) units: Vec<usize>,
    /// Blocks of a team, at most.
    pub(super) splits: usize,
    /// The most work of a block, in keys.
    load: usize,
}

impl Work {
    /// For sequences of so many keys, of `teams` teams each, on a GPU that runs so many blocks at once.
    ///
    /// A team has blocks of its own, unless it is better that those of one finish what others begin: where the lengths
    /// differ, or so many teams do not divide the blocks. With lengths that are equal it does not matter which.
    pub(super) fn new(keys: &[usize], teams: usize, blocks: usize) -> Self {
        let apart = Self::apart(keys, teams, blocks);
        match Self::adjoining(keys, teams, blocks) {
            Some(adjoining) if adjoining.load < apart.load => adjoining,
            _ => apart,
        }
    }

    /// A unit is a block. Sequences of equal lengths have equally many.
    fn apart(keys: &[usize], teams: usize, blocks: usize) -> Self {
        let mut units = vec![1; keys.len()];
        let mut left = (blocks / teams).saturating_sub(units.len());
        // Of those with the most keys a block each has one more, as long as there are enough for all of them.
        loop {
            let load = |i: usize| keys[i].div_ceil(units[i]);
            let can_share = |i: &usize| units[*i] < useful(keys[*i]);
            let most = (0..keys.len()).filter(can_share).map(load).max();
            let of_most: Vec<_> = (0..keys.len()).filter(can_share).filter(|i| Some(load(*i)) == most).collect();
            if of_most.is_empty() || of_most.len() > left {
                let most = (0..keys.len()).map(load).max().unwrap_or(0);
                let turns = (teams * units.iter().sum::<usize>()).div_ceil(blocks);
                let splits = units.iter().copied().max().unwrap_or(1);
                return Self { units_per_block: 1, units, splits, load: (most + KEYS_OF_TABLES) * turns };
            }
            left -= of_most.len();
            of_most.into_iter().for_each(|i| units[i] += 1);
        }
    }

    /// Teams lie side by side, so that a block may have the end of one and the beginning of the next. None where blocks would
    /// have too many.
    fn adjoining(keys: &[usize], teams: usize, blocks: usize) -> Option<Self> {
        const MOST_UNITS: usize = 4096;
        let longest = keys.iter().copied().max()?;
        let unit = (longest + KEYS_OF_TABLES).div_ceil(MOST_UNITS).next_multiple_of(CHUNK).max(CHUNK);
        let mut units: Vec<_> = keys.iter().map(|keys| (keys + KEYS_OF_TABLES).div_ceil(unit)).collect();
        let mut units_per_block = 0;
        for _ in 0..4 {
            let all = teams * units.iter().sum::<usize>();
            units_per_block = all.div_ceil(blocks).max((CHUNK * WARPS).div_ceil(unit));
            // No more parts than a block can have: short ones are as work as long as these.
            units.iter_mut().for_each(|units| *units = (*units).max(units_per_block.div_ceil(MAX_PARTS / 2)));
        }
        let all = teams * units.iter().sum::<usize>();
        let (least, most) = (units.iter().copied().min()?, units.iter().copied().max()?);
        let splits = most.div_ceil(units_per_block) + 1;
        let parts = units_per_block.div_ceil(least) + 1;
        let fits = parts <= MAX_PARTS && splits <= MAX_SPLITS && all.div_ceil(units_per_block) <= blocks;
        // Most blocks have a team's end and another's beginning, and so the tables of one more.
        fits.then(|| Self { units_per_block, units, splits, load: units_per_block * unit + KEYS_OF_TABLES })
    }

    /// Chunks of keys that a block has of a team of the `i`-th sequence, at most, if there are `chunks` of them.
    pub(super) fn chunks_of_block(&self, i: usize, chunks: usize) -> usize {
        (self.units_per_block.min(self.units[i]) * chunks).div_ceil(self.units[i])
    }

    /// Chunks of all teams that a block has, at most, if there are so many of each sequence.
    pub(super) fn chunks_of_all(&self, chunks: &[usize]) -> usize {
        let rounded = if self.units_per_block > 1 { MAX_PARTS } else { 0 };
        let of_sequence = |(chunks, units): (&usize, &usize)| (self.units_per_block * chunks).div_ceil(*units);
        chunks.iter().zip(&self.units).map(of_sequence).max().unwrap_or(0) + rounded
    }
}

/// Blocks that so many keys have work for: for all warps of each.
fn useful(keys: usize) -> usize {
    keys.div_ceil(CHUNK * WARPS).clamp(1, MAX_SPLITS)
}
