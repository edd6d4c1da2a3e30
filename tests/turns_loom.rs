//! Memory used in turn, against everything that processors may reorder: `loom` runs each model in
//! every order of its steps and with every value that a load may return.
//!
//! Run by `make test-loom`; without `--cfg loom` this file is empty, because loom and what it needs
//! take longer to build than all other tests take to run.
#![cfg(loom)]

use std::array;

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU32;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use zerort_core::turns::{Counter, LOAD, Line, STORE, TURNS, Turns, reached};

const RANKS: usize = 2;

/// The counters of the library, in loom's types.
struct Watched(AtomicU32);

impl Counter for Watched {
    fn load(&self) -> u32 {
        self.0.load(LOAD)
    }

    fn store(&self, value: u32) {
        self.0.store(value, STORE);
    }
}

/// What ranks share. A `UnsafeCell` of loom's fails the model where two threads are in it and one of
/// them writes, or where nothing orders them.
struct Segment {
    lines: Vec<Line<Watched>>,
    pieces: Vec<[UnsafeCell<u32>; TURNS as usize]>,
    /// A futex: the kernel compares and sleeps in one step.
    futex: Mutex<()>,
    woken: Condvar,
}

impl Segment {
    fn new() -> Self {
        let line = || Line { posted: Watched(AtomicU32::new(0)), read: Watched(AtomicU32::new(0)) };
        Self {
            lines: (0..RANKS).map(|_| line()).collect(),
            pieces: (0..RANKS).map(|_| array::from_fn(|_| UnsafeCell::new(0))).collect(),
            futex: Mutex::new(()),
            woken: Condvar::new(),
        }
    }

    fn write(&self, rank: usize, number: u32) {
        let piece = &self.pieces[rank][Turns::turn(number) as usize];
        // SAFETY: loom checks that nobody else is there.
        piece.with_mut(|value| unsafe { *value = number });
    }

    fn read(&self, rank: usize, number: u32) {
        let piece = &self.pieces[rank][Turns::turn(number) as usize];
        // SAFETY: loom checks that nobody writes.
        piece.with(|value| assert_eq!(unsafe { *value }, number));
    }

    fn wake(&self) {
        drop(self.futex.lock().unwrap());
        self.woken.notify_all();
    }

    /// Sleeps while the counter of `rank` is `seen`.
    fn sleep(&self, rank: usize, seen: u32) {
        let guard = self.futex.lock().unwrap();
        if self.lines[rank].posted.load() == seen {
            drop(self.woken.wait(guard).unwrap());
        }
    }
}

/// One rank's part in `uses` uses; it waits as `wait` does.
fn run(segment: &Segment, rank: usize, uses: u32, wait: impl Fn(&Segment, usize, u32)) {
    let mut turns = Turns::new(rank);
    for _ in 0..uses {
        let number = turns.next();
        segment.write(rank, number);
        turns.post(number, &segment.lines).expect("TRN-2");
        segment.wake();
        while let Some(peer) = Turns::missing(number, &segment.lines) {
            wait(segment, peer, number);
        }
        (0..RANKS).for_each(|peer| segment.read(peer, number));
        turns.finish(number, &segment.lines);
    }
}

fn model(uses: u32, wait: fn(&Segment, usize, u32)) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let segment = Arc::new(Segment::new());
        let peer = {
            let segment = Arc::clone(&segment);
            thread::spawn(move || run(&segment, 1, uses, wait))
        };
        run(&segment, 0, uses, wait);
        peer.join().unwrap();
    });
}

#[test]
fn trn_1_and_trn_2_hold_whatever_is_reordered() {
    model(TURNS + 1, |_, _, _| thread::yield_now());
}

#[test]
fn a_rank_that_sleeps_is_woken_by_the_post_that_it_waits_for() {
    model(TURNS, |segment, peer, number| {
        let seen = segment.lines[peer].posted.load();
        if !reached(seen, number) {
            segment.sleep(peer, seen);
        }
    });
}
