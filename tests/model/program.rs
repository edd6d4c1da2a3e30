//! What ranks run: random programs, and small ones with a few divergences.

use std::ops::Range;

use zerort_core::{ParamId, PassKind, UnitId};

/// What a rank runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A pass; the user's code raises at event `dies`.
    Pass { kind: PassKind, events: Vec<Event>, dies: Option<usize> },
    /// The end of a step.
    Boundary,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Use {
        units: Vec<UnitId>,
        node: Node,
    },
    /// The gradient of a unit's parameter.
    Grad(ParamId),
}

/// Where in a graph a use is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    Forward,
    /// At the node of use number so much of the forward before.
    Of(usize),
    /// At a node that is not known.
    Unknown,
}

/// `SplitMix64`: a trial is its seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    pub fn within(&mut self, range: Range<usize>) -> usize {
        range.start + self.below(range.len())
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, self.below(end + 1));
        }
    }
}

/// How ranks differ from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Divergence {
    None,
    Permuted,
    Dropped,
    Extra,
    Evaluations,
    Dies,
    Forwards,
    LateGradients,
    All,
}

pub const DIVERGENCES: [Divergence; 9] = [
    Divergence::None,
    Divergence::Permuted,
    Divergence::Dropped,
    Divergence::Extra,
    Divergence::Evaluations,
    Divergence::Dies,
    Divergence::Forwards,
    Divergence::LateGradients,
    Divergence::All,
];

fn one(unit: usize) -> Vec<UnitId> {
    vec![UnitId(unit as u32)]
}

/// The sets of a model of `units` units in the order in which its forward needs them; the last may
/// be tied to the first.
fn model(random: &mut Random, units: usize) -> Vec<Vec<UnitId>> {
    let mut sets: Vec<_> = (0..units).map(one).collect();
    if units > 2 && random.chance(25) {
        sets[units - 1].insert(0, UnitId(0));
    }
    if random.chance(25) {
        sets.push(one(random.below(units))); // a module that is called twice
    }
    sets
}

fn forward(random: &mut Random, sets: &[Vec<UnitId>], divergence: Divergence) -> Vec<Vec<UnitId>> {
    let mut sets = sets.to_vec();
    let is = |other| divergence == other || divergence == Divergence::All;
    if is(Divergence::Permuted) && random.chance(50) {
        random.shuffle(&mut sets);
    }
    if is(Divergence::Dropped) {
        sets.retain(|_| random.chance(70));
    }
    if is(Divergence::Extra) {
        for _ in 0..random.below(4) {
            let extra = sets.get(random.below(sets.len())).cloned().unwrap_or_else(|| one(0));
            sets.insert(random.below(sets.len() + 1), extra);
        }
    }
    sets
}

fn backward(random: &mut Random, forward: &[Vec<UnitId>], divergence: Divergence) -> Vec<Event> {
    let is = |other| divergence == other || divergence == Divergence::All;
    let mut events = Vec::new();
    let mut grads = Vec::new();
    for (index, units) in forward.iter().enumerate().rev() {
        if is(Divergence::Dropped) && random.chance(10) {
            continue;
        }
        events.push(Event::Use { units: units.clone(), node: Node::Of(index) });
        if is(Divergence::Extra) && random.chance(15) {
            let units = forward[random.below(forward.len())].clone();
            events.push(Event::Use { units, node: Node::Unknown });
        }
        for unit in units {
            // A gradient comes behind its first use.
            if !forward[..index].iter().any(|earlier| earlier.contains(unit)) {
                grads.push((events.len(), Event::Grad(ParamId(unit.0))));
            }
        }
    }
    let moves = is(Divergence::LateGradients) && random.chance(60);
    for (behind, (at, grad)) in grads.into_iter().enumerate() {
        let place = behind + at;
        if !moves {
            events.insert(place, grad);
        } else if random.chance(80) {
            let place = random.within(place.min(events.len())..events.len() + 1);
            events.insert(place, grad);
        }
    }
    events
}

/// The program of one rank: `steps` steps, which differ from other ranks' from step `from` on.
pub fn program(random: &mut Random, shape: &Shape, divergence: Divergence, rank: usize) -> Vec<Op> {
    let mut ops = Vec::new();
    for step in 0..shape.steps {
        let divergence = if step < shape.from { Divergence::None } else { divergence };
        let is = |other| divergence == other || divergence == Divergence::All;
        for micro in 0..shape.micro {
            if is(Divergence::Evaluations) {
                for _ in 0..random.below(3) {
                    ops.push(evaluation(random, shape, divergence));
                }
            }
            let calls = forward(random, &shape.sets, divergence);
            let back = backward(random, &calls, divergence);
            ops.push(pass(PassKind::Forward, uses(&calls)));
            if is(Divergence::Evaluations) && random.chance(20) {
                ops.push(evaluation(random, shape, divergence));
            }
            if divergence == Divergence::Forwards && rank == 0 && random.chance(60) {
                ops.push(pass(PassKind::Forward, uses(&calls)));
            }
            let local = micro + 1 < shape.micro && shape.local;
            ops.push(pass(if local { PassKind::LocalBackward } else { PassKind::Backward }, back));
        }
        ops.push(Op::Boundary);
    }
    if divergence == Divergence::Dies || divergence == Divergence::All {
        die(random, &mut ops, shape);
    }
    ops
}

fn evaluation(random: &mut Random, shape: &Shape, divergence: Divergence) -> Op {
    let calls = forward(random, &shape.sets, divergence);
    pass(PassKind::Evaluation, uses(&calls))
}

/// Some passes raise, at most one a step where that step counts.
fn die(random: &mut Random, ops: &mut [Op], shape: &Shape) {
    let mut boundaries = 0;
    for op in ops {
        match op {
            Op::Boundary => boundaries += 1,
            Op::Pass { events, dies, .. } => {
                if boundaries >= shape.from && random.chance(15) {
                    *dies = Some(random.below(events.len() + 1)).filter(|&at| at < events.len());
                }
            }
        }
    }
}

pub fn pass(kind: PassKind, events: Vec<Event>) -> Op {
    Op::Pass { kind, events, dies: None }
}

pub fn uses(calls: &[Vec<UnitId>]) -> Vec<Event> {
    calls.iter().map(|units| Event::Use { units: units.clone(), node: Node::Forward }).collect()
}

/// What all ranks of a trial have in common.
#[derive(Clone, Debug)]
pub struct Shape {
    pub sets: Vec<Vec<UnitId>>,
    pub steps: usize,
    /// The step from which ranks differ.
    pub from: usize,
    pub micro: usize,
    /// Gradients of all but the last micro-batch stay in `.grad`.
    pub local: bool,
}

impl Shape {
    pub fn random(random: &mut Random, units: usize) -> Self {
        let steps = random.within(1..5);
        Self {
            sets: model(random, units),
            steps,
            from: random.below(steps),
            micro: if random.chance(25) { 2 } else { 1 },
            local: random.chance(50),
        }
    }
}

/// One way in which a rank's step over three units differs from the others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Modules number so much and the next are called in the other order.
    Swap(usize),
    /// A module is not called.
    Drop(usize),
    /// A module is called once more, at the end of the forward.
    Again(usize),
    /// A unit is read once more at the end of the backward, at an unknown node.
    Unknown(usize),
    /// A gradient comes at the end of the backward.
    Late(usize),
    /// A gradient does not come.
    Absent(usize),
    /// The forward raises before its use number so much.
    ForwardDies(usize),
    /// The backward raises at its event number so much.
    BackwardDies(usize),
    /// An evaluation before the forward, the backward, or the boundary.
    Evaluate(usize),
}

/// All of them.
pub fn edits() -> Vec<Edit> {
    let each = |edit: fn(usize) -> Edit, count| (0..count).map(edit);
    let mut all: Vec<Edit> = each(Edit::Swap, 2).collect();
    for edit in [Edit::Drop, Edit::Again, Edit::Unknown, Edit::Late, Edit::Absent] {
        all.extend(each(edit, 3));
    }
    for edit in [Edit::ForwardDies, Edit::BackwardDies, Edit::Evaluate] {
        all.extend(each(edit, 3));
    }
    all
}

/// A step over three units, as `edits` change it.
pub fn scope(edits: &[Edit]) -> Vec<Op> {
    let mut calls = vec![one(0), one(1), one(2)];
    for edit in edits {
        match *edit {
            Edit::Swap(at) if at + 1 < calls.len() => calls.swap(at, at + 1),
            Edit::Drop(unit) => calls.retain(|call| *call != one(unit)),
            Edit::Again(unit) => calls.push(one(unit)),
            Edit::Swap(_)
            | Edit::Unknown(_)
            | Edit::Late(_)
            | Edit::Absent(_)
            | Edit::ForwardDies(_)
            | Edit::BackwardDies(_)
            | Edit::Evaluate(_) => {}
        }
    }
    let mut back = backward(&mut Random(0), &calls, Divergence::None);
    for edit in edits {
        match *edit {
            Edit::Unknown(unit) => back.push(Event::Use { units: one(unit), node: Node::Unknown }),
            Edit::Late(unit) | Edit::Absent(unit) => {
                let grad = Event::Grad(ParamId(unit as u32));
                let before = back.len();
                back.retain(|event| *event != grad);
                if matches!(edit, Edit::Late(_)) && back.len() < before {
                    back.push(grad);
                }
            }
            Edit::Swap(_)
            | Edit::Drop(_)
            | Edit::Again(_)
            | Edit::ForwardDies(_)
            | Edit::BackwardDies(_)
            | Edit::Evaluate(_) => {}
        }
    }
    let mut ops =
        vec![pass(PassKind::Forward, uses(&calls)), pass(PassKind::Backward, back), Op::Boundary];
    for edit in edits {
        match *edit {
            Edit::ForwardDies(at) => end_early(&mut ops, PassKind::Forward, at),
            Edit::BackwardDies(at) => end_early(&mut ops, PassKind::Backward, 2 * at),
            Edit::Swap(_)
            | Edit::Drop(_)
            | Edit::Again(_)
            | Edit::Unknown(_)
            | Edit::Late(_)
            | Edit::Absent(_)
            | Edit::Evaluate(_) => {}
        }
    }
    for edit in edits {
        if let Edit::Evaluate(at) = *edit {
            ops.insert(at, pass(PassKind::Evaluation, uses(&calls)));
        }
    }
    ops
}

fn end_early(ops: &mut [Op], raises: PassKind, at: usize) {
    for op in ops {
        match op {
            Op::Pass { kind, events, dies } if *kind == raises => {
                *dies = Some(at).filter(|&at| at < events.len());
            }
            Op::Pass { .. } | Op::Boundary => {}
        }
    }
}
