use rustls::pki_types::UnixTime;
use std::fmt;
use time::OffsetDateTime;

/// A second of universal time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Instant(pub i64);

/// The latest second that a certificate can name: the end of the year 9999.
const LAST: i64 = 253_402_300_799;

impl Instant {
    /// What this host's clock says.
    pub fn now() -> Self {
        UnixTime::now().into()
    }

    /// So many days later; never beyond what a certificate can name.
    pub fn plus_days(self, days: u32) -> Self {
        Self(self.0.saturating_add(i64::from(days) * 86_400).min(LAST))
    }

    /// So many whole days from `since` until this.
    pub fn days_since(self, since: Self) -> i64 {
        (self.0 - since.0).div_euclid(86_400)
    }

    pub(crate) fn date(self) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(self.0.clamp(0, LAST)).unwrap_or(OffsetDateTime::UNIX_EPOCH)
    }
}

impl From<UnixTime> for Instant {
    fn from(time: UnixTime) -> Self {
        Self(time.as_secs().min(LAST.unsigned_abs()).cast_signed())
    }
}

impl fmt::Display for Instant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let date = self.date();
        let (month, day) = (u8::from(date.month()), date.day());
        write!(f, "{}-{month:02}-{day:02} {:02}:{:02} UTC", date.year(), date.hour(), date.minute())
    }
}
