//! Which files nobody can need any more.

use crate::record::{Named, epoch_name};
use units::MigrationId;

/// As many decided epochs stay, beside the current one, so that whoever asks late is told what was decided
/// then. More would only be history; fewer would bring removals nearer to those who still ask.
pub const KEPT_EPOCHS: u64 = 4;

/// What may go, in this order, once `names` were seen in one look at a VM's directory. `offering`: the offer
/// that its owner has just made, at this epoch: it settled all others of that epoch before it made this one.
///
/// Removing an offer only ever takes a possibility away: nobody can claim by it any more. Removing the file
/// of an epoch would free its name, so it goes only when this same look shows no offer by which that name
/// could be taken again: such an offer was there before the epoch's file was, so a look that shows the one
/// and not the other is younger than the offer's removal.
pub fn disposable(names: &[String], offering: Option<(u64, MigrationId)>) -> Vec<String> {
    let named: Vec<(&String, Named)> =
        names.iter().filter_map(|name| Some((name, Named::parse(name)?))).collect();
    let newest = named.iter().filter_map(|(_, named)| match named {
        Named::Epoch(epoch) => Some(*epoch),
        Named::Offer(..) => None,
    });
    let Some(newest) = newest.max() else { return vec![] };
    let dead = |epoch: u64, change: Option<MigrationId>| {
        epoch < newest || offering.is_some_and(|(at, id)| epoch == at && change != Some(id))
    };
    let offers = named.iter().filter_map(|(name, named)| match named {
        Named::Offer(epoch, change) if dead(*epoch, *change) => Some((*name).clone()),
        _ => None,
    });
    let first_offer = named.iter().filter_map(|(_, named)| match named {
        Named::Offer(epoch, _) => Some(*epoch),
        Named::Epoch(_) => None,
    });
    let first_offer = first_offer.min().unwrap_or(newest);
    let mut epochs: Vec<u64> = named
        .iter()
        .filter_map(|(_, named)| match named {
            Named::Epoch(epoch) if epoch + KEPT_EPOCHS <= newest && *epoch <= first_offer => Some(*epoch),
            _ => None,
        })
        .collect();
    epochs.sort_unstable();
    offers.chain(epochs.into_iter().map(epoch_name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{draft_name, offer_name};

    const ID: MigrationId = MigrationId(1);

    #[test]
    fn an_epoch_goes_only_once_no_offer_could_take_its_name_again() {
        let mut names: Vec<String> = (1..=9).map(epoch_name).collect();
        assert_eq!(disposable(&names, None), (1..=5).map(epoch_name).collect::<Vec<_>>());
        let old = offer_name(2, ID, "b");
        names.push(old.clone());
        // Epoch 3 is what that offer could take.
        assert_eq!(disposable(&names, None), [old, epoch_name(1), epoch_name(2)]);
    }

    #[test]
    fn current_offers_stay_unless_their_owner_made_another() {
        let other = MigrationId(2);
        let names =
            [epoch_name(3), offer_name(3, ID, "b"), offer_name(3, other, "c"), draft_name(3, 7)].to_vec();
        assert_eq!(disposable(&names, None), Vec::<String>::new());
        assert_eq!(disposable(&names, Some((3, ID))), [offer_name(3, other, "c"), draft_name(3, 7)]);
        // Seen late: somebody has gone on.
        let names = [names, vec![epoch_name(4)]].concat();
        assert_eq!(disposable(&names, None).len(), 3);
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let names = ["README", ".nfs000012", "epoch-1", "lost+found"].map(str::to_owned);
        assert_eq!(disposable(&names, None), Vec::<String>::new());
    }
}
