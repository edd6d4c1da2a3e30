//! What a rank does with the others: the roll, serving, the boundary, learning.

use std::sync::Arc;

use zerort_core::roll::OWN;
use zerort_core::{At, PassKind, Reading, Route, Row};

use super::{Frame, Rank, text};
use crate::model::{Exchange, Setting, Shared};

impl Rank {
    pub(super) fn roll(&mut self, shared: &mut Shared) -> Result<bool, String> {
        let row = self.gatherer.row(&self.reducer, [0; OWN]).map_err(text)?;
        assert_eq!(Row::from_words(row.words()), Some(row));
        let index = shared.bring(self.index, Exchange::Roll(row));
        self.then([Frame::Rows(index)]);
        Ok(true)
    }

    pub(super) fn read(
        &mut self,
        brought: &[Exchange],
        shared: &mut Shared,
    ) -> Result<bool, String> {
        let rows: Option<Vec<_>> = brought
            .iter()
            .map(|exchange| match exchange {
                Exchange::Roll(row) => Some(*row),
                Exchange::Vote { .. } | Exchange::Learn(_) => None,
            })
            .collect();
        let reading = self.gatherer.read(&rows.ok_or("a roll meets another")?).map_err(text)?;
        match &reading {
            Reading::Serve(units) => {
                let asking = self.gatherer.asking().is_some();
                self.stats.served += 1;
                let gathers = self.gatherer.serve(units).map_err(text)?;
                self.run(gathers, shared)?;
                let wait = [Frame::Reach, Frame::Wait(units.clone()), Frame::Served];
                if !asking {
                    self.then([Frame::Roll]);
                }
                self.then(wait);
            }
            Reading::Again => self.then([Frame::Roll]),
            Reading::Alone => {}
            Reading::Together { .. } => {
                if std::mem::take(&mut self.owed) {
                    let program = self.program_of_all();
                    self.run(program, shared)?;
                    self.then([Frame::Reach]);
                }
            }
            Reading::Diverged(_) => {
                self.diverged = true;
                self.stack.clear();
                let frees = self.gatherer.abandon();
                self.run(frees, shared)?;
            }
        }
        self.reading = Some(reading);
        Ok(true)
    }

    // A rank that has failed, or has come to its end.

    pub(super) fn serve(&mut self) -> Result<bool, String> {
        self.gatherer.open(At::Serve, 0, self.seq).map_err(text)?;
        self.then([Frame::Roll, Frame::Follow]);
        Ok(true)
    }

    pub(super) fn follow(&mut self, shared: &mut Shared) -> Result<bool, String> {
        let Some(Reading::Together { at, .. }) = self.reading else {
            return Err("a serving rank is told what to do".into());
        };
        if self.has_to_learn() {
            self.then([Frame::Drain, Frame::Learn, Frame::Roll, Frame::Follow]);
            return Ok(true);
        }
        let list = self.gatherer.agreed();
        let At::Pass(kind) = at else {
            if at == At::Boundary || self.failed {
                self.then([Frame::AtBoundary]);
            } else {
                let frees = self.gatherer.begin().map_err(text)?; // all have come to their end
                self.run(frees, shared)?;
            }
            return Ok(true);
        };
        if kind == PassKind::Backward && !self.executor.drained(shared)? {
            return Ok(false);
        }
        let frees = self.gatherer.begin().map_err(text)?;
        self.run(frees, shared)?;
        self.then([Frame::Serve]);
        match (kind, list) {
            (PassKind::Backward, Some(list)) => self.reducer.begin_list(list).map_err(text)?,
            (PassKind::Backward, None) => self.reducer.observe().map_err(text)?,
            _ => {}
        }
        self.then([Frame::Close { complete: false }]);
        Ok(true)
    }

    // The boundary.

    pub(super) fn at_boundary(&mut self, shared: &mut Shared) -> Result<bool, String> {
        let frees = self.gatherer.begin().map_err(text)?;
        self.run(frees, shared)?;
        self.then([Frame::Drain, Frame::Vote]);
        Ok(true)
    }

    pub(super) fn vote(&mut self, shared: &mut Shared) -> Result<bool, String> {
        if !self.executor.holds_nothing() || self.gatherer.live() > 0 {
            return Err("GAT-10: a unit is whole at the vote".into());
        }
        let (unreduced, failed) = (self.grads.iter().sum(), self.failed);
        let index = shared.bring(self.index, Exchange::Vote { unreduced, failed });
        self.then([Frame::Voted(index)]);
        Ok(true)
    }

    pub(super) fn voted(&mut self, index: usize, shared: &mut Shared) -> Result<bool, String> {
        let Some(votes) = shared.brought(index) else { return Ok(false) };
        let (mut late, mut lost) = (0, false);
        for vote in votes {
            match vote {
                Exchange::Vote { unreduced, failed } => {
                    late += unreduced;
                    lost |= failed;
                }
                Exchange::Roll(_) | Exchange::Learn(_) => return Err("a vote meets another".into()),
            }
        }
        if !lost && late > 0 {
            self.stats.reruns += 1;
            let program = self.program_of_all();
            self.run(program, shared)?;
            self.then([Frame::Drain, Frame::Vote]);
            return Ok(true);
        }
        if lost {
            self.stats.lost += 1;
            self.grads.fill(0);
        } else if self.given != self.taken {
            return Err(format!("{} gradients came and {} were reduced", self.given, self.taken));
        }
        (self.given, self.taken, self.failed) = (0, 0, false);
        if let Some(Reading::Together { news: true, .. }) = self.reading {
            self.then([Frame::Learn]);
        }
        Ok(true)
    }

    pub(super) fn tell(&mut self, shared: &mut Shared) -> bool {
        let routes = self.gatherer.routes().iter().map(Route::words).collect();
        let routes = if self.index == 0 { routes } else { Vec::new() };
        let index = shared.bring(self.index, Exchange::Learn(routes));
        self.then([Frame::Learnt(index)]);
        true
    }

    pub(super) fn learn(&mut self, index: usize, shared: &Shared) -> Result<bool, String> {
        let Some(brought) = shared.brought(index) else { return Ok(false) };
        let Exchange::Learn(words) = brought[0] else {
            return Err("learning meets another".into());
        };
        let routes: Vec<Route> =
            words.iter().map(|words| Route::from_words(words).unwrap()).collect();
        let Setting { room, depth, .. } = self.setting;
        self.plan = Arc::new(self.plan.routed(&routes, room, depth).map_err(text)?);
        self.reducer.reorder(Arc::clone(&self.plan)).map_err(text)?;
        self.gatherer.load(Arc::clone(&self.plan)).map_err(text)?;
        self.gatherer.told();
        Ok(true)
    }
}
