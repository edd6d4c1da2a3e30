//! Integers from Python as identifiers.
//!
//! Arguments are taken as `i64`, so that -1 is refused with the error and the words of an unknown
//! id rather than as an overflow.

/// The id that `value` stands for, or the sentence that refuses it.
pub fn number(noun: &str, value: i64) -> Result<u32, String> {
    u32::try_from(value)
        .map_err(|_| format!("unknown {noun} {value}: expected a number from 0 to {}", u32::MAX))
}
