//! What both sides' drivers do alike: they tell their machine what has happened, and put down what it wants
//! done.

use crate::printed::Printed;
use proto::{Source, SourceEffect, SourceEvent, Target, TargetEffect, TargetEvent};
use std::collections::VecDeque;

/// A side of the protocol.
pub(crate) trait Machine {
    /// What it has seen.
    type Event;
    /// What it wants done.
    type Act;

    /// What must be done about an event.
    fn see(&mut self, event: Self::Event) -> Vec<Self::Act>;

    /// An act failed.
    fn broke(what: String, why: String) -> Self::Event;
}

/// Whoever does what a machine wants done.
pub(crate) trait Driver {
    /// Its machine.
    type Machine: Machine;

    /// The machine, if there is one, and the acts that are still to be done.
    #[expect(clippy::type_complexity, reason = "two fields of the same struct")]
    fn machine(
        &mut self,
    ) -> (Option<&mut Self::Machine>, &mut VecDeque<Printed<<Self::Machine as Machine>::Act>>);

    /// What was begun is not gone on with.
    fn stop_here(&mut self);

    /// Something happened.
    fn event(&mut self, event: <Self::Machine as Machine>::Event) {
        let (machine, todo) = self.machine();
        if let Some(machine) = machine {
            todo.extend(machine.see(event).into_iter().map(Printed));
        }
    }

    /// An act failed.
    fn broke(&mut self, what: &str) {
        self.stop_here();
        self.event(Self::Machine::broke(what.into(), "chance".into()));
    }
}

impl Machine for Source {
    type Event = SourceEvent;
    type Act = SourceEffect;

    fn see(&mut self, event: SourceEvent) -> Vec<SourceEffect> {
        self.handle(event)
    }

    fn broke(what: String, why: String) -> SourceEvent {
        SourceEvent::Broke { what, why }
    }
}

impl Machine for Target {
    type Event = TargetEvent;
    type Act = TargetEffect;

    fn see(&mut self, event: TargetEvent) -> Vec<TargetEffect> {
        self.handle(event)
    }

    fn broke(what: String, why: String) -> TargetEvent {
        TargetEvent::Broke { what, why }
    }
}
