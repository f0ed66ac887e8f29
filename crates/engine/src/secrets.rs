//! Random numbers of one migration.

use page::{Sealer, Sent};
use proto::Token;
use std::{fs::File, io, io::Read, sync::Arc};

/// A token for the connections of one migration.
pub(crate) fn draw_token() -> io::Result<Token> {
    let mut token = [0; Token::SIZE];
    File::open("/dev/urandom")?.read_exact(&mut token)?;
    Ok(Token(token))
}

/// Drawn anew for each migration.
#[derive(Default)]
pub(crate) struct Secrets {
    /// Never leaves this side: without it no guest can make two pages that look the same to us.
    prints: [u8; 32],
    /// Handed to the target: the key of what it verifies.
    pub(crate) seals: [u8; 32],
}

impl Secrets {
    pub(crate) fn draw() -> io::Result<Self> {
        let mut secrets = Self::default();
        let mut random = File::open("/dev/urandom")?;
        random.read_exact(&mut secrets.prints)?;
        random.read_exact(&mut secrets.seals)?;
        Ok(secrets)
    }

    /// What is known of a target to which nothing was sent yet.
    pub(crate) fn nothing_sent(&self, pages: &[u64], present: u64) -> Arc<Sent> {
        Arc::new(Sent::new(pages, present, &self.prints, Sealer::new(self.seals)))
    }
}
