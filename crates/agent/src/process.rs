//! Which process is which: numbers are given again, start times are not.

use crate::store::Process;
use std::{fs, io};

impl Process {
    /// The process that has number `pid` now.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let unreadable =
            || io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat is not as expected"));
        // The second field is the program's name in parentheses, and may itself hold spaces and parentheses.
        let (_, fields) = stat.rsplit_once(')').ok_or_else(unreadable)?;
        let mut fields = fields.split_whitespace();
        let state = fields.next().ok_or_else(unreadable)?;
        if matches!(state, "Z" | "X") {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("process {pid} has ended")));
        }
        // Field 22 of the file is the twentieth after the name.
        let start_time = fields.nth(18).and_then(|field| field.parse().ok()).ok_or_else(unreadable)?;
        Ok(Self { pid, start_time })
    }

    /// Whether it still runs: the number belongs to a process that started when this one did.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_that_ended_is_not_alive_even_while_unreaped() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(process.is_alive());
        assert!(!Process { start_time: process.start_time + 1, ..process }.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
    }
}
