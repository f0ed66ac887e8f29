use cap::Cap;
use std::alloc::System;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// What a target may take at a time, in bytes. Inputs are of some KiB: what is compressed in them may unpack
/// to 255 times as much, and a stream lands through buffers of a few batches; a number in them that is
/// believed without being looked at asks for far more.
pub(crate) const SHARE: usize = 64 << 20;

/// Runs `body`. Should it want more memory than that, it gets none, which ends the process.
pub(crate) fn within<T>(bytes: usize, body: impl FnOnce() -> T) -> T {
    /// Takes the limit back, also when `body` panics.
    struct Unlimited;
    impl Drop for Unlimited {
        fn drop(&mut self) {
            let _ = ALLOCATOR.set_limit(usize::MAX);
        }
    }
    let _unlimited = Unlimited;
    // Fails only where other threads took memory meanwhile: then this run has no limit.
    let _ = ALLOCATOR.set_limit(ALLOCATOR.allocated().saturating_add(bytes));
    body()
}
