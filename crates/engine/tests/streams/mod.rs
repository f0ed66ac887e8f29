//! One of several connections is lost: it alone is opened again (I2, I5).

use super::*;
use std::sync::atomic::AtomicBool;

/// Slowly enough that most of the memory is still to come when a stream is cut.
fn wish(mode: Mode) -> MigrateOptions {
    MigrateOptions { compress: Compression::None, bandwidth: Some(Rate(20 << 20)), ..options(mode) }
}

fn pages(ram: &Ram) -> usize {
    ram.content().iter().map(|block| block.len()).sum()
}

#[test]
fn i2_i5_a_lost_stream_is_opened_again_while_others_go_on() {
    for (mode, stream, at) in [
        (Mode::PreCopy, 1, 200 << 10),
        (Mode::PreCopy, 0, 6 << 20),
        (Mode::PostCopy, 0, 200 << 10),
        (Mode::PostCopy, 1, 6 << 20),
        (Mode::Hybrid, 1, 3 << 20),
    ] {
        println!("{mode:?}, stream {stream} is cut after {at} bytes");
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        source.guest(1);
        let cable = Cable::to(listen(&inn));
        let (cutter, from, to) = (cable.clone(), source.ram.clone(), inn.ram.clone());
        let (report, events) = source.migrate(cable.address, wish(mode), move |_| {
            thread::spawn(move || {
                wait_until("the first pages", || cutter.passed.load(SeqCst) > at);
                cutter.held.store(true, SeqCst);
                let before = cutter.cut_stream(stream);
                if mode == Mode::PreCopy {
                    // Some of these are there, and some were on their way.
                    (0..3000).step_by(7).for_each(|page| from.guest_writes(0, page, 0));
                }
                // It wants to be opened again, and cannot be, while the others bring two megabytes.
                wait_until("another connection", || cutter.connections(stream) > before);
                let there = pages(&to);
                wait_until("pages of the other stream", || pages(&to) > there + 500);
                cutter.held.store(false, SeqCst);
            });
        });
        assert_eq!(report.outcome, Outcome::Completed, "{mode:?} {:?}", report.error);
        assert_eq!((report.verified, inn.ram.overwritten()), (Some(true), 0), "{mode:?}: I5");
        assert_eq!(inn.ram.content(), source.ram.content(), "{mode:?}: I2");
        let said =
            |word: &str| events.iter().any(|e| matches!(e, Event::Note { text } if text.contains(word)));
        assert!(said("opened again; the others went on") && !said("reconnecting"), "{mode:?}: {events:?}");
    }
}

/// Connections of streams end at any time, in the switchover, too.
#[test]
fn i1_i2_i3_streams_that_end_at_any_point_cost_no_page() {
    let mut mended = 0;
    for mode in [Mode::PreCopy, Mode::Hybrid, Mode::PostCopy] {
        for part in 0..6 {
            let (source, inn) = (Source::new(), Inn::new(&PAGES));
            source.guest(1);
            let cable = Cable::to(listen(&inn));
            let cutter = cable.clone();
            let over = Arc::new(AtomicBool::new(false));
            let ended = over.clone();
            let wish = MigrateOptions { bandwidth: Some(Rate(100 << 20)), ..wish(mode) };
            let (report, events) = source.migrate(cable.address, wish, move |_| {
                thread::spawn(move || {
                    let mut at = (1 << 20) + (part << 18);
                    while !ended.load(SeqCst) {
                        if cutter.passed.load(SeqCst) > at {
                            at += 3 << 20;
                            cutter.cut_stream((at >> 18) as u16 % 2);
                        }
                        thread::sleep(Duration::from_micros(100));
                    }
                });
            });
            over.store(true, SeqCst);
            let story = format!("{mode:?} {part}: {report:?}");
            assert_eq!(report.outcome, Outcome::Completed, "{story}");
            assert_eq!((report.verified, inn.ram.overwritten()), (Some(true), 0), "{story}");
            assert_eq!(inn.ram.content(), source.ram.content(), "{story}");
            let again = |e: &&Event| matches!(e, Event::Note { text } if text.contains("the others went on"));
            mended += events.iter().filter(again).count();
        }
    }
    assert!(mended > 18, "only {mended} streams were mended");
}
