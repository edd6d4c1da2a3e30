//! The static list of commands.

use std::collections::HashSet;

use zerort_core::{BucketId, Command, Schedule};

fn order(buckets: u32) -> Vec<BucketId> {
    (0..buckets).map(BucketId).collect()
}

/// Every launch order, here rotated, reversed or neither, of up to 12 buckets, with every window
/// that makes a difference.
fn each(mut check: impl FnMut(&[BucketId], u32, &Schedule)) {
    for buckets in 0..=12 {
        for turn in 0..=buckets {
            let mut order = order(buckets);
            order.rotate_left(turn as usize);
            if turn % 2 == 1 {
                order.reverse();
            }
            for window in 1..=buckets + 2 {
                check(&order, window, &Schedule::new(&order, window));
            }
        }
    }
}

/// How many buckets are launched and unretired after each command.
fn in_flight(schedule: &Schedule) -> Vec<usize> {
    let mut open = HashSet::new();
    let after = |command: &Command| {
        match *command {
            Command::Launch(bucket) => assert!(open.insert(bucket), "{command} twice"),
            Command::Retire(bucket) => assert!(open.remove(&bucket), "{command} before its launch"),
            Command::Need(_) | Command::Gather(_) | Command::Free(_) => unreachable!(),
        }
        open.len()
    };
    schedule.commands().iter().map(after).collect()
}

#[test]
fn sch_1_every_bucket_is_launched_once_and_retired_once_later() {
    each(|order, _, schedule| {
        let retires: Vec<BucketId> = schedule
            .commands()
            .iter()
            .filter(|c| matches!(c, Command::Retire(_)))
            .filter_map(|c| c.bucket())
            .collect();
        assert_eq!(schedule.launches().collect::<Vec<_>>(), order);
        assert_eq!(retires.len(), order.len());
        assert_eq!(in_flight(schedule).last().copied().unwrap_or(0), 0);
    });
}

#[test]
fn sch_4_retires_stand_in_the_order_of_the_launches() {
    each(|order, _, schedule| {
        let retires = schedule.commands().iter().filter(|c| matches!(c, Command::Retire(_)));
        assert_eq!(retires.filter_map(|c| c.bucket()).collect::<Vec<_>>(), order);
    });
}

#[test]
fn sch_2_the_window_is_used_and_never_exceeded() {
    each(|order, window, schedule| {
        let most = in_flight(schedule).into_iter().max().unwrap_or(0);
        assert_eq!(most, order.len().min(window as usize));
    });
}

#[test]
fn sch_3_equal_orders_and_windows_make_equal_lists() {
    each(|order, window, schedule| assert_eq!(schedule, &Schedule::new(order, window)));
    assert_ne!(Schedule::new(&order(3), 1), Schedule::new(&order(3), 2));
    assert_eq!(Schedule::new(&order(3), 3), Schedule::new(&order(3), 4));
}

#[test]
fn a_bucket_is_retired_as_late_as_the_window_allows() {
    each(|order, window, schedule| {
        let full = order.len().min(window as usize);
        let counts = in_flight(schedule);
        for (index, command) in schedule.commands().iter().enumerate() {
            let launches_left =
                schedule.commands()[index..].iter().any(|c| matches!(c, Command::Launch(_)));
            if launches_left && matches!(command, Command::Retire(_)) {
                assert_eq!(counts[index] + 1, full);
            }
        }
    });
}

#[test]
fn it_prints_one_command_a_line() {
    let printed = Schedule::new(&[BucketId(0), BucketId(2), BucketId(1)], 2).to_string();
    let lines: Vec<&str> = printed.lines().map(str::trim).collect();
    assert_eq!(
        lines,
        ["0 Launch b0", "1 Launch b2", "2 Retire b0", "3 Launch b1", "4 Retire b2", "5 Retire b1"]
    );
}
