//! Keys, values and codes in pages that caches take from a pool as they grow.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{bail, DType, Device, Result, Tensor};

use super::{PqKvCache, Store};
use crate::config::PqConfig;
use crate::fault::point_of_failure;
use crate::ops::PAGE;

/// Memory for the caches of one layer of a model, cut into pages that caches take as they grow and give back when they are
/// dropped: as servers keep it that run many sequences whose lengths they do not know.
///
/// - **Growth** takes another page, [`PAGE`](Self::PAGE) positions, and copies nothing.
/// - **Block tables**, one of keys and values and one of codes, say which pages a cache has: a `u32` a page, which on a GPU
///   kernels read from device memory.
/// - **Forks** share pages until one of them writes to a page, of which it then has a copy: by their own
///   [`fork`](PqKvCache::fork).
///
/// A cache of a pool is otherwise as any [`PqKvCache`], with the same results, on a CPU to the bit and on a GPU to within
/// rounding: steps of [`PqAttention`](crate::PqAttention), alone, packed with others or in a captured graph, read the pages where
/// they are. What reads all keys at once makes a copy of them
/// for as long as it takes, where they are not in one piece: a prefill, training, [`PqKvCache::keys`], saving, dense decode steps,
/// which a graph cannot have, and on a GPU steps that its fused kernels do not suit.
///
/// Caches of a pool share its tensors. On a CPU they may be on different threads, as forks may: see [`PqKvCache::fork`]. On a GPU
/// work with all of them on one thread, whose stream has one after the other read and write a page. What [`PqKvCache::keys`] and
/// the like return are views of pages, valid until the cache gives these back.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_pq_attn::{PagePool, PqAttention, PqConfig};
///
/// let attn = PqAttention::new(PqConfig::default(), 0.125)?;
/// let pool = PagePool::new(attn.config().clone(), [1, 2, 64], 32, DType::F32, &Device::Cpu)?;
/// let random = |heads, s| Tensor::randn(0f32, 1., (1, heads, s, 64), &Device::Cpu);
/// let mut cache = pool.new_cache()?;
/// attn.forward(&random(8, 1500)?, &random(2, 1500)?, &random(2, 1500)?, &mut cache)?;
/// assert_eq!(pool.free_pages(), 32 - 12);
/// attn.forward(&random(8, 1)?, &random(2, 1)?, &random(2, 1)?, &mut cache)?;
/// drop(cache);
/// assert_eq!(pool.free_pages(), 32);
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct PagePool {
    config: PqConfig,
    store: Store,
    kv: Home,
    codes: Home,
}

impl PagePool {
    /// Positions of a page.
    pub const PAGE: usize = PAGE;

    /// Memory of `pages` pages for caches of `[batch, kv_heads, head_dim]`, all of it reserved now. A page has positions of all
    /// sequences and heads of a cache; there are as many for codes as for keys and values.
    ///
    /// # Errors
    /// What [`PqKvCache::new`] refuses, no pages, or 2^31 elements of keys or more, with which Candle's indices overflow.
    pub fn new(config: PqConfig, dims: [usize; 3], pages: usize, dtype: DType, device: &Device) -> Result<Self> {
        let elements = dims.iter().fold(pages.checked_mul(PAGE), |product, dim| product?.checked_mul(*dim));
        if pages == 0 || elements.is_none_or(|elements| elements >= 1 << 31) {
            bail!("PagePool: pages: expected 1 or more with less than 2^31 elements of keys, got {pages} of {dims:?}");
        }
        let store = Store::new(&config, dims, pages * PAGE, dtype, device)?;
        let home = || Home { free: Arc::new(Mutex::new((0..pages as u32).collect())), pages };
        Ok(Self { config, store, kv: home(), codes: home() })
    }

    /// A cache without keys, which has no pages yet.
    ///
    /// # Errors
    /// What the device gives.
    pub fn new_cache(&self) -> Result<PqKvCache> {
        let device = self.store.kv.device();
        let pages = Pages { kv: Table::new(self.kv.clone(), device)?, codes: Table::new(self.codes.clone(), device)? };
        PqKvCache::of_store(self.config.clone(), self.store.clone(), Some(pages))
    }

    /// A cache that goes on as `cache` does, with copies of its keys, values and codes: one that was loaded from a file, say.
    ///
    /// # Errors
    /// A cache of other dimensions, dtype, device or config, too few free pages, or what the device gives.
    pub fn copy_of(&self, cache: &PqKvCache) -> Result<PqKvCache> {
        if cache.config() != &self.config {
            bail!("PagePool: cache: expected one made with the pool's config, got {:?}", cache.config());
        }
        cache.forbid_capture("a copy", "copy")?;
        let mut copy = self.new_cache()?;
        copy.append(&cache.keys()?, &cache.values()?)?;
        copy.copy_index(cache)?;
        Ok(copy)
    }

    /// Pages that no cache has: for keys and values or for codes, whichever are fewer.
    pub fn free_pages(&self) -> usize {
        self.kv.free().len().min(self.codes.free().len())
    }
}

/// Where pages come from and go back to.
#[derive(Debug, Clone)]
struct Home {
    free: Arc<Mutex<BTreeSet<u32>>>,
    /// All there are.
    pages: usize,
}

impl Home {
    fn free(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails where fewer than `count` are free.
    fn expect(&self, count: usize, free: &BTreeSet<u32>) -> Result<()> {
        match free.len() {
            free if free < count => bail!("PagePool: expected {count} free pages, got {free} of {}", self.pages),
            _ => Ok(()),
        }
    }

    /// Takes the first ones, so that those of a sequence that grows alone lie in one piece.
    fn take(&self, count: usize) -> Result<Vec<Arc<Page>>> {
        point_of_failure()?;
        let mut free = self.free();
        self.expect(count, &free)?;
        let page = |number| Arc::new(Page { number, home: self.clone() });
        Ok(std::iter::from_fn(|| free.pop_first()).take(count).map(page).collect())
    }
}

/// A page in use, by as many caches as have this.
#[derive(Debug)]
struct Page {
    number: u32,
    home: Home,
}

impl Drop for Page {
    fn drop(&mut self) {
        self.home.free().insert(self.number);
    }
}

/// The pages of a cache.
#[derive(Debug)]
pub(super) struct Pages {
    pub(super) kv: Table,
    pub(super) codes: Table,
}

impl Pages {
    /// Takes pages for the positions up to `end`, if there are enough, and as many again as are to be copied before something is
    /// written to positions from `len`, and codes from `encoded` on.
    pub(super) fn grow_to(&mut self, end: usize, len: usize, encoded: usize) -> Result<()> {
        for (table, first) in [(&self.kv, len), (&self.codes, encoded)] {
            table.home.expect(table.missing(end) + table.shared_from(first).count(), &table.home.free())?;
        }
        let taken = (self.kv.taken_for(end)?, self.codes.taken_for(end)?);
        // The first is not in use before it is as long as the other.
        self.kv.extend(taken.0)?;
        self.codes.extend(taken.1)
    }

    /// Gives pages behind the first `len` positions back that other caches have too, and those behind them.
    pub(super) fn give_back(&mut self, len: usize) {
        for table in [&mut self.kv, &mut self.codes] {
            let first = table.shared_from(len.next_multiple_of(PAGE)).next();
            table.pages.truncate(first.unwrap_or(table.pages.len()));
        }
    }

    /// Positions that there is room for.
    pub(super) fn capacity(&self) -> usize {
        PAGE * self.kv.pages.len().min(self.codes.pages.len())
    }

    /// The pages of the first `len` positions.
    pub(super) fn sharing(&self, len: usize, device: &Device) -> Result<Self> {
        Ok(Self { kv: self.kv.sharing(len, device)?, codes: self.codes.sharing(len, device)? })
    }
}

/// Pages in the order of the positions that they are for.
#[derive(Debug)]
pub(super) struct Table {
    home: Home,
    pages: Vec<Arc<Page>>,
    /// So many of the first pages are those of what this was made a fork of.
    inherited: usize,
    /// The numbers of the pages in the memory of a GPU, with room for all there are.
    on_gpu: Option<Tensor>,
}

impl Table {
    fn new(home: Home, device: &Device) -> Result<Self> {
        let on_gpu = match device.is_cuda() {
            true => Some(Tensor::zeros(home.pages, DType::U32, device)?),
            false => None,
        };
        Ok(Self { home, pages: Vec::new(), inherited: 0, on_gpu })
    }

    /// The pages that positions up to `end` want beside those that are there.
    fn taken_for(&self, end: usize) -> Result<Vec<Arc<Page>>> {
        self.home.take(self.missing(end))
    }

    /// How many these are.
    fn missing(&self, end: usize) -> usize {
        end.div_ceil(PAGE).saturating_sub(self.pages.len())
    }

    fn extend(&mut self, pages: Vec<Arc<Page>>) -> Result<()> {
        self.tell_gpu(self.pages.len(), &pages)?;
        self.pages.extend(pages);
        Ok(())
    }

    /// Writes the numbers of `pages` to the GPU, from the `first` on.
    fn tell_gpu(&self, first: usize, pages: &[Arc<Page>]) -> Result<()> {
        match &self.on_gpu {
            Some(table) if !pages.is_empty() => {
                let numbers: Vec<_> = pages.iter().map(|page| page.number).collect();
                table.slice_set(&Tensor::new(numbers, table.device())?, 0, first)
            }
            _ => Ok(()),
        }
    }

    fn sharing(&self, len: usize, device: &Device) -> Result<Self> {
        let mut table = Self::new(self.home.clone(), device)?;
        table.extend(self.pages[..len.div_ceil(PAGE).min(self.pages.len())].to_vec())?;
        table.inherited = table.pages.len();
        Ok(table)
    }

    /// As kernels read it.
    #[cfg(feature = "cuda")]
    pub(super) fn on_gpu(&self) -> Option<&Tensor> {
        self.on_gpu.as_ref()
    }

    /// The number of each page.
    pub(super) fn numbers(&self) -> Vec<u32> {
        self.pages.iter().map(|page| page.number).collect()
    }

    /// Where the positions lie in the pool: of each piece its first place, and which positions it has.
    pub(super) fn places(&self, positions: Range<usize>) -> Vec<(usize, Range<usize>)> {
        let mut pieces: Vec<(usize, Range<usize>)> = Vec::new();
        let mut position = positions.start;
        while position < positions.end {
            let end = (position / PAGE * PAGE + PAGE).min(positions.end);
            let place = self.pages[position / PAGE].number as usize * PAGE + position % PAGE;
            match pieces.last_mut() {
                Some((first, piece)) if *first + piece.len() == place => piece.end = end,
                _ => pieces.push((place, position..end)),
            }
            position = end;
        }
        pieces
    }

    /// What `tensor`, `[b, h_kv, places, ...]`, has of these positions: a view where they lie in one piece.
    pub(super) fn gather(&self, tensor: &Tensor, positions: Range<usize>) -> Result<Tensor> {
        match *self.places(positions) {
            [] => tensor.narrow(2, 0, 0),
            [(first, ref positions)] => tensor.narrow(2, first, positions.len()),
            ref pieces => {
                point_of_failure()?;
                let of_piece =
                    |(first, positions): &(usize, Range<usize>)| *first as u32..(first + positions.len()) as u32;
                let places: Vec<_> = pieces.iter().flat_map(of_piece).collect();
                tensor.index_select(&Tensor::new(places, tensor.device())?, 2)
            }
        }
    }

    fn is_shared(&self, page: usize) -> bool {
        Arc::strong_count(&self.pages[page]) > 1
    }

    /// The pages of `position` and what comes behind it that another cache has too.
    fn shared_from(&self, position: usize) -> impl Iterator<Item = usize> + use<'_> {
        (position / PAGE..self.pages.len()).filter(|page| self.is_shared(*page))
    }

    /// Whether there are any.
    pub(super) fn is_shared_from(&self, position: usize) -> bool {
        self.shared_from(position).next().is_some()
    }

    /// Positions, of the first `len`, in whole pages of another cache, of which this was made a fork.
    pub(super) fn inherited(&self, len: usize) -> usize {
        PAGE * self.inherited.min(len / PAGE)
    }

    /// Has pages of its own in the place of those from the beginning of `live` on that other caches have too: from there on they
    /// can be written to. Copied are those that begin before the end of `live`, or have positions before its beginning;
    /// `tensors` are `[b, h_kv, places, ...]`.
    pub(super) fn own_from(&mut self, live: Range<usize>, tensors: &[Tensor]) -> Result<()> {
        let first = live.start / PAGE;
        self.inherited = self.inherited.min(first);
        let shared: Vec<_> = self.shared_from(live.start).collect();
        if shared.is_empty() {
            return Ok(());
        }
        let mut pages = self.pages[first..].to_vec();
        for (page, own) in shared.iter().zip(self.home.take(shared.len())?) {
            let [from, to] = [self.pages[*page].number, own.number].map(|number| number as usize * PAGE);
            let is_live = page * PAGE < live.end.max(live.start);
            for tensor in tensors.iter().filter(|_| is_live) {
                point_of_failure()?;
                tensor.slice_set(&tensor.narrow(2, from, PAGE)?.force_contiguous()?, 2, to)?;
            }
            pages[page - first] = own;
        }
        self.tell_gpu(first, &pages)?;
        self.pages.truncate(first);
        self.pages.extend(pages);
        Ok(())
    }
}
