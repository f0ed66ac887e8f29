//! Random numbers of one migration.

use page::{Sent, Tagger};
use proto::Token;
use std::{io, sync::Arc};

/// A token for the connections of one migration.
pub(crate) fn draw_token() -> io::Result<Token> {
    random().map(Token)
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::getrandom(&mut bytes)?;
    Ok(bytes)
}

/// Drawn anew for each migration.
#[derive(Default)]
pub(crate) struct Secrets {
    /// Never leaves this side: without it no guest can make two pages that look the same to us.
    fingerprints: [u8; 32],
    /// Handed to the target: the key of what it verifies.
    pub(crate) tags: [u8; 32],
    /// Handed to the target: the key of what goes into files on a datastore.
    pub(crate) spool: [u8; 32],
}

impl Secrets {
    pub(crate) fn draw() -> io::Result<Self> {
        Ok(Self { fingerprints: random()?, tags: random()?, spool: random()? })
    }

    /// What is known of a target to which nothing was sent yet. Unless it is `blank`, it has content of other
    /// connections, of which nothing is known: some of it may have been lost.
    pub(crate) fn nothing_sent(&self, pages: &[u64], present: u64, blank: bool) -> Arc<Sent> {
        let sent = Sent::new(pages, present, &self.fingerprints, Tagger::new(self.tags));
        Arc::new(if blank { sent } else { sent.to_a_target_with_content() })
    }
}
