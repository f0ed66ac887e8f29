//! What an agent says to its watchdog, a byte a word.

use ports::RunState;

/// A word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Word {
    /// The agent gets on, and so do its threads that the guest may wait for. Answered with itself.
    Beat,
    /// From now on writers may have to wait for the agent.
    Waits,
    /// They do not.
    Free,
    /// The pause is ours. Before the journal says so, and before `stop`.
    Pausing,
    /// The same, of a guest that somebody had stopped before: it stays so.
    PausingStopped,
    /// When the fence is durable, before the authorization is sent.
    Fenced,
    /// When the journal says that the guest is back.
    Back,
}

const ALL: [(Word, u8); 7] = [
    (Word::Beat, b'.'),
    (Word::Waits, b'w'),
    (Word::Free, b'f'),
    (Word::Pausing, b'p'),
    (Word::PausingStopped, b's'),
    (Word::Fenced, b'x'),
    (Word::Back, b'b'),
];

impl Word {
    pub(super) fn byte(self) -> u8 {
        ALL.iter().find(|(word, _)| *word == self).map_or(b'?', |(_, byte)| *byte)
    }

    fn of(byte: u8) -> Option<Self> {
        ALL.iter().find(|(_, known)| *known == byte).map(|(word, _)| *word)
    }
}

/// What the words so far come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Told {
    waits: bool,
    pause: Option<Word>,
}

impl Default for Told {
    /// An agent that says nothing else borrows a thread of QEMU just now, or is about to slow its guest.
    fn default() -> Self {
        Self { waits: true, pause: None }
    }
}

impl Told {
    /// One word more. What is none is left out.
    pub(super) fn hear(&mut self, byte: u8) -> Option<Word> {
        let word = Word::of(byte)?;
        match word {
            Word::Beat => {}
            Word::Waits => self.waits = true,
            Word::Free => self.waits = false,
            Word::Pausing | Word::PausingStopped | Word::Fenced | Word::Back => {
                self.pause = Some(word);
            }
        }
        Some(word)
    }

    /// Whether the guest stands still if the agent does, and may run on without it. After the fence only
    /// the record decides (I1).
    pub(super) fn needs_the_agent(&self) -> bool {
        match self.pause {
            Some(Word::Fenced) => false,
            Some(Word::Pausing | Word::PausingStopped) => true,
            _ => self.waits,
        }
    }

    /// The state that the guest is to have again when the agent is dead; none where that is not the
    /// watchdog's to give.
    pub(super) fn restores(&self) -> Option<RunState> {
        match self.pause {
            Some(Word::Pausing) => Some(RunState::Running),
            Some(Word::PausingStopped) => Some(RunState::Paused),
            _ => None,
        }
    }

    /// Whether only the record decides.
    pub(super) fn is_fenced(&self) -> bool {
        self.pause == Some(Word::Fenced)
    }

    /// What another watchdog has to be told.
    pub(super) fn again(&self) -> Vec<u8> {
        let waits = if self.waits { Word::Waits } else { Word::Free };
        [waits].into_iter().chain(self.pause).map(Word::byte).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i1_the_words_say_who_needs_the_agent_and_who_runs_without_it() {
        let table = [
            ("", true, None),
            ("f", false, None),
            ("f.w", true, None),
            ("fp", true, Some(RunState::Running)),
            ("wp", true, Some(RunState::Running)),
            ("fs", true, Some(RunState::Paused)),
            ("fps", true, Some(RunState::Paused)),
            ("fsx", false, None),
            ("fpx", false, None),
            ("wpx", false, None),
            ("wpb", true, None),
            ("fpb", false, None),
            ("fsb", false, None),
            ("fpbp.?", true, Some(RunState::Running)),
        ];
        for (words, needs, restores) in table {
            let mut told = Told::default();
            words.bytes().for_each(|byte| assert!(told.hear(byte).is_some() == (byte != b'?')));
            assert_eq!((told.needs_the_agent(), told.restores()), (needs, restores), "{words}");
            let mut other = Told::default();
            told.again().into_iter().for_each(|byte| assert!(other.hear(byte).is_some()));
            assert_eq!(other, told, "{words}");
        }
    }
}
