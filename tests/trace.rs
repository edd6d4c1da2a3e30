//! The trace: what a reader of the file can rely on.

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;

use proptest::prelude::*;
use serde_json::Value;
use zerort_core::ids::Rank;
use zerort_core::trace::{Arg, Args, Trace};

fn ring(rank: u32, capacity: usize) -> Trace {
    Trace::new(Rank(rank), NonZeroUsize::new(capacity).unwrap())
}

fn document(trace: &Trace) -> Value {
    let mut out = Vec::new();
    trace.write(&mut out).unwrap();
    serde_json::from_slice(&out).unwrap()
}

/// The lines of a written trace without its metadata.
fn events(trace: &Trace) -> Vec<Value> {
    let lines = document(trace)["traceEvents"].as_array().unwrap().clone();
    lines.into_iter().filter(|line| line["ph"] != "M").collect()
}

fn phases(trace: &Trace) -> Vec<String> {
    let word = |line: &Value| {
        format!("{} {}", line["ph"].as_str().unwrap(), line["name"].as_str().unwrap())
    };
    events(trace).iter().map(word).collect()
}

#[test]
fn a_rank_is_a_process_and_a_track_is_a_thread_of_it() {
    let mut trace = ring(3, 8);
    let main = trace.track("main");
    trace.track("stream");
    assert_eq!(trace.track("main"), main);
    let expected = serde_json::json!([
        {"name": "process_name", "pid": 3, "tid": 0, "ph": "M", "args": {"name": "rank 3"}},
        {"name": "process_sort_index", "pid": 3, "tid": 0, "ph": "M", "args": {"sort_index": 3}},
        {"name": "thread_name", "pid": 3, "tid": 1, "ph": "M", "args": {"name": "main"}},
        {"name": "thread_sort_index", "pid": 3, "tid": 1, "ph": "M", "args": {"sort_index": 0}},
        {"name": "thread_name", "pid": 3, "tid": 2, "ph": "M", "args": {"name": "stream"}},
        {"name": "thread_sort_index", "pid": 3, "tid": 2, "ph": "M", "args": {"sort_index": 1}},
    ]);
    assert_eq!(document(&trace)["traceEvents"], expected);
}

#[test]
fn what_is_true_of_the_whole_run_is_never_forgotten() {
    let mut trace = ring(2, 1);
    let row = trace.track("main");
    trace.state("stage", Arg::Int(3));
    trace.state("bucket 0", Arg::Text("head.weight .. head.bias".into()));
    trace.state("stage", Arg::Int(1));
    for at in 0..3 {
        trace.instant(row, "step", at, Args::new());
    }
    let expected = serde_json::json!({
        "format": 1, "rank": 2, "dropped": 2,
        "run": {"stage": 1, "bucket 0": "head.weight .. head.bias"},
    });
    assert_eq!(document(&trace)["otherData"], expected);
}

#[test]
fn a_number_stands_for_a_track_only_if_it_was_named() {
    let mut trace = ring(0, 8);
    let main = trace.track("main");
    assert_eq!(trace.track_numbered(main.get()), Some(main));
    assert_eq!(trace.track_numbered(1), None);
}

#[test]
fn every_kind_of_event_is_written_with_the_fields_of_its_phase() {
    let mut trace = ring(1, 8);
    let row = trace.track("bucket");
    let args: Args = vec![
        ("last".into(), Arg::Text("a \"b\"\n".into())),
        ("bytes".into(), Arg::Int(1 << 40)),
        ("ms".into(), Arg::Float(0.5)),
    ];
    trace.span(row, "forward", 1_500, 4_000, args);
    trace.async_span(row, "bucket 0", 9, (2_000, 3_000), Args::new());
    trace.instant(row, "step", 5_000, Args::new());
    trace.counter("bytes in flight", 6_000, 1024.0);
    let args = serde_json::json!({"last": "a \"b\"\n", "bytes": 1_u64 << 40, "ms": 0.5});
    let (name, cat, id) = ("bucket 0", "bucket", "0x10000000009");
    let value = serde_json::json!({"value": 1024.0});
    assert_eq!(
        Value::from(events(&trace)),
        serde_json::json!([
            {"pid": 1, "tid": 1, "ph": "X", "name": "forward", "ts": 1.5, "dur": 2.5, "args": args},
            {"pid": 1, "tid": 1, "ph": "b", "name": name, "ts": 2.0, "cat": cat, "id": id},
            {"pid": 1, "tid": 1, "ph": "e", "name": name, "ts": 3.0, "cat": cat, "id": id},
            {"pid": 1, "tid": 1, "ph": "i", "name": "step", "ts": 5.0, "s": "t"},
            {"pid": 1, "tid": 0, "ph": "C", "name": "bytes in flight", "ts": 6.0, "args": value},
        ])
    );
}

#[test]
fn a_full_ring_forgets_the_oldest_event_and_counts_it() {
    let mut trace = ring(0, 2);
    let row = trace.track("main");
    assert!(trace.is_empty());
    for (at, name) in (0..).zip(["a", "b", "c", "d", "e"]) {
        trace.instant(row, name, at, Args::new());
    }
    assert_eq!((trace.len(), trace.dropped()), (2, 3));
    assert_eq!(phases(&trace), ["i d", "i e"]);
    assert_eq!(document(&trace)["otherData"]["dropped"], 3);
}

#[test]
fn an_empty_ring_is_a_complete_file() {
    let lines = document(&ring(0, 1))["traceEvents"].as_array().unwrap().len();
    assert_eq!(lines, 2, "the process is named even if nothing happened");
}

#[test]
fn spans_recorded_when_they_ended_are_written_in_the_order_in_which_they_nest() {
    let mut trace = ring(0, 16);
    let row = trace.track("main");
    trace.span(row, "inner", 10, 20, Args::new());
    trace.span(row, "outer", 10, 30, Args::new());
    for (name, span) in [("flying", (5, 9)), ("filling", (0, 5)), ("life", (0, 9))] {
        trace.async_span(row, name, 1, span, Args::new());
    }
    let nested = [
        "b life",
        "b filling",
        "e filling",
        "b flying",
        "e flying",
        "e life",
        "X outer",
        "X inner",
    ];
    assert_eq!(phases(&trace), nested);
}

#[test]
fn spans_of_equal_times_nest_in_the_order_of_recording() {
    let mut trace = ring(0, 16);
    let row = trace.track("bucket");
    trace.async_span(row, "life", 1, (0, 5), Args::new());
    trace.async_span(row, "filling", 1, (0, 5), Args::new());
    assert_eq!(phases(&trace), ["b life", "b filling", "e filling", "e life"]);
}

#[test]
fn an_end_before_its_start_is_no_duration() {
    let mut trace = ring(0, 16);
    let row = trace.track("main");
    trace.span(row, "span", 7_000, 5_000, Args::new());
    trace.async_span(row, "async", 1, (8_000, 5_000), Args::new());
    assert_eq!(phases(&trace), ["X span", "b async", "e async"]);
    assert_eq!(events(&trace)[0]["dur"], 0.0);
}

#[test]
fn what_json_has_no_number_for_is_a_word_or_left_out() {
    let mut trace = ring(0, 16);
    let row = trace.track("main");
    trace.instant(row, "norm", 0, vec![("value".into(), Arg::Float(f64::INFINITY))]);
    trace.counter("loss", 1, f64::NAN);
    assert_eq!(phases(&trace), ["i norm"]);
    assert_eq!(events(&trace)[0]["args"]["value"], "inf");
}

#[test]
fn what_nests_in_nanoseconds_nests_when_a_reader_adds_durations() {
    let mut trace = ring(0, 4096);
    let row = trace.track("main");
    let decade = 315_576_000_000_000_000;
    for shift in 0..1000 {
        let start = decade + shift * 1_234_567;
        trace.span(row, "outer", start, start + 901 + shift, Args::new());
        trace.span(row, "inner", start + 900, start + 901 + shift, Args::new());
    }
    for pair in events(&trace).chunks(2) {
        let end = |line: &Value| line["ts"].as_f64().unwrap() + line["dur"].as_f64().unwrap();
        assert!(end(&pair[1]) <= end(&pair[0]), "{pair:?}");
    }
}

#[test]
fn an_error_of_the_writer_reaches_the_caller() {
    struct Full;
    impl io::Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    assert_eq!(ring(0, 1).write(Full).unwrap_err().kind(), io::ErrorKind::StorageFull);
}

proptest! {
    #[test]
    fn lines_are_in_order_of_time_and_async_spans_balance_whatever_was_forgotten(
        lives in prop::collection::vec((0_i64..1000, 0_i64..50, 0_i64..50), 0..40),
        capacity in 1_usize..60,
    ) {
        let mut trace = ring(2, capacity);
        let row = trace.track("bucket");
        for (key, (first, filling, flying)) in (0..).zip(lives) {
            let (full, retired) = (first + filling, first + filling + flying);
            trace.async_span(row, "life", key, (first, retired), Args::new());
            trace.async_span(row, "filling", key, (first, full), Args::new());
            trace.async_span(row, "flying", key, (full, retired), Args::new());
        }
        let mut open: HashMap<String, Vec<String>> = HashMap::new();
        let mut before = f64::MIN;
        for line in events(&trace) {
            let at = line["ts"].as_f64().unwrap();
            prop_assert!(at >= before);
            before = at;
            let stack = open.entry(line["id"].to_string()).or_default();
            match line["ph"].as_str() {
                Some("b") => stack.push(line["name"].to_string()),
                Some("e") => prop_assert_eq!(stack.pop(), Some(line["name"].to_string())),
                other => prop_assert!(false, "unexpected phase {:?}", other),
            }
        }
        prop_assert!(open.values().all(Vec::is_empty));
    }
}
