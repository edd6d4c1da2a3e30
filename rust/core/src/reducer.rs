//! The cursor for gradients: how far along the schedule one may go now.
//!
//! A hook of autograd's calls [`Reducer::grad_ready`] for each gradient that has been accumulated.
//! The answer is None, nearly always, or `hi`: every command of the schedule below `hi` may run.
//! What runs, and how, is somebody else's business; so is time.
//!
//! ```text
//! phase    Idle ── begin, observe ──> Observing ── finish ──> Idle    a pass with a new parameter
//!          Idle ── begin, begin_list ──> Backward ── finish ──> Idle  every other pass
//!          Idle ── arm ──> Armed ── first gradient ──> Idle  a backward has begun; begin or disarm
//!
//! bucket   Filling{missing} ── last gradient ──> Full
//!          Filling{missing} ── a stop behind its Launch is asked for ──> InFlight
//!          Full             ── cursor passes Launch ──> InFlight
//!          InFlight         ── cursor passes Retire ──> Reduced
//!          Reduced          ── begin ──> Filling{missing}
//! ```
//!
//! - **RED-1** The ranges handed out in a pass are consecutive and tile the schedule, whatever
//!   order gradients arrive in: a range begins where the one before ended.
//! - **RED-2** A `Launch` is handed out only when its bucket is full, or when the pass ends. Full
//!   means that every watched parameter of it has fired as often as learnt.
//! - **RED-3** A gradient that comes after its bucket was launched is named at the end of the pass,
//!   if `grad_ready` was called for it. It is neither dropped nor does it overwrite anything:
//!   autograd keeps it in `.grad`, and a later pass takes it.
//! - **RED-4** [`Reducer::finish`] hands out the rest and names the watched parameters that never
//!   came.
//! - **GAT-6** A need never waits for a gradient: in a pass along a list a stop that is asked for
//!   overtakes the launches before it ([`Reducer::need`]). What comes after that is late (RED-3).
//! - **RED-5** No hook ever blocks. Nothing here waits; the executor that runs the ranges must not
//!   either.
//!
//! # What is learnt
//!
//! Most parameters fire once a pass, but a module reused under reentrant checkpointing fires once
//! for each use, and its bucket must not be launched before the last one. So the first pass only
//! observes: it hands out nothing before its end, counts how often each parameter fires, and keeps
//! the order in which they fired last, from which [`Plan::reordered`] makes a better launch order.
//! A pass observes again when the one before had no arrivals at all, which teaches nothing, or when
//! [`Reducer::set_active`] has let a parameter in that no observing pass has had.
//!
//! A parameter that fires more often than learnt is no problem while its bucket has not been
//! launched, and late afterwards.
//!
//! # Sentinels
//!
//! A hook costs more than all that is done in it, so there should be few. With
//! [`Reducer::post_sentinels`] a bucket has one: on its *sentinel*, the parameter whose gradient
//! came last in the observing pass. Only the sentinel is then *watched*, and when it has fired as
//! often as learnt, the bucket counts as full.
//!
//! Every active parameter is watched, and has a hook, where no sentinel can stand for the others:
//!
//! - in a pass that observes;
//! - of a bucket of which something did not come in the observing pass, because it is not known
//!   what comes last there;
//! - after [`Reducer::dismiss_sentinels`].
//!
//! A sentinel may be wrong: in a later pass gradients may come in another order. What then protects
//! a gradient is not in this crate. Whoever runs a Launch first looks into `.grad` of the whole
//! bucket and waits where something is missing; what comes after the Launch stays in `.grad`, is
//! found at the end of the pass, and is reduced in one more pass on all ranks (RED-3). So a wrong
//! sentinel costs time and never a gradient. Nor is a bucket ever launched later for having one:
//! with all of it watched, it would wait for that parameter too.
//!
//! Freezing a sentinel passes its duty to the parameter that came before it. Sentinels may differ
//! from rank to rank: the schedule decides the order of launches, and they only when.

mod explain;
mod listed;
mod state;

use std::sync::Arc;

use crate::cursor::{Cursor, Overtake};
use crate::error::{Phase, StepError};
use crate::ids::{BucketId, ParamId};
use crate::life::Life;
use crate::plan::Plan;

pub use explain::Explanation;
use state::{Role, Slot, State, advance, watch};

/// The cursor for gradients. See the [module](self) for its states and invariants.
#[derive(Clone, Debug)]
pub struct Reducer {
    plan: Arc<Plan>,
    slots: Vec<Slot>,
    buckets: Vec<State>,
    pass: Pass,
    sentinels: bool,
    observed: Vec<ParamId>,
    life: Vec<Option<Life>>,
}

/// What [`Reducer::finish`] hands out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// End of the list: every command below it may run now.
    pub hi: usize,
    /// Watched parameters whose gradient never came, by id.
    pub absent: Vec<ParamId>,
    /// Parameters with a gradient that came after their bucket had left, by id.
    pub late: Vec<ParamId>,
}

/// The phase, with what it needs.
#[derive(Clone, Copy, Debug)]
enum Pass {
    Idle,
    Armed,
    Observing { arrivals: u64 },
    Backward { cursor: Cursor, list: Option<usize> },
}

impl Reducer {
    /// A reducer for `plan`, between passes, with all parameters active that are trained.
    pub fn new(plan: Arc<Plan>) -> Self {
        let mut slots = vec![Slot::new(BucketId(0), Role::Watched); plan.params().len()];
        for bucket in plan.buckets() {
            let role = if bucket.is_trained() { Role::Watched } else { Role::Held };
            for param in &bucket.params {
                slots[param.index()] = Slot::new(bucket.id, role);
            }
        }
        let buckets = vec![State::Reduced; plan.buckets().len()];
        let life = vec![None; buckets.len()];
        Self {
            plan,
            slots,
            buckets,
            pass: Pass::Idle,
            sentinels: false,
            observed: Vec::new(),
            life,
        }
    }

    /// Says which parameters require grad; the others are not waited for, nor is one that no
    /// optimizer has.
    ///
    /// # Errors
    /// [`StepError::OutOfPhase`] during a pass, [`StepError::WrongLength`] unless there is one
    /// entry per parameter.
    pub fn set_active(&mut self, active: &[bool]) -> Result<(), StepError> {
        self.demand(Phase::Idle)?;
        if active.len() != self.slots.len() {
            return Err(StepError::WrongLength { params: self.slots.len(), got: active.len() });
        }
        for (slot, &active) in self.slots.iter_mut().zip(active) {
            slot.role = match slot.role {
                Role::Held => Role::Held,
                Role::Frozen | Role::Relieved | Role::Watched if active => Role::Watched,
                Role::Frozen | Role::Relieved | Role::Watched => Role::Frozen,
            };
        }
        self.watch();
        Ok(())
    }

    /// From now on a bucket's [sentinel](self#sentinels) alone is watched, where it has one.
    ///
    /// # Errors
    /// [`StepError::OutOfPhase`] during a pass.
    pub fn post_sentinels(&mut self) -> Result<(), StepError> {
        self.demand(Phase::Idle)?;
        self.sentinels = true;
        self.watch();
        Ok(())
    }

    /// From now on every active parameter is watched.
    ///
    /// # Errors
    /// [`StepError::OutOfPhase`] during a pass.
    pub fn dismiss_sentinels(&mut self) -> Result<(), StepError> {
        self.demand(Phase::Idle)?;
        self.sentinels = false;
        self.watch();
        Ok(())
    }

    /// The parameters that are waited for, in the pass under way or the next one:
    /// [`Reducer::grad_ready`] need not be called for any other.
    pub fn watched(&self) -> impl Iterator<Item = ParamId> + '_ {
        self.ids_where(Slot::is_watched)
    }

    /// Takes a plan of the same layout with another launch order.
    ///
    /// # Errors
    /// [`StepError::OutOfPhase`] during a pass, [`StepError::OtherLayout`] when more than the order
    /// differs.
    pub fn reorder(&mut self, plan: Arc<Plan>) -> Result<(), StepError> {
        self.demand(Phase::Idle)?;
        let (expected, got) = (self.plan.layout_digest(), plan.layout_digest());
        if expected != got {
            return Err(StepError::OtherLayout { expected, got });
        }
        self.plan = plan;
        Ok(())
    }

    /// Starts a pass.
    ///
    /// Buckets without an active parameter are full from the start; they leave as soon as the
    /// cursor comes by.
    ///
    /// # Errors
    /// [`StepError::OutOfPhase`] during a pass.
    pub fn begin(&mut self) -> Result<(), StepError> {
        self.demand(Phase::Idle)?;
        self.buckets.fill(State::Full);
        self.life.fill(None);
        let learns = self.learns();
        for slot in &mut self.slots {
            slot.begin(learns);
            if slot.is_watched() {
                self.buckets[slot.bucket.index()].await_one();
            }
        }
        self.pass = if learns {
            Pass::Observing { arrivals: 0 }
        } else {
            Pass::Backward { cursor: Cursor::default(), list: None }
        };
        Ok(())
    }

    /// Answers the next gradient that arrives outside a pass.
    ///
    /// So begins a backward that the engine was not asked for: autograd does not say beforehand
    /// whether it accumulates gradients or only computes some.
    ///
    /// # Errors
    /// [`StepError::OutOfPhase`] during a pass.
    pub fn arm(&mut self) -> Result<(), StepError> {
        self.demand(Phase::Idle)?;
        self.pass = Pass::Armed;
        Ok(())
    }

    /// Takes back [`Reducer::arm`]; nothing if no gradient is awaited.
    pub fn disarm(&mut self) {
        match self.pass {
            Pass::Armed => self.pass = Pass::Idle,
            Pass::Idle | Pass::Observing { .. } | Pass::Backward { .. } => {}
        }
    }

    /// One gradient has been accumulated. Returns `hi` when commands became free: every one below
    /// `hi` may run now.
    ///
    /// Outside a pass nothing is handed out and nothing is kept: autograd has the gradient in
    /// `.grad`, where a later pass finds it. Armed, the answer is 0, once: begin a pass, and call
    /// again for this gradient.
    ///
    /// # Errors
    /// [`StepError::UnknownParam`].
    #[inline]
    pub fn grad_ready(&mut self, param: ParamId) -> Result<Option<usize>, StepError> {
        let params = self.slots.len();
        let slot =
            self.slots.get_mut(param.index()).ok_or(StepError::UnknownParam { param, params })?;
        match &mut self.pass {
            Pass::Idle => {}
            Pass::Armed => {
                self.pass = Pass::Idle;
                return Ok(Some(0));
            }
            Pass::Observing { arrivals } => {
                *arrivals += 1;
                slot.last = *arrivals;
                slot.fired = slot.fired.saturating_add(1);
            }
            Pass::Backward { cursor, list } => {
                let bucket = &mut self.buckets[slot.bucket.index()];
                if slot.fire(bucket) {
                    let commands = self.plan.commands(*list);
                    return Ok(advance(commands, &mut self.buckets, cursor, Overtake::Nothing));
                }
            }
        }
        Ok(None)
    }

    /// [`Reducer::grad_ready`], with the time kept for [`Reducer::life`].
    ///
    /// # Errors
    /// [`StepError::UnknownParam`].
    pub fn grad_ready_at(
        &mut self,
        param: ParamId,
        now_ns: u64,
    ) -> Result<Option<usize>, StepError> {
        if let Some(slot) = self.slots.get(param.index()) {
            let index = slot.bucket.index();
            match self.buckets[index] {
                State::Filling { .. } => {
                    Life::note(&mut self.life[index], slot.bucket, param, now_ns);
                }
                State::Full | State::InFlight | State::Reduced => {}
            }
        }
        self.grad_ready(param)
    }

    /// Ends the pass: hands out the rest of the list, and names what never came and what came too
    /// late.
    ///
    /// # Errors
    /// [`StepError::OutOfPhase`] outside a pass.
    pub fn finish(&mut self) -> Result<Finished, StepError> {
        self.demand(Phase::Backward)?;
        match self.pass {
            Pass::Observing { arrivals: 1.. } => self.learn(),
            Pass::Observing { arrivals: 0 } | Pass::Backward { .. } | Pass::Idle | Pass::Armed => {}
        }
        let hi = self.plan.commands(self.list()).len();
        self.buckets.fill(State::Reduced);
        self.pass = Pass::Idle;
        Ok(Finished {
            hi,
            absent: self.ids_where(|slot| slot.expected > 0 && slot.fired == 0).collect(),
            late: self.ids_where(|slot| slot.late).collect(),
        })
    }

    /// The plan whose schedule is being handed out.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// Whether a pass has begun and not finished.
    pub fn in_pass(&self) -> bool {
        self.phase() == Phase::Backward
    }

    /// Whether the pass under way is one that only observes; every active parameter is watched in
    /// it.
    pub fn observing(&self) -> bool {
        match self.pass {
            Pass::Observing { .. } => true,
            Pass::Idle | Pass::Armed | Pass::Backward { .. } => false,
        }
    }

    /// Parameters in the order in which the last observing pass stopped waiting for them: those
    /// that were not active, then the others by their last arrival. What never came is not listed.
    /// Empty before the first pass has ended.
    pub fn observed(&self) -> &[ParamId] {
        &self.observed
    }

    /// When the gradients of this pass, or of the last one, came, by bucket; those of
    /// [`Reducer::grad_ready_at`] only.
    pub fn life(&self) -> impl Iterator<Item = Life> + '_ {
        self.life.iter().copied().flatten()
    }

    fn learn(&mut self) {
        let slots = &mut self.slots;
        let mut order: Vec<(u64, ParamId)> = Vec::with_capacity(slots.len());
        for (index, slot) in slots.iter_mut().enumerate() {
            if slot.is_active() {
                slot.known = true;
                slot.fires = slot.fired.max(1);
            }
            let place = if slot.is_active() { slot.last } else { 0 };
            if slot.fired > 0 || !slot.is_active() {
                order.push((place, ParamId(index as u32)));
            }
        }
        order.sort_unstable();
        self.observed = order.into_iter().map(|(_, param)| param).collect();
        self.watch();
    }

    fn learns(&self) -> bool {
        self.slots.iter().any(|slot| slot.is_active() && !slot.known)
    }

    fn watch(&mut self) {
        let sentinels = self.sentinels && !self.learns();
        watch(&mut self.slots, self.buckets.len(), sentinels);
    }

    fn ids_where(&self, predicate: impl Fn(&Slot) -> bool) -> impl Iterator<Item = ParamId> {
        let slots = self.slots.iter().enumerate();
        slots.filter(move |(_, slot)| predicate(slot)).map(|(index, _)| ParamId(index as u32))
    }

    fn phase(&self) -> Phase {
        match self.pass {
            Pass::Idle | Pass::Armed => Phase::Idle,
            Pass::Observing { .. } | Pass::Backward { .. } => Phase::Backward,
        }
    }

    fn demand(&self, want: Phase) -> Result<(), StepError> {
        let have = self.phase();
        if have == want { Ok(()) } else { Err(StepError::OutOfPhase { have, want }) }
    }
}
