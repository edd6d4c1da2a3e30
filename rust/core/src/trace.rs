//! The trace: a ring of runtime events, written in Chrome's trace event format.
//!
//! # What it is
//!
//! [`Trace`] keeps the last `capacity` events of one rank: spans and instants on named tracks,
//! counters, and *async spans*, which may overlap others of their track (a bucket's life: several
//! buckets fill and fly at the same time). [`Trace::write`] turns the ring into the JSON that
//! Perfetto and `chrome://tracing` open. A rank is a process in Chrome's terms (`pid` = rank), a
//! track is a thread of it, so the files of all ranks open side by side.
//!
//! # What it guarantees
//!
//! * Memory is bounded: a full ring forgets its oldest event and counts it in [`Trace::dropped`].
//! * What is written is complete whatever was forgotten: a span is one event in the ring, so a
//!   begin never lacks its end.
//! * Lines are in order of time; where times are equal, ends come before begins, outer begins
//!   before inner ones and inner ends before outer ones, so spans that nest are seen to nest.
//!
//! # What it does not do
//!
//! It has no clock and opens no file: times come in as nanoseconds on an axis of the caller's
//! choice, and the text goes into the caller's writer. It does not check that the spans of one
//! track nest.
//!
//! Chrome counts in microseconds, as 64-bit floats. On an axis that starts no more than a few years
//! ago, what is written is right to 10 ns; from 1970 it would be wrong by a quarter of a
//! microsecond.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::ids::Rank;

/// The form of a file: it grows by one when a reader of the form before would go wrong.
pub const FORMAT: u32 = 1;

/// A named row of a trace: a stream, a worker, the training loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackId(u32);

impl TrackId {
    /// The number under which the row is known: 0 for the first one named.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Chrome's `tid`. Zero is left to events that belong to no row.
    const fn tid(self) -> u32 {
        self.0 + 1
    }
}

/// The value of an argument, shown beside an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// Words.
    Text(Box<str>),
    /// A count.
    Int(i64),
    /// A measured quantity. JSON has no infinity and no NaN, so these are written as words.
    Float(f64),
}

/// Arguments of an event in the order in which they are shown.
pub type Args = Vec<(Box<str>, Arg)>;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Span { track: TrackId, end_ns: i64 },
    AsyncSpan { track: TrackId, key: u64, end_ns: i64 },
    Instant { track: TrackId },
    Counter { value: f64 },
}

#[derive(Debug)]
struct Event {
    name: Box<str>,
    at_ns: i64,
    kind: Kind,
    args: Args,
}

/// The last events of one rank. A clone shares the events that there are by now, so that it can be
/// written while others are recorded; it takes some ns an event.
#[derive(Clone, Debug)]
pub struct Trace {
    rank: Rank,
    capacity: usize,
    facts: Args,
    tracks: Vec<Box<str>>,
    ring: VecDeque<Arc<Event>>,
    dropped: u64,
}

impl Trace {
    /// An empty ring. It grows as it fills, up to `capacity` events.
    pub fn new(rank: Rank, capacity: NonZeroUsize) -> Self {
        Self {
            rank,
            capacity: capacity.get(),
            facts: Args::new(),
            tracks: Vec::new(),
            ring: VecDeque::new(),
            dropped: 0,
        }
    }

    /// Something that is true of the whole run. The ring does not forget it; a name that was given
    /// again has its new value.
    pub fn state(&mut self, name: &str, value: Arg) {
        match self.facts.iter_mut().find(|(known, _)| &**known == name) {
            Some((_, known)) => *known = value,
            None => self.facts.push((name.into(), value)),
        }
    }

    /// The row called `name`; the same name gives the same row. Rows are shown in the order in
    /// which they were named.
    pub fn track(&mut self, name: &str) -> TrackId {
        let known = self.tracks.iter().position(|track| &**track == name);
        let index = known.unwrap_or_else(|| {
            self.tracks.push(name.into());
            self.tracks.len() - 1
        });
        TrackId(index as u32)
    }

    /// The row that [`TrackId::get`] numbered, if there is one.
    pub fn track_numbered(&self, number: u32) -> Option<TrackId> {
        ((number as usize) < self.tracks.len()).then_some(TrackId(number))
    }

    /// Something that lasted. Spans of one track must nest. An end before its start counts as no
    /// duration.
    pub fn span(&mut self, track: TrackId, name: &str, start_ns: i64, end_ns: i64, args: Args) {
        let end_ns = end_ns.max(start_ns);
        self.push(name, start_ns, Kind::Span { track, end_ns }, args);
    }

    /// Something that lasted and may overlap others of its track. Those with the same `key` (below
    /// 2^40) must nest: they are shown inside one another. One without duration is given a
    /// nanosecond, so that it begins before it ends.
    pub fn async_span(
        &mut self,
        track: TrackId,
        name: &str,
        key: u64,
        (start_ns, end_ns): (i64, i64),
        args: Args,
    ) {
        let end_ns = end_ns.max(start_ns.saturating_add(1));
        let kind = Kind::AsyncSpan { track, key, end_ns };
        self.push(name, start_ns, kind, args);
    }

    /// Something that happened at one moment.
    pub fn instant(&mut self, track: TrackId, name: &str, at_ns: i64, args: Args) {
        self.push(name, at_ns, Kind::Instant { track }, args);
    }

    /// A quantity's new value. One that is not finite cannot be drawn and is not kept.
    pub fn counter(&mut self, name: &str, at_ns: i64, value: f64) {
        if value.is_finite() {
            self.push(name, at_ns, Kind::Counter { value }, Args::new());
        }
    }

    /// Events the ring has forgotten because it was full.
    pub const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Events in the ring.
    pub fn len(&self) -> usize {
        self.ring.len()
    }

    /// Whether the ring holds nothing.
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }

    /// Writes the whole ring as one JSON object, an event a line. The ring stays as it was.
    ///
    /// # Errors
    ///
    /// Whatever `out` answers.
    pub fn write(&self, mut out: impl io::Write) -> io::Result<()> {
        write!(out, "{{\"displayTimeUnit\":\"ms\",\"otherData\":")?;
        serde_json::to_writer(&mut out, &About(self))?;
        write!(out, ",\"traceEvents\":[")?;
        let mut separator = "\n";
        for line in self.names().chain(self.lines()) {
            out.write_all(separator.as_bytes())?;
            serde_json::to_writer(&mut out, &line)?;
            separator = ",\n";
        }
        out.write_all(b"\n]}\n")
    }

    fn push(&mut self, name: &str, at_ns: i64, kind: Kind, args: Args) {
        if self.ring.len() == self.capacity {
            self.ring.pop_front();
            self.dropped += 1;
        }
        self.ring.push_back(Arc::new(Event { name: name.into(), at_ns, kind, args }));
    }

    /// Metadata: what the process and its threads are called, and in which order they are shown.
    fn names(&self) -> impl Iterator<Item = Line<'_>> {
        let pid = self.rank.0;
        let about = move |name, tid, label| Line { name, pid, tid, shape: Shape::Metadata(label) };
        let process = [
            about("process_name", 0, Label::Name(format!("rank {pid}"))),
            about("process_sort_index", 0, Label::Order(pid)),
        ];
        let threads = self.tracks.iter().zip(0..).flat_map(move |(name, number)| {
            let tid = TrackId(number).tid();
            [
                about("thread_name", tid, Label::Name(name.to_string())),
                about("thread_sort_index", tid, Label::Order(number)),
            ]
        });
        process.into_iter().chain(threads)
    }

    fn lines(&self) -> impl Iterator<Item = Line<'_>> {
        let mut edges: Vec<Edge> =
            self.ring.iter().zip(0..).flat_map(|(event, seq)| event.edges(seq)).collect();
        edges.sort_unstable();
        edges.into_iter().map(|edge| self.line(&self.ring[edge.seq()], edge.1 == Side::End))
    }

    fn line<'a>(&'a self, event: &'a Event, is_end: bool) -> Line<'a> {
        let at = event.at_ns;
        let args = &event.args;
        let (tid, shape) = match event.kind {
            Kind::Span { track, end_ns } => {
                (track.tid(), Shape::Complete { at, end: end_ns, args })
            }
            Kind::AsyncSpan { track, key, end_ns } => {
                let id = format!("0x{:x}{key:010x}", self.rank.0);
                let category = &*self.tracks[track.0 as usize];
                let shape = if is_end {
                    Shape::AsyncEnd { at: end_ns, category, id }
                } else {
                    Shape::AsyncBegin { at, category, id, args }
                };
                (track.tid(), shape)
            }
            Kind::Instant { track } => (track.tid(), Shape::Instant { at, args }),
            Kind::Counter { value } => (0, Shape::Counter { at, value }),
        };
        Line { name: &event.name, pid: self.rank.0, tid, shape }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    End,
    Begin,
}

/// One line to be, ordered as the file is: time; ends before begins; the other edge, farthest first
/// for begins and nearest first for ends (which both put the later moment first); then the order of
/// recording, reversed for ends.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Edge(i64, Side, Reverse<i64>, i64);

impl Edge {
    const fn seq(&self) -> usize {
        self.3.unsigned_abs() as usize
    }
}

impl Event {
    fn edges(&self, seq: i64) -> impl Iterator<Item = Edge> {
        let (until, end) = match self.kind {
            Kind::Span { end_ns, .. } => (end_ns, None),
            Kind::AsyncSpan { end_ns, .. } => {
                (end_ns, Some(Edge(end_ns, Side::End, Reverse(self.at_ns), -seq)))
            }
            Kind::Instant { .. } | Kind::Counter { .. } => (self.at_ns, None),
        };
        std::iter::once(Edge(self.at_ns, Side::Begin, Reverse(until), seq)).chain(end)
    }
}

/// A line of `traceEvents`, with what every phase has.
struct Line<'a> {
    name: &'a str,
    pid: u32,
    tid: u32,
    shape: Shape<'a>,
}

/// The phases, each with the fields that the format asks of it.
enum Shape<'a> {
    Metadata(Label),
    Complete { at: i64, end: i64, args: &'a Args },
    Instant { at: i64, args: &'a Args },
    Counter { at: i64, value: f64 },
    AsyncBegin { at: i64, category: &'a str, id: String, args: &'a Args },
    AsyncEnd { at: i64, category: &'a str, id: String },
}

enum Label {
    Name(String),
    Order(u32),
}

/// Rounding keeps the order, and the difference of two close results is exact: what nests in
/// nanoseconds nests in the file, where a reader adds a duration to a start.
fn micros(ns: i64) -> f64 {
    ns as f64 / 1000.0
}

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", self.name)?;
        map.serialize_entry("pid", &self.pid)?;
        map.serialize_entry("tid", &self.tid)?;
        self.shape.entries(&mut map)?;
        map.end()
    }
}

impl Shape<'_> {
    fn entries<M: SerializeMap>(&self, map: &mut M) -> Result<(), M::Error> {
        match self {
            Self::Metadata(label) => {
                map.serialize_entry("ph", "M")?;
                map.serialize_entry("args", label)
            }
            Self::Complete { at, end, args } => {
                timed(map, "X", *at)?;
                map.serialize_entry("dur", &(micros(*end) - micros(*at)))?;
                arguments(map, args)
            }
            Self::Instant { at, args } => {
                timed(map, "i", *at)?;
                map.serialize_entry("s", "t")?;
                arguments(map, args)
            }
            Self::Counter { at, value } => {
                timed(map, "C", *at)?;
                map.serialize_entry("args", &Value(*value))
            }
            Self::AsyncBegin { at, category, id, args } => {
                timed(map, "b", *at)?;
                map.serialize_entry("cat", category)?;
                map.serialize_entry("id", id)?;
                arguments(map, args)
            }
            Self::AsyncEnd { at, category, id } => {
                timed(map, "e", *at)?;
                map.serialize_entry("cat", category)?;
                map.serialize_entry("id", id)
            }
        }
    }
}

fn timed<M: SerializeMap>(map: &mut M, phase: &str, at_ns: i64) -> Result<(), M::Error> {
    map.serialize_entry("ph", phase)?;
    map.serialize_entry("ts", &micros(at_ns))
}

fn arguments<M: SerializeMap>(map: &mut M, args: &Args) -> Result<(), M::Error> {
    if args.is_empty() {
        return Ok(());
    }
    map.serialize_entry("args", &Named(args))
}

/// What is known of a whole file: which form it has, whose it is, and the facts of the run.
struct About<'a>(&'a Trace);

impl Serialize for About<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Trace { rank, dropped, facts, .. } = self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("format", &FORMAT)?;
        map.serialize_entry("rank", &rank.0)?;
        map.serialize_entry("dropped", dropped)?;
        if !facts.is_empty() {
            map.serialize_entry("run", &Named(facts))?;
        }
        map.end()
    }
}

struct Named<'a>(&'a Args);

impl Serialize for Named<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl Serialize for Arg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Int(count) => serializer.serialize_i64(*count),
            Self::Float(value) if value.is_finite() => serializer.serialize_f64(*value),
            Self::Float(value) => serializer.collect_str(value),
        }
    }
}

impl Serialize for Label {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Name(name) => serializer.collect_map([("name", name)]),
            Self::Order(order) => serializer.collect_map([("sort_index", order)]),
        }
    }
}

struct Value(f64);

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map([("value", self.0)])
    }
}
