//! Of `whimbrel migrate`, `plan`, `status` and `cancel`.

use super::{
    values::{duration, patience, rate},
    words::{CompressArg, LimitArg, ModeArg, RobustArg},
};
use std::{path::PathBuf, time::Duration};
use units::Rate;

/// What a migration is to be like.
#[derive(clap::Args, Debug)]
pub(crate) struct How {
    /// The VM.
    pub(crate) vm: String,
    /// The host to move it to: a name from the agent's `[peers]`, or ADDR:PORT.
    #[arg(long, value_name = "HOST")]
    pub(crate) to: String,
    /// How memory travels.
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) mode: ModeArg,
    /// Let `auto` end in post-copy when pre-copy does not get there.
    #[arg(long)]
    pub(crate) allow_post_copy: bool,
    /// Let a host take it whose QEMU is older than the one that runs it. If that cannot read its device
    /// state, it stays here.
    #[arg(long)]
    pub(crate) allow_older_qemu: bool,
    /// The pause that is acceptable, like 20ms [default: 20ms].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) max_downtime: Option<Duration>,
    /// How long all of it may take, like 60s.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) max_time: Option<Duration>,
    /// A guest that writes faster than the link carries is slowed, so that pre-copy ends: whoever writes to
    /// one more page waits, but never longer than this at a time, like 5ms [default: 5ms].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) max_stall: Option<Duration>,
    /// Where not all of --max-downtime, --max-time and --max-stall can hold: which is kept first. The last
    /// one gives way first, and that is said before anything moves.
    #[arg(
        long,
        value_name = "PROMISES",
        value_enum,
        value_delimiter = ',',
        default_value = "downtime,time,stall"
    )]
    pub(crate) keep: Vec<LimitArg>,
    /// A directory on a datastore that both hosts reach: memory goes into a file there, too, while it goes
    /// over the network, so that the target can finish from it if this host is lost. With it, `auto` may end
    /// in post-copy [default: the agent's, if it has one].
    #[arg(long, value_name = "DIR")]
    pub(crate) spool: Option<PathBuf>,
    /// What must be in that file when the VM changes hands before all its memory is there [default: strict].
    #[arg(long, value_name = "HOW", value_enum)]
    pub(crate) robust: Option<RobustArg>,
    /// How long a link that was lost is waited for, with the VM running on here, like 60s; 0s ends the
    /// migration at once. Once the VM may run on the target it is waited for as long as it takes [default:
    /// 60s].
    #[arg(long, value_name = "TIME", value_parser = patience)]
    pub(crate) give_up: Option<Duration>,
    /// The most that may be put on the wire, like 1Gbit or 50MiB/s.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) bandwidth: Option<Rate>,
    /// How many data connections [default: from 2 to the number of cores, 8 at most: as many as it pays to
    /// use].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) streams: Option<u16>,
    /// What pages may be compressed with. `auto` finds out what moves most over this link.
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) compress: CompressArg,
    /// The most cores that may compress at a time [default: those that the VM leaves idle, at least 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) cpu: Option<u32>,
}

/// Say what a migration would take: how long, how much traffic, which pause, what the guest would feel.
///
/// Watches what the guest writes for a second, looks at some of its memory, and sends the target as much as
/// the link carries in a sixth of a second. Moves nothing and does not disturb the guest. Takes the options
/// of `migrate`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  whimbrel plan web1 --to hostb
  whimbrel plan web1 --to hostb --allow-post-copy --max-time 30s
  whimbrel plan web1 --to hostb --json | jq .takes")]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) how: How,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Move a running VM to another host.
///
/// Shows what happens while it happens, and ends with a report. Until the VM has switched over, whatever goes
/// wrong leaves it running here. Ctrl-C cancels.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  whimbrel migrate web1 --to hostb
  whimbrel migrate web1 --to 10.0.0.2:7471 --mode post-copy
  whimbrel migrate web1 --to hostb --max-downtime 10ms --bandwidth 1Gbit --verify
  whimbrel migrate web1 --to hostb --detach && whimbrel status web1 --follow
  whimbrel migrate web1 --to hostb --json | tail -n 1      # the report

With --json every line is an event (it has \"event\"), except the last one: the report.")]
pub(crate) struct Migrate {
    #[command(flatten)]
    pub(crate) how: How,
    /// Compare all memory of both sides while the VM is stopped: takes longer.
    #[arg(long)]
    pub(crate) verify: bool,
    /// Print events and the report, one JSON object a line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Return as soon as it has begun.
    #[arg(long)]
    pub(crate) detach: bool,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Status {
    /// The VM.
    pub(crate) vm: String,
    /// Watch it to its end. Ctrl-C ends the watching, not the migration.
    #[arg(long)]
    pub(crate) follow: bool,
    /// Print JSON: with --follow events and the report, without it the latest of them.
    #[arg(long)]
    pub(crate) json: bool,
}

/// End a VM's migration, and wait until the VM is as it was before.
#[derive(clap::Args, Debug)]
pub(crate) struct Cancel {
    /// The VM.
    pub(crate) vm: String,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
