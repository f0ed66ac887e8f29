//! How an agent's connections are protected: told loudly when they are not, and when a certificate nears its
//! end.

use crate::config::Config;
use pki::{Identity, Instant, PkiError, Security};
use std::{io, sync::Arc};
use tracing::{info, warn};

/// Why an agent cannot have protected connections, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    /// Nothing was set up yet.
    #[error("this host has no certificate yet: {cause}")]
    Missing {
        /// Which file is not there.
        #[source]
        cause: PkiError,
    },
    /// What was set up cannot be used.
    #[error(transparent)]
    Unusable(PkiError),
    /// The certificate is another host's.
    #[error("this host is called {name}, but its certificate {path} is for {names}")]
    OtherName {
        /// The host's name.
        name: String,
        /// The certificate.
        path: String,
        /// Whose it is.
        names: String,
    },
}

impl SecurityError {
    /// What to do next.
    pub fn next(&self, name: &str) -> String {
        match self {
            Self::Missing { .. } => format!(
                "make the workgroup's CA once (whimbrel pki init), a certificate for this host (whimbrel pki \
                 issue {name}), and put its three files where [tls] or --tls says; on a network that nobody \
                 else can reach, --insecure-plaintext on all hosts does without"
            ),
            Self::Unusable(_) => {
                "whimbrel pki show DIR says what is in these files and whether they fit".to_owned()
            }
            Self::OtherName { .. } => {
                format!("issue one for it (whimbrel pki issue {name}), or start the agent with --name")
            }
        }
    }
}

/// What the configuration says, loaded and checked.
pub fn security(config: &Config) -> Result<Security, SecurityError> {
    let Some(files) = &config.tls else {
        warn!(
            "INSECURE: connections are in plaintext (--insecure-plaintext). Whoever reaches {} can take VMs, \
             give VMs, and read and change guests' memory on its way",
            config.listen
        );
        return Ok(Security::Plaintext);
    };
    let identity = Identity::load(files).map_err(|cause| match &cause {
        PkiError::File { cause: io, .. } if io.kind() == io::ErrorKind::NotFound => {
            SecurityError::Missing { cause }
        }
        _ => SecurityError::Unusable(cause),
    })?;
    let card = &identity.card;
    if !identity.is(&config.name) {
        let (name, path, names) =
            (config.name.clone(), card.path.display().to_string(), card.names.join(", "));
        return Err(SecurityError::OtherName { name, path, names });
    }
    if let Some(warning) = identity.warning(Instant::now()) {
        warn!("{warning}");
    }
    info!(workgroup = card.workgroup, until = %card.until, "connections are protected by TLS");
    Ok(Security::Tls(Arc::new(identity)))
}
