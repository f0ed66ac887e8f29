//! `whimbrel agent`.

use crate::{
    args::Agent,
    trouble::{FAILED, Trouble, WRONG_USE},
};
use agent::config::{Config, Flags};
use host::{Mover, QemuHost};
use std::{path::PathBuf, process::ExitCode, sync::Arc};

/// Is the agent until it is told to end.
pub(crate) fn agent(args: Agent, socket: Option<PathBuf>) -> Result<ExitCode, Trouble> {
    let flags = Flags {
        name: args.name,
        state_dir: args.state_dir,
        runtime_dir: args.runtime_dir,
        socket,
        listen: args.listen,
        qemu: args.qemu,
        tracker: args.tracker,
        group: args.group,
        tls: args.tls,
        insecure_plaintext: args.insecure_plaintext,
        peers: args.peers,
    };
    let cannot = "the agent cannot start";
    let config = Config::load(args.config.as_deref(), flags)
        .map_err(|error| Trouble::local(WRONG_USE, cannot, error.to_string()))?;
    agent::log::begin(args.log_format);
    let security = agent::security::security(&config)
        .map_err(|error| Trouble::local(FAILED, cannot, error.to_string()).next(error.next(&config.name)))?;
    // Found out once and for all by running a tiny guest: the device file alone proves nothing.
    let kvm = sys::kvm::measure().is_ok_and(|ran| ran.usable());
    let qemu = QemuHost::new(&config, kvm);
    let mover = qemu.clone();
    agent::run(config, Arc::new(qemu), |context| Arc::new(Mover::new(context, mover, security)))
        .map_err(|error| Trouble::local(FAILED, cannot, error.to_string()))?;
    Ok(ExitCode::SUCCESS)
}
