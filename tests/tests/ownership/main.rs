//! What every ownership record promises, whoever keeps it: the store of a target's agent, a directory, a
//! directory that loses answers and shows old things, etcd (I1).

mod child;
mod directory;
mod etcd;
mod places;
mod suite;

use lab::copy_dir;
use places::{Place, claim};
use ports::Claimed;

/// The suite over one back end.
macro_rules! every_promise {
    ($name:ident, $place:expr, $only:ident) => {
        mod $name {
            use super::*;

            suite::promises!($place,
                the_same_claim_asked_again_gets_the_same_answer
                i1_of_many_threads_exactly_one_side_wins
                a_stale_epoch_and_a_claim_that_nobody_offered_win_nothing
                a_claimer_that_is_killed_after_its_success_has_won
            );
            suite::$only!($place);
        }
    };
}

every_promise!(store, Some(Place::store()), nothing_more);
every_promise!(plain_directory, Some(Place::directory()), what_is_shared);
every_promise!(view, Place::view("ownership in a directory through FUSE"), what_is_shared);
every_promise!(cluster, Place::etcd("ownership in etcd"), what_is_shared);

/// What the target's agent forgot, nobody is told: the source stays in doubt until a person knows more.
#[test]
fn a_store_that_was_set_back_before_the_offer_decides_nothing() {
    let mut place = Place::store();
    let (state, backup) = (place.dir.path().join("state"), place.dir.path().join("backup"));
    place.close();
    copy_dir(&state, &backup).unwrap();
    place.open();
    let offer = place.offered("vm", 1);
    assert_eq!(place.record("b").claim(&claim(&offer, "b")).unwrap(), Claimed::Yours(offer.expected.next()));
    place.close();
    std::fs::remove_dir_all(&state).unwrap();
    copy_dir(&backup, &state).unwrap();
    place.open();
    for host in ["a", "b"] {
        let error = place.record(host).claim(&claim(&offer, host)).unwrap_err().to_string();
        assert!(error.contains("no ownership record"), "{error}");
    }
}
