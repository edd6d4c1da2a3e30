//! One rank: its program, and what it is in the middle of.

mod exchanges;

use std::fmt;
use std::sync::Arc;

use zerort_core::{At, Gatherer, PassKind, Plan, Reading, Reducer, SetId, UnitId};

use super::executor::Executor;
use super::{Event, Mutant, Node, Op, Setting, Shared, Step};

/// What is to be done next, the last first.
#[derive(Clone, Debug)]
enum Frame {
    Program,
    Roll,
    Rows(usize),
    Served,
    Begin,
    Events { at: usize },
    Need { set: SetId, node: Option<u64> },
    Arrived { set: SetId },
    Used { set: SetId, seq: Option<u64> },
    Close { complete: bool },
    Serve,
    Follow,
    AtBoundary,
    Vote,
    Voted(usize),
    Learn,
    Learnt(usize),
    Reach,
    Drain,
    Wait(Vec<UnitId>),
}

#[derive(Clone, Debug)]
pub struct Rank {
    index: usize,
    setting: Setting,
    plan: Arc<Plan>,
    gatherer: Gatherer,
    reducer: Reducer,
    executor: Executor,
    program: Vec<Op>,
    pc: usize,
    stack: Vec<Frame>,
    reading: Option<Reading>,
    /// A free backward's sums have not been launched.
    owed: bool,
    failed: bool,
    pub diverged: bool,
    /// Gradients in `.grad`, by bucket, and what has been taken.
    grads: Vec<u32>,
    given: u32,
    taken: u32,
    /// torch's sequence number, and that of each use of the last forward.
    seq: u64,
    uses: Vec<u64>,
    /// Units read in this backward, each with the node at which that is over.
    reads: Vec<(UnitId, Option<u64>)>,
    /// Needs that were not answered at once.
    asked: u32,
    pub stats: Stats,
}

/// What a run has met.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub listed: u32,
    pub free: u32,
    pub went_off: u32,
    pub served: u32,
    pub reruns: u32,
    pub lost: u32,
    /// Elements whole or gathering in a pass along a list.
    pub most: u64,
}

impl Rank {
    pub fn new(setting: &Setting, rank: usize, program: Vec<Op>) -> Self {
        let plan = Arc::clone(&setting.plan);
        let reducer = Reducer::new(Arc::clone(&plan));
        let id = zerort_core::Rank(rank as u32);
        let mut gatherer = Gatherer::new(Arc::clone(&plan), id, setting.room);
        for unit in plan.units() {
            gatherer.set_of(&[unit.id]).unwrap();
        }
        Self {
            index: rank,
            setting: setting.clone(),
            gatherer,
            reducer,
            executor: Executor::new(rank),
            program,
            pc: 0,
            stack: vec![Frame::Program],
            reading: None,
            owed: false,
            failed: false,
            diverged: false,
            grads: vec![0; plan.buckets().len()],
            plan,
            given: 0,
            taken: 0,
            seq: 0,
            uses: Vec::new(),
            reads: Vec::new(),
            asked: 0,
            stats: Stats::default(),
        }
    }

    /// All that decides what it does next.
    pub fn state(&self) -> impl fmt::Debug + '_ {
        let machines = (&self.gatherer, &self.reducer, &self.executor);
        let frames = (self.pc, &self.stack, &self.reading, self.owed, self.failed, self.diverged);
        let gradients = (&self.grads, self.given, self.taken, self.seq, &self.uses, &self.reads);
        (machines, frames, gradients)
    }

    /// Whether it is between two passes, with so much of its program behind it.
    pub fn is_at(&self, pc: usize) -> bool {
        self.pc == pc && matches!(self.stack[..], [Frame::Program])
    }

    pub fn is_done(&self) -> bool {
        self.stack.is_empty()
    }

    /// Whether no pass along a list had more here than the room, or than three units that one stop
    /// may need and hold.
    pub fn within_room(&self) -> bool {
        let largest = self.plan.units().iter().map(|unit| unit.numel).max().unwrap_or(0);
        self.stats.most <= self.setting.room.max(3 * largest)
    }

    pub fn step(&mut self, shared: &mut Shared) -> Result<Step, String> {
        let Some(frame) = self.stack.pop() else { return Ok(Step::Done) };
        let (kept, queued) = (frame.clone(), self.executor.queued());
        let moved = match frame {
            Frame::Program => self.next(),
            Frame::Roll => self.roll(shared),
            Frame::Rows(index) => match shared.brought(index) {
                None => Ok(false),
                Some(rows) => {
                    let rows: Vec<_> = rows.into_iter().cloned().collect();
                    self.read(&rows, shared)
                }
            },
            Frame::Served => {
                let frees = self.gatherer.served();
                self.run(frees, shared)
            }
            Frame::Begin => self.begin(shared),
            Frame::Events { at } => self.event(at, shared),
            Frame::Need { set, node } => self.need(set, node, shared),
            Frame::Arrived { set } => self.gatherer.arrived(set).map(|()| true).map_err(text),
            Frame::Used { set, seq } => self.used(set, seq, shared),
            Frame::Close { complete } => self.close(complete, shared),
            Frame::Serve => self.serve(),
            Frame::Follow => self.follow(shared),
            Frame::AtBoundary => self.at_boundary(shared),
            Frame::Vote => self.vote(shared),
            Frame::Voted(index) => self.voted(index, shared),
            Frame::Learn => Ok(self.tell(shared)),
            Frame::Learnt(index) => self.learn(index, shared),
            Frame::Reach => self.executor.reached(shared),
            Frame::Drain => self.executor.drained(shared),
            Frame::Wait(units) => Ok(self.executor.is_whole(&units, shared)),
        }?;
        self.pack();
        if self.gatherer.list().is_some() {
            self.stats.most = self.stats.most.max(self.gatherer.live());
        }
        if moved {
            return Ok(Step::Moved);
        }
        self.stack.push(kept);
        // Peers may go on for what the executor has done.
        let ran = self.executor.queued() != queued;
        Ok(if ran { Step::Moved } else { Step::Blocked })
    }

    /// In the order in which they are to be done.
    fn then(&mut self, frames: impl IntoIterator<Item = Frame, IntoIter: DoubleEndedIterator>) {
        self.stack.extend(frames.into_iter().rev());
    }

    fn run(
        &mut self,
        actions: Vec<zerort_core::Action>,
        shared: &mut Shared,
    ) -> Result<bool, String> {
        self.executor.run(actions, shared).map(|()| true)
    }

    /// A Launch takes what is in `.grad`.
    fn pack(&mut self) {
        for bucket in std::mem::take(&mut self.executor.launched) {
            self.taken += std::mem::take(&mut self.grads[bucket.index()]);
        }
    }

    // The program.

    fn next(&mut self) -> Result<bool, String> {
        let Some(op) = self.program.get(self.pc).cloned() else {
            // Others may still evaluate.
            self.then([Frame::Serve]);
            return Ok(true);
        };
        self.then([Frame::Program]);
        match op {
            Op::Pass { .. } if self.failed => self.pc += 1,
            Op::Pass { kind, .. } => {
                self.gatherer.open(At::Pass(kind), 0, self.seq).map_err(text)?;
                self.then([Frame::Roll, Frame::Begin, Frame::Events { at: 0 }]);
            }
            Op::Boundary if self.failed => {
                self.pc += 1;
                self.then([Frame::Serve]);
            }
            Op::Boundary => {
                self.pc += 1;
                self.gatherer.open(At::Boundary, 0, 0).map_err(text)?;
                self.then([Frame::Roll, Frame::AtBoundary]);
            }
        }
        Ok(true)
    }

    fn begin(&mut self, shared: &mut Shared) -> Result<bool, String> {
        let Some(Op::Pass { kind, .. }) = self.program.get(self.pc) else {
            return Err("no pass".into());
        };
        let kind = *kind;
        if self.has_to_learn() {
            self.then([Frame::Drain, Frame::Learn, Frame::Roll, Frame::Begin]);
            return Ok(true);
        }
        if kind == PassKind::Backward && !self.executor.drained(shared)? {
            return Ok(false);
        }
        let list = self.gatherer.agreed();
        let frees = self.gatherer.begin().map_err(text)?;
        if kind == PassKind::Forward {
            self.uses.clear();
        }
        match (kind, list) {
            (PassKind::Backward, Some(list)) => self.reducer.begin_list(list).map_err(text)?,
            (PassKind::Backward, None) => self.reducer.observe().map_err(text)?,
            _ => {}
        }
        let count = if list.is_some() { &mut self.stats.listed } else { &mut self.stats.free };
        *count += 1;
        self.run(frees, shared)
    }

    /// Whether rank 0 has routes to tell before a forward.
    fn has_to_learn(&self) -> bool {
        matches!(
            self.reading,
            Some(Reading::Together {
                at: At::Pass(PassKind::Forward | PassKind::Evaluation),
                news: true,
                ..
            })
        )
    }

    fn event(&mut self, at: usize, shared: &mut Shared) -> Result<bool, String> {
        let Some(Op::Pass { kind, events, dies }) = self.program.get(self.pc) else {
            return Err("no pass".into());
        };
        let kind = *kind;
        if *dies == Some(at) {
            self.failed |= kind != PassKind::Evaluation;
            self.pc += 1;
            self.then([Frame::Close { complete: false }]);
            return Ok(true);
        }
        let Some(event) = events.get(at).cloned() else {
            self.pc += 1;
            self.then([Frame::Close { complete: true }]);
            return Ok(true);
        };
        self.then([Frame::Events { at: at + 1 }]);
        match event {
            Event::Use { units, node } => {
                let set = self.gatherer.set_of(&units).map_err(text)?;
                self.seq += 10;
                let (node, seq) = match node {
                    Node::Forward => (None, (kind == PassKind::Forward).then_some(self.seq)),
                    Node::Of(index) => (self.uses.get(index).map(|seq| seq + 5), None),
                    Node::Unknown => (None, None),
                };
                if node.is_some() {
                    self.reads.retain(|(_, last)| last.is_none_or(|last| node >= Some(last)));
                    self.executor.read = self.reads.iter().map(|&(unit, _)| unit).collect();
                }
                self.then([Frame::Need { set, node }, Frame::Used { set, seq }]);
            }
            Event::Grad(unit) => {
                let (bucket, _) = self.plan.home(unit).map_err(text)?;
                if !self.plan.bucket(bucket).map_err(text)?.is_trained() {
                    return Ok(true); // it is frozen, and has none
                }
                self.grads[bucket.index()] += 1;
                self.given += 1;
                if let Some(hi) = self.reducer.grad_ready(unit).map_err(text)? {
                    let actions = self.gatherer.reached(hi);
                    self.run(actions, shared)?;
                }
            }
        }
        Ok(true)
    }

    fn need(&mut self, set: SetId, node: Option<u64>, shared: &mut Shared) -> Result<bool, String> {
        let before = self.gatherer.list();
        let answer = self.gatherer.need(&mut self.reducer, set, node).map_err(text)?;
        self.stats.went_off += u32::from(before.is_some() && self.gatherer.list().is_none());
        let Some(answer) = answer else { return Ok(true) };
        self.asked += 1;
        if self.asked > 99_999 {
            return Err(format!("{set:?} never comes"));
        }
        self.run(answer.actions, shared)?;
        if answer.ask.is_some() {
            self.then([Frame::Reach, Frame::Roll, Frame::Need { set, node }]);
        } else {
            let units = self.units(set);
            self.then([Frame::Reach, Frame::Wait(units), Frame::Arrived { set }]);
        }
        Ok(true)
    }

    fn units(&self, set: SetId) -> Vec<UnitId> {
        self.gatherer.set(set).unwrap_or_default().to_vec()
    }

    fn used(&mut self, set: SetId, seq: Option<u64>, shared: &Shared) -> Result<bool, String> {
        let units = self.units(set);
        if !self.executor.is_whole(&units, shared) {
            return Err(format!("GAT-2: {units:?} are read and are not here"));
        }
        if !self.gatherer.reuse(set) && !self.gatherer.acquire(set, seq).map_err(text)? {
            return Err(format!("{units:?} have arrived, and are not current"));
        }
        self.gatherer.release(set).map_err(text)?;
        let backward = match self.program.get(self.pc) {
            Some(Op::Pass { kind: PassKind::Backward | PassKind::LocalBackward, .. }) => true,
            Some(Op::Pass { .. } | Op::Boundary) | None => false,
        };
        if let Some(seq) = seq {
            self.uses.push(seq);
        }
        if backward {
            for unit in units {
                let last = self.first_use(unit);
                self.reads.push((unit, last));
            }
            self.executor.read = self.reads.iter().map(|&(unit, _)| unit).collect();
        }
        Ok(true)
    }

    /// The node number of a unit's first use in the forward before.
    fn first_use(&self, unit: UnitId) -> Option<u64> {
        let mut passes = self.program[..self.pc].iter().rev();
        let forward = passes.find_map(|op| match op {
            Op::Pass { kind: PassKind::Forward, events, .. } => Some(events),
            Op::Pass { .. } | Op::Boundary => None,
        })?;
        let mut uses = forward.iter().filter_map(|event| match event {
            Event::Use { units, .. } => Some(units),
            Event::Grad(_) => None,
        });
        uses.position(|units| units.contains(&unit)).and_then(|at| self.uses.get(at)).copied()
    }

    fn close(&mut self, complete: bool, shared: &mut Shared) -> Result<bool, String> {
        let free = self.gatherer.list().is_none() && !self.gatherer.went_off();
        let backward = self.reducer.in_pass();
        if backward {
            self.reducer.finish().map_err(text)?;
        }
        self.reads.clear();
        self.executor.read.clear();
        let actions = self.gatherer.close(&mut self.reducer, complete);
        self.run(actions, shared)?;
        if self.failed {
            self.gatherer.fail();
        }
        self.then([Frame::Reach]);
        if backward && free {
            if self.setting.mutant == Mutant::WaitsForSums {
                let program = self.program_of_all();
                self.run(program, shared)?;
                self.then([Frame::Reach, Frame::Drain]);
            } else {
                self.owed = true;
            }
        }
        Ok(true)
    }

    fn program_of_all(&self) -> Vec<zerort_core::Action> {
        self.plan.schedule().commands().iter().filter_map(|command| command.action()).collect()
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
