//! The loss scale against recordings of `DeepSpeed` and against a model written the other way
//! round.

use proptest::prelude::*;
use serde_json::Value;
use zerort_core::scaler::{Counting, LossScale, LossScaleError, Outcome, Policy, State};

const POLICY: Policy = Policy {
    window: 4,
    counting: Counting::Before,
    hysteresis: 2,
    consecutive: false,
    minimum: 1.0,
    forgives_at_minimum: false,
    maximum: f64::INFINITY,
    factor: 2.0,
};

/// As Apex moves it.
const APEX: Policy = Policy {
    counting: Counting::Through,
    hysteresis: 1,
    forgives_at_minimum: true,
    maximum: 16_777_216.0,
    ..POLICY
};

fn started(initial: f64, policy: Policy) -> LossScale {
    LossScale::new(initial, policy).expect("a valid policy")
}

#[test]
fn every_recorded_sequence_is_reproduced_to_the_bit() {
    let recorded: Value =
        serde_json::from_str(include_str!("data/loss_scale.json")).expect("valid JSON");
    let rows = recorded["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 72);
    for row in rows {
        let number = |key: &str| row[key].as_f64().expect("a number");
        let policy = Policy {
            window: row["loss_scale_window"].as_u64().expect("an integer"),
            hysteresis: serde_json::from_value(row["hysteresis"].clone()).expect("an integer"),
            consecutive: row["consecutive_hysteresis"].as_bool().expect("a flag"),
            minimum: number("min_loss_scale"),
            ..POLICY
        };
        let mut scale = started(number("initial_scale"), policy);
        let overflows = row["overflow"].as_array().expect("overflows");
        let expected = row["scale_after"].as_array().expect("scales");
        assert_eq!(overflows.len(), expected.len());
        for (step, (overflow, after)) in overflows.iter().zip(expected).enumerate() {
            scale.update(overflow == 1);
            assert_eq!(
                Some(scale.scale()),
                after.as_f64(),
                "step {step} of {policy:?}, pattern {}",
                row["pattern"]
            );
        }
    }
}

#[test]
fn an_overflow_at_the_minimum_says_so_and_changes_nothing_but_the_count() {
    let mut scale = started(2.0, Policy { hysteresis: 1, ..POLICY });
    assert_eq!(scale.update(true), Outcome::Cut);
    assert_eq!(scale.update(true), Outcome::AtMinimum);
    assert_eq!(
        scale.state(),
        State { scale: 1.0, hysteresis_left: 1, boundaries: 2, last_overflow: 2 }
    );
}

#[test]
fn a_cut_that_would_pass_the_minimum_stops_there() {
    let mut scale = started(3.0, Policy { hysteresis: 1, minimum: 2.0, ..POLICY });
    assert_eq!(scale.update(true), Outcome::Cut);
    assert_eq!(scale.scale().to_bits(), 2.0_f64.to_bits());
}

#[test]
fn a_scale_that_cannot_grow_stays_finite_and_can_still_be_cut() {
    let mut scale = started(f64::MAX, Policy { window: 1, hysteresis: 1, ..POLICY });
    assert_eq!([scale.update(false), scale.update(false)], [Outcome::Kept; 2]);
    assert_eq!(scale.update(true), Outcome::Cut);
    assert_eq!(scale.scale().to_bits(), (f64::MAX / 2.0).to_bits());
}

#[test]
fn apex_counts_the_boundary_at_which_the_scale_grows() {
    let mut scale = started(1024.0, APEX);
    let outcomes: Vec<_> = (0..8).map(|_| scale.update(false)).collect();
    let grown: Vec<_> = (0..8).filter(|&step| outcomes[step] == Outcome::Grown).collect();
    assert_eq!(grown, [3, 7]);
}

#[test]
fn a_policy_may_forgive_at_the_minimum() {
    let mut scale = started(2.0, APEX);
    assert_eq!([scale.update(true), scale.update(true)], [Outcome::Cut, Outcome::Forgiven]);
    assert_eq!(
        scale.state(),
        State { scale: 1.0, hysteresis_left: 1, boundaries: 2, last_overflow: 2 }
    );
}

#[test]
fn the_maximum_bounds_the_start_the_growth_and_what_is_restored() {
    let policy = Policy { window: 1, maximum: 24.0, ..APEX };
    let mut scale = started(65536.0, policy);
    assert_eq!(scale.scale().to_bits(), 24.0_f64.to_bits());
    assert_eq!(scale.update(true), Outcome::Cut);
    assert_eq!([scale.update(false), scale.update(false)], [Outcome::Grown, Outcome::Kept]);
    assert_eq!(scale.scale().to_bits(), 24.0_f64.to_bits());
    let state = State { scale: 4096.0, ..scale.state() };
    scale.restore(state).expect("a state of a policy with a larger maximum");
    assert_eq!(scale.scale().to_bits(), 24.0_f64.to_bits());
}

#[test]
fn what_makes_no_scale_is_refused_by_name() {
    let refused =
        |initial, policy| LossScale::new(initial, policy).expect_err("refused").to_string();
    assert_eq!(refused(0.0, POLICY), "scale: expected a finite number above 0, got 0");
    assert_eq!(refused(f64::INFINITY, POLICY), "scale: expected a finite number above 0, got inf");
    assert_eq!(refused(1.0, Policy { window: 0, ..POLICY }), "window: expected at least 1, got 0");
    assert_eq!(
        refused(1.0, Policy { hysteresis: 0, ..POLICY }),
        "hysteresis: expected at least 1, got 0"
    );
    assert_eq!(
        refused(1.0, Policy { minimum: f64::NAN, ..POLICY }),
        "minimum: expected a finite number above 0, got NaN"
    );
    assert_eq!(
        refused(1.0, Policy { factor: 1.0, ..POLICY }),
        "factor: expected a number above 1, got 1"
    );
    assert_eq!(
        refused(1.0, Policy { maximum: 0.5, ..POLICY }),
        "maximum: expected at least the minimum, 1, got 0.5"
    );
    assert!(refused(1.0, Policy { maximum: f64::NAN, ..POLICY }).starts_with("maximum: "));
}

#[test]
fn a_state_that_cannot_have_been_saved_is_refused_and_leaves_the_scale_alone() {
    let mut scale = started(8.0, POLICY);
    let before = scale;
    let good = before.state();
    assert_eq!(
        scale.restore(State { last_overflow: 1, ..good }),
        Err(LossScaleError::FutureOverflow { last_overflow: 1, boundaries: 0 })
    );
    assert_eq!(
        scale.restore(State { hysteresis_left: 0, ..good }),
        Err(LossScaleError::Zero { name: "hysteresis left" })
    );
    assert!(scale.restore(State { scale: -1.0, ..good }).is_err());
    assert_eq!(scale, before);
}

/// The rules derived from the history of overflows, without any state but the scale and the
/// forgiveness left.
fn model(initial: f64, policy: Policy, history: &[bool]) -> Vec<f64> {
    let mut scale = initial.min(policy.maximum);
    let mut forgiven = 0;
    let mut scales = Vec::new();
    for (step, &overflow) in history.iter().enumerate() {
        let clean_before =
            history[..step].iter().rev().take_while(|&&overflow| !overflow).count() as u64;
        let counted = clean_before + u64::from(policy.counting == Counting::Through);
        let grows = !overflow && counted > 0 && counted.is_multiple_of(policy.window);
        if overflow && forgiven + 1 < policy.hysteresis {
            forgiven += 1;
        } else if overflow {
            scale = f64::max(scale / policy.factor, policy.minimum);
        } else if grows {
            scale = f64::min(scale * policy.factor, policy.maximum);
        }
        if grows || (!overflow && policy.consecutive) {
            forgiven = 0;
        }
        scales.push(scale);
    }
    scales
}

fn policies() -> impl Strategy<Value = Policy> {
    (
        (1..9_u64, any::<bool>()),
        (1..5_u32, any::<bool>()),
        (prop::sample::select(vec![0.5, 1.0, 128.0]), any::<bool>()),
        prop::sample::select(vec![f64::INFINITY, 1e6, 128.0]),
        2..5_u32,
    )
        .prop_map(
            |((window, through), (hysteresis, consecutive), minimum, maximum, factor)| Policy {
                window,
                counting: if through { Counting::Through } else { Counting::Before },
                hysteresis,
                consecutive,
                minimum: minimum.0,
                forgives_at_minimum: minimum.1,
                maximum,
                factor: f64::from(factor),
            },
        )
}

proptest! {
    #[test]
    fn the_machine_agrees_with_a_model_that_reads_the_whole_history(
        policy in policies(),
        power in 7..20_i32,
        history in prop::collection::vec(prop::bool::weighted(0.3), 0..120),
    ) {
        let initial = 2.0_f64.powi(power);
        let mut scale = started(initial, policy);
        let mut scales = Vec::new();
        for &overflow in &history {
            scale.update(overflow);
            scales.push(scale.scale());
        }
        prop_assert_eq!(scales, model(initial, policy, &history));
    }

    #[test]
    fn a_restored_scale_goes_on_as_the_saved_one(
        policy in policies(),
        before in prop::collection::vec(any::<bool>(), 0..40),
        after in prop::collection::vec(any::<bool>(), 0..40),
    ) {
        let mut saved = started(65536.0, policy);
        for &overflow in &before {
            saved.update(overflow);
        }
        let mut restored = started(1.0, policy);
        restored.restore(saved.state()).expect("a state that was saved");
        for &overflow in &after {
            prop_assert_eq!(saved.update(overflow), restored.update(overflow));
            prop_assert_eq!(saved.state(), restored.state());
        }
    }

    #[test]
    fn the_outcome_says_which_way_the_scale_went(
        policy in policies(),
        history in prop::collection::vec(any::<bool>(), 0..80),
    ) {
        let mut scale = started(65536.0, policy);
        for &overflow in &history {
            let before = scale.scale();
            let outcome = scale.update(overflow);
            let after = scale.scale();
            let same = |value: f64| after.to_bits() == value.to_bits();
            prop_assert!(after <= policy.maximum);
            let moved_so = match outcome {
                Outcome::Grown => after > before && !overflow,
                Outcome::Kept => same(before) && !overflow,
                Outcome::Forgiven => same(before) && overflow,
                Outcome::Cut => after < before && overflow,
                Outcome::AtMinimum => {
                    same(policy.minimum) && overflow && !policy.forgives_at_minimum
                }
            };
            prop_assert!(moved_so);
        }
    }
}
