//! Runs independent pieces of work in parallel, with results in the order of the pieces: the same bytes at any number
//! of threads.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Threads, divided among workers.
///
/// Each worker is a pool of its own, so that parallel iterators and products inside a piece of work use only the
/// threads of that worker: with as many workers as threads, each piece runs on one thread; a single worker leaves all
/// threads to the products.
pub struct Workers {
    /// Empty for a single worker, who works in the threads of the caller.
    pools: Vec<ThreadPool>,
}

impl Workers {
    /// As many workers as there are threads, but at most `limit`; threads that remain are divided evenly.
    ///
    /// # Errors
    /// The system refuses threads.
    pub fn new(limit: usize) -> Result<Self> {
        let n_threads = rayon::current_num_threads();
        let n_workers = limit.clamp(1, n_threads);
        if n_workers == 1 {
            return Ok(Self { pools: Vec::new() });
        }
        let pool = |i: usize| {
            let own = n_threads / n_workers + usize::from(i < n_threads % n_workers);
            ThreadPoolBuilder::new().num_threads(own).build().context("starting threads")
        };
        Ok(Self { pools: (0..n_workers).map(pool).collect::<Result<_>>()? })
    }

    /// Number of pieces that are worked on at once.
    pub fn count(&self) -> usize {
        self.pools.len().max(1)
    }

    /// Computes `work(i)` for `i` from 0 to `n`, several at once, and passes the results to `merge` in order, one at a
    /// time. At most twice [`Self::count`] pieces are in flight or wait for their turn.
    ///
    /// # Errors
    /// The first error, in order, of `work` or `merge`.
    pub fn in_order<T: Send>(
        &self,
        n: usize,
        work: impl Fn(usize) -> Result<T> + Sync,
        merge: impl FnMut(usize, T) -> Result<()> + Send,
    ) -> Result<()> {
        self.serve(n, 2 * self.count(), work, merge)
    }

    /// Computes `work(i)` for every index of `costs`, the most costly first, so that none is left for the end.
    ///
    /// # Errors
    /// The error of the most costly piece that fails.
    pub fn collect<T: Send>(&self, costs: &[u64], work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
        let mut order: Vec<usize> = (0..costs.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(costs[i]));
        let mut results: Vec<Option<T>> = costs.iter().map(|_| None).collect();
        let keep = |at: usize, result| {
            results[order[at]] = Some(result);
            Ok(())
        };
        self.serve(order.len(), order.len(), |at| work(order[at]), keep)?;
        Ok(results.into_iter().flatten().collect())
    }

    /// Hands out pieces, at most `ahead` before the first of them is merged.
    fn serve<T: Send>(
        &self,
        n: usize,
        ahead: usize,
        work: impl Fn(usize) -> Result<T> + Sync,
        mut merge: impl FnMut(usize, T) -> Result<()> + Send,
    ) -> Result<()> {
        if self.pools.is_empty() || n < 2 {
            return (0..n).try_for_each(|i| merge(i, work(i)?));
        }
        let queue = Queue { n, ahead, state: Mutex::default(), changed: Condvar::new() };
        let merge = Mutex::new(merge);
        std::thread::scope(|scope| {
            for pool in &self.pools {
                scope.spawn(|| pool.install(|| queue.serve(&work, &merge)));
            }
        });
        queue.lock().failed.take().map_or(Ok(()), Err)
    }
}

/// The pieces that are handed out and merged.
struct Queue<T> {
    n: usize,
    /// Pieces that may be handed out before the first of them is merged.
    ahead: usize,
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    /// The next piece to hand out, and the next to merge.
    next: usize,
    merged: usize,
    finished: BTreeMap<usize, Result<T>>,
    is_merging: bool,
    /// The first error; nothing is handed out after it.
    failed: Option<anyhow::Error>,
    has_panicked: bool,
}

impl<T> Default for State<T> {
    fn default() -> Self {
        Self { next: 0, merged: 0, finished: BTreeMap::new(), is_merging: false, failed: None, has_panicked: false }
    }
}

/// Wakes the other workers when one of them panics, so that none waits for its piece.
struct Watch<'q, T>(&'q Queue<T>);

impl<T> Drop for Watch<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().has_panicked = true;
            self.0.changed.notify_all();
        }
    }
}

impl<T> Queue<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece; `None` when nothing is left to do.
    fn take(&self) -> Option<usize> {
        let mut state = self.lock();
        while state.failed.is_none() && !state.has_panicked && state.next < self.n {
            if state.next < state.merged + self.ahead {
                state.next += 1;
                return Some(state.next - 1);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    fn serve<M: FnMut(usize, T) -> Result<()>>(&self, work: impl Fn(usize) -> Result<T>, merge: &Mutex<M>) {
        let _watch = Watch(self);
        while let Some(i) = self.take() {
            let result = work(i);
            self.lock().finished.insert(i, result);
            self.merge(merge);
        }
    }

    /// Merges the next results in order, unless another worker is doing so: that one will find the new result too.
    fn merge<M: FnMut(usize, T) -> Result<()>>(&self, merge: &Mutex<M>) {
        let mut state = self.lock();
        if state.is_merging {
            return;
        }
        loop {
            let i = state.merged;
            let Some(result) = state.finished.remove(&i) else { return };
            state.is_merging = true;
            drop(state);
            let mut merge = merge.lock().unwrap_or_else(PoisonError::into_inner);
            let merged = result.and_then(|result| merge(i, result));
            drop(merge);
            state = self.lock();
            state.is_merging = false;
            match merged {
                Ok(()) => state.merged += 1,
                Err(error) => {
                    state.failed.get_or_insert(error);
                }
            }
            self.changed.notify_all();
            if state.failed.is_some() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    fn with_threads<T: Send>(n: usize, f: impl FnOnce() -> T + Send) -> T {
        ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(f)
    }

    #[test]
    fn results_are_merged_in_order_whatever_finishes_first() {
        for n_threads in [1, 2, 5] {
            let mut seen = Vec::new();
            with_threads(n_threads, || {
                let workers = Workers::new(usize::MAX).unwrap();
                assert_eq!(workers.count(), n_threads);
                let work = |i: usize| {
                    std::thread::sleep(Duration::from_micros(((i * 7919) % 13) as u64 * 50));
                    Ok(i * i)
                };
                let merge = |i, square| {
                    seen.push((i, square));
                    Ok(())
                };
                workers.in_order(40, work, merge).unwrap();
            });
            assert_eq!(seen, (0..40).map(|i| (i, i * i)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn threads_are_divided_among_the_workers() {
        let counts = with_threads(7, || {
            let workers = Workers::new(3).unwrap();
            workers.pools.iter().map(ThreadPool::current_num_threads).collect::<Vec<_>>()
        });
        assert_eq!(counts, [3, 2, 2]);
    }

    #[test]
    fn the_first_error_in_order_ends_the_work() {
        let begun = AtomicUsize::new(0);
        let found = with_threads(4, || {
            let workers = Workers::new(usize::MAX).unwrap();
            let work = |i: usize| {
                begun.fetch_add(1, Ordering::Relaxed);
                // The later of the two failures happens first.
                std::thread::sleep(Duration::from_millis(if i == 5 { 20 } else { 0 }));
                anyhow::ensure!(i != 5 && i != 6, "piece {i}");
                Ok(i)
            };
            workers.in_order(1000, work, |i, _| if i == 40 { anyhow::bail!("merge") } else { Ok(()) })
        });
        assert_eq!(found.unwrap_err().to_string(), "piece 5");
        assert!(begun.into_inner() < 30);
    }

    #[test]
    fn few_results_wait_for_a_slow_first_one() {
        let (begun, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        with_threads(3, || {
            let workers = Workers::new(usize::MAX).unwrap();
            let work = |i: usize| {
                begun.fetch_add(1, Ordering::Relaxed);
                if i == 0 {
                    std::thread::sleep(Duration::from_millis(50));
                    most.store(begun.load(Ordering::Relaxed), Ordering::Relaxed);
                }
                Ok(())
            };
            workers.in_order(100, work, |_, ()| Ok(())).unwrap();
        });
        assert!(most.into_inner() <= 6);
    }

    #[test]
    fn a_panic_is_passed_on() {
        let panicked = std::panic::catch_unwind(|| {
            with_threads(2, || {
                let work = |i: usize| if i == 3 { panic!("piece 3") } else { Ok(()) };
                Workers::new(2).unwrap().in_order(50, work, |_, ()| Ok(()))
            })
        });
        assert!(panicked.is_err());
    }

    #[test]
    fn results_are_collected_by_index_and_the_costly_come_first() {
        let pool = ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        pool.install(|| {
            let workers = Workers::new(usize::MAX).unwrap();
            let costs: Vec<u64> = (0..50).map(|i| (i * 37) % 50).collect();
            let begun = AtomicUsize::new(0);
            let of = |i: usize| Ok((i, begun.fetch_add(1, Ordering::SeqCst)));
            let results = workers.collect(&costs, of).unwrap();
            assert!(results.iter().enumerate().all(|(i, result)| result.0 == i));
            // Three are handed out at once.
            assert!(results.iter().zip(&costs).all(|(result, &cost)| result.1.abs_diff(49 - cost as usize) < 6));
            let failing = |i: usize| if costs[i] < 10 { anyhow::bail!("{}", costs[i]) } else { Ok(()) };
            assert_eq!(workers.collect(&costs, failing).unwrap_err().to_string(), "9");
            assert!(workers.collect(&[], |_| Ok(())).unwrap().is_empty());
        });
    }
}
