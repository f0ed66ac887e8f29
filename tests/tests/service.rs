//! What ends an agent with all that it has started, as a service manager does, does not end its guests.

use lab::{Doing, Oddity, Result, Spec, Stage, VmFile, ensure, story, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const WORK: &str = "whimbrel.fill=16M,content=random whimbrel.check=16M,rate=2M";

/// A cgroup of version 2, as that of a service.
struct Service(PathBuf);

impl Service {
    /// None: there are no cgroups of version 2 here, or none may be made.
    fn new(name: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        let mount = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let at = fields.next()?;
            (fields.next()? == "cgroup2").then_some(at)
        });
        let at = Path::new(mount?).join(format!("whimbrel-test-{}", std::process::id())).join(name);
        fs::create_dir_all(&at).ok().map(|()| Self(at))
    }

    fn takes(&self, pid: u32) -> Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).doing("move the agent to a cgroup")
    }

    fn processes(&self) -> Result<Vec<i32>> {
        let all = fs::read_to_string(self.0.join("cgroup.procs")).doing("list a cgroup")?;
        Ok(all.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// `KillMode=control-group`.
    fn ends(&self) -> Result<()> {
        for pid in self.processes()? {
            kill_process(Pid::from_raw(pid).doing("name a process")?, Signal::KILL).doing("end a process")?;
        }
        wait_for("the end of the service", Duration::from_secs(20), || {
            Ok(self.processes()?.is_empty().then_some(()))
        })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let above = self.0.parent().unwrap_or(&self.0);
        for folder in [above.join("whimbrel-guests"), above.to_owned()] {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(entry.path());
            }
        }
        let _ = fs::remove_dir(above);
    }
}

#[test]
fn i3_the_end_of_an_agents_service_ends_no_guest() {
    story("a service's end", &["a", "b"], |lab, tools| {
        let Some(service) = Service::new("agent.service") else {
            lab::skip("a service's end", &"no cgroups of version 2 can be made here");
            return Ok(());
        };
        let mut stage = Stage::with(lab, tools, |_| Oddity {
            // `ip netns exec` hides what the host has mounted there.
            prelude: "mount -t cgroup2 none /sys/fs/cgroup || true".to_owned(),
            ..Oddity::default()
        })?;
        service.takes(stage.agent_mut("a").process()?.pid())?;
        let guest = stage.run("a", &VmFile::new("web", Spec::new(96, WORK)))?;
        let agent = stage.agent_mut("a").process()?.pid().cast_signed();
        ensure!(service.processes()? == [agent], "nothing but the agent: {:?}", service.processes()?);

        // In the middle of a migration: its watchdog lives, too.
        let slowly = ["--mode", "pre-copy", "--bandwidth", "8M"];
        let mut migration = stage.start_migration("web", "a", "b", &slowly)?;
        migration.until_moving("pre-copy")?;
        service.ends()?;
        drop(migration);
        guest.runs()?;
        guest.verify()?;
        stage.agent_mut("a").crash()?;
        stage.agent_mut("a").begin()?;
        stage.runs_only_on("web", "a")?;
        stage.migrate("web", &guest, "a", "b", &["--mode", "pre-copy"]).map(drop)?;
        stage.agent("b").cli().json(&["stop", "web"]).map(drop)
    });
}
