//! What one side does while the guest stands still, and when, by its own clock.

use crate::conn::now_ns;

/// Steps that are kept, at most: a pause has some twenty. Before it, holes for what will be missing may be
/// announced often.
pub(crate) const MAX_STEPS: usize = 64;

/// The steps of a pause. `P` names them.
#[derive(Debug)]
pub(crate) struct PauseLog<P> {
    open: Vec<(P, u64)>,
    steps: Vec<Timed<P>>,
}

/// A step, in nanoseconds of [`now_ns`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Timed<P> {
    pub(crate) part: P,
    pub(crate) began: u64,
    pub(crate) ended: u64,
}

impl<P> Default for PauseLog<P> {
    fn default() -> Self {
        Self { open: Vec::new(), steps: Vec::new() }
    }
}

impl<P: Copy + PartialEq> PauseLog<P> {
    /// Another pause begins, or this one came to nothing.
    pub(crate) fn clear(&mut self) {
        self.open.clear();
        self.steps.clear();
    }

    /// This begins now.
    pub(crate) fn begin(&mut self, part: P) {
        self.open.retain(|(open, _)| *open != part);
        self.open.push((part, now_ns()));
    }

    /// It is over, if it was under way.
    pub(crate) fn end(&mut self, part: P) {
        if let Some(at) = self.open.iter().position(|(open, _)| *open == part) {
            let (_, began) = self.open.swap_remove(at);
            self.add(part, began, now_ns());
        }
    }

    /// It is over only now, although it was said before that it is.
    pub(crate) fn end_later(&mut self, part: P) {
        self.end(part);
        if let Some(step) = self.steps.iter_mut().rfind(|step| step.part == part) {
            step.ended = now_ns();
        }
    }

    /// It was done then.
    pub(crate) fn add(&mut self, part: P, began: u64, ended: u64) {
        if self.steps.len() >= MAX_STEPS {
            self.steps.remove(0);
        }
        self.steps.push(Timed { part, began, ended });
    }

    /// This happened now. Only the last time counts.
    pub(crate) fn mark(&mut self, part: P) {
        let now = now_ns();
        self.steps.retain(|step| step.part != part);
        self.add(part, now, now);
    }

    /// All of them.
    pub(crate) fn steps(&self) -> &[Timed<P>] {
        &self.steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_bounded_and_end_once() {
        let mut log = PauseLog::default();
        log.end('a');
        assert_eq!(log.steps(), []);
        log.begin('a');
        log.end('a');
        log.end('a');
        let [first] = log.steps()[..] else { panic!("{log:?}") };
        log.end_later('a');
        let [later] = log.steps()[..] else { panic!("{log:?}") };
        assert!(later.began == first.began && later.ended >= first.ended);
        log.mark('b');
        log.mark('b');
        assert_eq!(log.steps().len(), 2);
        (0..200).for_each(|n| log.add('c', n, n));
        assert_eq!(log.steps().len(), MAX_STEPS);
        assert_eq!(log.steps().last(), Some(&Timed { part: 'c', began: 199, ended: 199 }));
    }
}
