/// While the link is not full nobody knows how fast it is: believed to be so much faster with each window,
/// the more so the longer it was not full. If it then turns out to be no faster than this part of what was
/// believed, that was in vain.
const HOPE: f64 = 0.02;
const HOPE_GROWS: f64 = 1.2;
const MOST_HOPE: f64 = 1.0;
const VAIN: f64 = 0.7;

/// How fast a link is, as far as was seen. Rates are bytes a nanosecond.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    rate: Option<f64>,
    /// How long it was observed, in nanoseconds; no more than a long window.
    age: f64,
    /// By which part it is believed to be faster with each window in which it was not full.
    hope: f64,
    /// Halved whenever that was in vain.
    caution: f64,
}

/// What one window shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkWindow {
    /// What it carried.
    pub(crate) rate: f64,
    /// Whether it always had something to carry.
    pub(crate) full: bool,
    /// How long the window was, in nanoseconds, and how long windows usually are.
    pub(crate) took: f64,
    pub(crate) usual: f64,
    /// Whether something else than usual was tried in it.
    pub(crate) trial: bool,
}

impl Link {
    pub(crate) fn new() -> Self {
        Self { rate: None, age: 0.0, hope: HOPE, caution: 1.0 }
    }

    /// `None` before it was seen.
    pub(crate) fn rate(&self) -> Option<f64> {
        self.rate
    }

    pub(crate) fn see(&mut self, seen: &LinkWindow) {
        let LinkWindow { rate, full, took, usual, trial } = *seen;
        // A short window says less than a long one, once there were longer ones.
        let news = took / (self.age + took);
        self.age = (self.age + took).min(usual);
        let believed = self.rate;
        self.rate = Some(match believed {
            None => rate,
            // A trial only shows what is possible.
            Some(known) if trial => known.max(rate),
            // Even if it was not full: what a bucket or a buffer saved up is soon used up.
            Some(known) if full || rate > known => known + news * (rate - known),
            Some(known) => known * (1.0 + self.hope),
        });
        if full && believed.is_some_and(|known| rate < known * VAIN) {
            self.caution *= 0.5;
        }
        self.hope = if full { HOPE * self.caution } else { (self.hope * HOPE_GROWS).min(MOST_HOPE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(rate: f64, full: bool) -> LinkWindow {
        LinkWindow { rate, full, took: 40.0, usual: 40.0, trial: false }
    }

    #[test]
    fn a_burst_is_forgotten() {
        let mut link = Link::new();
        assert_eq!(link.rate(), None);
        link.see(&LinkWindow { took: 1.0, ..window(10.0, true) });
        assert_eq!(link.rate(), Some(10.0));
        link.see(&window(1.0, true));
        assert!(link.rate().unwrap() < 1.3, "{link:?}");
        link.see(&LinkWindow { took: 4.0, ..window(10.0, false) });
        assert!(link.rate().unwrap() < 2.2, "a short window says less than the long one before it: {link:?}");
    }

    #[test]
    fn what_is_not_full_may_be_faster_but_hope_gets_cautious() {
        let mut link = Link::new();
        link.see(&window(1.0, true));
        let windows_to_double = |link: &mut Link| {
            let before = link.rate().unwrap();
            let n = (1..).find(|_| {
                link.see(&window(0.5, false));
                link.rate().unwrap() > before * 2.0
            });
            // It was in vain.
            (0..20).for_each(|_| link.see(&window(1.0, true)));
            assert!((0.99..1.01).contains(&link.rate().unwrap()));
            n.unwrap()
        };
        let waits: Vec<i32> = (0..4).map(|_| windows_to_double(&mut link)).collect();
        assert!(waits.is_sorted() && waits[3] > waits[0] + 5, "{waits:?}");
    }

    #[test]
    fn a_trial_shows_only_what_is_possible() {
        let mut link = Link::new();
        link.see(&window(1.0, true));
        link.see(&LinkWindow { trial: true, ..window(0.2, true) });
        assert_eq!(link.rate(), Some(1.0));
        link.see(&LinkWindow { trial: true, ..window(3.0, true) });
        assert_eq!(link.rate(), Some(3.0));
    }
}
