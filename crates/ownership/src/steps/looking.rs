//! One look at who owns a VM.

use super::{Got, Op, Step, Steps, entry, newest, odd, read, unknown};
use crate::record::Entry;

/// Who owns the VM, as far as can be seen.
#[derive(Clone, Debug)]
pub struct Looking {
    vm: String,
    /// The newest entry that was read.
    found: Option<Entry>,
    at: LookAt,
}

#[derive(Clone, Debug)]
enum LookAt {
    List,
    /// Listed, so it must be there.
    Listed(u64),
    /// A listing may be old: is there a newer one?
    Beyond(u64),
}

impl Looking {
    /// At this VM.
    pub fn new(vm: &str) -> Self {
        Self { vm: vm.to_owned(), found: None, at: LookAt::List }
    }
}

impl Steps for Looking {
    type Outcome = Option<Entry>;

    fn begin(&mut self) -> Step<Option<Entry>> {
        Step::Do(Op::List)
    }

    fn next(&mut self, got: Got) -> Step<Option<Entry>> {
        match (self.at.clone(), got) {
            (LookAt::List, Got::Missing) => {
                self.at = LookAt::Beyond(1);
                read(1)
            }
            (LookAt::List, Got::Names(names)) => {
                let newest = newest(&names);
                self.at = newest.map_or(LookAt::Beyond(1), LookAt::Listed);
                read(newest.unwrap_or(1))
            }
            (LookAt::Listed(epoch) | LookAt::Beyond(epoch), Got::Content(content)) => {
                match entry(&content, &self.vm, epoch) {
                    Ok(entry) => self.found = Some(entry),
                    Err(error) => return Step::End(Err(error)),
                }
                self.at = LookAt::Beyond(epoch + 1);
                read(epoch + 1)
            }
            (LookAt::Beyond(_), Got::Missing) => Step::End(Ok(self.found.take())),
            (LookAt::Listed(epoch), Got::Missing) => {
                unknown(format!("epoch {epoch} of {} was listed, but cannot be read yet", self.vm))
            }
            (_, got) => odd(&got),
        }
    }
}
