//! What may be said on the command line. The help teaches: what a command does, and how it is used.

mod agent; // of `whimbrel agent`
mod migrate; // of `migrate`, `plan`, `status` and `cancel`
mod vms; // of the commands about the VMs of this host

pub(crate) use agent::Agent;
pub(crate) use migrate::{Cancel, Migrate, PlanArgs, Status};
pub(crate) use vms::{Adopt, List, Resolve, Run, Show, Stop};

use crate::{doctor::Doctor, pki_command::Pki};
use clap::{Parser, Subcommand};
use std::path::PathBuf;

/// Moves running virtual machines between hosts, without the machine noticing.
///
/// Every host runs an agent; every other command talks to the agent of the host it is typed on.
#[derive(Parser, Debug)]
#[command(
    name = "whimbrel",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  whimbrel doctor                          can this host do it?
  whimbrel pki init                        make certificates, so that hosts know each other
  whimbrel agent --config agent.toml       be this host's agent
  whimbrel run web1.toml                   start a VM
  whimbrel plan web1 --to hostb            what would moving it take?
  whimbrel migrate web1 --to hostb         move it to another host
  whimbrel list                            what runs here

Exit status: 0 done · 1 failed, the VM still runs where it was · 2 wrong use · 3 in doubt who runs
the VM · 130 cancelled"
)]
pub(crate) struct Args {
    /// The agent's socket [default: /run/whimbrel/agent.sock].
    #[arg(long, global = true, value_name = "PATH", env = "WHIMBREL_SOCKET")]
    pub(crate) socket: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Say whether this host can migrate VMs, and how to mend what is missing.
    Doctor(Doctor),
    Pki(Pki),
    Agent(Agent),
    Run(Run),
    Adopt(Adopt),
    /// List the VMs of this host.
    List(List),
    /// Show one VM.
    Show(Show),
    Stop(Stop),
    Plan(PlanArgs),
    Migrate(Migrate),
    /// Show where a VM's migration stands, or how its last one ended.
    Status(Status),
    Cancel(Cancel),
    Resolve(Resolve),
    /// Started by an agent for each of its migrations.
    #[command(hide = true, name = host::watchdog::COMMAND)]
    Watchdog,
}

impl Command {
    /// Whether programs read the output.
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Doctor(doctor) => doctor.json,
            Self::Pki(pki) => pki.json(),
            Self::Agent(_) | Self::Watchdog => false,
            Self::Run(Run { json, .. })
            | Self::Adopt(Adopt { json, .. })
            | Self::List(List { json })
            | Self::Show(Show { json, .. })
            | Self::Stop(Stop { json, .. })
            | Self::Plan(PlanArgs { json, .. })
            | Self::Migrate(Migrate { json, .. })
            | Self::Status(Status { json, .. })
            | Self::Cancel(Cancel { json, .. })
            | Self::Resolve(Resolve { json, .. }) => *json,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Args::command().debug_assert();
    }
}
