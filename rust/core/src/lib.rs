//! Plans and state machines of a gradient communication runtime.

#![forbid(unsafe_code)]

pub mod ids;
pub mod trace;
