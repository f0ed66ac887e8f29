//! `whimbrel agent`.

use crate::{
    args::Agent,
    trouble::{FAILED, Trouble, WRONG_USE},
};
use agent::config::{Config, Flags};
use host::{Kvm, Mover, QemuHost};
use std::{path::PathBuf, process::ExitCode, sync::Arc};
use sys::kvm::KvmError;

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
    // By running a tiny guest: the device file alone proves nothing.
    let qemu = QemuHost::new(&config, || match sys::kvm::measure() {
        Ok(ran) => Ok(Some(Kvm { speed: ran.speed() as u64, usable: ran.usable() })),
        Err(KvmError::Absent) => Ok(None),
        Err(error) => Err(error.to_string()),
    });
    let mover = qemu.clone();
    let record = host::shared_record(&config)
        .map_err(|error| Trouble::local(FAILED, cannot, format!("the ownership record: {error}")))?;
    agent::run(config, Arc::new(qemu), record, |context| Arc::new(Mover::new(context, mover, security)))
        .map_err(|error| Trouble::local(FAILED, cannot, error.to_string()))?;
    Ok(ExitCode::SUCCESS)
}
