//! Starting a QEMU process.

use super::{Belongings, LOOK, LaunchError, START, kill};
use crate::{
    account::Account,
    apart,
    confine::{
        self, Confinement,
        pin::{Pin, Use},
        program::Program,
        view::{self, View},
    },
    granted::Grants,
    host::{Host, fits_socket},
    ports,
    qmp::{Qmp, QmpError},
    random,
    recipe::{
        self, Backing, ChardevKind, Paths, Recipe, Role,
        chain::Chains,
        files::{Identity, Opened},
    },
    tap, tpm, vhost,
};
use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt, fchown},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use sys::{mounts::named_socket, process::PidFd};

/// By what a process is found that was told to listen somewhere and does not do so yet: it has this in its
/// environment.
pub(super) const MARK: &str = "WHIMBREL_QMP";

/// A QEMU process that answers.
pub(crate) struct Started {
    pub(crate) qmp: Qmp,
    pub(crate) process: PidFd,
    pub(crate) belongings: Belongings,
    /// What it may have open.
    pub(crate) grants: Grants,
}

/// Starts QEMU after a recipe, with these files, or with what their names lead to now. When it fails, nothing
/// stays behind.
pub(crate) fn start(
    recipe: &Recipe,
    host: &Host,
    incoming: bool,
    opened: Option<&[Opened]>,
) -> Result<Started, LaunchError> {
    let vm = recipe.name.clone();
    let unusable = |reasons| LaunchError::Unusable { vm: vm.clone(), reasons };
    let wrong = recipe::check(recipe);
    if !wrong.is_empty() {
        return Err(unusable(wrong));
    }
    let program = host.program().map_err(|why| unusable(vec![why]))?;
    let account = Account::choose(host.user.as_deref()).map_err(|why| unusable(vec![why]))?;
    let hindrances = confine::hindrances(recipe, &account);
    if !hindrances.is_empty() {
        return Err(unusable(hindrances));
    }
    let here;
    let opened = match opened {
        Some(opened) => opened,
        // Who runs QEMU as the agent's user lets it open its files itself.
        None if account.ids().is_none() => &[],
        None => {
            here = open(recipe).map_err(unusable)?;
            &here
        }
    };
    let mut belongings = Belongings::default();
    let pinned = account.ids().is_some();
    let chains = chains(recipe, opened);
    let mut files = identities(recipe, opened);
    let mut workers = false;
    let started = prepare(recipe, host, &account, &mut belongings).and_then(|made| {
        let own = made.files.iter().map(|(_, _, file)| file).chain(&made.shared_memory);
        let own = own.filter_map(|file| file.metadata().ok());
        files.extend(own.map(|metadata| Identity::of(&metadata)));
        workers = made.paths.vhost;
        let made = Made { paths: Paths { chains, ..made.paths }, ..made };
        Start { recipe, host, program, account, opened, incoming }.spawn(made, &belongings)
    });
    match started {
        Ok((mut qmp, process)) => {
            files.extend(belongings.log.iter().filter_map(|log| Identity::at(log).ok()));
            let mut grants = Grants::of(recipe, &belongings, files, workers);
            grants.pinned = pinned;
            if let Err(error) = ports::settle(&mut belongings.ports, &mut qmp) {
                tracing::warn!(vm, %error, "it is not known what its character devices are here");
            }
            if !host.second {
                belongings.take_names();
            }
            Ok(Started { qmp, process, belongings, grants })
        }
        Err(error) => {
            belongings.remove_all();
            Err(error)
        }
    }
}

/// Which files the VM's are: those that were opened for it, or those that QEMU finds by their names.
fn identities(recipe: &Recipe, opened: &[Opened]) -> Vec<Identity> {
    if opened.is_empty() {
        return recipe.files.iter().filter_map(|file| Identity::at(&file.path).ok()).collect();
    }
    opened.iter().map(|file| file.identity).collect()
}

/// What the VM's images lie on, as they say it now: QEMU is told.
fn chains(recipe: &Recipe, opened: &[Opened]) -> Chains {
    let images = recipe.files.iter().filter(|file| file.role == Role::Disk).map(|file| file.path.as_path());
    let open = |path: &Path| match opened.iter().find(|file| file.path == path) {
        Some(opened) => opened.file.try_clone().ok(),
        None if opened.is_empty() => File::open(path).ok(),
        None => None,
    };
    recipe::chain::of(images, open)
}

/// The recipe's files, by what their names lead to now.
pub(crate) fn open(recipe: &Recipe) -> Result<Vec<Opened>, Vec<String>> {
    let only_read = recipe.only_read();
    let (mut all, mut reasons) = (Vec::new(), Vec::new());
    for file in &recipe.files {
        let read_only = file.role != Role::Disk || only_read.contains(&*file.path.to_string_lossy());
        match Opened::open(&file.path, file.role, read_only) {
            Ok(opened) => all.push(opened),
            Err(why) => reasons.push(why),
        }
    }
    if reasons.is_empty() { Ok(all) } else { Err(reasons) }
}

/// What was made for a QEMU that is not there yet.
struct Made {
    paths: Paths,
    /// The socket that it is to listen at.
    monitor: OwnedFd,
    /// The ends of the channel to its TPM: swtpm's, and its own.
    channel: Option<(OwnedFd, OwnedFd)>,
    /// What its secrets are.
    secrets: Vec<OwnedFd>,
    /// Memory that exists already and that it maps, by the descriptors that it inherits.
    shared_memory: Vec<File>,
    /// Files of this host: the console, memory.
    files: Vec<(&'static str, PathBuf, File)>,
}

/// Makes all that the process needs, noting each thing in `belongings` as soon as it exists. What it opens by
/// a name belongs to its user.
fn prepare(
    recipe: &Recipe,
    host: &Host,
    account: &Account,
    belongings: &mut Belongings,
) -> Result<Made, LaunchError> {
    let vm = &recipe.name;
    let user = account.ids();
    let system = |what: String, cause| LaunchError::System { vm: vm.clone(), what, cause };
    let unusable = |why| LaunchError::Unusable { vm: vm.clone(), reasons: vec![why] };
    let give = |file: &File| match user {
        Some(ids) => fchown(file, Some(ids.user), Some(ids.group)),
        None => Ok(()),
    };

    let folder = host.runtime.display();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&host.runtime)
        .map_err(|cause| system(format!("make the directory {folder}"), cause))?;
    let random = random::number().map_err(|cause| system("draw a random number".to_owned(), cause))?;
    let tagged = format!("{vm}-{:08x}", random & 0xffff_ffff);

    let mut paths = Paths { qmp: host.in_runtime(&tagged, "qmp"), ..Paths::default() };
    let mut files = Vec::new();
    if !fits_socket(&paths.qmp) {
        return Err(unusable(format!("the socket path {} is too long for Linux", paths.qmp.display())));
    }
    belongings.owner = host.owner.clone();
    belongings.qmp = paths.qmp.clone();
    belongings.log = Some(host.in_runtime(&tagged, "log"));
    belongings.ports = ports::plan(recipe, host, &tagged).map_err(unusable)?;
    let console = belongings.ports.iter().find(|port| port.id == recipe::CONSOLE_ID);
    belongings.console = console.and_then(|port| port.log.clone());
    ports::tell(&belongings.ports, &mut paths);
    let logs = ports::make_logs(&belongings.ports).and_then(|logs| {
        logs.iter()
            .try_for_each(|(path, file)| give(file).map_err(|error| (path.clone(), error)))
            .map(|()| logs)
    });
    let logs = logs.map_err(|(path, cause)| system(format!("make the console {}", path.display()), cause))?;
    files.extend(logs.into_iter().map(|(path, file)| ("console", path, file)));
    let write_down = |belongings: &Belongings| {
        belongings.write_down().map_err(|cause| system("write down what is made".to_owned(), cause))
    };
    paths.sockets = host.sockets(&tagged);
    belongings.sockets = Some(paths.sockets.clone());
    write_down(belongings)?;
    let made = DirBuilder::new().mode(0o700).create(&paths.sockets);
    let made = made.and_then(|()| File::open(&paths.sockets)).and_then(|folder| give(&folder));
    made.map_err(|cause| system(format!("make the directory {}", paths.sockets.display()), cause))?;
    let monitor = named_socket(&paths.qmp);
    let monitor =
        monitor.map_err(|cause| system(format!("make the socket {}", paths.qmp.display()), cause))?;
    paths.monitor = Some(monitor.as_raw_fd());
    let mut channel = None;
    if recipe.tpm.is_some() {
        let folder = tpm::folder(host, &tagged);
        belongings.tpm = Some(folder.clone());
        write_down(belongings)?;
        let made = tpm::make(&folder, account).and_then(|()| tpm::channel());
        let ends = made.map_err(|cause| system(format!("make the directory {}", folder.display()), cause))?;
        paths.tpm = Some(ends.1.as_raw_fd());
        channel = Some(ends);
    }
    let mut shared_memory = Vec::new();
    for block in &recipe.memory {
        let failed = |path: &Path| {
            let what = format!("make the memory file {}", path.display());
            |cause| system(what, cause)
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        if let Some(path) = host.shared_memory.get(&block.id) {
            let file = options.open(path).map_err(failed(path))?;
            // QEMU would lengthen it, and map less than all of a longer one.
            let bytes = file.metadata().map_err(failed(path))?.len();
            if bytes != block.bytes {
                let (id, wanted) = (&block.id, block.bytes);
                return Err(unusable(format!(
                    "the memory that is to be its RAM block {id} has {bytes} bytes, not {wanted}"
                )));
            }
            if path.starts_with("/proc") {
                // A memfd has no name that QEMU could open.
                let inherited = format!("/proc/self/fd/{}", file.as_raw_fd());
                paths.memory.insert(block.id.clone(), inherited.into());
                shared_memory.push(file);
            } else {
                paths.memory.insert(block.id.clone(), path.clone());
                files.push(("memory file", path.clone(), file));
            }
        } else if block.backing == Backing::File {
            let path = host.memory.join(format!("whimbrel-{tagged}-{}", block.id));
            belongings.memory.push(path.clone());
            write_down(belongings)?;
            let file = options.create_new(true).open(&path);
            let made =
                file.and_then(|file| file.set_len(block.bytes).and_then(|()| give(&file)).map(|()| file));
            let file = made.map_err(failed(&path))?;
            paths.memory.insert(block.id.clone(), path.clone());
            files.push(("memory file", path, file));
        }
    }
    for net in &recipe.nets {
        let tap = tap::name(vm).map_err(|cause| system("draw a random number".to_owned(), cause))?;
        belongings.taps.push(tap.clone());
        write_down(belongings)?;
        tap::create(&tap, net, user.map(|ids| ids.user)).map_err(|error| unusable(error.to_string()))?;
        paths.taps.insert(net.id.clone(), tap);
    }
    paths.vhost = vhost::gives(recipe);
    let mut secrets = Vec::new();
    for secret in &recipe.secrets {
        let content = secret.content.as_ref().and_then(recipe::Hidden::bytes).ok_or_else(|| {
            unusable(format!(
                "the secret {} of a disk did not come with the VM; update the source's Whimbrel",
                secret.id
            ))
        })?;
        let made = sys::sealed::memory("secret", &content);
        let made = made.map_err(|cause| system("make memory for a secret".to_owned(), cause))?;
        paths.secrets.insert(secret.id.clone(), made.as_raw_fd());
        secrets.push(made);
    }
    Ok(Made { paths, monitor, channel, secrets, shared_memory, files })
}

/// A QEMU that is about to be started.
struct Start<'a> {
    recipe: &'a Recipe,
    host: &'a Host,
    program: PathBuf,
    account: Account,
    opened: &'a [Opened],
    incoming: bool,
}

impl Start<'_> {
    fn system(&self, what: impl Into<String>, cause: io::Error) -> LaunchError {
        LaunchError::System { vm: self.recipe.name.clone(), what: what.into(), cause }
    }

    fn unusable(&self, why: String) -> LaunchError {
        LaunchError::Unusable { vm: self.recipe.name.clone(), reasons: vec![why] }
    }

    fn spawn(self, made: Made, belongings: &Belongings) -> Result<(Qmp, PidFd), LaunchError> {
        let Made { paths, monitor, channel, secrets, shared_memory, files } = made;
        let log = self.log(belongings)?;
        let mut inherits = vec![monitor];
        inherits.extend(secrets);
        inherits.extend(shared_memory.into_iter().map(OwnedFd::from));
        if let Some((end, qemus)) = channel {
            self.begin_tpm(end, &log, belongings)?;
            inherits.push(qemus);
        }
        let installed = self.account.ids().map(|_| Program::open(&self.program)).transpose();
        let installed = installed.map_err(|cause| self.system("open QEMU's program", cause))?;
        let view = self.view(installed.as_ref(), &files, &paths);
        let view = view.map_err(|cause| self.system("look at a file", cause))?;
        let command = self.command(&paths, inherits, log, &belongings.qmp)?;
        // A view of its own is a thread's, and its children's.
        let child = thread::scope(|scope| {
            let begin = || {
                if let Some(view) = &view {
                    view.enter().map_err(|why| self.unusable(why))?;
                }
                self.begin(command)
            };
            let thread = thread::Builder::new().name("launch".into()).spawn_scoped(scope, begin);
            let thread = thread.map_err(|cause| self.system("start a thread", cause))?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        let process = PidFd::open(child.id().cast_signed());
        let process = process.map_err(|cause| self.system("hold the QEMU process", cause))?;
        reap(child);
        // Its socket is named after it.
        apart::settle(&process, &belongings.qmp.file_stem().unwrap_or_default().to_string_lossy());
        let qmp = self.wait(&process, belongings)?;
        if let Some(view) = &view {
            let files: Vec<_> = view.pins.iter().map(|pin| (pin.path.clone(), pin.file)).collect();
            let lost = view::replaced(&process.proc_path("root"), &files);
            if let Some(path) = lost.first() {
                kill(&process);
                return Err(self.unusable(format!("{} was replaced just now; try again", path.display())));
            }
        }
        Ok((qmp, process))
    }

    /// Starts its TPM, which ends when QEMU does, or never begins.
    fn begin_tpm(&self, end: OwnedFd, log: &File, belongings: &Belongings) -> Result<(), LaunchError> {
        let (Some(tpm), Some(folder)) = (&self.recipe.tpm, &belongings.tpm) else { return Ok(()) };
        let program = tpm::program().map_err(|why| self.unusable(why))?;
        let log = log.try_clone().map_err(|cause| self.system("duplicate a descriptor", cause))?;
        let agents = vec![self.host.owner.clone(), self.host.runtime.clone()];
        let start = tpm::Start { program: &program, tpm, account: &self.account, folder, agents, log };
        let child = start.spawn(end).map_err(|why| self.unusable(why))?;
        let process = PidFd::open(child.id().cast_signed());
        let process = process.map_err(|cause| self.system("hold the swtpm process", cause))?;
        reap(child);
        let name = belongings.qmp.file_stem().unwrap_or_default().to_string_lossy();
        apart::settle(&process, &format!("{name}-tpm"));
        Ok(())
    }

    /// What QEMU sees, where it runs as a user of its own.
    fn view<'b>(
        &'b self,
        program: Option<&'b Program>,
        files: &'b [(&'static str, PathBuf, File)],
        paths: &Paths,
    ) -> io::Result<Option<View<'b>>> {
        let (Account::User { name, ids }, Some(program)) = (&self.account, program) else { return Ok(None) };
        let mut pins = confine::pins(self.opened);
        for (word, path, file) in files {
            pins.push(Pin { word, path: path.clone(), real: path.canonicalize()?, file, how: Use::Write });
        }
        pins.extend(program.pin());
        // Of one file in two roles, what may do more is on top.
        pins.sort_by_key(|pin| pin.how);
        let limits = &self.host.limits;
        let disks = limits.disks.iter().map(|path| (path.clone(), true));
        let boot =
            limits.boot.iter().filter(|path| !limits.disks.contains(path)).map(|path| (path.clone(), false));
        let beside = program.beside(*ids)?.into_iter().map(|path| (path, false));
        let mut devices = Vec::new();
        if self.recipe.accel == recipe::Accel::Kvm {
            devices.push("kvm");
        }
        if !self.recipe.nets.is_empty() {
            devices.push("net/tun");
        }
        if paths.vhost {
            devices.push(vhost::NODE);
        }
        Ok(Some(View {
            user: *ids,
            name,
            agents: vec![self.host.owner.clone(), self.host.runtime.clone()],
            shown: disks.chain(boot).chain(beside).chain([(paths.sockets.clone(), true)]).collect(),
            pins,
            devices,
            terminals: self.recipe.all_chardevs().any(|device| device.kind == ChardevKind::Pty),
        }))
    }

    /// What it prints.
    fn log(&self, belongings: &Belongings) -> Result<File, LaunchError> {
        let log = belongings.log.as_deref().unwrap_or(Path::new("/dev/null"));
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(log);
        file.map_err(|cause| self.system(format!("make the log {}", log.display()), cause))
    }

    fn command(
        &self,
        paths: &Paths,
        inherits: Vec<OwnedFd>,
        log: File,
        qmp: &Path,
    ) -> Result<Command, LaunchError> {
        let again = log.try_clone().map_err(|cause| self.system("duplicate a descriptor", cause))?;
        // Its name may be a link in a directory that QEMU does not see.
        let mut command = Command::new(self.program.canonicalize().unwrap_or_else(|_| self.program.clone()));
        command
            .args(self.recipe.argv(paths, self.incoming))
            // Not ours, of which it may see nothing.
            .current_dir("/")
            // A sound card without a back end would look for the host's (QEMU 7).
            .env("QEMU_AUDIO_DRV", "none")
            .env(MARK, qmp)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(again);
        let confined = Confinement::of(&self.program, &self.account, self.recipe);
        confined.give(&mut command, inherits);
        Ok(command)
    }

    fn begin(&self, mut command: Command) -> Result<Child, LaunchError> {
        let child = command.spawn().map_err(|cause| {
            let program = Path::new(command.get_program()).display();
            self.system(format!("run {program} as the user {}", self.account.name()), cause)
        })?;
        tracing::debug!(pid = child.id(), user = self.account.name(), ?command, "started QEMU");
        Ok(child)
    }

    fn wait(&self, process: &PidFd, belongings: &Belongings) -> Result<Qmp, LaunchError> {
        let ended = || LaunchError::Ended {
            vm: self.recipe.name.clone(),
            words: belongings.last_words().unwrap_or_else(|| "nothing, and ended".to_owned()),
        };
        let end = Instant::now() + START;
        loop {
            let gone = process.wait(LOOK).map_err(|cause| self.system("wait for QEMU", cause))?;
            if gone {
                return Err(ended());
            }
            let left = end.saturating_duration_since(Instant::now());
            match Qmp::connect_within(&belongings.qmp, left) {
                Ok(qmp) => return Ok(qmp),
                Err(QmpError::Connect { .. }) if !left.is_zero() => {}
                Err(cause) => {
                    // Its socket may have broken because it is just ending: then its words are the better
                    // answer.
                    if process.wait(Duration::from_millis(500)).unwrap_or(false) {
                        return Err(ended());
                    }
                    kill(process);
                    return Err(LaunchError::Silent { vm: self.recipe.name.clone(), cause });
                }
            }
        }
    }
}

/// Waits for the child in the background, so that it never stays as a zombie. It is collected only once it
/// has ended: while one of our threads borrows one of its threads, waiting for it would swallow the stops
/// that the borrower waits for (`ptrace(2)`: a tracer's `wait` sees them whatever it asked for).
fn reap(mut child: Child) {
    let pid = child.id();
    let reaper = thread::Builder::new().name(format!("reap-{pid}")).stack_size(64 << 10).spawn(move || {
        let ended = PidFd::open(pid.cast_signed()).and_then(|process| {
            while !process.wait(Duration::from_secs(3600))? {}
            child.wait()
        });
        tracing::debug!(pid, ?ended, "QEMU has ended");
    });
    if let Err(error) = reaper {
        tracing::warn!(pid, %error, "nobody will reap this QEMU process");
    }
}
