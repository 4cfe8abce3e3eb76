//! Failures on demand, for tests: Candle aborts where a CPU has no memory left, so that what a step leaves behind when it is
//! refused some can be seen in no other way.

/// Stands before what takes memory or comes after a part of a change: an error if a test wants one here.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn point_of_failure() -> candle_core::Result<()> {
    Ok(())
}

#[cfg(test)]
pub(crate) use of_tests::{failing, point_of_failure, Failing};

#[cfg(test)]
mod of_tests {
    use std::cell::Cell;

    use candle_core::{bail, Result};

    /// Which points are to fail, of those that this thread comes to.
    #[derive(Debug, Clone, Copy)]
    pub(crate) enum Failing {
        Once(usize),
        From(usize),
    }

    thread_local! {
        static FAILING: Cell<Option<Failing>> = const { Cell::new(None) };
        static PASSED: Cell<usize> = const { Cell::new(0) };
    }

    pub(crate) fn point_of_failure() -> Result<()> {
        let point = PASSED.replace(PASSED.get() + 1);
        match FAILING.get() {
            Some(Failing::Once(at)) if point == at => bail!("no memory at point {point}"),
            Some(Failing::From(at)) if point >= at => bail!("no memory from point {at} on"),
            _ => Ok(()),
        }
    }

    /// Runs a call of which some points fail; also says how many it came to.
    pub(crate) fn failing<T>(points: Failing, call: impl FnOnce() -> T) -> (T, usize) {
        FAILING.set(Some(points));
        PASSED.set(0);
        let result = call();
        FAILING.set(None);
        (result, PASSED.get())
    }
}
