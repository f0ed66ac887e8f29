//! `whimbrel pki`: a workgroup's CA, its hosts' certificates, and what is in them.

use crate::{
    trouble::{DONE, FAILED, Trouble, WRONG_USE},
    words::{json, table},
};
use ::pki::{Card, Made, PkiError, Shown};
use agent::config::TLS;
use clap::Subcommand;
use serde_json::{Value, json};
use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Where the CA is unless told otherwise.
const CA: &str = "/etc/whimbrel/ca";

/// Make a workgroup's certificates, and show what is in them.
///
/// Hosts of a workgroup know each other by certificates that one authority (CA) issued. The CA's key makes
/// hosts members: keep it on one machine, where nobody else is. A host needs three files: ca.crt, host.crt
/// and host.key. Certificates that another CA of yours issued do as well, if each is for the host's name and
/// may be used by servers and by clients.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples, for a workgroup of two hosts:
  whimbrel pki init --name lab                         once
  whimbrel pki issue hosta --address 10.0.0.1          for each host
  scp -r /etc/whimbrel/ca/hosts/hosta hosta:/etc/whimbrel/tls
  whimbrel pki show /etc/whimbrel/tls                  on each host: is it all right?")]
pub(crate) struct Pki {
    #[command(subcommand)]
    command: PkiCommand,
}

#[derive(Subcommand, Debug)]
enum PkiCommand {
    Init(Init),
    Issue(Issue),
    Show(ShowPki),
}

/// Make a workgroup's CA: ca.crt, which everybody may see, and ca.key, which nobody may.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  whimbrel pki init --name lab
  whimbrel pki init --name lab --dir ~/lab-ca")]
struct Init {
    /// Where to put them.
    #[arg(long, value_name = "DIR", default_value = CA)]
    dir: PathBuf,
    /// What the workgroup is called.
    #[arg(long, value_name = "WORKGROUP", default_value = "whimbrel")]
    name: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Make a host's certificate and key.
///
/// The certificate is for the host's name, as its agent's configuration and the other hosts' `[peers]` call
/// it, and for each --address. A host that is called by its address (`migrate --to 10.0.0.2:7471`) needs that
/// address in it. To renew one, issue another into a new directory, put its files in the place of the old
/// ones, and start the agent again: VMs run on meanwhile.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  whimbrel pki issue hosta
  whimbrel pki issue hosta --address 10.0.0.1 --address hosta.example.org --days 90
  whimbrel pki issue hosta --out /etc/whimbrel/tls     when the CA is on this host itself")]
struct Issue {
    /// The host's name.
    host: String,
    /// Where the CA is.
    #[arg(long, value_name = "DIR", default_value = CA)]
    dir: PathBuf,
    /// Where to put the three files [default: hosts/HOST in the CA's directory].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// How long it is valid; never longer than the CA.
    #[arg(long, value_name = "N", default_value_t = 365,
        value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
    /// An IP address or a further name by which other hosts call it; may be given several times.
    #[arg(long = "address", value_name = "IP|NAME")]
    addresses: Vec<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Say whose certificates these are, of which workgroup, how long they are valid, and whether they fit
/// together.
///
/// Ends with 1 if something is wrong with them.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  whimbrel pki show                                    this host's
  whimbrel pki show host.crt")]
struct ShowPki {
    /// A certificate, or a directory with ca.crt and host.crt in it.
    #[arg(value_name = "FILE|DIR", default_value = TLS)]
    path: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Pki {
    /// Whether programs read the output.
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            PkiCommand::Init(Init { json, .. })
            | PkiCommand::Issue(Issue { json, .. })
            | PkiCommand::Show(ShowPki { json, .. }) => *json,
        }
    }
}

pub(crate) fn pki(args: &Pki) -> Result<ExitCode, Trouble> {
    match &args.command {
        PkiCommand::Init(Init { dir, name, json }) => {
            let made = ::pki::init(dir, name).map_err(|error| trouble("cannot make a CA", error))?;
            let next = format!("whimbrel pki issue HOST{}, for each host", option("dir", dir, CA));
            tell_made(
                &made,
                *json,
                &format!("The CA of workgroup {name} is made. Its key makes hosts members: guard it."),
                &next,
            )
        }
        PkiCommand::Issue(Issue { host, dir, out, days, addresses, json }) => {
            let out = out.clone().unwrap_or_else(|| dir.join("hosts").join(host));
            let made = ::pki::issue(dir, host, addresses, *days, &out)
                .map_err(|error| trouble(format!("cannot issue a certificate for {host}"), error))?;
            let next = if out == Path::new(TLS) {
                "whimbrel agent".to_owned()
            } else {
                format!("put these files into {TLS} on {host}: scp -r {} {host}:{TLS}", out.display())
            };
            let head = format!("{host} is a member of workgroup {} with these.", made.card.workgroup);
            tell_made(&made, *json, &head, &next)
        }
        PkiCommand::Show(ShowPki { path, json }) => {
            let shown = ::pki::show(path).map_err(|error| {
                trouble(format!("cannot show {}", path.display()), error)
                    .next("whimbrel pki init makes a CA, whimbrel pki issue a host's certificate")
            })?;
            tell_shown(&shown, *json)?;
            Ok(ExitCode::from(if shown.bad.is_empty() { DONE } else { FAILED }))
        }
    }
}

fn trouble(what: impl Into<String>, error: PkiError) -> Trouble {
    let status = if matches!(error, PkiError::Unfit(_)) { WRONG_USE } else { FAILED };
    Trouble::local(status, what, error.to_string())
}

/// An option as it must be given again, unless it is left to its default.
fn option(name: &str, value: &Path, default: &str) -> String {
    if value == Path::new(default) { String::new() } else { format!(" --{name} {}", value.display()) }
}

fn tell_made(made: &Made, as_json: bool, head: &str, next: &str) -> Result<ExitCode, Trouble> {
    let words = if as_json {
        let mut value = of(&made.card);
        value["files"] = json!(made.files);
        json(&value) + "\n"
    } else {
        let files = made.files.iter().map(|file| vec!["  file".to_owned(), file.display().to_string()]);
        let rows: Vec<_> = rows(&made.card).into_iter().chain(files).collect();
        format!("{head}\n\n{}\nnext: {next}\n", table(&rows))
    };
    io::stdout().lock().write_all(words.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn tell_shown(shown: &Shown, as_json: bool) -> Result<(), Trouble> {
    let mut words = String::new();
    if as_json {
        let cards: Vec<Value> = shown.cards.iter().map(of).collect();
        words = json(&json!({ "certificates": cards, "good": shown.good, "bad": shown.bad })) + "\n";
    } else {
        for card in &shown.cards {
            words += &format!("{}\n{}\n", card.path.display(), table(&rows(card)));
        }
        words += &shown.good.iter().map(|good| format!("  ok     {good}\n")).collect::<String>();
        words += &shown.bad.iter().map(|bad| format!("  WRONG  {bad}\n")).collect::<String>();
    }
    io::stdout().lock().write_all(words.as_bytes())?;
    Ok(())
}

fn rows(card: &Card) -> Vec<Vec<String>> {
    let whose = if card.authority {
        format!("CA of workgroup {}", card.workgroup)
    } else {
        format!("host of workgroup {}", card.workgroup)
    };
    let mut rows = vec![("what", whose)];
    if !card.authority {
        rows.push(("for", card.names.join(", ")));
    }
    rows.push(("valid", format!("from {} until {}", card.from, card.until)));
    rows.push(("sha256", card.fingerprint.clone()));
    rows.into_iter().map(|(name, value)| vec![format!("  {name}"), value]).collect()
}

fn of(card: &Card) -> Value {
    json!({
        "path": card.path,
        "kind": if card.authority { "ca" } else { "host" },
        "workgroup": card.workgroup,
        "names": card.names,
        "valid_from": card.from.0,
        "valid_until": card.until.0,
        "sha256": card.fingerprint,
    })
}
