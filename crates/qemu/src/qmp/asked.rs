//! Several questions at once.

use super::{Qmp, QmpError};
use serde_json::Value;
use std::{
    collections::VecDeque,
    io::Write,
    time::{Duration, Instant},
};

/// Commands that were written and whose answers were not read yet.
#[derive(Debug)]
pub(crate) struct Asked {
    commands: VecDeque<(u64, String)>,
    end: Instant,
    patience: Duration,
}

impl Asked {
    /// The answers that are not read yet may take this long from now on.
    pub(crate) fn within(mut self, patience: Duration) -> Self {
        (self.end, self.patience) = (Instant::now() + patience, patience);
        self
    }
}

impl Qmp {
    /// Runs several commands: all are written before the first answer is read, which saves a wait for each.
    /// What became of each, in their order; an error of the connection ends all.
    pub(crate) fn execute_all(
        &mut self,
        commands: &[(&str, Value)],
        patience: Duration,
    ) -> Result<Vec<Result<Value, QmpError>>, QmpError> {
        let mut asked = self.ask_all(commands, patience)?;
        commands.iter().map(|_| self.next_answer(&mut asked)).collect()
    }

    /// Writes several commands. Their answers are to be read one by one, all within this time; those that are
    /// not read are passed over by whoever asks next.
    pub(crate) fn ask_all(
        &mut self,
        commands: &[(&str, Value)],
        patience: Duration,
    ) -> Result<Asked, QmpError> {
        let mut lines = String::new();
        let first = self.next_id;
        for (command, arguments) in commands {
            self.unnamed.push_back(self.next_id);
            lines += &self.line(command, arguments, None);
        }
        let name = commands.first().map_or("", |(command, _)| command);
        let broken = |cause| QmpError::Broken { command: name.to_owned(), cause };
        let end = Instant::now() + patience;
        self.socket.set_write_timeout(Some(patience)).map_err(broken)?;
        self.socket.write_all(lines.as_bytes()).map_err(broken)?;
        let commands =
            (first..).zip(commands).map(|(id, (command, _))| (id, (*command).to_owned())).collect();
        Ok(Asked { commands, end, patience })
    }

    /// How many questions were asked so far.
    pub(crate) fn questions(&self) -> u64 {
        self.next_id
    }

    /// Whether what QEMU has said by now, as it was heard, answers the last of them.
    pub(crate) fn is_answered(&self, asked: &Asked) -> bool {
        let last = asked.commands.back().map(|(id, _)| *id);
        self.early.iter().any(|answer| answer["id"].as_u64() == last)
    }

    /// The answer to the first of them that was not read yet. The outer error is the connection's, the inner
    /// one QEMU's word.
    pub(crate) fn next_answer(&mut self, asked: &mut Asked) -> Result<Result<Value, QmpError>, QmpError> {
        match asked.commands.pop_front() {
            Some((id, command)) => self.answer(id, &command, asked.end, asked.patience),
            None => Err(self.strange("nothing", &Value::Null)),
        }
    }
}
