use rayon::ThreadPoolBuilder;

/// Makes this thread the only one of rayon's pool: tensors are small, and no work is handed over.
pub fn this_thread() {
    ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global().unwrap();
}
