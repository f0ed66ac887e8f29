//! How fast this processor makes the tiny guest's loop without any KVM: what KVM's speed is compared with.

use std::{io, time::Duration};

/// The processor time that this thread has used so far.
pub(super) fn used() -> io::Result<Duration> {
    Ok(nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// Turns of the loop a second of processor time, natively.
pub(super) fn speed(turns: u64) -> io::Result<f64> {
    let began = used()?;
    let mut left = turns.max(1);
    // SAFETY: counts a register of ours down to zero; touches no memory and no stack.
    unsafe {
        std::arch::asm!("2:", "dec {left}", "jnz 2b", left = inout(reg) left, options(nomem, nostack));
    }
    let took = used()?.saturating_sub(began);
    // The result is used, so that the loop is made.
    Ok((turns.max(1) - left) as f64 / took.as_secs_f64().max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_takes_time_and_ends() {
        let fast = speed(1_000_000).unwrap();
        assert!(fast.is_finite() && fast > 1e6, "{fast}");
        assert!(speed(0).is_ok());
    }
}
