//! Whether two hosts have the same file: shown by the source, proven by the target, believed by nobody.
//!
//! Names, inodes and sizes look alike on hosts that share nothing. So the source does something to the very
//! file that its QEMU has open, and the target looks for it at the very descriptor that its QEMU will get:
//!
//! - **Locks**: the source locks bytes far beyond the file's end, at places that both derive from a secret of
//!   this migration. The target finds exactly these locked. Leaves nothing behind; works wherever hosts see
//!   each other's locks (NFS 4, CephFS, OCFS2, one kernel), also in directories that nobody may write to. A
//!   disk that the guest writes is locked for writing, which shows that the source may write it.
//! - **A token**: a file beside the image, by a name and with a content derived from the secret. For file
//!   systems whose locks may hold on one host only.
//! - **Content**, for what the guest only reads: a digest, under a key derived from the secret. The source
//!   need not share the file then, but must know what is in it.
//!
//! The secret travels in `Prepare`, under TLS. What is derived from it also depends on the source's name and
//! the migration's id: who is told of a proof cannot pass it on as his own.

mod content;
mod locks;
mod mounts;
mod nbd;
pub(crate) mod servers;
mod token;

pub(crate) use content::digest as content_of;
pub use token::sweep;

use crate::{
    random,
    recipe::{Recipe, Role, SeenFile, backing_of, files::Opened},
};
use mounts::Ways;
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, fmt, fs::File, io, os::unix::ffi::OsStrExt, path::Path};

/// 256 random bits that the source drew for one migration, in hexadecimal.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    fn draw() -> io::Result<Self> {
        let mut text = String::new();
        for _ in 0..4 {
            text.push_str(&format!("{:016x}", random::number()?));
        }
        Ok(Self(text))
    }

    fn key(&self) -> Result<[u8; 32], String> {
        let key = blake3::Hash::from_hex(&self.0);
        key.map(|hash| *hash.as_bytes()).map_err(|_| "the secret of the source's proofs is none".to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What proofs hang on: good for one migration from one host only.
struct Terms<'a> {
    key: [u8; 32],
    from: &'a str,
    migration: &'a str,
}

impl Terms<'_> {
    /// Bytes without end that only the two hosts of this migration know.
    fn derive(&self, what: &str, path: &Path, more: &[u8]) -> blake3::OutputReader {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        for part in [
            what.as_bytes(),
            self.from.as_bytes(),
            self.migration.as_bytes(),
            path.as_os_str().as_bytes(),
            more,
        ] {
            // Its length first: no two lists of parts look alike.
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        hasher.finalize_xof()
    }

    /// 256 of them, in hexadecimal.
    fn word(&self, what: &str, path: &Path, more: &[u8]) -> String {
        let mut bytes = [0; 32];
        self.derive(what, path, more).fill(&mut bytes);
        blake3::Hash::from_bytes(bytes).to_hex().to_string()
    }
}

/// Files as they are shown to another host, for as long as this lives.
#[derive(Debug)]
pub struct Shown {
    /// The recipe for the other host. It holds the secret.
    pub recipe: Recipe,
    _locked: Vec<File>,
    _tokens: Vec<token::Token>,
}

/// Opens a file of a VM as its QEMU has it open; for writing if that is said.
pub type Open<'a> = &'a dyn Fn(&SeenFile, bool) -> Result<File, String>;

/// Shows the files of a VM to the target of this migration, which comes from the host `from`. Every reason
/// why it cannot.
pub fn show(recipe: &Recipe, from: &str, migration: &str, open: Open<'_>) -> Result<Shown, Vec<String>> {
    let one = |why: String| vec![why];
    let secret = Secret::draw().map_err(|error| one(format!("cannot draw random numbers: {error}")))?;
    let terms = Terms { key: secret.key().map_err(one)?, from, migration };
    let only_read = recipe.only_read();
    let mut shown = Shown { recipe: recipe.clone(), _locked: vec![], _tokens: vec![] };
    shown.recipe.proof = Some(secret);
    let mut reasons = Vec::new();
    // One that is used twice is shown once.
    let mut before = HashMap::new();
    for file in &mut shown.recipe.files {
        if let Some(digest) = before.get(&(file.path.clone(), file.role)) {
            (file.device, file.inode, file.digest) = (0, 0, Clone::clone(digest));
            continue;
        }
        let shows = match file.role {
            Role::Boot => boot_file(&terms, file),
            Role::Disk | Role::Backing => {
                let writes = file.role == Role::Disk && !only_read.contains(&*file.path.to_string_lossy());
                image(&terms, file, writes, open, &mut shown._locked, &mut shown._tokens)
            }
        };
        if let Err(why) = shows {
            reasons.push(why);
        }
        // What they are here is nobody's business there.
        (file.device, file.inode) = (0, 0);
        before.insert((file.path.clone(), file.role), file.digest.clone());
    }
    if reasons.is_empty() { Ok(shown) } else { Err(reasons) }
}

fn boot_file(terms: &Terms<'_>, file: &mut SeenFile) -> Result<(), String> {
    let digest = match file.digest.take().filter(|digest| content::is_digest(digest)) {
        Some(digest) => digest,
        // Recorded by an earlier version.
        None => {
            let opened = Opened::open(&file.path, Role::Boot, true)?;
            content_of(&opened.file).map_err(|error| said(file, &error))?
        }
    };
    file.digest = Some(content::sealed(terms, &file.path, &digest));
    Ok(())
}

fn image(
    terms: &Terms<'_>,
    file: &mut SeenFile,
    writes: bool,
    open: Open<'_>,
    locked: &mut Vec<File>,
    tokens: &mut Vec<token::Token>,
) -> Result<(), String> {
    let opened = open(file, writes)?;
    let mut ways = mounts::ways(&opened, writes).unwrap_or(Ways { token: true, content: true });
    file.digest = None;
    let mut lacks = match locks::hold(terms, file, &opened, writes) {
        Ok(()) => None,
        Err(error) => Some(format!("its file system does not lock it ({error})")),
    };
    if ways.token {
        match token::Token::leave(terms, file, &opened) {
            Ok(token) => {
                tokens.push(token);
                lacks = None;
            }
            Err(error) => {
                tracing::info!(file = %file.path.display(), %error, "no token can be left beside it");
                ways.content = true;
            }
        }
    }
    if ways.content && file.role == Role::Disk && !writes && backing_of(&opened, &file.path)?.is_none() {
        let digest = content_of(&opened).map_err(|error| said(file, &error))?;
        file.digest = Some(content::sealed(terms, &file.path, &digest));
        lacks = None;
    }
    locked.push(opened);
    match lacks {
        None => Ok(()),
        Some(why) => Err(format!(
            "{} {}: {why}, so it cannot be shown to another host; mount it with locks (NFS without nolock)",
            file.role.word(),
            file.path.display()
        )),
    }
}

fn said(file: &SeenFile, error: &io::Error) -> String {
    format!("{} {}: {error}", file.role.word(), file.path.display())
}

/// Proves that an opened file is the one that the source has; or says, for this host only, why it is not.
pub(crate) fn prove(
    recipe: &Recipe,
    from: &str,
    migration: &str,
    seen: &SeenFile,
    here: &Opened,
) -> Result<(), String> {
    let secret = recipe.proof.as_ref().ok_or("the source shows no proof of what it has")?;
    let terms = Terms { key: secret.key()?, from, migration };
    let same_content = || match &seen.digest {
        None => Err("its content was not told".to_owned()),
        Some(_) if seen.bytes != here.file.metadata().map_or(u64::MAX, |metadata| metadata.len()) => {
            Err("it has another size".to_owned())
        }
        Some(told) => match content_of(&here.file) {
            Ok(digest) if content::sealed(&terms, &seen.path, &digest) == *told => Ok(()),
            Ok(_) => Err("its content differs".to_owned()),
            Err(error) => Err(format!("its content cannot be read: {error}")),
        },
    };
    if seen.role == Role::Boot {
        return same_content();
    }
    let no_locks = match locks::are_held(&terms, seen, &here.file, !here.read_only) {
        Ok(()) => return Ok(()),
        Err(why) => why,
    };
    let no_token = match token::is_left(&terms, here) {
        Ok(()) => return Ok(()),
        Err(why) => why,
    };
    let other = if seen.role == Role::Disk && here.read_only && backing_of(&here.file, &here.path)?.is_none()
    {
        match same_content() {
            Ok(()) => return Ok(()),
            Err(why) => format!("; {why}"),
        }
    } else {
        String::new()
    };
    Err(format!("{no_locks}; {no_token}{other}"))
}
