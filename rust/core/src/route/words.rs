//! Routes as integers, to be broadcast.

use super::{Key, PassKind, Route, Stop};
use crate::error::PlanError;
use crate::ids::{BucketId, UnitId};

impl PassKind {
    /// Its number in rows and routes.
    pub const fn code(self) -> i64 {
        match self {
            Self::Forward => 1,
            Self::Backward => 2,
            Self::LocalBackward => 3,
            Self::Evaluation => 4,
        }
    }

    /// The kind with this number.
    pub const fn of(code: i64) -> Option<Self> {
        match code {
            1 => Some(Self::Forward),
            2 => Some(Self::Backward),
            3 => Some(Self::LocalBackward),
            4 => Some(Self::Evaluation),
            _ => None,
        }
    }
}

impl Key {
    pub(crate) const fn word(self) -> i64 {
        self.0.cast_signed()
    }

    pub(crate) const fn of(word: i64) -> Self {
        Self(word.cast_unsigned())
    }
}

impl Route {
    /// The route as integers: kind, key, whether a pass followed and which, then stops and fills,
    /// every list behind its length.
    pub fn words(&self) -> Vec<i64> {
        let then = self.then.map_or([0, 0], |key| [1, key.word()]);
        let mut words = vec![self.kind.code(), self.key.word(), then[0], then[1]];
        words.push(length(self.stops.len()));
        for stop in &self.stops {
            for units in [&stop.units, &stop.held] {
                words.push(length(units.len()));
                words.extend(units.iter().map(|unit| i64::from(unit.0)));
            }
        }
        words.push(length(self.fills.len()));
        for &(bucket, stop) in &self.fills {
            words.extend([i64::from(bucket.0), i64::from(stop)]);
        }
        words
    }

    /// The route that [`Route::words`] wrote.
    ///
    /// # Errors
    /// [`PlanError::BadRoute`] for anything else.
    pub fn from_words(words: &[i64]) -> Result<Self, PlanError> {
        Reader(words).route().ok_or(PlanError::BadRoute)
    }
}

fn length(length: usize) -> i64 {
    i64::try_from(length).unwrap_or(i64::MAX)
}

/// What is left to read.
struct Reader<'a>(&'a [i64]);

impl Reader<'_> {
    fn route(mut self) -> Option<Route> {
        let kind = PassKind::of(self.word()?)?;
        let key = Key::of(self.word()?);
        let then = match (self.word()?, Key::of(self.word()?)) {
            (0, _) => None,
            (_, key) => Some(key),
        };
        let mut stops = Vec::new();
        for _ in 0..self.length()? {
            stops.push(Stop { units: self.units()?, held: self.units()? });
        }
        let mut fills = Vec::new();
        for _ in 0..self.length()? {
            fills.push((BucketId(self.id()?), self.id()?));
        }
        self.0.is_empty().then_some(Route { kind, key, then, stops, fills })
    }

    fn word(&mut self) -> Option<i64> {
        let (&word, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(word)
    }

    /// A length that what is left can have.
    fn length(&mut self) -> Option<usize> {
        usize::try_from(self.word()?).ok().filter(|&length| length <= self.0.len())
    }

    fn id(&mut self) -> Option<u32> {
        u32::try_from(self.word()?).ok()
    }

    fn units(&mut self) -> Option<Vec<UnitId>> {
        (0..self.length()?).map(|_| self.id().map(UnitId)).collect()
    }
}
