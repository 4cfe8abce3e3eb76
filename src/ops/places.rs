//! Positions in pages.

use std::ops::Range;

/// Positions of a page: a warp of `search` takes as many at a time. `kernels/common.cuh`
pub(crate) const PAGE: usize = 128;

/// Where keys that follow each other lie in tensors whose positions are in pages.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The number of each page, in the order of the positions that they have.
    pub(crate) pages: Vec<u32>,
    /// The position of the first key.
    pub(crate) first: usize,
    /// How many there are.
    pub(crate) n: usize,
}

impl Places {
    /// Of the keys `first..first + count` the runs that lie in one piece: its first place, and which of the `count` it has.
    /// Without pages that is all of them.
    #[inline(always)]
    pub(super) fn runs(
        this: Option<&Self>,
        first: usize,
        count: usize,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + use<'_> {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == count {
                return None;
            }
            let (place, len) = match this {
                None => (first + done, count - done),
                Some(Self { pages, first: start, .. }) => {
                    let position = start + first + done;
                    (place_of(pages, position), (PAGE - position % PAGE).min(count - done))
                }
            };
            done += len;
            Some((place, done - len..done))
        })
    }
}

/// Where a position lies.
#[inline(always)]
pub(crate) fn place_of(pages: &[u32], position: usize) -> usize {
    pages[position / PAGE] as usize * PAGE + position % PAGE
}
