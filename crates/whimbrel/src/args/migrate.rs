//! Of `whimbrel migrate`, `plan`, `status` and `cancel`.

use api::MigrateOptions;

/// What a migration is to be like.
#[derive(clap::Args, Debug)]
pub(crate) struct How {
    /// The VM.
    pub(crate) vm: String,
    #[command(flatten)]
    pub(crate) options: MigrateOptions,
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
