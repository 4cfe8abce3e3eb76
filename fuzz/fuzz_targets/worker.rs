use rayon::ThreadPoolBuilder;

/// Makes this thread the only one of rayon's pool: handing work over takes longer than the work on small tensors.
pub fn this_thread() {
    ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global().unwrap();
}
